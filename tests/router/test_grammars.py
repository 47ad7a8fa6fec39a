"""Structured output at the router: what nodes are asked for, and what is refused before they hear of it."""

from __future__ import annotations

from tests.router.conftest import StartNode, StartRouter

PROMPT = {"prompt": "the", "max_tokens": 4}


async def test_a_grammar_reaches_both_nodes_checked(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    router = await start_router(prefill, decode)
    answer = await router.post("/v1/completions", **PROMPT, response_format={"type": "json_object"}, n=2)
    assert answer.status_code == 200, answer.text
    grammars = {submit.sampling.grammar for node in (prefill, decode) for submit in node.submits}
    (grammar,) = grammars
    assert grammar is not None and grammar.kind == "lowered" and '"object"' in grammar.text

    wrong = await router.post("/v1/completions", **PROMPT, structured_outputs={"regex": "(a"})
    error = wrong.json()["error"]
    assert (wrong.status_code, error["param"], error["code"]) == (400, "structured_outputs.regex", "invalid_grammar")
    assert "unclosed group" in error["message"]
    assert len(prefill.submits) == len(decode.submits) == 2


async def test_a_node_that_knows_no_grammars_is_named(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode", grammars=False)
    router = await start_router(prefill, decode)
    answer = await router.post("/v1/completions", **PROMPT, guided_choice=["a"])
    assert answer.status_code == 501
    message = answer.json()["error"]["message"]
    assert f"node {decode.id} knows no grammars" in message and "pd-serve[structured]" in message
    assert not prefill.submits
    assert (await router.post("/v1/completions", **PROMPT)).status_code == 200
