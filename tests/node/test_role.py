"""A node whose role is switched: what it answers, what routers hear, and why it may refuse."""

from __future__ import annotations

import pytest

from pd_serve.wire import link
from tests.node.harness import RouterEnd, StartNode, receive, submit
from tests.node.test_sleep import error

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]


def next_role(connection: RouterEnd) -> link.Role:
    while not isinstance(message := receive(connection), link.Role):
        pass
    return message


def test_a_switch_is_a_word_to_the_routers_and_what_runs_goes_on(start_node: StartNode) -> None:
    node = start_node("shut")
    connection = node.link()
    hello = receive(connection)
    assert isinstance(hello, link.Hello)
    assert (hello.role, hello.peer_addresses) == ("decode", ())
    connection.send(submit("a", list(range(100))))

    answer = node.post("/role", json={"role": "both"})
    assert (answer.status_code, answer.json()) == (200, {"role": "both", "before": "decode"})
    seen: list[link.FromNode] = []
    while not any(isinstance(m, link.Outputs) and m.items[-1].finish for m in seen):
        seen.append(receive(connection))
    roles = [message for message in seen if isinstance(message, link.Role)]
    assert roles == [link.Role("both", ("tcp://127.0.0.1:1",))], "the door was opened first"
    tokens = [token for m in seen if isinstance(m, link.Outputs) for item in m.items for token in item.tokens]
    assert tokens == list(range(100))

    assert node.post("/role?role=prefill").json() == {"role": "prefill", "before": "both"}
    assert next_role(connection).role == "prefill"
    assert node.post("/role", json={"role": "prefill"}).json() == {"role": "prefill", "before": "prefill"}
    assert node.counters()["heard_listen"] == 1, "an open door stays open"
    assert node.status()["role"] == "prefill"
    another = receive(node.link())
    assert isinstance(another, link.Hello) and another.role == "prefill"


def test_why_a_node_does_not_take_a_role(start_node: StartNode) -> None:
    node = start_node("no-door")
    assert "role is one of prefill, decode, both, not 'router'" in error(node.post("/role?role=router"), 400)
    assert "not None" in error(node.post("/role"), 400)
    assert "the only one is 'role'" in error(node.post("/role?level=1"), 400)
    assert "the node stays decode: cannot listen" in error(node.post("/role?role=both"), 503)
    assert "web pages" in error(node.post("/role?role=both", headers={"Origin": "http://x"}), 403)
    assert node.status()["role"] == "decode"


def test_a_node_that_sleeps_wakes_in_its_new_role(start_node: StartNode) -> None:
    node = start_node("shut", "--enable-sleep-mode")
    node.post("/sleep")
    assert node.post("/role?role=both").json()["role"] == "both"
    node.post("/wake_up")
    node.until_ready()
    hello = receive(node.link())
    assert isinstance(hello, link.Hello)
    assert (hello.role, hello.peer_addresses) == ("both", ("tcp://127.0.0.1:2",))
