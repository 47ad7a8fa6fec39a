"""Which parsers there are, by the names that vLLM has for them, and which one a model's chat template calls for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from pd_serve.api.parsers.gemma import FunctionGemma, Gemma4
from pd_serve.api.parsers.harmony import Harmony
from pd_serve.api.parsers.json_calls import Granite, Hermes, Llama3Json, Mistral
from pd_serve.api.parsers.pieces import Parser
from pd_serve.api.parsers.pythonic import Pythonic
from pd_serve.api.parsers.reasoning import Marks, Thinking
from pd_serve.api.parsers.sections import DeepSeek, KimiK2
from pd_serve.api.parsers.tags import Glm, Parameters, QwenCoder, SeedOss

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
    "seed_oss": SeedOss,
    "kimi_k2": KimiK2,
    "gemma4": Gemma4,
    "functiongemma": FunctionGemma,
    "openai": Harmony,
}
_OPENINGS = {
    "hermes": ("<tool_call>",),
    "mistral": ("[TOOL_CALLS]",),
    "granite": ("<|tool_call|>", "<tool_call>"),
    "deepseek_v3": ("<｜tool▁calls▁begin｜>",),
    "glm45": ("<tool_call>",),
    "qwen3_coder": ("<tool_call>",),
    "seed_oss": ("<seed:tool_call>",),
    "gemma4": ("<|tool_call>",),
    "functiongemma": ("<start_function_call>",),
    "kimi_k2": ("<|tool_calls_section_begin|>",),
}
_THINK = Marks(("<think>",), ("</think>",))
_MARKS = {
    "deepseek_r1": _THINK._replace(always=True),
    "qwen3": _THINK,
    "mistral": Marks(("[THINK]",), ("[/THINK]",)),
    "seed_oss": Marks(("<seed:think>",), ("</seed:think>",), always=True),
    "gemma4": Marks(("<|channel>thought",), ("<channel|>",)),
    "granite": Marks(
        ("Here is my thought process:", "Here's my thought process:"), ("Here is my response:", "Here's my response:")
    ),
}
TOOL_PARSERS = (AUTO, *_TOOLS)
REASONING_PARSERS = (AUTO, NONE, *_MARKS, "openai_gptoss")

# What only templates of these formats hold; the first that is found counts.
_TOOLS_BY_TEXT = (
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("<|channel|>", "openai"),
    ("[TOOL_CALLS]", "mistral"),
    ("<arg_key>", "glm45"),
    ("<seed:tool_call>", "seed_oss"),
    ("<|tool_call>", "gemma4"),
    ("<start_function_call>", "functiongemma"),
    ("<function=", "qwen3_coder"),
    ("<|tool_call|>", "granite"),
    ("<tool_call>", "hermes"),
    ("<|python_start|>", "pythonic"),
    ("func_name1(params_name1=", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
    ("dictionary of argument name and its value", "llama3_json"),  # those of Llama 3.2 and of models made from it
)
_REASONING_BY_TEXT = (
    ("<|channel|>", "openai_gptoss"),
    ("[THINK]", "mistral"),
    ("</seed:think>", "seed_oss"),
    ("<|channel>", "gemma4"),
    ("Here is my thought process:", "granite"),
    ("</think>", "qwen3"),
)


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
    return make(parameters) if kind in (Glm, QwenCoder, SeedOss) else make()


def openings(name: str, functions: Sequence[str]) -> tuple[str, ...]:
    """What calls begin with; none: nothing that could be told from an answer in time (gpt-oss)."""
    if name == "llama3_json":
        quoted = [msgspec.json.encode(function).decode() for function in functions]
        return (*_TOOLS[name].markers, *(f'{{"name":{space}{text}' for text in quoted for space in ("", " ")))
    if name == "pythonic":
        return (_TOOLS[name].markers[0], *(f"[{function}(" for function in functions))
    return _OPENINGS.get(name, ())


def left_by_prompt(name: str, prompt_end: str, continued: str | None) -> Left:
    """``prompt_end``: the last words of the prompt, where some templates begin the reasoning, or end it.

    ``continued``: the message that the output goes on with, where it does with one.
    """
    if name not in _MARKS:
        return "open"
    marks = _MARKS[name]
    if continued is not None:
        if _last(continued, marks.open) > _last(continued, marks.close):
            return "reasoning"
        return "answer" if continued.strip() else "open"
    end = prompt_end.rstrip()
    if end.endswith(marks.close):
        return "answer"
    return "reasoning" if marks.always or end.endswith(marks.open) else "open"


def _last(text: str, marks: tuple[str, ...]) -> int:
    """Where the last of these begins; -1: none does."""
    return max(map(text.rfind, marks))


def make_reasoning_parser(name: str, left: Left) -> Thinking | Harmony | None:
    if name == NONE:
        return None
    return Thinking(_MARKS[name], begun=left == "reasoning") if name in _MARKS else Harmony()


def close_mark(name: str) -> str:
    """What ends the reasoning; empty where it is not one text."""
    marks = _MARKS.get(name)
    return marks.close[0] if marks is not None and len(marks.close) == 1 else ""


def markers(*names: str) -> frozenset[str]:
    """Texts that these parsers have to see, even where they are special tokens."""
    found: set[str] = set()
    for name in names:
        if (marks := _MARKS.get(name)) is not None:
            # of "<|channel>thought" the first part is a token
            found.update(re.sub("(?<=>).+", "", mark) for mark in marks.open + marks.close)
        if name == "openai_gptoss":
            found.update(Harmony.markers)
        elif name in _TOOLS:
            found.update(_TOOLS[name].markers)
    return frozenset(found)
