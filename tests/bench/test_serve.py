"""The load generator against a real HTTP server whose speed is known."""

from __future__ import annotations

import gzip
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pd_serve import config
from pd_serve.bench import load, serve
from pd_serve.bench.datasets import Ask, choose, read
from pd_serve.bench.prompts import BLOCK_TOKENS, Bodies
from pd_serve.bench.report import counted, summary
from pd_serve.config import BenchConfig
from pd_serve.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

FIRST_S, GAP_S = 0.10, 0.02


class Endpoint(ThreadingHTTPServer):
    """Answers each request with its max_tokens, the first after FIRST_S, the others after GAP_S each."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.open = self.most_open = self.connections = 0
        self.lock = threading.Lock()
        self.fail: dict[int, str] = {}  # number of the request -> how it fails
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer(200, b'{"data": [{"id": "the-model"}]}')

    def _event(self, data: str) -> None:
        chunk = f"data: {data}\r\n\r\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body | {"path": self.path, "key": self.headers["Authorization"]})
            server.open += 1
            server.most_open = max(server.most_open, server.open)
        try:
            self._stream(body, server.fail.get(number))
        finally:
            with server.lock:
                server.open -= 1

    def _stream(self, body: dict[str, Any], fail: str | None) -> None:
        if fail == "429":
            return self._answer(429, b'{"error": {"message": "full"}}')
        chat = "messages" in body
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if chat:
            self._event('{"choices": [{"delta": {"role": "assistant", "content": ""}}]}')
        for index in range(body["max_tokens"]):
            time.sleep(GAP_S if index else FIRST_S)
            if fail == "cut" and index == 1:
                self.close_connection = True
                return None
            if fail == "error" and index == 1:
                self._event('{"error": {"message": "no node left"}}')
                break
            if fail == "garbage" and index == 1:
                self._event("{nonsense")
                self.close_connection = True
                return None
            text = {"delta": {"content": "x"}} if chat else {"text": "" if index == 1 else "x"}
            finish = "length" if index == body["max_tokens"] - 1 else None
            self._event(json.dumps({"choices": [{"index": 0, "finish_reason": finish} | text], "usage": None}))
        else:
            usage = {"prompt_tokens": 77, "completion_tokens": body["max_tokens"]}
            self._event(json.dumps({"choices": [], "usage": usage}))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")
        return None


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    yield server
    server.shutdown()
    server.server_close()


def bench(endpoint: Endpoint, *flags: str, status: int = 0) -> tuple[str, dict[str, Any]]:
    arguments = [
        sys.executable,
        "-m",
        "pd_serve.cli",
        "bench",
        "serve",
        "--base-url",
        endpoint.url,
        "--json",
        "/dev/stderr",
    ]
    answer = subprocess.run([*arguments, *flags], capture_output=True, text=True, timeout=50, check=False)
    assert answer.returncode == status, answer.stderr + answer.stdout
    assert "Traceback" not in answer.stderr
    return answer.stdout, json.loads(answer.stderr)


def test_figures_are_those_of_the_server(endpoint: Endpoint) -> None:
    text, result = bench(endpoint, "--requests", "12", "--concurrency", "4", "--output-len", "8", "--input-len", "16")
    assert (result["completed"], result["failed"], result["short_outputs"]) == (12, 0, 0)
    assert (result["prompt_tokens"], result["output_tokens"]) == (12 * 77, 12 * 8)
    assert result["tokens_per_event"] == 1.0  # an empty text is a token too
    assert 100 <= result["ttft_ms"]["median"] < 150
    assert 20 <= result["itl_ms"]["median"] < 30
    assert 20 <= result["tpot_ms"]["mean"] < 30
    assert 240 <= result["e2e_ms"]["median"] < 330
    assert result["output_tokens_per_s"] == pytest.approx(96 / result["duration_s"])
    assert 3 * 0.24 <= result["duration_s"] < 3 * 0.33
    assert result["settings"]["model"] == "the-model"
    assert re.search(r"TTFT +time to first token +1\d\d\.\d\d", text)
    assert "12 requests in" in text
    assert endpoint.most_open == 4
    assert endpoint.connections <= 6  # of 17 requests: connections are used again
    measured = endpoint.bodies[4:]
    assert {len(body["prompt"]) for body in measured} == {16}
    assert len({tuple(body["prompt"]) for body in endpoint.bodies}) == 16
    assert all(body["ignore_eos"] and body["stream"] and body["path"] == "/v1/completions" for body in measured)


def test_chat_with_a_key(endpoint: Endpoint) -> None:
    _, result = bench(
        endpoint, "--endpoint", "chat", "--api-key", "secret", "--requests", "2", "--warmup", "0", "--output-len", "3",
        "--no-ignore-eos", "--model", "other",
    )  # fmt: skip
    assert result["completed"] == 2
    assert 100 <= result["ttft_ms"]["median"] < 160  # the event with the role alone is no token
    assert "secret" not in json.dumps(result)
    body = endpoint.bodies[0]
    assert (body["path"], body["key"], body["model"]) == ("/v1/chat/completions", "Bearer secret", "other")
    assert "ignore_eos" not in body
    assert len(body["messages"][0]["content"].split()) == 512


def test_errors_are_counted_by_kind(endpoint: Endpoint) -> None:
    endpoint.fail = {0: "429", 1: "cut", 2: "error", 3: "429", 4: "garbage"}
    flags = ("--requests", "6", "--warmup", "0", "--concurrency", "2", "--output-len", "3")
    text, result = bench(endpoint, *flags, status=1)
    assert (result["completed"], result["failed"]) == (1, 5)
    errors = result["errors"]
    assert sum(count for error, count in errors.items() if error.startswith("HTTP 429: ") and "full" in error) == 2
    assert any("connection closed in mid-answer" in error for error in errors)
    assert any("no node left" in error for error in errors)
    assert any("an answer that cannot be read" in error for error in errors)
    assert "5 requests failed:" in text


def test_a_request_rate_does_not_wait_for_answers(endpoint: Endpoint) -> None:
    flags = ("--requests", "20", "--request-rate", "40", "--concurrency", "1", "--output-len", "10", "--seed", "7")
    _, first = bench(endpoint, *flags)
    assert endpoint.most_open > 4
    gaps = [b["sent_s"] - a["sent_s"] for a, b in zip(first["requests"], first["requests"][1:], strict=False)]
    sent = sorted(request["sent_s"] for request in first["requests"])
    assert sent[-1] == pytest.approx(20 / 40, rel=0.6)
    assert statistics.pstdev(gaps) > 0
    prompts = [body["prompt"] for body in endpoint.bodies]
    endpoint.bodies.clear()
    bench(endpoint, *flags)
    assert sorted(body["prompt"] for body in endpoint.bodies) == sorted(prompts)  # same seed, same prompts


def test_nobody_there() -> None:
    command = [sys.executable, "-m", "pd_serve.cli", "bench", "serve", "--base-url", "http://127.0.0.1:1"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert answer.returncode == 1
    assert answer.stderr.startswith("pd-serve: http://127.0.0.1:1 does not name a model (cannot connect: ")


def test_files_are_looked_at_before_anything_is_sent(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("no requests at all\nbut lines")
    for flags, said in (
        ({"json": str(tmp_path / "no" / "where.json")}, "directory that exists"),
        ({"dataset": str(tmp_path / "none")}, "cannot read"),
        ({"dataset": str(tmp_path / "notes")}, "ShareGPT"),
    ):
        with pytest.raises(ConfigError, match=said):
            serve.run(config.load("bench serve", {"base_url": endpoint.url, **flags}, environ={}))
    assert not endpoint.bodies


def test_summaries() -> None:
    found = summary([0.005, 0.001, 0.004, 0.002, 0.003])
    assert [found[name] for name in ("min", "median", "p90", "max")] == pytest.approx([1, 3, 4.6, 5])
    assert summary([0.007])["p99"] == pytest.approx(7)
    assert summary([]) == {}
    assert summary([0.001, 0.003])["mean"] == pytest.approx(2)


def test_equal_errors_are_one_kind() -> None:
    errors = [f'HTTP 429: {{"message":"full of {n}","request_id":"{id}"}}' for n, id in ((7, "a1"), (81, "b2"))]
    found = counted([*errors, "HTTP 503: full", "HTTP 502: full"])
    assert list(found.values()) == [2, 1, 1] and "full of 7" in next(iter(found))


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_a_url_may_end_in_v1(url: str) -> None:
    assert config.load("bench serve", {"base_url": url}, environ={}).base_url == "http://h:1"


def test_reasoning_counts_as_tokens() -> None:
    for name in ("content", "reasoning", "reasoning_content"):
        event = load._decode(json.dumps({"choices": [{"delta": {name: "x"}}]}).encode())
        assert load.text_of(event.choices[0]) == "x"


def test_prompts_depend_on_the_seed_alone() -> None:
    config = BenchConfig(input_len=5)
    one, same, other = (Bodies(config, "m", seed) for seed in (1, 1, 2))
    bodies = [one.next() for _ in range(3)]
    assert bodies == [same.next() for _ in range(3)]
    assert bodies[0] != other.next()
    assert len(set(bodies)) == 3


SHAREGPT = [
    {"id": "1", "conversations": [{"from": "human", "value": "Why?" * 10}, {"from": "gpt", "value": "So" * 20}]},
    {"id": "2", "conversations": [{"from": "gpt", "value": "an answer first"}, {"from": "human", "value": "?"}]},
    {"id": "3", "conversations": [{"from": "human", "value": "alone"}]},
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
        ]
    },
]


def test_conversations_in_sharegpts_shape(tmp_path: Path) -> None:
    whole, lines = tmp_path / "whole", tmp_path / "lines.gz"
    whole.write_text(json.dumps(SHAREGPT, indent=1))
    lines.write_bytes(gzip.compress("\n".join(map(json.dumps, SHAREGPT)).encode()))
    found = read(str(whole))
    assert found == read(str(lines)) and not found.timed
    assert found.asks == [Ask(10, 10, text="Why?" * 10), Ask(1, 1, text="Hi")]
    body = json.loads(Bodies(BenchConfig(), "m", 1).of(found.asks[0]))
    assert (body["prompt"], body["max_tokens"]) == ("Why?" * 10, 10)
    assert [ask.text for ask in choose(found, 9, 1, longest=5).asks] == ["Hi"]
    assert sorted(choose(found, 9, 1, longest=0).asks) == sorted(found.asks)


def test_a_trace_shares_what_it_says_is_shared(tmp_path: Path) -> None:
    trace, objects = tmp_path / "trace.jsonl", tmp_path / "objects.jsonl"
    rows = [[20_500, 1100, 7, [5, 6, 8]], [20_000, 1000, 0, [5, 6]], [21_000, 1e5, 3, list(range(200))]]
    trace.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    objects.write_text("".join(f"{json.dumps(dict(zip(names, row, strict=True)))}\n" for row in rows))
    found = choose(read(str(trace)), 5, 1, longest=4096)
    assert found == choose(read(str(objects)), 5, 1, longest=4096)
    assert found.asks == [Ask(1000, 1, 0.0, (5, 6)), Ask(1100, 7, 0.5, (5, 6, 8))] and found.left_out == 1
    bodies = Bodies(BenchConfig(), "m", 1)
    first, second = (json.loads(bodies.of(ask))["prompt"] for ask in found.asks)
    assert (len(first), len(second)) == (1000, 1100)
    assert first == second[:1000] and first[:76] != second[1024:]
    words = Bodies(BenchConfig(endpoint="chat"), "m", 1).of(found.asks[1])
    assert len(json.loads(words)["messages"][0]["content"].split()) == 1100 > 2 * BLOCK_TOKENS


def test_a_trace_is_sent_when_it_was_recorded(endpoint: Endpoint, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("timestamp_ms,input_tokens,output_tokens\n1000,16,2\n1800,24,3\n1800,8,2\n9000,5,5\n")
    flags = ("--dataset", str(trace), "--trace-speed", "4", "--requests", "3", "--warmup", "0", "--concurrency", "1")
    text, result = bench(endpoint, *flags)
    assert [len(body["prompt"]) for body in endpoint.bodies] in ([16, 24, 8], [16, 8, 24])
    assert sorted(body["max_tokens"] for body in endpoint.bodies) == [2, 2, 3] and result["short_outputs"] == 0
    sent = [request["sent_s"] for request in sorted(result["requests"], key=lambda one: one["sent_s"])]
    assert sent == pytest.approx([0.0, 0.2, 0.2], abs=0.05) and endpoint.most_open == 2
    assert str(trace) in text
