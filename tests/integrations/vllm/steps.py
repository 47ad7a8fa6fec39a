"""vLLM's requests and plans of steps, as its scheduler hands them to a connector: recorded from 0.24 and 0.32, with the
fields that both have. Where vLLM itself is installed, tests/peers/ runs the real thing."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

TO_HAND_OVER = {"do_remote_decode": True, "do_remote_prefill": False, "remote_block_ids": None}


class Status(Enum):
    WAITING = 1
    RUNNING = 2
    PREEMPTED = 3
    FINISHED_STOPPED = 4
    FINISHED_LENGTH_CAPPED = 5
    FINISHED_ABORTED = 6


def request(request_id: str, prompt: int, params: dict[str, Any] | None) -> Any:
    return SimpleNamespace(
        request_id=request_id, num_prompt_tokens=prompt, kv_transfer_params=params, status=Status.RUNNING
    )


class Step:
    """A plan: who computes how many tokens, and which blocks are new."""

    def __init__(self) -> None:
        self.num_scheduled_tokens: dict[str, int] = {}
        self.scheduled_new_reqs: list[Any] = []
        self.scheduled_cached_reqs = SimpleNamespace(
            req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()
        )

    def new(self, request_id: str, tokens: int, *ids: list[int], computed: int = 0) -> Step:
        self.num_scheduled_tokens[request_id] = tokens
        self.scheduled_new_reqs.append(SimpleNamespace(req_id=request_id, block_ids=ids, num_computed_tokens=computed))
        return self

    def goes_on(self, request_id: str, tokens: int, *ids: list[int], computed: int, resumed: bool = False) -> Step:
        self.num_scheduled_tokens[request_id] = tokens
        cached = self.scheduled_cached_reqs
        cached.req_ids.append(request_id)
        cached.new_block_ids.append(ids or None)
        cached.num_computed_tokens.append(computed)
        if resumed:
            cached.resumed_req_ids.add(request_id)
        return self
