"""The scheduler's half of the connector: which blocks are announced, kept and fetched. It touches no memory.

Called by vLLM's scheduler, on its thread, in the order of its steps. Requests and scheduler outputs are vLLM's; only
fields that have been the same since 0.24 are read. Whatever a client put into ``kv_transfer_params``, nothing here
raises: an exception would end the engine.
"""

from __future__ import annotations

import logging
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from pd_serve.integrations.vllm import params
from pd_serve.integrations.vllm.orders import Announcement, Fetch, Ids, Orders
from pd_serve.integrations.vllm.params import Held
from pd_serve.wire.link import Source

log = logging.getLogger(__name__)

MAX_FETCHED = 4096  # keys remembered: each is worth one request


@dataclass
class _Sending:
    """A prompt that is computed here for another server. ``key``: another one after a preemption, with other blocks."""

    request: Any
    key: str
    tables: list[Ids]
    announced: list[int]  # blocks, a group
    num_cached: int = 0
    opened: bool = False
    done: bool = False


@dataclass
class SchedulerSide:
    """``windows``: of each group of layers, None where all tokens are attended to.

    ``source``: this server, as others dial it; None where it does not send. ``receives``: it fetches from others.
    """

    block_size: int
    windows: tuple[int | None, ...]
    source: Source | None = None
    receives: bool = True
    _sending: dict[str, _Sending] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)  # requests whose prompt was fetched, or declined
    _fetched: OrderedDict[str, str] = field(default_factory=OrderedDict)  # by key, the request that it went to
    _orders: Orders = field(default_factory=Orders)

    # --- a decode server: prompts that others have computed

    def matched(self, request: Any, num_computed: int) -> int:
        """Tokens beyond ``num_computed`` that can be fetched."""
        held = self._held(request)
        return max(0, self._wanted(request, held) - num_computed) if held is not None else 0

    def _held(self, request: Any) -> Held | None:
        """What is there to be fetched, once: after a preemption or a failure the prompt is computed here."""
        if not self.receives or request.request_id in self._taken:
            return None
        held = params.held_of(request.kv_transfer_params)
        if held is not None and self._fetched.get(held.key, request.request_id) != request.request_id:
            return None  # such as another choice of a request with n > 1
        return held

    def _wanted(self, request: Any, held: Held) -> int:
        return min(held.num_tokens, int(request.num_prompt_tokens))

    def allocated(self, request: Any, tables: tuple[Ids, ...], num_external: int) -> None:
        """``tables``: the blocks that the request has now, a group."""
        held = self._held(request)
        if held is None:
            return
        self._take(request, held)
        if not num_external:  # all of it is in the prefix cache
            self._orders.declined.append(held)
            return
        end = self._wanted(request, held)
        count = -(-end // self.block_size)
        first = (end - num_external) // self.block_size
        self._orders.fetched.append(Fetch(request.request_id, held, [list(t[:count]) for t in tables], first))

    def _take(self, request: Any, held: Held) -> None:
        self._taken.add(request.request_id)
        self._fetched[held.key] = request.request_id
        if len(self._fetched) > MAX_FETCHED:
            self._fetched.popitem(last=False)

    # --- a prefill server: prompts computed for others

    def orders(self, output: Any) -> Orders:
        """With each step: ``output`` is vLLM's plan of it."""
        for sending in self._sending.values():
            if sending.request.status.name == "PREEMPTED":
                self._start_over(sending)
        for new in output.scheduled_new_reqs:
            self._scheduled(new.req_id, new.block_ids, True, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for request_id, ids, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            self._scheduled(request_id, ids, request_id in cached.resumed_req_ids, computed, output)
        orders, self._orders = self._orders, Orders()
        orders.computes = bool(output.num_scheduled_tokens)
        return orders

    def begun(self, request: Any) -> None:
        """A request is scheduled for the first time, or again."""
        sends = self.source is not None and params.wants_hand_over(request.kv_transfer_params)
        if sends and request.request_id not in self._sending:
            tables: list[Ids] = [[] for _ in self.windows]
            self._sending[request.request_id] = _Sending(request, _key(request), tables, [0] * len(tables))

    def _start_over(self, sending: _Sending) -> None:
        """Its blocks are somebody else's now."""
        if sending.opened:
            self._orders.cancelled.append((sending.key, "preempted"))
        sending.key, sending.opened, sending.done = _key(sending.request), False, False
        sending.announced = [0] * len(self.windows)
        sending.tables = [[] for _ in self.windows]

    def _scheduled(self, request_id: str, ids: tuple[Ids, ...] | None, anew: bool, computed: int, output: Any) -> None:
        sending = self._sending.get(request_id)
        if sending is None or sending.done:
            return
        if anew:
            sending.tables = [list(new) for new in ids or ()]
            sending.num_cached = computed
        else:
            for table, new in zip(sending.tables, ids or (), strict=False):
                table += new
        prompt = int(sending.request.num_prompt_tokens)
        num_tokens = min(computed + output.num_scheduled_tokens[request_id], prompt)
        sending.done = num_tokens == prompt
        if not sending.opened:
            sending.opened = True
            self._orders.opened.append(sending.key)
        blocks = [found for group in range(len(self.windows)) if (found := self._computed(sending, group, num_tokens))]
        if blocks or sending.done:
            self._orders.announced.append(Announcement(sending.key, num_tokens, blocks, sending.done))

    def _computed(self, sending: _Sending, group: int, num_tokens: int) -> tuple[int, int, Ids] | None:
        """Blocks of a group that can be announced now. Those that leave a window while the prompt is computed are
        reused; what a window sees at the end stays."""
        first, window = sending.announced[group], self.windows[group]
        upto = -(-num_tokens // self.block_size) if sending.done else num_tokens // self.block_size
        if window is not None:
            if not sending.done:
                return None
            first = max(0, num_tokens - window + 1) // self.block_size
        if upto <= first:
            return None
        sending.announced[group] = upto
        return group, first, sending.tables[group][first:upto]

    # --- ends

    def finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        """Whether its blocks have to be kept until they are reported as sent; what its answer says to clients."""
        self._forget(request)
        sending = self._sending.pop(request.request_id, None)
        if sending is None:
            return False, None
        if not sending.done or request.status.name != "FINISHED_LENGTH_CAPPED":
            if sending.opened:
                self._orders.cancelled.append((sending.key, request.status.name.lower()))
            return False, None
        self._orders.kept[sending.key] = request.request_id
        assert self.source is not None
        prompt = int(request.num_prompt_tokens)
        source = self.source
        held = Held(params.VERSION, sending.key, source.node_id, source.epoch, source.addresses, prompt)
        return True, params.answer(held, sending.num_cached)

    def _forget(self, request: Any) -> None:
        """A decode server's request has ended: what it fetches, or would have fetched, is not wanted any more."""
        if request.request_id in self._taken:
            self._taken.discard(request.request_id)
            self._orders.dropped.append(request.request_id)
        elif (held := self._held(request)) is not None:
            self._take(request, held)
            self._taken.discard(request.request_id)
            self._orders.declined.append(held)


def _key(request: Any) -> str:
    return f"{request.request_id[-64:]}-{uuid.uuid4().hex}"
