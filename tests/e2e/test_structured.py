"""Structured output of a model that knows nothing, over a prefill and two decode nodes, one of which dies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import tiny_model
from tests.e2e.cluster import HTTP, Cluster, cluster
from tests.e2e.test_failures import busy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 4},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
LONG = {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{4,9}$"}, "minItems": 40, "maxItems": 45}
COMPACT = {"disable_any_whitespace": True}


def ask(nodes: Cluster, **body: Any) -> Any:
    messages = [{"role": "user", "content": "Who is it? " * 12}]
    body = {"messages": messages, "max_tokens": 400, **body}
    return HTTP.post(f"{nodes.url}/v1/chat/completions", json=body, timeout=60)


def choices(answer: Any) -> list[Any]:
    assert answer.status_code == 200, answer.text
    assert all(choice["finish_reason"] == "stop" for choice in answer.json()["choices"]), answer.text
    return list(answer.json()["choices"])


def test_a_model_that_knows_nothing_answers_in_form(tmp_path: Path) -> None:
    model = tiny_model.write(tmp_path / "model")
    flags: dict[str, Any] = {"local_prefill_tokens": 0, "kv_cache_memory": "32MiB"}
    with cluster(tmp_path, decode=2, model=model, **flags) as nodes:
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
        found = choices(ask(nodes, response_format=form, n=3, seed=1, logprobs=True, top_logprobs=2))
        people = [json.loads(choice["message"]["content"]) for choice in found]
        for person in people:
            assert person.keys() == {"name", "tags"} and {*person["tags"]} <= {"red", "green", "blue"}
        assert len({json.dumps(person) for person in people}) == 3
        assert all(part["logprob"] > -100 for choice in found for part in choice["logprobs"]["content"])
        again = choices(ask(nodes, response_format=form, n=3, seed=1))
        assert [c["message"]["content"] for c in again] == [c["message"]["content"] for c in found]

        assert isinstance(json.loads(one(ask(nodes, response_format={"type": "json_object"}, seed=6))), dict)
        assert one(ask(nodes, guided_choice=["left", "right"], max_tokens=20)) in ("left", "right")
        assert one(ask(nodes, structured_outputs={"regex": "[ab]{3}"}, ignore_eos=True)).strip("ab") == ""
        check_refusals(nodes)

        with HTTP.stream("POST", f"{nodes.url}/v1/completions", json=long_request(nodes), timeout=60) as stream:
            lines = (line for line in stream.iter_lines() if line.startswith("data: {"))
            texts = [event_text(next(lines)) for _ in range(20)]
            victim = busy(nodes, nodes.decodes)
            assert victim is not None
            victim.kill()
            texts += map(event_text, lines)
        assert 40 <= len(json.loads("".join(texts))) <= 45
        assert sum(node.get("/v1/status")["counters"].get("failures_invalid", 0) for node in nodes.prefills) == 0
        nothing = ask(nodes, guided_choice=["left"], bad_words=["left"], allowed_token_ids=[5, 6], stream=True)
        assert nothing.status_code == 400 and "permit none" in nothing.text


def one(answer: Any) -> str:
    return str(choices(answer)[0]["message"]["content"])


def event_text(line: str) -> str:
    return str(json.loads(line.removeprefix("data: "))["choices"][0]["text"])


def long_request(nodes: Cluster) -> dict[str, Any]:
    return {
        "prompt": "A list of words: " * 5,
        "structured_outputs": {"json": LONG, **COMPACT},
        "max_tokens": 900,
        "stream": True,
        "seed": 3,
    }


def check_refusals(nodes: Cluster) -> None:
    """None of these reaches a node."""
    many = {"type": "object", "properties": {f"p{i}": {} for i in range(9000)}}
    for field, value, why in (
        ("guided_json", {"type": "nothing"}, "Invalid type"),
        ("guided_json", "{", "EOF"),
        ("guided_json", {"if": {}}, "Unimplemented"),
        ("guided_regex", "(", "unclosed group"),
        ("guided_grammar", "root := nothing", "Expected ::="),
        ("guided_json", many, "takes "),  # more than 1 s to compile, or too long to find the first tokens
    ):
        answer = ask(nodes, **{field: value})
        assert answer.status_code == 400 and why in answer.json()["error"]["message"], answer.text
        assert answer.json()["error"]["param"] == field
    both = ask(nodes, guided_regex="a", guided_choice=["a"])
    assert both.status_code == 400 and "leave one" in both.text
