"""The served text is the model's: float32 greedy output over the whole path equals transformers'."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e import reference
from tests.e2e.cluster import HTTP, Cluster
from tests.e2e.prompts import chats, raw_prompts

OUTPUT_TOKENS = 32
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def serve(cluster: Cluster, path: str, bodies: list[dict[str, object]]) -> list[dict[str, object]]:
    """Answers to all bodies, asked at once."""

    def one(body: dict[str, object]) -> dict[str, object]:
        body = {"model": cluster.model, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **body}
        answer = HTTP.post(cluster.url + path, json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(one, bodies))


def check(directory: Path, answers: list[dict[str, object]]) -> None:
    lengths = []
    for answer in answers:
        choice = answer["choices"][0]  # type: ignore[index]
        prompt = choice.get("prompt_token_ids") or answer["prompt_token_ids"]
        output = choice["token_ids"]
        assert len(output) == OUTPUT_TOKENS
        assert reference.first_difference(directory, prompt, output) is None, (len(prompt), choice)
        lengths.append(len(prompt))
    assert min(lengths) <= 45  # a chat template adds some thirty tokens
    assert max(lengths) >= 800


def test_smollm2_raw(smol: Cluster, smollm2: Path) -> None:
    bodies: list[dict[str, object]] = [{"prompt": p, "max_tokens": OUTPUT_TOKENS} for p in raw_prompts()]
    check(smollm2, serve(smol, "/v1/completions", bodies))
    pulled = smol.decodes[0].get("/v1/status")["counters"]
    assert pulled["pulls"] >= 24 and pulled["pull_bytes"] > 0
    smol.assert_idle()


def test_smollm2_chat(smol: Cluster, smollm2: Path) -> None:
    from transformers import AutoTokenizer

    asked = [*chats()[::3], chats()[-1]]
    bodies: list[dict[str, object]] = [{"messages": m, "max_tokens": OUTPUT_TOKENS} for m in asked]
    answers = serve(smol, "/v1/chat/completions", bodies)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for messages, answer in zip(asked, answers, strict=True):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert answer["prompt_token_ids"] == ids
    check(smollm2, answers)
    smol.assert_idle()


def test_logprobs(smol: Cluster, smollm2: Path) -> None:
    body: dict[str, object] = {"prompt": raw_prompts()[17], "max_tokens": 24, "logprobs": 5}
    (answer,) = serve(smol, "/v1/completions", [body])
    choice = answer["choices"][0]  # type: ignore[index]
    prompt = choice.get("prompt_token_ids") or answer["prompt_token_ids"]
    rows = reference.logprobs(smollm2, prompt, choice["token_ids"])
    for i, token in enumerate(choice["token_ids"]):
        assert abs(choice["logprobs"]["token_logprobs"][i] - float(rows[i, token])) < 1e-3
        best = rows[i].topk(5).values.tolist()
        served = sorted(choice["logprobs"]["top_logprobs"][i].values(), reverse=True)[:5]
        assert all(abs(a - b) < 1e-3 for a, b in zip(best, served, strict=False))


def test_prompt_logprobs_with_echo(smol: Cluster, smollm2: Path) -> None:
    text = raw_prompts()[12]
    (answer,) = serve(smol, "/v1/completions", [{"prompt": text, "max_tokens": 2, "echo": True, "logprobs": 1}])
    choice = answer["choices"][0]  # type: ignore[index]
    prompt = choice.get("prompt_token_ids") or answer["prompt_token_ids"]
    assert choice["text"].startswith(text)
    rows = reference.logprobs(smollm2, prompt[:1], prompt[1:])
    served = choice["logprobs"]["token_logprobs"]
    assert served[0] is None
    for i, token in enumerate(prompt[1:]):
        assert abs(served[i + 1] - float(rows[i, token])) < 1e-3
