"""Conversations as agents send them come out of every kind of template as transformers renders the repaired ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pd_serve.api.chat_template import ChatTemplates
from pd_serve.api.errors import APIError
from pd_serve.api.leniency import Leniency
from pd_serve.api.parsing import parse
from pd_serve.api.schemas import ChatCompletionRequest
from tests.api import families

TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}]
ID, SHORT = "call_Ab-1234567890", "234567890"


def said(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


CALLED = '{"name": "sum", "arguments": {"a": [1, "é"]}}'


def call(arguments: Any, id: str = ID) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "sum", "arguments": arguments}}


def calling(*calls: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", **fields, "tool_calls": list(calls)}


def result(content: Any, id: str = ID) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


HI, ANSWER, GO_ON = said("user", "hi"), said("assistant", "three"), said("user", "and now?")
TEXT = '{"a": [1, "é"]}'
VALUE = {"a": [1, "é"]}

CASES: list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = [
    # Content that is null or absent beside calls; arguments as text, empty, absent, broken.
    ("ONE_CALL", [HI, calling(call(TEXT), content=None), result("3")], [HI, calling(call(VALUE)), result("3")]),
    ("ONE_CALL", [HI, calling(call(TEXT)), result("3")], [HI, calling(call(VALUE)), result("3")]),
    ("ONE_CALL", [HI, calling(call("")), result("3")], [HI, calling(call({})), result("3")]),
    ("ONE_CALL", [HI, calling(call(None)), result(None)], [HI, calling(call({})), result("")]),
    ("ITEMS", [HI, calling(call('{"a": ')), result("no")], [HI, calling(call({"arguments": '{"a": '})), result("no")]),
    ("ITEMS", [HI, calling(call(TEXT)), result("3")], [HI, calling(call(VALUE)), result("3")]),
    (
        "NONE_OR_CALLS",
        [HI, calling(call(VALUE), content=""), result("3")],
        [HI, calling(call(TEXT), content=None), result("3")],
    ),
    (
        "NONE_OR_CALLS",
        [HI, calling(call(TEXT), content="Let me see."), result("3")],
        [HI, said("assistant", "Let me see."), calling(call(TEXT), content=None), result("3")],
    ),
    ("TURNS", [HI, calling(call(TEXT)), result("3")], [HI, calling(call(VALUE, SHORT)), result("3", SHORT)]),
    (
        "TURNS",
        [HI, calling(call(TEXT), content="Let me see."), result("3"), ANSWER, GO_ON],
        [HI, calling(call(VALUE, SHORT)), result("3", SHORT), ANSWER, GO_ON],
    ),
    (
        "ONE_CALL",
        [HI, calling(call(TEXT, "1"), call("{}", "2")), result("3", "1"), result("0", "2"), ANSWER],
        [HI, calling(call(VALUE)), result("3"), calling(call({})), result("0"), ANSWER],
    ),
    # Templates without tools: calls are text, results the user's where there is no such role.
    (
        "ANY_ROLE",
        [HI, calling(call(TEXT), content="Look:"), result("3")],
        [HI, said("assistant", f"Look:\n<tool_call>\n{CALLED}\n</tool_call>"), result("3")],
    ),
    (
        "NO_SYSTEM",
        [HI, calling(call("{}", "1"), call("{}", "2")), result("3", "1"), result("4", "2"), GO_ON],
        [
            HI,
            said("assistant", "\n".join(['<tool_call>\n{"name": "sum", "arguments": {}}\n</tool_call>'] * 2)),
            said("user", "3\n4\nand now?"),
        ],
    ),
    # Developers and systems.
    ("ONE_CALL", [said("developer", "brief"), HI], [said("system", "brief"), HI]),
    ("ANY_ROLE", [said("developer", "brief"), HI], [said("system", "brief"), HI]),
    ("DEVELOPER", [said("developer", "brief"), HI], [said("developer", "brief"), HI]),
    (
        "DEVELOPER",
        [said("system", "one"), said("developer", parts("two", "three")), HI],
        [said("system", "one\n\ntwo\nthree"), HI],
    ),
    (
        "TURNS",
        [said("system", "one"), HI, ANSWER, said("developer", "two"), GO_ON],
        [said("system", "one\n\ntwo"), HI, ANSWER, GO_ON],
    ),
    (
        "ANY_ROLE",
        [said("system", "one"), HI, ANSWER, said("system", "two"), GO_ON],
        [said("system", "one"), HI, ANSWER, said("system", "two"), GO_ON],
    ),
    ("NO_SYSTEM", [said("system", "brief"), HI, ANSWER, GO_ON], [said("user", "brief\n\nhi"), ANSWER, GO_ON]),
    # Parts and strings.
    ("ANY_ROLE", [said("user", parts("a", "b"))], [said("user", "a\nb")]),
    ("ITEMS", [said("user", parts("a", "b"))], [said("user", parts("a", "b"))]),
    ("PARTS_ONLY", [said("system", "s"), HI], [said("system", parts("s")), said("user", parts("hi"))]),
    ("ITEMS", [HI, calling(call(VALUE)), result(parts("3", "4"))], [HI, calling(call(VALUE)), result("3\n4")]),
    ("ONE_CALL", [said("user", ["a", {"text": "b"}, {"type": "input_text", "text": "c"}])], [said("user", "a\nb\nc")]),
    # What replayed answers carry.
    ("ITEMS", [HI, said("assistant", "b", reasoning="c")], [HI, said("assistant", "b", reasoning_content="c")]),
    ("ITEMS", [HI, said("assistant", "b", reasoning_content="c")], [HI, said("assistant", "b", reasoning_content="c")]),
    ("DEVELOPER", [HI, calling(call("{}"), reasoning="c")], [HI, calling(call({}), content="", thinking="c")]),
    (
        "ONE_CALL",
        [HI, said("assistant", "b", tool_calls=[], function_call=None, audio=None, refusal=None, name=None, id="m")],
        [HI, said("assistant", "b")],
    ),
    ("ANY_ROLE", [HI, said("assistant", None), GO_ON], [HI, said("assistant", ""), GO_ON]),
]  # fmt: skip


def as_sent(messages: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """What of the messages the schema lets through."""
    body = json.dumps({"messages": messages, **fields}).encode()
    request = parse(ChatCompletionRequest, body, Leniency(strict=False))
    return [message.model_dump(exclude_unset=True) for message in request.messages]


@pytest.mark.parametrize(("family", "sent", "repaired"), CASES, ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)])
def test_as_transformers_renders_the_repaired(
    family: str, sent: list[dict[str, Any]], repaired: list[dict[str, Any]]
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = getattr(families, family)
    tools = TOOLS if any("tool_calls" in message for message in sent) else None
    expected, _ = render_jinja_template(
        [repaired], tools=tools, chat_template=template, add_generation_prompt=True, bos_token="<s>"
    )
    ours = ChatTemplates({"default": template}, {"bos_token": "<s>"}).render(as_sent(sent), tools=tools)
    assert ours == expected[0]


def test_what_needs_no_repair_is_handed_on_as_it_is() -> None:
    messages = [said("system", "s"), HI, calling(call(VALUE), content="x"), result("3"), ANSWER, GO_ON]
    templates = ChatTemplates({"default": "{{ messages | tojson }}"}, {})
    assert json.loads(templates.render(messages)) == messages


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_parts_that_are_no_text_are_refused_by_name(kind: str) -> None:
    with pytest.raises(APIError, match=f"only text parts are supported.*'{kind}'") as caught:
        as_sent([said("user", [{"type": kind, kind: {}}])])
    assert caught.value.param == "messages.0.content"


@pytest.mark.parametrize("family", ["NO_SYSTEM", "ANY_ROLE", "NONE_OR_CALLS"])
def test_a_template_that_ignores_tools_is_found_out(family: str) -> None:
    assert ChatTemplates({"default": getattr(families, family)}, {}).ignores_tools()


@pytest.mark.parametrize("family", ["ONE_CALL", "TURNS", "ITEMS"])
def test_a_template_that_shows_tools_is_not_blamed(family: str) -> None:
    assert not ChatTemplates({"default": getattr(families, family)}, {}).ignores_tools()


def test_a_template_that_wants_a_list_of_tools_gets_one() -> None:
    template = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}{{ messages[-1].content }}"
    assert ChatTemplates({"default": template}, {}).render([HI]) == "hi"
    assert ChatTemplates({"default": template}, {}).render([said("developer", "a"), HI]) == "a\n\nhi"


def test_calls_at_once_lose_no_result() -> None:
    """Results without a call, twice the same id, ids that are no text: everything is shown, and quickly."""
    calls = [call("{}", id) for id in ("1", "2")] + [call("{}", [])]  # type: ignore[arg-type]
    results = [result(f"r{n}", id) for n, id in enumerate(("2", "9", "2", "1"))]
    templates = ChatTemplates({"default": families.ONE_CALL}, {})
    text = templates.render([HI, calling(*calls), *results, GO_ON])
    assert sorted(text.index(f"r{n}") for n in range(4)) == [text.index(f"r{n}") for n in (3, 0, 2, 1)]
    assert text.count("[call]") == 3


def test_a_final_message_in_parts_is_continued() -> None:
    messages = as_sent([HI, said("assistant", parts("one", "two"))], continue_final_message=True)
    templates = ChatTemplates({"default": families.ANY_ROLE}, {})
    assert templates.render(messages, continue_final_message=True).endswith("assistant\none\ntwo")
