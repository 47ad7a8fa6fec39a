"""Fields of vLLM against the real system: what a prefill node samples first and a decode node goes on with."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.cluster import HTTP, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

PROMPT = "The capital of France is"


def complete(smol: Cluster, **fields: Any) -> dict[str, Any]:
    body = {"model": smol.model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    answer = HTTP.post(f"{smol.url}/v1/completions", json=body | fields, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_words_that_must_not_be(smol: Cluster) -> None:
    plain = complete(smol)["choices"][0]
    assert "Paris" in plain["text"]
    ids = plain["token_ids"]
    assert "Paris" not in complete(smol, bad_words=["Paris"])["choices"][0]["text"]
    # of two tokens: the second one, which the decode node samples, is another; the first stays
    two = HTTP.post(f"{smol.url}/detokenize", json={"tokens": ids[:2]}, timeout=20).json()["prompt"]
    changed = complete(smol, bad_words=[two])["choices"][0]["token_ids"]
    assert changed[0] == ids[0] and changed[1] != ids[1]
    some = sorted({ids[0], 10, 11, 12})
    assert set(complete(smol, allowed_token_ids=some, temperature=1, seed=1)["choices"][0]["token_ids"]) <= set(some)


def test_salts_keep_prompts_apart(smol: Cluster) -> None:
    def cached(salt: str | None) -> int:
        answer = complete(smol, prompt=[900 + at for at in range(200)], cache_salt=salt, max_tokens=2)
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached("mine"), cached("yours"), cached(None)] == [0, 0, 0]
    assert min(cached("mine"), cached("yours"), cached(None)) >= 128
    smol.assert_idle()


def test_the_best_is_the_likeliest(smol: Cluster) -> None:
    asked = {"temperature": 1.5, "seed": 7, "max_tokens": 6}
    made = complete(smol, n=4, logprobs=0, **asked)["choices"]
    scores = [choice["logprobs"]["token_logprobs"] for choice in made]
    order = sorted(range(4), key=lambda at: -sum(scores[at]) / len(scores[at]))
    best = complete(smol, n=2, best_of=4, **asked)["choices"]
    assert [choice["token_ids"] for choice in best] == [made[at]["token_ids"] for at in order[:2]]


def test_what_stopped_it(smol: Cluster) -> None:
    ids = complete(smol)["choices"][0]["token_ids"]
    assert complete(smol, stop_token_ids=[ids[3]])["choices"][0]["stop_reason"] == ids[3]
    assert complete(smol, stop=["Paris"])["choices"][0]["stop_reason"] == "Paris"
    assert complete(smol)["choices"][0]["stop_reason"] is None
