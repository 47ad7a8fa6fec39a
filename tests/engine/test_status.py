"""What an engine tells its node without being asked."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from pd_serve.wire import engine as wire
from pd_serve.wire import link
from pd_serve.wire.chunks import pack
from tests.engine.harness import DeviceExecutor, Node, ScriptedExecutor


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(f"ipc://{tmp_path}/engine", status_interval_s=60)  # nothing comes because it is time
    yield node
    node.close()


def test_where_several_routers_submit_they_hear_of_each_other_soon(node: Node) -> None:
    def reports() -> list[tuple[dict[int, int], int]]:
        return [(m.submits, m.status.load.running) for m in node.heard if isinstance(m, wire.Report)]

    node.executor.step_s = 0.02
    node.submit("a", 90, number=1)
    node.listen(lambda: any(submits == {1: 1} for submits, _ in reports()), "a status, as it is no longer idle")
    params = link.SamplingParams(90, 0)
    node.say(link.Submit("b", array("i", [5, 6, 7]).tobytes(), 0, params, number=1), origin=2)
    node.listen(lambda: ({1: 1, 2: 1}, 2) in reports(), "a status while both run")


@pytest.mark.parametrize("executor", [ScriptedExecutor, DeviceExecutor])
def test_how_long_steps_took_is_told(tmp_path: Path, executor: type[ScriptedExecutor]) -> None:
    """Routers learn from it how fast prompts are computed here."""
    node = Node(f"ipc://{tmp_path}/engine", executor, status_interval_s=0.01)
    try:
        node.executor.step_s = 0.02
        begun_s = time.monotonic()
        node.submit("a", 5)
        node.finished("a")
        node.listen(lambda: node.status().load.running == 0, "a status after it")
        counters = node.status().counters
        assert 5 * 0.02 <= counters["step_seconds"] <= time.monotonic() - begun_s
        assert counters["computed_tokens"] == 24 and counters["steps"] >= 5
    finally:
        node.close()


def test_routers_that_ask_are_told_of_cached_prefixes(node: Node) -> None:
    def heard(count: int) -> list[tuple[int, link.Prefixes]]:
        node.listen(lambda: len(node.prefixes) == count, f"{count} frames")
        return node.prefixes

    node.kv.named.stored([1, 2])
    node.say(link.GetPrefixes(), origin=1)
    assert heard(1) == [(1, link.Prefixes(1, pack([1, 2]), whole=True))]
    node.kv.named.evicted([1])
    node.kv.named.stored([3])
    node.say(link.GetPrefixes(), origin=2)  # the first hears what has changed, the second has it with the whole
    changed = link.Prefixes(2, pack([3]), pack([1]))
    assert heard(3)[1:] == [(1, changed), (2, link.Prefixes(2, pack([2, 3]), whole=True))]
    node.tell(wire.Drop(1))
    node.kv.named.stored([4])
    node.tell(link.Peers([]))
    assert heard(4)[3:] == [(2, link.Prefixes(3, pack([4])))]


def test_sources_that_cannot_be_read_from_are_told_at_once(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str] = {}
    monkeypatch.setattr(node.role, "misfits", lambda: found)
    node.listen(lambda: node.heard, "the first status")
    assert node.status().misfits == {}
    for found in ({"P": "models differ"}, {"P": "models differ", "Q": "no answer"}, {}):
        node.tell(link.Peers([]))  # wakes it, as the inbox does
        node.listen(lambda expected=found: node.status().misfits == expected, "a status with misfits")  # type: ignore[misc]
