"""Which parsers there are, by the names that vLLM has for them, and which one a model's chat template calls for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pd_serve.api.parsers.harmony import Harmony
from pd_serve.api.parsers.json_calls import Granite, Hermes, Llama3Json, Mistral
from pd_serve.api.parsers.pieces import Parser
from pd_serve.api.parsers.pythonic import Pythonic
from pd_serve.api.parsers.reasoning import Thinking
from pd_serve.api.parsers.sections import DeepSeek, KimiK2
from pd_serve.api.parsers.tags import Glm, Parameters, QwenCoder

# What comes next where a prompt ends: reasoning, the answer, or either, as the output opens it.
Left = Literal["reasoning", "answer", "open"]
AUTO, NONE = "auto", "none"

_TOOLS: dict[str, type[Parser]] = {
    "hermes": Hermes,
    "llama3_json": Llama3Json,
    "mistral": Mistral,
    "pythonic": Pythonic,
    "granite": Granite,
    "deepseek_v3": DeepSeek,
    "glm45": Glm,
    "qwen3_coder": QwenCoder,
    "kimi_k2": KimiK2,
    "openai": Harmony,
}
_ALWAYS = "deepseek_r1"  # begins to think without a mark
_MARKS = {_ALWAYS: ("<think>", "</think>"), "qwen3": ("<think>", "</think>"), "mistral": ("[THINK]", "[/THINK]")}
TOOL_PARSERS = (AUTO, *_TOOLS)
REASONING_PARSERS = (AUTO, NONE, *_MARKS, "openai_gptoss")

# What only templates of these formats hold; the first that is found counts.
_TOOLS_BY_TEXT = (
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("<|channel|>", "openai"),
    ("[TOOL_CALLS]", "mistral"),
    ("<arg_key>", "glm45"),
    ("<function=", "qwen3_coder"),
    ("<|tool_call|>", "granite"),
    ("<tool_call>", "hermes"),
    ("<|python_start|>", "pythonic"),
    ("func_name1(params_name1=", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
    ("dictionary of argument name and its value", "llama3_json"),  # those of Llama 3.2 and of models made from it
)
_REASONING_BY_TEXT = (("<|channel|>", "openai_gptoss"), ("[THINK]", "mistral"), ("</think>", "qwen3"))


def tool_parser(name: str, template: str) -> str:
    """``name``, or what the template calls for; Hermes' format where nothing tells."""
    if name != AUTO:
        return name
    return next((found for text, found in _TOOLS_BY_TEXT if text in template), "hermes")


def reasoning_parser(name: str, template: str) -> str:
    if name != AUTO:
        return name
    return next((found for text, found in _REASONING_BY_TEXT if text in template), NONE)


def make_tool_parser(name: str, parameters: Parameters) -> Parser:
    """``parameters``: schemas of the functions' parameters, for formats that are told apart by them."""
    kind = _TOOLS[name]
    make: Callable[..., Parser] = kind
    return make(parameters) if kind in (Glm, QwenCoder) else make()


def left_by_prompt(name: str, prompt_end: str, continued: str | None) -> Left:
    """``prompt_end``: the last words of the prompt, where some templates begin the reasoning, or end it.

    ``continued``: the message that the output goes on with, where it does with one.
    """
    if name not in _MARKS:
        return "open"
    open_mark, close_mark = _MARKS[name]
    if continued is not None:
        if continued.rfind(open_mark) > continued.rfind(close_mark):
            return "reasoning"
        return "answer" if continued.strip() else "open"
    end = prompt_end.rstrip()
    if end.endswith(close_mark):
        return "answer"
    return "reasoning" if name == _ALWAYS or end.endswith(open_mark) else "open"


def make_reasoning_parser(name: str, left: Left) -> Thinking | Harmony | None:
    if name == NONE:
        return None
    return Thinking(*_MARKS[name], begun=left == "reasoning") if name in _MARKS else Harmony()


def close_mark(name: str) -> str:
    """What ends the reasoning; empty where it is not one text."""
    return _MARKS[name][1] if name in _MARKS else ""


def markers(*names: str) -> frozenset[str]:
    """Texts that these parsers have to see, even where they are special tokens."""
    found: set[str] = set()
    for name in names:
        found.update(_MARKS.get(name, ()))
        if name == "openai_gptoss":
            found.update(Harmony.markers)
        elif name in _TOOLS:
            found.update(_TOOLS[name].markers)
    return frozenset(found)
