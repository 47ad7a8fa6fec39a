"""What an engine reports of attempts that have a span, when they have ended; of others nothing."""

from __future__ import annotations

import time

from pd_serve.wire import engine as wire
from pd_serve.wire import link
from tests.engine.harness import Node
from tests.engine.test_core import PARAMS, tokens

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def timelines(node: Node) -> dict[str, wire.Timeline]:
    return {message.id: message for message in node.heard if isinstance(message, wire.Timeline)}


def test_an_attempt_with_a_span_is_reported_when_it_has_ended(node: Node) -> None:
    begun_s = time.monotonic()
    node.say(link.Submit("plain", tokens(), 0, PARAMS))
    node.say(link.Submit("traced", tokens(), 2, PARAMS, trace=TRACE))
    node.executor.go.clear()
    node.say(link.Submit("aborted", tokens(), 0, link.SamplingParams(60, 0, 0), trace=TRACE))
    node.say(link.Abort(["aborted"]))
    node.executor.go.set()
    node.listen(lambda: len(timelines(node)) == 2, "two timelines")
    node.finished("plain")
    found = timelines(node)
    assert set(found) == {"traced", "aborted"}
    at = found["traced"]
    assert begun_s < at.admitted_s <= at.started_s <= at.first_token_s <= at.ended_s < time.monotonic()
    assert (at.end, at.failed, at.pulled, at.placed_s, at.trace) == ("finished", False, False, 0.0, TRACE)
    assert (at.tokens, at.made) == (20, 2)  # of four output tokens two were there before
    assert (found["aborted"].end, found["aborted"].failed) == ("aborted", False)
