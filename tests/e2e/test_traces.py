"""One trace of three processes, as a collector gets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.collector import Collector
from tests.e2e import tiny_model
from tests.e2e.cluster import HTTP, cluster

pytestmark = pytest.mark.slow
TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_one_trace_of_router_prefill_and_decode(tmp_path: Path) -> None:
    model = tiny_model.write(tmp_path / "tiny")
    collector = Collector()
    try:
        traces: dict[str, object] = {"otlp_traces_endpoint": collector.endpoint}
        with cluster(tmp_path, model=model, local_prefill_tokens=0, router=traces, **traces) as running:
            prompt = list(range(10, 210))
            asked = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "ignore_eos": True}
            headers = {"traceparent": f"00-{TRACE}-{CLIENT}-01"}
            assert HTTP.post(running.url + "/v1/completions", json=asked, headers=headers).status_code == 200
            prefill, decode = running.prefills[0], running.decodes[0]
        # They have drained, and what was not exported then is lost.
    finally:
        collector.close()
    spans = {(span.service.removeprefix("pd-serve-"), span.name): span for span in collector.spans}
    assert len(spans) == len(collector.spans) and {span.trace for span in collector.spans} == {TRACE}
    root, attempt = spans["router", "POST /v1/completions"], spans["router", "attempt"]
    assert root.parent == CLIENT and root.events == ["first token"] and attempt.parent == root.id
    assert attempt.events == ["accepted", "KV arrived"]
    nodes = [spans["node", name] for name in ("queue", "prefill", "wait for KV", "transfer", "decode")]
    assert len(spans) == len(nodes) + 3  # and the router's queue
    assert [span.instance for span in nodes] == [prefill.url[7:]] * 2 + [decode.url[7:]] * 3
    for span in nodes:
        assert span.parent == attempt.id and not span.failed
        assert root.start <= span.start <= span.end <= root.end + 1e9  # an engine may end after its client heard all
    queue, computed, wait, transfer, decoded = nodes
    assert queue.end == computed.start and wait.end == transfer.start and transfer.end == decoded.start
    assert computed.attributes["pd_serve.prompt_tokens"] == 200 and decoded.attributes["pd_serve.output_tokens"] == 6
