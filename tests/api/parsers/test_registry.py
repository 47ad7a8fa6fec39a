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
        ("<seed:think></seed:think><seed:tool_call><function=", "seed_oss", "seed_oss"),
        ("<|turn>model\n<|channel>thought\n<channel|><|tool_call>call:", "gemma4", "gemma4"),
        ("<start_function_call>call:", "functiongemma", "none"),
        ("Write your thoughts after 'Here is my thought process:' <|tool_call|>", "granite", "granite"),
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


def test_calls_begin_with() -> None:
    for name in registry.TOOL_PARSERS:
        assert bool(registry.openings(name, ["f"])) == (name not in ("auto", "openai"))
    assert '{"name": "f"' in registry.openings("llama3_json", ["f"]) and "[f(" in registry.openings("pythonic", ["f"])


def test_marks_as_their_models_write_them() -> None:
    """Whether a prompt leaves them to the output, which marks are tokens, and what is read."""
    for name, end, left, said in (
        ("seed_oss", "<seed:bos>assistant\n", "reasoning", "<seed:think>so</seed:think>Hi"),
        ("seed_oss", "<seed:think>none</seed:think>", "answer", "Hi"),
        ("gemma4", "<|turn>model\n", "open", "<|channel>thought\nso<channel|>Hi"),
        ("gemma4", "<|turn>model\n", "open", "Hi"),
        ("granite", "<|end_of_role|>", "open", "Here is my thought process: so\nHere is my response:\nHi"),
    ):
        assert registry.left_by_prompt(name, end, None) == left
        parser = registry.make_reasoning_parser(name, left)
        assert parser is not None
        pieces = [piece for character in said for piece in parser.feed(character)] + parser.finish()
        texts = {kind: "".join(p.text for p in pieces if p.kind == kind).strip() for kind in ("reasoning", "content")}
        assert texts == {"reasoning": "so" if "so" in said else "", "content": "Hi"}
    assert registry.markers("gemma4") >= {"<|channel>", "<channel|>", "<|tool_call>", '<|"|>'}
    assert registry.close_mark("gemma4") == "<channel|>" and registry.close_mark("granite") == ""
