"""The Responses and the Messages API as translations: requests to chats, chunks of chats to events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_serve.api.errors import APIError
from pd_serve.api.leniency import Leniency
from pd_serve.api.messages_api.events import MessageFormat
from pd_serve.api.messages_api.request import CountTokensRequest, MessagesRequest
from pd_serve.api.parsing import parse
from pd_serve.api.responses import Finish, Usage
from pd_serve.api.responses_api.events import ResponsesFormat
from pd_serve.api.responses_api.request import ResponsesRequest
from pd_serve.api.schemas import ChatCompletionRequest
from pd_serve.api.translated import NOTHING, TranslatedFormat

LENIENT = Leniency(strict=False)
USAGE = Usage(9, 5, 4)


def responses(**fields: Any) -> ChatCompletionRequest:
    body = json.dumps({"model": "m", "input": "hi", **fields}).encode()
    return parse(ResponsesRequest, body, LENIENT).chat(LENIENT)


def messages(kind: type[CountTokensRequest] = MessagesRequest, **fields: Any) -> ChatCompletionRequest:
    said = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse(kind, json.dumps(said).encode(), LENIENT).chat(LENIENT)


def spoken(chat: ChatCompletionRequest) -> list[dict[str, Any]]:
    return [message.model_dump(exclude_unset=True) for message in chat.messages]


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    {"role": "assistant", "content": "I call", "tool_calls": [CALL], "reasoning_content": "so"},
    {"role": "tool", "tool_call_id": "c1", "content": "done"},
    {"role": "user", "content": "go on"},
]


ITEM_CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}', "id": "fc_1"}
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I call"}]},
    ITEM_CALL,
    {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "done"}]},
    {"role": "user", "content": "go on"},
]
BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "so", "signature": "x"},
            {"type": "redacted_thinking", "data": "?"},
            {"type": "text", "text": "I call", "cache_control": {"type": "ephemeral"}},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "done"}]},
            {"type": "text", "text": "go on"},
        ],
    },
]
TOOL = {"name": "f", "description": "d"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def test_a_conversation_of_items_is_one_of_messages() -> None:
    assert spoken(responses(instructions="be brief", input=ITEMS)) == CONVERSATION
    again = {**ITEM_CALL, "call_id": "c2"}
    turns = spoken(responses(input=[ITEM_CALL, again, {"role": "assistant", "content": "x"}, ITEM_CALL]))
    assert [[c["id"] for c in turn.get("tool_calls", ())] for turn in turns] == [["c1", "c2"], ["c1"]]


def test_a_conversation_of_blocks_is_one_of_messages() -> None:
    system = [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}]
    chat = messages(system=system, messages=BLOCKS)
    assert spoken(chat) == CONVERSATION and not chat.continue_final_message
    prefilled = messages(messages=[*BLOCKS, {"role": "assistant", "content": "Well,"}])
    assert prefilled.continue_final_message and prefilled.add_generation_prompt is False


def test_settings_keep_their_meaning() -> None:
    chat = responses(max_output_tokens=7, temperature=0.5, seed=3, top_logprobs=2, store=True, stream=True, user="u")
    assert (chat.max_completion_tokens, chat.temperature, chat.seed) == (7, 0.5, 3)
    assert (chat.logprobs, chat.top_logprobs, chat.stream) == (True, 2, True)
    assert responses(include=["message.output_text.logprobs", "reasoning.encrypted_content"]).logprobs
    assert responses(reasoning={"effort": "low", "summary": "auto"}).reasoning_effort == "low"
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    chat = responses(tools=[{"type": "function", **function}], tool_choice="auto")
    assert chat.tools is not None and chat.tools[0].function.model_dump() == function
    tool = {"name": "f", "description": "d", "input_schema": {"type": "object"}}
    chat = messages(tools=[tool], tool_choice={"type": "none"}, stop_sequences=["END"], top_k=4, metadata={"x": 1})
    assert chat.tools is not None and chat.tools[0].function.model_dump() == function
    assert (chat.tool_choice, chat.stop, chat.top_k, chat.max_tokens) == ("none", ["END"], 4, None)
    assert messages(thinking={"type": "disabled"}).enable_thinking is False
    assert messages(thinking={"type": "enabled", "budget_tokens": 1024}).enable_thinking is True
    assert messages(thinking={"type": "adaptive"}, output_config={"effort": "high"}).enable_thinking is None


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not stored"),
        ({"conversation": "c", "store": True}, "conversation", "not stored"),
        ({"prompt": {"id": "p"}}, "prompt", "templates"),
        ({"background": True}, "background", "stream"),
        ({"truncation": "auto"}, "truncation", "oldest items"),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format", "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "'web_search' are not supported"),
        ({"tools": [{"type": "function"}]}, "tools.0.name", "needs a 'name'"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "file_search"),
        ({"input": []}, "input", "empty"),
        ({"input": [5]}, "input.0", "object"),
        ({"input": [IMAGE]}, "input.0.content.0", "input_image"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "not stored"),
        ({"input": [{"type": "web_search_call"}]}, "input.0", "web_search_call"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role", "user, assistant"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0", "call_id"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"n": 2}, "n", "'n' is not supported"),
        ({"input": None}, "input", "valid"),
    ],
)
def test_what_the_responses_api_cannot_do_is_said(fields: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(APIError, match=words) as caught:
        responses(**fields)
    assert caught.value.status == 400
    assert param is None or (caught.value.param or "").startswith(param)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": None}, "max_tokens", "integer"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0", "'image'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "user or assistant"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "blocks"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages.0.content.0", "'id'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages.0.content.0", "tool_use_id"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0", "bash_20250124"),
        ({"tools": [{"name": "f"}]}, "tools.0", "input_schema"),
        ({"tool_choice": {"type": "required"}}, "tool_choice.type", "any, tool"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers", "yourself"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format", "json_schema"),
        ({"max_output_tokens": 5}, "max_output_tokens", "has 'max_tokens' instead"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "not supported"),
        ({"thinking": {"type": "deep"}}, "thinking.type", "enabled"),
    ],
)
def test_what_the_messages_api_cannot_do_is_said(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(APIError, match=words) as caught:
        messages(**fields)
    assert caught.value.status == 400 and caught.value.param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.sampled_from(["", "auto", "function", "text", "c1"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "name"]), inner, max_size=2),
    max_leaves=3,
)
REQUESTS: list[tuple[Any, dict[str, Any]]] = [
    (
        ResponsesRequest,
        {
            "input": ITEMS,
            "instructions": "x",
            "tools": [{"type": "function", **TOOL, "parameters": SCHEMA}],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            "reasoning": {"effort": "low"},
            "text": {"format": {"type": "text"}},
            "include": ["message.output_text.logprobs"],
        },
    ),
    (
        MessagesRequest,
        {
            "messages": BLOCKS,
            "max_tokens": 5,
            "system": [{"type": "text", "text": "x"}],
            "tools": [{**TOOL, "input_schema": SCHEMA}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "output_config": {"effort": "low"},
        },
    ),
]


@given(st.sampled_from(REQUESTS), st.data())
def test_whatever_is_sent_is_a_chat_or_a_clear_error(request: tuple[Any, dict[str, Any]], data: st.DataObject) -> None:
    kind, body = request
    body = place = json.loads(json.dumps(body))
    parse(kind, json.dumps(body).encode(), LENIENT).chat(LENIENT)
    while True:  # somewhere in it stands something else
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not place[key] or not isinstance(place[key], dict | list) or data.draw(st.integers(0, 3)) == 0:
            place[key] = data.draw(JSON)
            break
        place = place[key]
    try:
        parse(kind, json.dumps(body).encode(), LENIENT).chat(LENIENT)
    except APIError as error:
        assert error.status == 400 and error.message


def test_counting_needs_no_limit() -> None:
    counted = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert spoken(parse(CountTokensRequest, json.dumps(counted).encode(), LENIENT).chat(LENIENT))


# --- answers --------------------------------------------------------------------------------------------

REASONS = st.sampled_from(["stop", "length", "tool_calls"])
TEXTS = st.text(max_size=12)


@st.composite
def answers(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A chat's whole message, and the same as deltas, split anywhere."""
    reasoning, content = draw(TEXTS), draw(TEXTS)
    arguments = draw(st.lists(st.dictionaries(TEXTS, st.integers(), max_size=2).map(json.dumps), max_size=3))
    calls = [
        {"id": f"call_{n}", "type": "function", "function": {"name": f"f{n}", "arguments": text}}
        for n, text in enumerate(arguments)
    ]

    def split(text: str) -> list[str]:
        cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    deltas: list[dict[str, Any]] = [{"reasoning_content": piece} for piece in split(reasoning)]
    deltas += [{"content": piece} for piece in split(content)]
    for number, call in enumerate(calls):
        head, *rest = split(arguments[number])
        deltas.append(
            {"tool_calls": [{**call, "index": number, "function": {"name": f"f{number}", "arguments": head}}]}
        )
        deltas += [{"tool_calls": [{"index": number, "function": {"arguments": piece}}]} for piece in rest]
    return {"content": content, "reasoning_content": reasoning, "tool_calls": calls}, deltas


