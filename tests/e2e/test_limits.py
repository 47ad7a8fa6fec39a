"""Garbage and extremes against the real system: a 4xx that says what to change, and nothing left behind."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import HTTP, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


OK: dict[str, Any] = {"prompt": "Hello", "max_tokens": 4, "temperature": 0}

BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "prompt too long": ({"prompt": [7] * 1024}, 400, "1024"),
    "prompt and output too long": ({"prompt": [7] * 1000, "max_tokens": 100}, 400, "max_tokens"),
    "empty prompt": ({"prompt": ""}, 400, "prompt"),
    "empty list": ({"prompt": []}, 400, "prompt"),
    "empty inner list": ({"prompt": [[1, 2], []]}, 400, "prompt"),
    "no prompt": ({"prompt": None}, 400, "prompt"),
    "unknown model": ({"model": "gpt-nothing"}, 404, "gpt-nothing"),
    "another server's field": ({"max_new_tokens": 4}, 400, "max_tokens"),
    "wrong type": ({"temperature": "warm"}, 400, "temperature"),
    "1,000 stop strings": ({"stop": [str(i) for i in range(1000)]}, 400, "stop"),
    "n=0": ({"n": 0}, 400, "n"),
    "n too large": ({"n": 100000}, 400, "n"),
    "negative max_tokens": ({"max_tokens": -2}, 400, "max_tokens"),
    "zero max_tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "negative token id": ({"prompt": [-1, 5]}, 400, "token"),
    "token id out of range": ({"prompt": [5, 49152]}, 400, "49151"),
    "huge token id": ({"prompt": [5, 2**40]}, 400, "token"),
    "top_p out of range": ({"top_p": 1.5}, 400, "top_p"),
    "negative temperature": ({"temperature": -0.1}, 400, "temperature"),
    "bias of an unknown token": ({"logit_bias": {"999999": 1}}, 400, "logit_bias"),
    "too many logprobs": ({"logprobs": 1000}, 400, "logprobs"),
    "seed too large": ({"seed": 2**70}, 400, "seed"),
    "response format": ({"response_format": {"type": "xml"}}, 400, "response_format"),
}


def post(smol: Cluster, content: bytes | str, path: str = "/v1/completions") -> httpx.Response:
    return HTTP.post(smol.url + path, content=content, headers={"Content-Type": "application/json"}, timeout=60)


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(smol: Cluster, name: str) -> None:
    change, status, hint = BAD[name]
    answer = post(smol, json.dumps({"model": smol.model, **OK, **change}))
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert hint in error["message"] or hint == error["param"]
    assert error["type"] and "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"text"', 400),
        (b'{"model": "\xff\xfe"}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b"[" * 100_000, 400),
        (b"x" * 10_000_000, 413),
    ],
)
def test_broken_bodies(smol: Cluster, content: bytes, status: int) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = post(smol, content, path)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(smol: Cluster, value: str) -> None:
    for field in ("temperature", "top_p", "presence_penalty", "repetition_penalty", "min_p"):
        content = f'{{"model": "{smol.model}", "prompt": "Hello", "max_tokens": 2, "{field}": {value}}}'
        answer = post(smol, content)
        assert answer.status_code == 400, (field, answer.text)


def test_chat_garbage(smol: Cluster) -> None:
    for messages in (
        [],
        None,
        "hi",
        [{}],
        [{"role": "user"}],
        [{"role": 5, "content": "x"}],
        [{"role": "user", "content": 5}],
    ):
        answer = post(smol, json.dumps({"model": smol.model, "messages": messages}), "/v1/chat/completions")
        assert answer.status_code == 400, (messages, answer.text)


def test_unknown_paths_and_methods(smol: Cluster) -> None:
    assert HTTP.get(smol.url + "/v1/nothing", timeout=5).json()["error"]["message"]
    answer = HTTP.get(smol.url + "/v1/completions", timeout=5)
    assert answer.status_code == 405 and answer.json()["error"]["message"]


def test_it_still_serves_and_holds_nothing(smol: Cluster) -> None:
    assert smol.complete("The capital of France is", 8)["choices"][0]["text"]
    assert HTTP.get(smol.url + "/health", timeout=5).status_code == 200
    metrics = HTTP.get(smol.url + "/metrics", timeout=5).text
    assert "pd_serve" in metrics
    smol.assert_idle()


def test_the_longest_that_fits(smol: Cluster) -> None:
    answer = smol.complete([7] * 1000, 24, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 24
    smol.assert_idle()
