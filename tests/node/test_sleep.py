"""A node that sleeps: what it answers, what routers see, and how it comes back."""

from __future__ import annotations

import os
import signal
import threading
import time

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from pd_serve.wire import link
from tests.node.harness import NodeUnderTest, StartNode, receive, receive_outputs, submit
from tests.node.test_node import close_code
from tests.node.test_registration import Registry
from tests.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

ASLEEP = {"is_sleeping": True, "state": "asleep", "level": 1, "asleep": ["weights", "kv_cache"]}
AWAKE = {"is_sleeping": False, "state": "awake", "level": 0, "asleep": []}


def answer(response: httpx.Response) -> dict[str, object]:
    assert response.status_code == 200, response.text
    return dict(response.json())


def error(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"])


def test_sleeps_and_wakes(start_node: StartNode) -> None:
    port = free_port()
    router = Registry(port)
    node = start_node("echoes", "--enable-sleep-mode", "--router", f"http://127.0.0.1:{port}")
    router.wait_for(("POST", node.url), 3)
    connection = node.link()
    hello = receive(connection)
    assert isinstance(hello, link.Hello)
    assert (hello.epoch, hello.peer_addresses) == ("epoch-1", ("tcp://127.0.0.1:1",))
    assert answer(node.get("/is_sleeping")) == AWAKE
    connection.send(submit("a", list(range(20))))

    assert answer(node.post("/sleep")) == ASLEEP  # level 1 where nothing is said
    seen = []
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            seen.append(receive(connection))
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
    outputs = [item for message in seen if isinstance(message, link.Outputs) for item in message.items]
    assert outputs[-1].finish == "length"  # what ran ended first
    assert next(m for m in seen if isinstance(m, link.Status) and m.load.draining)
    assert router.seen[-1] == ("DELETE", node.url)

    assert answer(node.post("/sleep", json={"level": 1})) == ASLEEP
    assert answer(node.get("/is_sleeping")) == ASLEEP
    assert "wake_up" in error(node.post("/sleep?level=2"), 409)
    assert node.get("/health").json() == {"status": "asleep"}
    assert node.get("/ready").json() == {"ready": False, "reason": "asleep"}
    status = node.status()
    assert (status["state"], status["sleep"]) == ("asleep", ASLEEP)
    assert status["memory"]["asleep"] == ["weights", "kv_cache"]  # type: ignore[index]
    metrics = node.get("/metrics").text
    assert "pd_serve_node_sleeping 1.0" in metrics
    assert 'pd_serve_node_memory_peak_bytes{device="cpu",tag="weights"} 30.0' in metrics
    assert 'pd_serve_node_memory_reserved_bytes{device="cpu",tag="kv_cache"} 0.0' in metrics
    assert 'pd_serve_node_memory_reserved_bytes{device="host",tag="weights"} 7.0' in metrics
    assert 'pd_serve_node_memory_fragmentation_ratio{device="cpu"} 0.25' in metrics
    assert close_code(node.link, node) == 1013

    part = answer(node.post("/wake_up?tags=weights"))
    assert part == ASLEEP | {"asleep": ["kv_cache"]}
    assert node.get("/ready").status_code == 503
    router.seen.clear()
    assert answer(node.post("/wake_up", json={"tags": ["kv_cache", "weights"]})) == AWAKE
    assert answer(node.post("/wake_up")) == AWAKE
    assert node.get("/ready").status_code == 200
    router.wait_for(("POST", node.url), 3)
    connection = node.link()
    hello = receive(connection)
    assert isinstance(hello, link.Hello)
    assert (hello.epoch, hello.peer_addresses, hello.load.draining) == ("epoch-2", ("tcp://127.0.0.1:2",), False)
    connection.send(submit("b", [1, 2]))
    assert receive_outputs(connection, "b") == [1, 2]
    router.close()


def test_what_does_not_end_in_time_is_ended(start_node: StartNode) -> None:
    node = start_node("echoes", "--enable-sleep-mode", "--drain-timeout-s", "0.3")
    connection = node.link()
    connection.send(submit("long", [1] * 10_000))
    assert answer(node.post("/sleep?level=2"))["level"] == 2
    assert close_code(connection, node) == 1013
    assert "they end now" in node.log
    assert answer(node.post("/wake_up")) == AWAKE


def test_an_engine_that_cannot_sleep_serves_on(start_node: StartNode) -> None:
    node = start_node("cannot-sleep", "--enable-sleep-mode")
    response = node.post("/sleep")
    assert error(response, 503) == "a transfer is still under way"
    assert "Retry-After" in response.headers
    assert answer(node.get("/is_sleeping")) == AWAKE
    connection = node.link()
    connection.send(submit("a", [1, 2]))
    assert receive_outputs(connection, "a") == [1, 2]


def test_an_engine_that_cannot_wake_stays_asleep_and_ends_when_told(start_node: StartNode) -> None:
    node = start_node("sleeps-for-ever", "--enable-sleep-mode")
    assert answer(node.post("/sleep")) == ASLEEP
    assert error(node.post("/wake_up"), 503) == "no files"
    assert answer(node.get("/is_sleeping"))["is_sleeping"] is True
    node.process.send_signal(signal.SIGTERM)
    assert node.wait() == 0


@pytest.mark.parametrize("path", ["/sleep", "/wake_up", "/is_sleeping"])
def test_without_sleep_mode(start_node: StartNode, path: str) -> None:
    node = start_node("echoes")
    response = node.get(path) if path == "/is_sleeping" else node.post(path)
    assert "--enable-sleep-mode" in error(response, 404)
    assert node.status()["sleep"] is None


def test_orders_that_are_wrong(start_node: StartNode) -> None:
    node = start_node("echoes", "--enable-sleep-mode")
    for options in ({"params": {"level": "3"}}, {"json": {"level": 0}}, {"json": {"level": "deep"}}):
        assert "level is 1" in error(node.post("/sleep", **options), 400)  # type: ignore[arg-type]
    assert "'depth'" in error(node.post("/sleep?depth=1"), 400)
    assert "JSON object" in error(node.post("/sleep", content=b"[1]"), 400)
    page = {"Origin": "http://a-web-page.example"}  # of a browser on this machine
    assert "web pages" in error(node.post("/sleep", headers=page), 403)
    for options in ({"params": {"tags": "kv"}}, {"json": {"tags": "weights"}}, {"json": {"tags": []}}):
        assert "tags is a list" in error(node.post("/wake_up", **options), 400)  # type: ignore[arg-type]
    assert node.get("/sleep").status_code == 405
    assert answer(node.get("/is_sleeping")) == AWAKE


def test_orders_at_once_are_carried_out_one_after_another(start_node: StartNode) -> None:
    node = start_node("echoes", "--enable-sleep-mode")
    node.link(close_timeout=0.1).send(submit("a", [1] * 60))  # 0.6 s of work
    orders = ("/sleep", "/sleep", "/wake_up")
    answers: list[dict[str, object]] = [{}] * len(orders)

    def send(number: int) -> None:  # which answer is read first is up to the threads
        answers[number] = answer(node.post(orders[number]))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(len(orders))]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    assert node.status()["state"] == "falling asleep"
    for thread in threads:
        thread.join()
    assert answers == [ASLEEP, ASLEEP, AWAKE]


def test_the_engine_dies_asleep(start_node: StartNode) -> None:
    node: NodeUnderTest = start_node("echoes", "--enable-sleep-mode")
    assert answer(node.post("/sleep")) == ASLEEP
    engine = node.status()["engine"]
    assert isinstance(engine, dict)
    os.kill(int(engine["pid"]), signal.SIGKILL)
    assert node.wait() != 0
    assert "the engine died" in node.log