def response_format() -> ResponsesFormat:
    return ResponsesFormat({"metadata": {}}, id="r-1", created_s=1, model="m", usage=lambda: USAGE)


def message_format() -> MessageFormat:
    return MessageFormat(5, id="r-1", created_s=1, model="m", usage=lambda: USAGE)


def streamed(format: TranslatedFormat, deltas: Iterable[dict[str, Any]], finish: Finish) -> list[dict[str, Any]]:
    """The events as documents; their names must be their types."""
    raw = format.first(0)
    for delta in deltas:
        plain = delta.get("content") if delta.keys() == {"content"} else None
        raw += format.text(0, plain) if plain is not None else format.chunk(0, "", message=delta)
    raw += format.chunk(0, "", finish=finish) + format.end(USAGE)
    return list(events(raw))


def events(raw: bytes) -> Iterator[dict[str, Any]]:
    for block in raw.replace(NOTHING, b"").decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        yield document


def whole(format: TranslatedFormat, message: dict[str, Any], finish: Finish) -> dict[str, Any]:
    choice = {"message": message, "logprobs": None, "finish_reason": finish.reason, "stop_reason": finish.stop}
    return dict(json.loads(format.document([choice], USAGE)))


def added_up(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client of the Responses API makes of the events before the last."""
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"] for event in found[:2]] == ["response.created", "response.in_progress"]
    output: list[Any] = []
    for event in found[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(output) and event["item"]["status"] == "in_progress"
            output.append(event["item"])
            continue
        item = output[event["output_index"]]
        assert event["output_index"] == len(output) - 1 and event.get("item_id", item["id"]) == item["id"]
        if kind == "content_part.added":
            item["content"].append(event["part"])
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            item["content"][event["content_index"]]["text"] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert item["content"][event["content_index"]]["text"] == event["text"]
        elif kind == "content_part.done":
            assert item["content"][event["content_index"]] == event["part"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert item["arguments"] == event["arguments"]
        else:
            assert kind == "output_item.done" and event["item"] == {**item, "status": event["item"]["status"]}
            output[-1] = event["item"]
    return {**found[0]["response"], "output": output}


@given(answers(), REASONS)
def test_a_responses_events_add_up_to_the_whole(answer: Any, reason: str) -> None:
    message, deltas = answer
    finish = Finish(reason)
    expected = whole(response_format(), message, finish)
    found = streamed(response_format(), deltas, finish)
    assert found[-1]["response"] == expected
    assert found[-1]["type"] == f"response.{expected['status']}"
    assert added_up(found)["output"] == expected["output"]
    kinds = [item["type"] for item in expected["output"]]
    said = ["reasoning"] * bool(message["reasoning_content"]) + ["message"] * bool(message["content"])
    assert kinds == (said + ["function_call"] * len(message["tool_calls"]) or ["message"])
    assert expected["usage"]["input_tokens_details"]["cached_tokens"] == 4
    statuses = [item["status"] for item in expected["output"]]
    assert set(statuses[:-1]) <= {"completed"}
    assert (expected["status"] == "incomplete") == (reason == "length") == (expected["incomplete_details"] is not None)


@given(answers(), REASONS)
def test_a_messages_events_add_up_to_the_whole(answer: Any, reason: str) -> None:
    message, deltas = answer
    finish = Finish(reason)
    expected = whole(message_format(), message, finish)
    found = streamed(message_format(), deltas, finish)
    assert [found[0]["type"], *(event["type"] for event in found[-2:])] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]
    built = found[0]["message"] | found[-2]["delta"] | {"usage": found[-2]["usage"], "content": []}
    arguments = ""
    for event in found[1:-2]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(built["content"])
            built["content"].append(event["content_block"])
            arguments = ""
            continue
        assert event["index"] == len(built["content"]) - 1
        block = built["content"][-1]
        if event["type"] == "content_block_delta":
            match event["delta"]:
                case {"type": "text_delta", "text": text}:
                    block["text"] += text
                case {"type": "thinking_delta", "thinking": text}:
                    block["thinking"] += text
                case {"type": "signature_delta", "signature": text}:
                    block["signature"] = text
                case {"type": "input_json_delta", "partial_json": text}:
                    arguments += text
        else:
            assert event["type"] == "content_block_stop"
            if block["type"] == "tool_use":
                block["input"] = json.loads(arguments or "{}")
    assert built == expected
    assert expected["usage"] == {
        "input_tokens": 5,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 5,
    }
    assert expected["stop_reason"] == {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[reason]


def test_why_a_message_ended() -> None:
    said = {"content": "x"}
    stopped = whole(message_format(), said, Finish("stop", "END"))
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "END")
    assert whole(message_format(), said, Finish("stop", 7))["stop_reason"] == "end_turn"
    wanted_more = MessageFormat(99, id="r-1", created_s=1, model="m", usage=lambda: USAGE)
    assert whole(wanted_more, said, Finish("length"))["stop_reason"] == "model_context_window_exceeded"


def test_arguments_that_are_no_object_reach_the_client_as_one() -> None:
    call = {"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "[1"}}]}
    (block,) = whole(message_format(), call, Finish("tool_calls"))["content"]
    assert block == {"type": "tool_use", "id": "c", "name": "f", "input": {"arguments": "[1"}}


def test_log_probabilities_wait_for_their_text() -> None:
    def score(token: str) -> dict[str, Any]:
        return {"token": token, "logprob": -1.0, "bytes": [], "top_logprobs": []}

    format = response_format()
    raw = format.first(0)
    for text, tokens in (("", ["a"]), ("é", ["b"]), ("", ["c"])):
        raw += format.chunk(0, text, logprobs={"content": [score(token) for token in tokens]})
    found = list(events(raw + format.chunk(0, "", finish=Finish("stop"))))
    deltas = [event for event in found if event["type"] == "response.output_text.delta"]
    assert [[entry["token"] for entry in event["logprobs"]] for event in deltas] == [["a", "b"], ["c"]]
    assert "".join(event["delta"] for event in deltas) == "é"
    (part,) = found[-1]["response"]["output"][0]["content"]
    assert [entry["token"] for entry in part["logprobs"]] == ["a", "b", "c"]


@pytest.mark.parametrize("begun", [False, True])
def test_an_error_in_a_stream_is_told_as_its_api_tells_it(begun: bool) -> None:
    error = APIError(503, "nodes are gone")
    format: TranslatedFormat = response_format()
    raw = format.first(0) + format.text(0, "half") if begun else b""
    found = list(events(raw + format.error_event(error, "id")))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert found[0]["type"] == "response.created" and found[-1]["type"] == "response.failed"
    failed = found[-1]["response"]
    assert (failed["status"], failed["error"]) == ("failed", {"code": "server_error", "message": "nodes are gone"})
    assert [item["status"] for item in failed["output"]] == ["incomplete"] * begun

    format = message_format()
    raw = format.first(0) + format.text(0, "half") + format.keep_alive() if begun else b""
    *before, last = events(raw + format.error_event(error, "id"))
    assert last == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "nodes are gone"},
        "request_id": "id",
    }
    assert [event["type"] for event in before[-1:]] == ["ping"] * begun
