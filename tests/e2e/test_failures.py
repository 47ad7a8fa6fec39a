"""Real processes, real kills: what a client sees, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import HTTP, Cluster, Server, cluster, wait_for
from tests.e2e.prompts import raw_prompts
from tests.e2e.tiny_model import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMPT = raw_prompts()[20]
LONG = PROMPT * 12  # seconds of prefill on one core


class Stream:
    """A streamed greedy completion in a thread: tokens so far, error event, end."""

    def __init__(self, cluster: Cluster, prompt: str = PROMPT, max_tokens: int = 120, **body: object) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.error: dict[str, Any] | None = None
        self.status = 0
        self.done = threading.Event()
        self._close = threading.Event()
        self.body = {"model": cluster.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
                     "ignore_eos": True, "stream": True, "return_token_ids": True, **body}  # fmt: skip
        self._url = cluster.url + "/v1/completions"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with HTTP.stream("POST", self._url, json=self.body, timeout=120) as answer:
                self.status = answer.status_code
                if answer.status_code != 200:
                    answer.read()
                    self.error = answer.json()["error"]
                    return
                for line in answer.iter_lines():
                    if self._close.is_set():
                        return
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        self.error = event["error"]
                        continue
                    for choice in event["choices"]:
                        self.tokens += choice.get("token_ids") or []
                        self.text += choice["text"]
        except httpx.HTTPError as error:
            self.error = {"message": repr(error), "type": "connection"}
        finally:
            self.done.set()

    def abort(self) -> None:
        """Closes the connection, as a client that has left."""
        self._close.set()

    def wait(self, timeout_s: float = 60) -> Stream:
        assert self.done.wait(timeout_s), f"the stream hangs after {len(self.tokens)} tokens"
        return self


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("pair")
    with cluster(directory, prefill=2, decode=2, model=small_model, kv_cache_memory="128MiB", lease_s=6) as running:
        yield running


@pytest.fixture
def pair(nodes: Cluster) -> Cluster:
    """Two prefill and two decode nodes; what an earlier test killed has been started again."""
    nodes.revive()
    return nodes


def busy(pair: Cluster, nodes: list[Server]) -> Server | None:
    """One of the nodes that the router has given requests; the router knows it before the node reports it."""
    at = {node["url"]: node.get("in_flight", 0) for node in pair.router.get("/v1/status")["nodes"]}
    return next((node for node in nodes if at.get(node.url)), None)


def expected(cluster: Cluster, prompt: str, max_tokens: int) -> str:
    return str(cluster.complete(prompt, max_tokens, ignore_eos=True)["choices"][0]["text"])


def test_decode_node_killed_in_mid_stream(pair: Cluster) -> None:
    text = expected(pair, PROMPT, 300)
    streams = [Stream(pair, max_tokens=300) for _ in range(4)]
    wait_for(lambda: all(len(s.tokens) > 10 for s in streams), 60, "tokens")
    victim = wait_for(lambda: busy(pair, pair.decodes), 30, "a decode node with streams")
    victim.kill()
    for stream in streams:
        stream.wait()
        assert stream.error is None
        assert stream.text == text
        assert len(stream.tokens) == 300
    pair.assert_idle()


# Runs in every process of a node that is started with this directory in PYTHONPATH.
FAULT = """
import pathlib, sys, threading, time

def wait():
    while not pathlib.Path(__file__).with_name("now").exists():
        time.sleep(0.05)
    if "pd_serve.engine" in sys.orig_argv:
        sys.modules["pd_serve.transfer.worker"].GIVE_UP_S = 0.5
        sys.modules["pd_serve.transfer.lanes"].Lanes.progress = lambda lanes: 1 // 0
        pathlib.Path(__file__).with_name("set").touch()

