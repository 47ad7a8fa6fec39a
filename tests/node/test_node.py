"""A node process from outside: what it answers and forwards, what it survives, and how it ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from pd_serve.wire import link
from pd_serve.wire.handshake import LinkRefused, RouterHalf
from pd_serve.wire.model import ModelBundle, decode_bundle
from tests.node.harness import NodeUnderTest, RouterEnd, StartNode, receive, receive_outputs, submit
from tests.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]


def engine_pid(node: NodeUnderTest) -> int:
    engine = node.status()["engine"]
    assert isinstance(engine, dict)
    return int(engine["pid"])


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def close_code(end: RouterEnd | Callable[[], RouterEnd], node: NodeUnderTest) -> int:
    """Reads a link until the node closes it; one that is still to be opened may be closed while its ends greet."""
    try:
        connection = end if isinstance(end, RouterEnd) else end()
        while True:
            receive(connection)
    except ConnectionClosed as closed:
        assert closed.rcvd is not None, node.log
        return int(closed.rcvd.code)


def get_model(connection: RouterEnd) -> ModelBundle:
    connection.send(link.encoder.encode(link.GetModel()))
    while not isinstance(model := receive(connection), link.Model):
        pass
    return decode_bundle(model.bundle)


def test_answers(start_node: StartNode) -> None:
    node = start_node("echoes", "--served-model-name", "tiny-model", "--local-prefill-tokens", "7")
    assert node.get("/health").status_code == 200
    status = node.status()
    assert status["state"] == "serving"
    assert status["role"] == "decode"
    assert status["node_id"] == f"127.0.0.1:{node.url.rsplit(':', 1)[1]}"
    node.until(lambda: node.counters(), "a status")
    metrics = node.get("/metrics").text
    assert 'pd_serve_node_kv_blocks{group="0",state="cached"} 2.0' in metrics
    assert "pd_serve_node_leaks_total 0.0" in metrics
    assert 'model="tiny-model"' in metrics
    connection = node.link()
    hello = receive(connection)
    assert isinstance(hello, link.Hello)
    assert (hello.role, hello.url, hello.epoch, hello.local_prefill_tokens) == ("decode", node.url, "epoch-1", 7)
    assert hello.model.name == "tiny-model"
    bundle = get_model(connection)
    assert (bundle.name, bundle.fingerprint) == ("tiny-model", "f00d")
    assert b"WordLevel" in bundle.tokenizer_json
    connection.send(link.encoder.encode(link.GetModel()))
    assert close_code(connection, node) == 1008  # once a link


def test_a_web_page_opens_no_link(start_node: StartNode) -> None:
    node = start_node("echoes")
    with pytest.raises(InvalidStatus, match="403"):
        connect(node.url.replace("http", "ws") + "/link", origin=Origin("http://example.org"))


def test_a_stranger_who_sends_too_much_or_too_little_is_ended(start_node: StartNode) -> None:
    node = start_node("echoes", "--head-timeout-s", "0.5")
    port = int(node.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as silent, socket.create_connection(("127.0.0.1", port)) as loud:
        connection = node.link()  # upgraded while both are there
        loud.sendall(b"GET / HTTP/1.1\r\nx: " + b"a" * 65_500)
        loud.sendall(b"a" * 100)
        loud.settimeout(5)
        assert loud.recv(100).startswith(b"HTTP/1.1 431")
        silent.settimeout(5)
        assert silent.recv(1) == b""
        assert isinstance(receive(connection), link.Hello)  # the link outlives the time for a head


def test_links_do_not_see_each_other(start_node: StartNode) -> None:
    node = start_node("echoes")
    links = [node.link() for _ in range(3)]
    for number, connection in enumerate(links):
        assert isinstance(receive(connection), link.Hello)
        connection.send(submit(f"a{number}", [number, 10, 20]))
    for number, connection in enumerate(links):
        assert receive_outputs(connection, f"a{number}") == [number, 10, 20]
        assert isinstance(receive(connection), link.Status)


def test_peers_and_the_end_of_a_link_reach_the_engine(start_node: StartNode) -> None:
    node = start_node("echoes")
    connection = node.link()
    connection.send(link.encoder.encode(link.Peers([link.Source("p", "e", ("tcp://127.0.0.1:1",))])))
    connection.send(submit("long", [1] * 10_000))
    node.until(lambda: node.counters().get("heard_peers") == 1, "peers as a message of the node")
    connection.close()
    node.until(lambda: node.counters().get("dropped_1") == 1, "drop of the first link")
    node.until(lambda: node.status()["load"]["running"] == 0, "the attempt's end")  # type: ignore[index]


@pytest.mark.parametrize("garbage", [b"\xc1", b"", b"\x80", link.encoder.encode({"type": "shutdown"}), "text"])
def test_garbage_closes_the_link_and_nothing_else(start_node: StartNode, garbage: bytes | str) -> None:
    node = start_node("echoes")
    bad, good = node.link(), node.link()
    good.send(submit("good", [1, 2, 3]))
    bad.send(garbage)
    assert close_code(bad, node) == 1008
    assert receive_outputs(good, "good") == [1, 2, 3]
    assert "heard_shutdown" not in node.counters()


def test_a_router_that_does_not_read_is_dropped(start_node: StartNode) -> None:
    node = start_node("echoes")
    slow, good = node.link(max_queue=1, close_timeout=0.1), node.link()
    process = psutil.Process(node.process.pid)
    before_bytes = process.memory_info().rss
    slow.send(submit("flood", [1]))
    node.until(lambda: node.status()["links"] == 1, "the slow link's end", 30)
    assert process.memory_info().rss - before_bytes < 100 << 20  # of 200 MiB that the engine sent
    assert "does not read" in node.log
    good.send(submit("good", [4, 5]))
    assert receive_outputs(good, "good") == [4, 5]


def test_a_chat_template_and_the_sampling_defaults_travel_with_the_model(
    start_node: StartNode, model_directory: Path, tmp_path: Path
) -> None:
    model, template = tmp_path / "model", tmp_path / "chat.jinja"
    shutil.copytree(model_directory, model)
    (model / "generation_config.json").write_text('{"temperature": 0.3}')
    template.write_text("{{ messages }}")
    node = start_node("echoes", "--model", str(model), "--chat-template", str(template))
    bundle = get_model(node.link())
    assert bundle.chat_templates == {"default": "{{ messages }}"}
    assert bundle.generation_defaults == {"temperature": 0.3}


def test_a_tokenizer_that_cannot_be_read_is_said_and_nothing_more(
    start_node: StartNode, model_directory: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_directory, model)
    (model / "tokenizer_config.json").write_text("{")
    node = start_node("echoes", "--model", str(model), ready=False)
    assert node.wait() == 2
    assert "tokenizer_config.json" in node.log and "Traceback" not in node.log


def test_a_link_before_the_engine_is_ready_is_told_to_come_again(start_node: StartNode) -> None:
    node = start_node("never-ready", ready=False)
    node.until(lambda: node.get("/health").status_code == 200, "alive")
    assert node.get("/ready").status_code == 503
    assert close_code(node.link, node) == 1013
    node.process.terminate()
    assert node.wait() == 0


def test_sigterm_drains(start_node: StartNode) -> None:
    node = start_node("echoes")
    connection = node.link()
    assert isinstance(receive(connection), link.Hello)
    connection.send(submit("a", list(range(60))))
    assert isinstance(receive(connection), link.Outputs | link.Status)
    pid = engine_pid(node)
    node.process.send_signal(signal.SIGTERM)
    sent_s = time.monotonic()
    while not (isinstance(message := receive(connection), link.Status) and message.load.draining):
        assert time.monotonic() - sent_s < 0.5, "draining is not announced at once"
    assert node.get("/ready").status_code == 503
    seen = 0
    while True:
        message = receive(connection)
        if isinstance(message, link.Status):
            assert message.load.draining
        elif isinstance(message, link.Outputs):
            seen = message.items[0].index
            if message.items[0].finish:
                break
    assert seen == 59
    assert node.wait() == 0, node.log
    assert not alive(pid)


def test_draining_is_bounded(start_node: StartNode) -> None:
    node = start_node("never-drains", "--drain-timeout-s", "0.5")
    pid = engine_pid(node)
    started_s = time.monotonic()
    node.process.send_signal(signal.SIGINT)
    assert node.wait() == 0
    assert 0.5 <= time.monotonic() - started_s < 4
    assert "not drained" in node.log
    assert not alive(pid)


def test_a_second_signal_ends_at_once(start_node: StartNode) -> None:
    node = start_node("never-drains")
    pid = engine_pid(node)
    node.process.send_signal(signal.SIGTERM)
    node.until(lambda: node.status()["state"] == "draining", "draining")
    node.process.send_signal(signal.SIGTERM)
    assert node.wait(1) != 0
    until_gone(pid)


def until_gone(pid: int) -> None:
    deadline_s = time.monotonic() + 2
    while alive(pid):
        assert time.monotonic() < deadline_s, "the engine outlives its node"
        time.sleep(0.01)


def test_the_engine_does_not_outlive_a_killed_node(start_node: StartNode, tmp_path: Path) -> None:
    node = start_node("echoes", variables={"TMPDIR": str(tmp_path)})
    pid = engine_pid(node)
    node.until(lambda: not list(tmp_path.iterdir()), "both sockets connected: their paths are gone")
    node.process.kill()
    node.wait()
    until_gone(pid)
    assert not list(tmp_path.iterdir())


def test_when_the_engine_dies_the_node_ends(start_node: StartNode) -> None:
    node = start_node("echoes")
    connection = node.link()
    connection.send(submit("die", [1]))
    assert close_code(connection, node) == 1011
    assert node.wait(3) == 1
    assert "pd-serve: the engine died (exit status 7)" in node.log
    assert "Traceback" not in node.log


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("fails", "pd-serve: the pool is too small; raise --kv-cache-memory\n"),
        ("crashes", "pd-serve: the engine ended without a word"),
    ],
)
def test_an_engine_that_cannot_start(start_node: StartNode, behaviour: str, message: str) -> None:
    node = start_node(behaviour, ready=False)
    assert node.wait() == 1
    assert message in node.log
    assert "Traceback" not in node.log


def test_a_taken_port_is_a_clear_error(start_node: StartNode) -> None:
    node = start_node("echoes")
    port = int(node.url.rsplit(":", 1)[1])
    second = start_node("echoes", ready=False, port=port)
    assert second.wait() == 2
    assert f"cannot listen on 127.0.0.1:{port}" in second.log
    assert "Traceback" not in second.log


# --- slow, stopped, hanging ---------------------------------------------------------------------------


def bare(name: str, number: int = 0) -> bytes:
    return link.encoder.encode(link.Submit(name, b"", 0, link.SamplingParams(max_tokens=1, seed=0), number=number))


def test_a_long_step_within_its_limit_is_no_trouble_and_routers_hear_of_it(start_node: StartNode) -> None:
    node = start_node("echoes", "--engine-timeout-s", "0.5")
    connection = node.link()
    connection.send(bare("before", number=4))
    node.until(lambda: node.counters().get("heard_submit") == 1, "the submit")
    connection.send(bare("slow", number=5))  # the engine says nothing from here on but its pulse
    deadline_s = time.monotonic() + 1.0
    statuses = []
    while time.monotonic() < deadline_s:
        if isinstance(message := receive(connection), link.Status):
            statuses.append(message)
    running = statuses[-1].running
    assert running is not None and (running.step, running.tokens, running.limit_s) == (3, 1024, 600.0)
    assert statuses[-1].last_submit == 4  # the load is from before
    assert len([s for s in statuses if s.running]) > 3
    assert node.get("/health").status_code == 200
    assert node.status()["state"] == "serving"
    connection.send(bare("go on", number=6))
    while not (isinstance(message := receive(connection), link.Status) and message.running is None):
        pass
    while not (isinstance(message := receive(connection), link.Status) and message.last_submit == 6):
        pass


def test_an_engine_that_hangs_in_a_step_is_found_and_forgiven_when_it_goes_on(start_node: StartNode) -> None:
    node = start_node("echoes", "--engine-timeout-s", "0.6")
    connection = node.link()
    connection.send(bare("hang"))
    assert close_code(connection, node) == 1011
    health = node.get("/health")
    assert health.status_code == 503
    assert "step 3 (1024 tokens) takes longer than its limit of 40.0 s" in health.json()["status"]
    assert node.status()["state"] == "stuck"
    assert "pd_serve_node_stuck 1.0" in node.get("/metrics").text
    assert close_code(node.link, node) == 1013
    os.kill(engine_pid(node), signal.SIGSTOP)  # a stopped process is stuck for another reason
    node.until(lambda: "has said nothing" in node.get("/health").text, "silence")
    os.kill(engine_pid(node), signal.SIGCONT)
    node.until(lambda: "limit" in node.get("/health").text, "the step still hangs")


def test_a_stopped_engine_is_noticed_within_the_setting(start_node: StartNode) -> None:
    node = start_node("echoes", "--engine-timeout-s", "0.6")
    connection = node.link()
    pid = engine_pid(node)
    os.kill(pid, signal.SIGSTOP)
    stopped_s = time.monotonic()
    assert close_code(connection, node) == 1011
    assert time.monotonic() - stopped_s < 1.5
    assert node.get("/ready").status_code == 503
    os.kill(pid, signal.SIGCONT)
    node.until(lambda: node.get("/ready").status_code == 200, "the engine is back", 2)
    assert isinstance(receive(node.link()), link.Hello)


def test_a_node_that_was_stopped_itself_does_not_blame_its_engine(start_node: StartNode) -> None:
    node = start_node("echoes", "--engine-timeout-s", "0.6")
    connection = node.link()
    connection.send(submit("a", list(range(300))))
    for _ in range(2):
        node.process.send_signal(signal.SIGSTOP)
        time.sleep(1.3)
        node.process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
    assert receive_outputs(connection, "a") == list(range(300))
    assert "has said nothing" not in node.log


def test_a_node_that_drains_takes_no_link(start_node: StartNode) -> None:
    node = start_node("never-drains")
    connection = node.link()
    node.process.send_signal(signal.SIGTERM)
    node.until(lambda: node.status()["state"] == "draining", "draining")
    assert close_code(node.link, node) == 1013
    connection.send(submit("a", [1, 2]))
    assert receive_outputs(connection, "a") == [1, 2]  # links that there are go on


def test_cores_that_are_not_there(start_node: StartNode) -> None:
    node = start_node("echoes", "--cpus", "60000", ready=False, port=free_port())
    assert node.wait() == 2
    assert "--cpus names cores that this process may not use: [60000]" in node.log


# --- doors --------------------------------------------------------------------------------------------

SECRET = "long, and random enough"


def test_a_node_that_strangers_reach_needs_a_secret(start_node: StartNode) -> None:
    for flags in (("--host", "0.0.0.0"), ("--peer-host", "10.0.0.1")):
        node = start_node("echoes", *flags, ready=False)
        assert node.wait() == 2
        assert "--secret-file" in node.log and "--allow-insecure-nodes" in node.log
        assert "Traceback" not in node.log


def test_orders_from_elsewhere_want_the_token_and_routers_the_secret(start_node: StartNode, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET)
    file.chmod(0o600)
    flags = ("--host", "0.0.0.0", "--secret-file", str(file), "--enable-sleep-mode", "--connect-timeout-s", "1.5")
    node = start_node("echoes", *flags)
    command = [sys.executable, "-m", "pd_serve.cli", "token", "--secret-file", str(file)]
    token = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    for shown in (None, "Bearer x", f"Bearer {SECRET}", f"Bearer {token[:-1]}x"):
        answer = node.post("/sleep", headers={"Authorization": shown} if shown else {})
        assert answer.status_code == 401 and "pd-serve token" in answer.json()["error"]
    assert node.get("/is_sleeping").json()["is_sleeping"] is False
    with pytest.raises(LinkRefused, match="it has a secret and this process has none"):
        node.link()
    stranger, silent = node.dial(), node.dial()
    stranger.send(RouterHalf(b"").greeting)
    stranger.recv(timeout=5)
    stranger.send(link.encoder.encode(link.Proof(b"x" * 32)))
    with pytest.raises(ConnectionClosed, match="its secret is another one"):
        stranger.recv(timeout=5)
    with pytest.raises(ConnectionClosed, match="the router must greet first; update the older"):
        silent.recv(timeout=5)  # as routers from before the handshake, which wait for a Hello
    connection = node.link(SECRET)
    assert isinstance(receive(connection), link.Hello)
    connection.send(submit("a", [1, 2]))
    assert receive_outputs(connection, "a") == [1, 2]
    connection.connection.send(submit("b", [1, 2]))  # without a MAC
    assert close_code(connection, node) == 1008
    node.until(lambda: "MAC does not hold" in node.log, "the reason in its log")
    node.until(lambda: node.counters().get("dropped_1") == 1, "the end of the link")
    assert node.counters()["heard_submit"] == 1
    assert node.post("/sleep", headers={"Authorization": f"Bearer {token}"}).status_code == 200


def test_a_node_speaks_tls(start_node: StartNode, certificate: tuple[str, str]) -> None:
    node = start_node("echoes", "--ssl-certfile", certificate[0], "--ssl-keyfile", certificate[1], ready=False)
    url, context = node.url.replace("http", "https"), ssl.create_default_context(cafile=certificate[0])
    node.until(lambda: httpx.get(f"{url}/ready", verify=context).status_code == 200, "ready")
    assert httpx.get(f"{url}/v1/status", verify=context).json()["url"] == url
    with connect(url.replace("https", "wss") + "/link", ssl=context) as socket:
        assert isinstance(receive(RouterEnd(socket)), link.Hello)
    broken = start_node("echoes", "--ssl-certfile", "/nowhere", ready=False)
    assert broken.wait() == 2 and "ssl_certfile" in broken.log
    lone = start_node("echoes", "--ssl-ca", certificate[0], ready=False)
    assert lone.wait() == 2 and "give --ssl-certfile" in lone.log
