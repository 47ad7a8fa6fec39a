"""pd-serve's connector in vLLM, writing down when it was called: where the time of a hand-over goes.

vLLM loads it in place of PdServeConnector (``kv_connector_module_path``); :mod:`benchmarks.vllm_handover` does with
``--trace`` and joins the two servers' lines with its own. A line: what, seconds since 1970, and of which request.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.vllm_handover import TRACE
from pd_serve.integrations.vllm.connector import PdServeConnector


class TracedConnector(PdServeConnector):
    """``computed``: a prefill server's request is done. On a decode server ``arrived``: HTTP is behind it; ``asked``: a
    step is planned that fetches it; ``begun``: its worker says so to the transfer thread; ``told``: it has reported the
    prompt as received; ``runs``: a step is planned that computes it. ``step``: any, with its tokens and requests.
    """

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._lines = Path(os.environ[TRACE]).open("a", buffering=1)  # noqa: SIM115
        self._fetched: set[str] = set()

    def _note(self, what: str, request: Any = "", at_s: float | None = None) -> None:
        self._lines.write(json.dumps([what, at_s or time.time(), request]) + "\n")

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens and request.request_id not in self._fetched:
            self._fetched.add(request.request_id)
            self._note("arrived", request.request_id, request.arrival_time)
            self._note("asked", request.request_id)
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        scheduled = scheduler_output.num_scheduled_tokens
        for request_id in self._fetched.intersection(scheduled):
            self._fetched.discard(request_id)
            self._note("runs", request_id)
        self._note("step", [sum(scheduled.values()), len(scheduled)])
        return super().build_connector_meta(scheduler_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._note("computed", request.request_id)
        return super().request_finished(request, block_ids)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._note("computed", request.request_id)
        return super().request_finished_all_groups(request, block_ids)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for fetch in self._orders.fetched:
            self._note("begun", fetch.request_id)
        super().start_load_kv(forward_context, **kwargs)

    def _results(self) -> Any:
        results = super()._results()
        for request_id in results.received:
            self._note("told", request_id)
        return results