threading.Thread(target=wait, daemon=True).start()
"""


def test_a_decode_node_whose_transfer_thread_only_fails(pair: Cluster, tmp_path: Path) -> None:
    """A mistake of ours in every turn: the node ends, as if it had died, and no request is lost."""
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    text = expected(pair, PROMPT, 200)
    pair.decodes[0].kill()
    faulty = pair.decodes[0] = pair.start_node("decode", environ={"PYTHONPATH": str(tmp_path)})
    pair.revive()
    streams = [Stream(pair, max_tokens=200) for _ in range(4)]
    wait_for(lambda: all(len(s.tokens) > 3 for s in streams), 60, "tokens")
    assert busy(pair, [faulty])
    (tmp_path / "now").touch()
    wait_for((tmp_path / "set").exists, 10, "the fault")
    deadline_s = time.monotonic() + 60
    fresh: list[list[Stream]] = []
    while faulty.process.poll() is None:  # prompts in nobody's cache wake the thread
        assert time.monotonic() < deadline_s, "the faulty node goes on"
        asked = [Stream(pair, f"{len(fresh)}\n" + PROMPT, 20) for _ in range(4)]
        fresh.append([stream.wait() for stream in asked])
    assert faulty.process.wait() == 1
    for stream in streams:
        assert stream.wait().error is None
        assert stream.text == text
    for same in fresh:
        text = expected(pair, str(same[0].body["prompt"]), 20)
        assert [(stream.error, stream.text) for stream in same] == [(None, text)] * 4
    log = faulty.log.read_text()
    assert "CRITICAL" in log and "has failed for 0.5 s in every turn" in log and "the engine died" in log
    assert log.count("Traceback") <= 3, "the log is not to be filled"
    pair.assert_idle()


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_prefill_node_killed(pair: Cluster, moment: str) -> None:
    prompt = f"Killed {moment}.\n" + LONG  # in nobody's prefix cache
    streams = [Stream(pair, prompt, 60) for _ in range(2)]
    victim = wait_for(lambda: busy(pair, pair.prefills), 30, "a prefill node with a prompt")
    if moment == "before":
        wait_for(lambda: victim.get("/v1/status")["engine"]["running"], 30, "the prompt being computed")
    elif moment == "during":
        # blocks of a first chunk are being read, or just have been, while the next chunk is computed
        wait_for(lambda: any(n.blocks_used() for n in pair.decodes), 30, "a pull")
    else:
        wait_for(lambda: all(len(s.tokens) > 3 for s in streams), 60, "tokens")
    victim.kill()
    for stream in streams:
        stream.wait()
        assert stream.error is None
        assert len(stream.tokens) == 60
    text = expected(pair, prompt, 60)
    assert [stream.text for stream in streams] == [text, text]
    pair.assert_idle()


def test_without_another_node_there_is_one_clear_error(pair: Cluster) -> None:
    with pair.another_router(pair.prefills[:1], pair.decodes[:1], node_wait_s=1) as single:
        stream = Stream(single, max_tokens=2000)
        wait_for(lambda: len(stream.tokens) > 5, 60, "tokens")
        victim = pair.decodes[0]
        victim.kill()
        stream.wait(30)
        assert stream.error is not None and stream.error["message"]
        assert "Traceback" not in stream.error["message"]
        refused = HTTP.post(
            single.url + "/v1/completions", json={"model": stream.body["model"], "prompt": "x"}, timeout=30
        )
        assert refused.status_code == 503
        assert HTTP.get(single.url + "/ready", timeout=5).status_code == 503
        single.decodes[0] = pair.decodes[0] = pair.start_node("decode", port=victim.port)
        single.wait_ready()
        assert single.complete("The capital of France is", 5)["choices"][0]["text"]
        single.assert_idle()


def test_router_restarted(pair: Cluster) -> None:
    stream = Stream(pair, max_tokens=2000)
    wait_for(lambda: len(stream.tokens) > 5, 60, "tokens")
    pair.router.kill()
    stream.wait(20)
    pair.assert_idle(5)  # the nodes end what the router asked for
    pair.router = pair.start_router(pair.router.port, {}, 2, 2)
    pair.wait_ready()
    assert pair.complete("The capital of France is", 5)["choices"][0]["text"]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_paused_node_is_left_and_comes_back(pair: Cluster, role: str) -> None:
    prompt = f"Paused {role}.\n" + PROMPT
    streams = [Stream(pair, prompt, 300) for _ in range(2)]
    nodes = pair.prefills if role == "prefill" else pair.decodes
    if role == "decode":
        wait_for(lambda: all(len(s.tokens) > 10 for s in streams), 60, "tokens")
    victim = busy(pair, nodes) or nodes[0]
    victim.signal_all(signal.SIGSTOP)
    try:
        for stream in streams:
            assert stream.wait().error is None
            assert len(stream.tokens) == 300
    finally:
        victim.signal_all(signal.SIGCONT)
    wait_for(
        lambda: sum(n["state"] == "ready" for n in pair.router.get("/v1/status")["nodes"]) == 4, 30, "all four back"
    )
    text = expected(pair, prompt, 300)
    assert [stream.text for stream in streams] == [text, text]
    pair.assert_idle(20)


def test_a_client_that_leaves_frees_its_blocks(pair: Cluster) -> None:
    streams = [Stream(pair, max_tokens=1000) for _ in range(4)]
    wait_for(lambda: all(len(s.tokens) > 3 for s in streams), 60, "tokens")
    for stream in streams:
        stream.abort()
    for stream in streams:
        stream.wait(10)
    left = time.monotonic()
    pair.assert_idle(5)
    assert time.monotonic() - left < 5


def test_an_abort_during_prefill_frees_both_nodes(pair: Cluster) -> None:
    for turn in range(3):
        body = {"model": pair.model, "prompt": f"{turn}\n" + LONG, "max_tokens": 200}
        with pytest.raises(httpx.ReadTimeout):
            HTTP.post(pair.url + "/v1/completions", json=body, timeout=0.4)
    pair.assert_idle(10)


def test_sigterm_finishes_streams_first(pair: Cluster) -> None:
    text = expected(pair, PROMPT, 300)
    streams = [Stream(pair, max_tokens=300) for _ in range(4)]
    wait_for(lambda: all(len(s.tokens) > 3 for s in streams), 60, "tokens")
    leaving = [busy(pair, pair.decodes) or pair.decodes[0], pair.prefills[0]]
    for node in leaving:
        os.kill(node.pid, signal.SIGTERM)
    for stream in streams:
        assert stream.wait().text == text
    for node in leaving:
        assert node.process.wait(30) == 0
    assert pair.complete("The capital of France is", 5)["choices"][0]["text"]
    pair.assert_idle()


def test_a_full_pool_and_queue_answer_429(tmp_path: Path, small_model: Path) -> None:
    memory = 64 * SMALL.block_bytes  # for two requests and a little more
    with cluster(tmp_path, model=small_model, kv_cache_memory=memory, max_model_len=900, max_queue=2) as small:
        statuses: list[int] = []
        answers: list[httpx.Response] = []

        def one() -> None:
            body = {"model": model, "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
            answer = HTTP.post(small.url + "/v1/completions", json=body, timeout=120)
            answers.append(answer)
            statuses.append(answer.status_code)

        model = small.model
        threads = [threading.Thread(target=one) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "a request hangs"
        assert set(statuses) == {200, 429}, statuses
        refused = next(a for a in answers if a.status_code == 429)
        assert float(refused.headers["retry-after"]) >= 1
        whole = {a.json()["choices"][0]["text"] for a in answers if a.status_code == 200}
        assert len(whole) == 1
        small.assert_idle()
