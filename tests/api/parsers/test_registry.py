"""Parsers by name, and by what chat templates hold."""

from __future__ import annotations

import pytest

from pd_serve import config
from pd_serve.api.parsers import registry


def test_the_settings_know_all_of_them() -> None:
    assert config.TOOL_PARSERS == registry.TOOL_PARSERS
    assert config.REASONING_PARSERS == registry.REASONING_PARSERS


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{{ messages }}", "hermes", "none"),
        ("<tool_call>\n{'name': ...}\n</tool_call> {% if '</think>' in content %}", "hermes", "qwen3"),
        ("<tool_call>\n<function=example>", "qwen3_coder", "none"),
        ("[TOOL_CALLS] [THINK]", "mistral", "mistral"),
        ("<|start|>assistant<|channel|>analysis", "openai", "openai_gptoss"),
        ("<｜tool▁calls▁begin｜> </think>", "deepseek_v3", "qwen3"),
        ("<|python_tag|>", "llama3_json", "none"),
        ('{"name": function name, "parameters": dictionary of argument name and its value}', "llama3_json", "none"),
        ("[func_name1(params_name1=params_value1)]", "pythonic", "none"),
    ],
)
def test_templates_tell(template: str, tools: str, reasoning: str) -> None:
    assert registry.tool_parser("auto", template) == tools
    assert registry.reasoning_parser("auto", template) == reasoning
    assert registry.tool_parser("granite", template) == "granite"
    assert registry.reasoning_parser("none", template) == "none"
