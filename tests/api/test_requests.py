"""What is accepted, what is not, and that the message says what to change."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.api.errors import APIError
from pd_serve.api.leniency import Leniency
from pd_serve.api.parsing import parse
from pd_serve.api.sampling import sampling_params
from pd_serve.api.schemas import ChatCompletionRequest, CompletionRequest, TokenizeRequest
from pd_serve.api.text_model import TextModel
from tests.api import tiny

MODEL = TextModel(tiny.bundle(), tiny.info())
HI = [{"role": "user", "content": "hi"}]
VOCAB = tiny.info().vocab_size
(A,) = MODEL.tokenizer.encode("a", add_special_tokens=False)


def completion(**fields: Any) -> tuple[CompletionRequest, Any]:
    request = parse(CompletionRequest, json.dumps({"model": "tiny", "prompt": "the fox", **fields}).encode())
    (prompt, *_) = MODEL.completion_prompts(request)
    return request, sampling_params(request, MODEL, len(prompt.ids))


def chat(**fields: Any) -> tuple[ChatCompletionRequest, Any]:
    request = parse(ChatCompletionRequest, json.dumps({"model": "tiny", "messages": HI, **fields}).encode())
    prompt = MODEL.chat_prompt(request)
    return request, sampling_params(request, MODEL, len(prompt.ids))


def test_the_models_sampling_defaults_stand_in_for_what_a_request_does_not_say() -> None:
    defaults = {"temperature": 0.2, "top_k": 20.0, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}
    model = TextModel(msgspec.structs.replace(tiny.bundle(), generation_defaults=defaults), tiny.info())

    def params(**fields: Any) -> dict[str, Any]:
        request = parse(CompletionRequest, json.dumps({"model": "tiny", "prompt": "a", **fields}).encode())
        found = sampling_params(request, model, 1)
        return {name: getattr(found, name) for name in defaults}

    assert params() == defaults
    own = {"temperature": 0.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert params(**own) == {**own, "top_k": 0}
    assert params(temperature=None, top_p=0.5) == {**defaults, "top_p": 0.5}


BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": [[1], []]}, "prompt", "empty"),
    ({"prompt": None}, "prompt", "empty"),
    ({"prompt": {}}, "prompt", "string"),
    ({"prompt": 5}, "prompt", "string"),
    ({"prompt": ["a", 5]}, "prompt", "string"),
    ({"prompt": [1.5]}, "prompt", "string"),
    ({"prompt": [True]}, "prompt", "string"),
    ({"prompt": [-1]}, "prompt", "token id -1"),
    ({"prompt": [VOCAB]}, "prompt", f"0 to {VOCAB - 1}"),
    ({"prompt": [[1], [2**70]]}, "prompt", "out of range"),
    ({"prompt": [1] * 512}, "prompt", "shorten the prompt"),
    ({"prompt": [1] * 500, "max_tokens": 13}, "max_tokens", "at most 12"),
    ({"prompt": ["a"] * 1025}, "prompt", "1024"),
    ({"prompt": ["a"] * 100, "n": 100}, "prompt", "1024"),
    ({"max_tokens": -2}, "max_tokens", "greater than or equal to -1"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"max_tokens": "5"}, "max_tokens", "integer"),
    ({"max_tokens": 2**70}, "max_tokens", "at most"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 129}, "n", "128"),
    ({"n": True}, "n", "integer"),
    ({"best_of": 1, "n": 2}, "best_of", "at least 'n'"),
    ({"best_of": 2, "stream": True}, "best_of", "best_of"),
    ({"best_of": 129}, "best_of", "128"),
    ({"bad_words": "x"}, "bad_words", "list"),
    ({"bad_words": [5]}, "bad_words.0", "string"),
    ({"bad_words": ["a", "  "]}, "bad_words", "no space"),
    ({"bad_words": ["a" * 257]}, "bad_words", "256 characters"),
    ({"bad_words": ["a"] * 257}, "bad_words", "256 bad words"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
    ({"allowed_token_ids": [1.5]}, "allowed_token_ids.0", "integer"),
    ({"allowed_token_ids": [1, VOCAB]}, "allowed_token_ids", "out of range"),
    ({"allowed_token_ids": [A], "bad_words": ["a"]}, "bad_words", "allow another"),
    ({"allowed_token_ids": [A], "stop_token_ids": [A], "min_tokens": 1}, "min_tokens", "nothing but ends"),
    ({"cache_salt": ""}, "cache_salt", "at least 1"),
    ({"cache_salt": 5}, "cache_salt", "string"),
    ({"cache_salt": "x" * 1025}, "cache_salt", "1024"),
    ({"return_tokens_as_token_ids": "yes"}, "return_tokens_as_token_ids", "boolean"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.01}, "top_p", "less than or equal to 1"),
    ({"top_k": -2}, "top_k", "-1"),
    ({"min_p": 2}, "min_p", "less than or equal to 1"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"presence_penalty": 3}, "presence_penalty", "2"),
    ({"logprobs": 21}, "logprobs", "20"),
    ({"logprobs": 1.5}, "logprobs", "integer"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "20"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "prompt_logprobs"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
    ({"min_tokens": 17}, "min_tokens", "max_tokens"),
    ({"stop": [str(i) for i in range(1000)]}, "stop", "16"),
    ({"stop": ""}, "stop", "empty"),
    ({"stop": ["a", ""]}, "stop", "empty"),
    ({"stop": [1]}, "stop", "string"),
    ({"stop": "x" * 1025}, "stop", "1024"),
    ({"stop_token_ids": [VOCAB]}, "stop_token_ids", "out of range"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids", "128"),
    ({"logit_bias": {str(VOCAB): 1}}, "logit_bias", "out of range"),
    ({"logit_bias": {"the": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "100"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1024"),
    ({"seed": 2**64}, "seed", "less than"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"include_use": True}}, "stream_options.include_use", "include_usage"),
    ({"temprature": 1}, "temprature", "'temperature'"),
    ({"max_token": 1}, "max_token", "'max_tokens'"),
    ({"messages": HI}, "messages", "unknown field"),
    ({"suffix": "x"}, "suffix", "does not fill in text"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
    ({"repeat_penalty": 1.1}, "repeat_penalty", "use 'repetition_penalty'"),
    ({"grammar": "root ::= [a-z]"}, "grammar", "use 'structured_outputs'"),
    ({"use_beam_search": True}, "use_beam_search", "not supported"),
    ({"model": 5}, "model", "string"),
]


@pytest.mark.parametrize(("fields", "param", "hint"), BAD_COMPLETIONS, ids=lambda v: str(v)[:40])
def test_bad_completions(fields: dict[str, Any], param: str | None, hint: str) -> None:
    with pytest.raises(APIError) as caught:
        completion(**fields)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert hint in caught.value.message


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [3]}, "messages.0: must be a JSON object"),
    ({"tools": ["f"]}, "tools.0: must be a JSON object"),
    ({"messages": [{}]}, "role"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"messages": [{"role": 5, "content": "x"}]}, "role"),
    ({"messages": [{"role": "user", "content": 5}]}, "text parts"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url"),
    ({"messages": [{"role": "user", "content": "x", "contnt": "y"}]}, "'content'"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": []}]}]}, "function"),
    ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "tool_calls"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "differ"),
    ({"max_completion_tokens": 512}, "max_tokens"),
    ({"top_logprobs": 2}, "logprobs"),
    ({"logprobs": 2}, "boolean"),
    ({"logprobs": True, "top_logprobs": 21}, "20"),
    ({"tools": [{"type": "retrieval"}]}, "function"),
    ({"tools": [{"type": "function"}]}, "required"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": allowed("auto", "f")}, "not among 'tools': 'f'"),
    ({"tool_choice": allowed("never", "f")}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"reasoning_effort": 5}, "reasoning_effort"),
    ({"chat_template": "{{ x }}"}, "chat_template_kwargs"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "both"),
    ({"chat_template_kwargs": {"messages": []}}, "messages"),
    ({"prompt": "x"}, "prompt"),
]


@pytest.mark.parametrize(("fields", "hint"), BAD_CHATS, ids=lambda v: str(v)[:40])
def test_bad_chats(fields: dict[str, Any], hint: str) -> None:
    with pytest.raises(APIError) as caught:
        chat(**fields)
    assert caught.value.status == 400 and hint in caught.value.message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
def test_numbers_that_are_none(field: str, number: str) -> None:
    with pytest.raises(APIError) as caught:
        parse(CompletionRequest, f'{{"prompt": "x", "{field}": {number}}}'.encode())
    assert caught.value.param == field


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"a":' * 5000]
)
def test_bodies_that_are_no_objects(body: bytes) -> None:
    for kind in (CompletionRequest, ChatCompletionRequest, TokenizeRequest):
        with pytest.raises(APIError) as caught:
            parse(kind, body)
        assert caught.value.status == 400 and caught.value.message


def test_fields_that_contradict_each_other_are_named() -> None:
    for fields, param in (
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ):
        with pytest.raises(APIError) as caught:
            chat(**fields)
        assert caught.value.param == param


def test_tools_that_are_not_allowed_are_none_for_the_model() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in "fgh"]
    for mode in ("auto", "required"):
        asked, _ = chat(tools=tools, tool_choice=allowed(mode, "h", "f"))
        assert asked.tool_choice == mode and [tool.function.name for tool in asked.tools_shown or ()] == ["f", "h"]


def test_fields_without_effect_are_ignored() -> None:
    ignored = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "k"}
    text = {"type": "text"}
    completion(**ignored, response_format=text, suffix="", best_of=1)
    chat(**ignored, response_format=text, parallel_tool_calls=True, modalities=["text"], audio=None, tool_choice="auto")


def lenient(kind: Any = CompletionRequest, strict: bool = False, **fields: Any) -> Any:
    return parse(kind, json.dumps(fields).encode(), Leniency(strict=strict))


def test_unknown_fields_are_ignored_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    leniency = Leniency(strict=False)
    message = {"role": "user", "content": "x", "id": "m1", "provider_specific_fields": {}, "a\nb": 1}
    body = {
        "messages": [message],
        "temprature": 1,
        "user": "me",
        "provider": {"only": ["x"]},
        "reasoning": {"effort": "low"},
    }
    body |= {"stream": True, "stream_options": {"include_usage": True, "other": 1}}
    caplog.set_level("INFO", logger="pd_serve.api.leniency")
    for _ in range(2):
        assert parse(ChatCompletionRequest, json.dumps(body).encode(), leniency).wants_usage
    said = [record.getMessage() for record in caplog.records]
    for name in ("user", "provider", "reasoning", "id", "provider_specific_fields", "other", r"a\nb"):
        assert sum(f"field '{name}'" in line for line in said) == 1, (name, said)
    assert any("'temprature'" in line and "did you mean 'temperature'" in line for line in said)
    with pytest.raises(APIError, match="temprature"):
        parse(ChatCompletionRequest, json.dumps(body).encode(), Leniency(strict=True))
    for number in range(1000):  # names are the clients': memory does not grow with them
        parse(CompletionRequest, json.dumps({"prompt": "x", f"x{number}": 1}).encode(), leniency)
    assert len(leniency._seen) <= 256


def test_whole_numbers_written_as_floats() -> None:
    fields = {"max_tokens": 8, "n": 2, "seed": 5, "top_k": 40, "min_tokens": 1, "logprobs": 3, "best_of": 2}
    floats = {name: float(value) for name, value in fields.items()}
    assert (
        completion(prompt=[1.0, 2.0], stop_token_ids=[3.0], **floats)[1]
        == completion(prompt=[1, 2], stop_token_ids=[3], **fields)[1]
    )
    assert lenient(prompt=[[1.0], [2, 3.0]]).prompt == [[1], [2, 3]]
    assert lenient(prompt=["a", [1]]).prompt == ["a", [1]]
    with pytest.raises(APIError, match="max_tokens"):
        lenient(prompt="x", max_tokens=8.5)


def test_values_that_mean_the_default() -> None:
    assert lenient(prompt="x", model=None).model == ""
    assert completion(seed=-1)[1].seed != completion(seed=-1)[1].seed
    assert completion(prompt=[1] * 12, max_tokens=-1)[1].max_tokens == 500
    assert chat(max_tokens=-1)[1].max_tokens == chat()[1].max_tokens == chat(max_completion_tokens=-1.0)[1].max_tokens
    assert completion(logprobs=False)[1].logprobs == -1 and completion(logprobs=True)[1].logprobs == 1


def test_prompt_logprobs() -> None:
    assert completion(prompt_logprobs=2)[1].prompt_logprobs == 2 and completion(prompt_logprobs=2)[1].logprobs == -1
    assert completion(prompt_logprobs=1, echo=True, logprobs=4)[1].prompt_logprobs == 4
    assert chat(prompt_logprobs=0)[1].prompt_logprobs == 0


def test_prompts_are_cut_from_the_left() -> None:
    def ids(kind: Any = CompletionRequest, **fields: Any) -> Any:
        request = lenient(kind, **fields)
        if kind is ChatCompletionRequest:
            return MODEL.chat_prompt(request)
        return MODEL.completion_prompts(request)[0]

    long = list(range(1, 300)) * 2
    assert ids(prompt=long, truncate_prompt_tokens=3) == (long[-3:], None, None)
    assert ids(prompt=[1, 2], truncate_prompt_tokens=3).ids == [1, 2]
    assert ids(prompt=long, truncate_prompt_tokens=-1, max_tokens=12).ids == long[-500:]
    whole = ids(prompt="the fox " * 3000, truncate_prompt_tokens=5)
    assert len(whole.ids) == 5 and whole.text is None
    assert len(ids(ChatCompletionRequest, messages=HI, truncate_prompt_tokens=2).ids) == 2


def test_variables_of_templates() -> None:
    request = lenient(ChatCompletionRequest, messages=HI, reasoning_effort="low", enable_thinking=False)
    assert request.template_variables == {"reasoning_effort": "low", "enable_thinking": False, "thinking": False}
    request = lenient(
        ChatCompletionRequest, messages=HI, reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "x"}
    )
    assert request.template_variables == {"reasoning_effort": "x"}


def test_null_is_the_default() -> None:
    names = [name for name in CompletionRequest.model_fields if name not in ("prompt", "model")]
    plain, sampling = completion(seed=1)
    assert completion(**dict.fromkeys(names), model="")[1] != sampling  # another seed
    assert completion(**{**dict.fromkeys(names), "seed": 1})[1] == sampling
    assert plain.choices == 1


def test_sampling_defaults_are_openais() -> None:
    _, sampling = completion()
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.logprobs) == (16, 1.0, 1.0, -1)
    request, sampling = chat()
    assert sampling.max_tokens == 512 - len(MODEL.chat_prompt(request).ids)
    assert completion(prompt=[1] * 510)[1].max_tokens == 2  # the default fits itself to what is left


def test_sampling_fields_arrive() -> None:
    _, sampling = completion(
        max_tokens=9,
        temperature=1e-9,
        top_k=-1,
        top_p=0.5,
        min_p=0.1,
        seed=-3,
        stop_token_ids=[5],
        logit_bias={"3": -100},
        min_tokens=2,
        ignore_eos=True,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.2,
        logprobs=0,
    )
    assert sampling.temperature == 0.0  # dividing by it would overflow
    assert sampling.top_k == 0 and sampling.seed == 2**64 - 3 and sampling.logit_bias == {3: -100.0}
    assert (sampling.stop_token_ids, sampling.min_tokens, sampling.ignore_eos) == ((5,), 2, True)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (0, -1)
    assert completion(echo=True, logprobs=3)[1].prompt_logprobs == 3
    assert chat(logprobs=True)[1].logprobs == 0 and chat(logprobs=True, top_logprobs=4)[1].logprobs == 4
    assert completion()[1].seed != completion()[1].seed


def test_words_and_tokens_that_may_not_be() -> None:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(MODEL.tokenizer.encode(text, add_special_tokens=False))

    for made in (completion, chat):
        _, sampling = made(bad_words=["fox", " the fox"], allowed_token_ids=[5, 3.0, 5])
        assert sampling.bad_words == tuple(dict.fromkeys(map(ids, ("fox", " fox", "the fox", " the fox"))))
        assert sampling.allowed_token_ids == (5, 3)
        assert made(bad_words=[], cache_salt="s", kv_transfer_params={"x": 1})[1].bad_words == ()


def test_the_longest_that_fits() -> None:
    completion(prompt=[1] * 511, max_tokens=1)
    completion(prompt=[1] * 500, max_tokens=12)


def test_text_of_megabytes_is_refused_without_tokenising_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = type(MODEL.tokenizer).encode

    def spy(self: Any, text: str, **options: bool) -> list[int]:
        seen.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(type(MODEL.tokenizer), "encode", spy)
    for text in ("the fox " * 500_000, "a" * 4_000_000):
        with pytest.raises(APIError, match="shorten the prompt"):
            completion(prompt=text)
    assert sum(seen) < 100_000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
fields = st.sampled_from([*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields, "user", "suffix", "x"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(fields, json_values, max_size=6), st.booleans())
def test_any_json_is_a_request_or_a_400(body: dict[str, Any], chatting: bool) -> None:
    try:
        (chat if chatting else completion)(**body)
    except APIError as error:
        assert error.status == 400 and error.message and json.loads(error.body("id"))["error"]["message"]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_400(body: bytes) -> None:
    with pytest.raises(APIError) as caught:
        parse(ChatCompletionRequest, body)
    assert caught.value.status == 400
