"""Chat templates are rendered as transformers does it."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from pd_serve.api.chat_template import ChatTemplates
from pd_serve.api.errors import APIError

CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {% if message['role'] != 'system' %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}
    {% endif %}
{% endfor %}
{% if tools %}
{{ tools | tojson }}
{% endif %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "  Grüße, 世界 \n"},
    {"role": "assistant", "content": "Well, "},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"type": "object"}}}]


def render(template: str, messages: list[dict[str, Any]] = MESSAGES, **options: Any) -> str:
    return ChatTemplates({"default": template}, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, **options)


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_as_transformers(tools: Any, prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        [MESSAGES], tools=tools, chat_template=CHATML, add_generation_prompt=prompt, bos_token="<s>"
    )
    assert render(CHATML, tools=tools, add_generation_prompt=prompt) == rendered[0]


def test_conventions() -> None:
    assert (
        render("{{ bos_token }}{% for m in messages %}\n  {% if loop.last %}{% break %}{% endif %}\nx{% endfor %}")
        == "<s>xx"
    )
    assert render("{{ {'a': '<é>&'} | tojson }}") == '{"a": "<é>&"}'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1) }}") == '{\n "b": 1,\n "a": 2\n}'
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert render("a{% generation %}b{{ messages[0].role }}{% endgeneration %}c") == "absystemc"
    assert render("{{ x is defined }}{{ y }}", extra={"y": False}) == "FalseFalse"


def test_a_final_message_is_continued() -> None:
    whole = render(CHATML, add_generation_prompt=False)
    cut = render(CHATML, continue_final_message=True)
    assert whole.startswith(cut) and cut.endswith("<|im_start|>assistant\nWell,")  # the template trims
    untrimmed = CHATML.replace(" | trim", "")
    assert render(untrimmed, continue_final_message=True).endswith("<|im_start|>assistant\nWell, ")
    with pytest.raises(APIError, match="drops the final message"):
        render("nothing", continue_final_message=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 5 }}",
        "{{ messages[9].content.strip() }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for %}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_what_a_template_rejects_is_a_400(template: str) -> None:
    with pytest.raises(APIError) as caught:
        render(template)
    assert caught.value.status == 400 and "template" in caught.value.message


def test_the_tool_template_is_used_with_tools() -> None:
    templates = ChatTemplates({"default": "plain", "tool_use": "tools"}, {})
    assert templates.render(MESSAGES) == "plain"
    assert templates.render(MESSAGES, tools=TOOLS) == "tools"


def test_no_template_says_where_to_go() -> None:
    with pytest.raises(APIError, match="/v1/completions"):
        ChatTemplates({}, {}).render(MESSAGES)
