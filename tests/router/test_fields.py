"""Fields of vLLM beyond OpenAI's, from a request to what nodes are told and clients read."""

from __future__ import annotations

from tests.router.conftest import StartNode, StartRouter
from tests.router.scripted_node import expected
from tests.router.test_serving import PROMPT, TOKENIZER


async def test_what_is_restricted_and_salted_reaches_both_nodes(
    start_node: StartNode, start_router: StartRouter
) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    running = await start_router(prefill, decode)
    kept = {"kv_transfer_params": {"do_remote_prefill": True}, "max_tokens": 2}
    for salt in ("a", "a", "b", None):
        await running.complete(**kept, cache_salt=salt, bad_words=["the"], allowed_token_ids=[5, 6])
    for node in (prefill, decode):
        salts = [submit.salt for submit in node.submits]
        assert salts[0] == salts[1] != salts[2] and salts[3] == b""
        assert all(len(salt) == 32 for salt in salts[:3])
        assert {submit.sampling.allowed_token_ids for submit in node.submits} == {(5, 6)}
        assert all(
            (TOKENIZER.encode("the", add_special_tokens=False)[0],) in s.sampling.bad_words for s in node.submits
        )


async def test_tokens_called_by_their_ids(start_node: StartNode, start_router: StartRouter) -> None:
    running = await start_router(await start_node("prefill"), await start_node("decode"))
    asked = {"max_tokens": 3, "logprobs": 2, "return_tokens_as_token_ids": True}
    scores = (await running.complete(**asked, echo=True))["choices"][0]["logprobs"]
    names = [f"token_id:{id}" for id in (*PROMPT, *expected(PROMPT, 3))]
    assert scores["tokens"] == names and names[-1] in scores["top_logprobs"][-1]
    asked |= {"logprobs": True, "top_logprobs": 2, "messages": [{"role": "user", "content": "the fox"}]}
    (choice,) = (await running.post("/v1/chat/completions", temperature=0, **asked)).json()["choices"]
    for entry in choice["logprobs"]["content"]:
        for each in (entry, *entry["top_logprobs"]):
            id = int(each["token"].removeprefix("token_id:"))
            assert bytes(each["bytes"]) == TOKENIZER.token_bytes(id)


async def test_the_best_of_some(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    running = await start_router(prefill, decode)
    answer = await running.complete(["the fox", "a"], 3, best_of=3, n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 2 * 3 * 3 and len(decode.submits) == 6
    messages = [{"role": "user", "content": "hi"}]
    answer = (await running.post("/v1/chat/completions", messages=messages, max_tokens=2, best_of=2)).json()
    assert len(answer["choices"]) == 1 and answer["choices"][0]["logprobs"] is None
