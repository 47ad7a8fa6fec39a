"""Whatever a model writes, in whatever pieces it comes: parsers give the same, never raise and lose no word."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_serve.api.parsers.gemma import FunctionGemma, Gemma4
from pd_serve.api.parsers.harmony import Harmony
from pd_serve.api.parsers.json_calls import Forced, Granite, Hermes, Llama3Json, Mistral, Named
from pd_serve.api.parsers.pieces import Parser, Piece, joined
from pd_serve.api.parsers.pythonic import Pythonic
from pd_serve.api.parsers.reasoning import Marks, Thinking
from pd_serve.api.parsers.sections import DeepSeek, KimiK2
from pd_serve.api.parsers.tags import Glm, QwenCoder, SeedOss

SCHEMAS = {"f": {"type": "object", "properties": {"s": {"type": "string"}, "b": {"type": "boolean"}}}}
MARKS = Marks(("<think>",), ("</think>",))
GRANITE = Marks(("Here is my thought:", "Here's my thought:"), ("Here is my response:", "Here's my response:"))
PARSERS: dict[str, Callable[[], Parser]] = {
    "hermes": Hermes,
    "granite": Granite,
    "mistral": Mistral,
    "llama3_json": Llama3Json,
    "forced": Forced,
    "named": lambda: Named("f"),
    "pythonic": Pythonic,
    "deepseek_v3": DeepSeek,
    "kimi_k2": KimiK2,
    "glm45": lambda: Glm(SCHEMAS),
    "qwen3_coder": lambda: QwenCoder(SCHEMAS),
    "seed_oss": lambda: SeedOss(SCHEMAS),
    "gemma4": Gemma4,
    "functiongemma": FunctionGemma,
    "openai": Harmony,
    "thinking": lambda: Thinking(MARKS, begun=False),
    "begun": lambda: Thinking(MARKS, begun=True),
    "words": lambda: Thinking(GRANITE, begun=False),
}
# What formats are made of, in any order.
_FORMS = {
    "hermes": ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {"a": 1}}', "\n"],
    "granite": ["<|tool_call|>", "<tool_call>", "[", "]", '{"name": "f", "arguments": {"a": 1}}', ", "],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[", "]", "f", '{"name": "f", "arguments": {}}', '{"a": 1}'],
    "llama3_json": ["<|python_tag|>", '{"name": "f", "parameters": {"a": 1}}', ";", "; ", "\n"],
    "forced": ["[", "]", '{"name": "f", "parameters": {"a": 1}}', ", "],
    "named": ['{"a": 1}'],
    "pythonic": ["[", "]", "f(", "a=1", ")", ", ", '"', "g.h(", "'", "<|python_start|>", "<|python_end|>"],
    "deepseek_v3": [*DeepSeek.markers, "function", "f", "\n```json\n", '{"a": 1}', "\n```"],
    "kimi_k2": [*KimiK2.markers, "functions.f:0", '{"a": 1}'],
    "glm45": [*Glm.markers, "f", "k", "1"],
    "qwen3_coder": [*QwenCoder.markers, "<function=f>", "</function>", "<parameter=k>", "</parameter>", "1", "\n"],
    "seed_oss": [*SeedOss.markers, "<function=f>", "</function>", "<parameter=k>", "</parameter>", "1", "\n"],
    "gemma4": [*Gemma4.markers, "call:f{", "k:", "1", ",", "[", "]", "true"],
    "functiongemma": [*FunctionGemma.markers, "call:", "f{", "k:", "1", ",", '"a,b"'],
    "openai": [*Harmony.markers, "analysis", "final", "commentary to=functions.f", "assistant", '{"a": 1}'],
    "thinking": [*MARKS.open, *MARKS.close],
    "begun": [*MARKS.open, *MARKS.close],
    "words": [*GRANITE.open, *GRANITE.close, "Here"],
}
_ANY = [
    "word",
    " ",
    "\n",
    "\n\n",
    "{",
    "}",
    '"',
    "\\",
    "<",
    "[",
    "東",
    "a b",
    '{"name": ',
    '"arguments": ',
    "null",
    "é\t",
]


def texts(name: str) -> st.SearchStrategy[str]:
    forms = _FORMS[name]
    parts = [*forms, *(form[: len(form) // 2] for form in forms if len(form) > 2), *_ANY]
    return st.lists(st.sampled_from(parts), max_size=14).map("".join)


def pieces(parser: Parser, parts: list[str]) -> list[Piece]:
    return joined([piece for part in parts for piece in parser.feed(part)] + parser.finish())


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(PARSERS)), st.data())
def test_any_text_in_any_pieces(name: str, data: st.DataObject) -> None:
    text = data.draw(texts(name))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)) | {0, len(text)})
    whole = pieces(PARSERS[name](), [text])
    assert pieces(PARSERS[name](), [text[a:b] for a, b in itertools.pairwise(cuts)]) == whole
    assert pieces(PARSERS[name](), list(text)) == whole
    # What is cut off in a call, or in the head of a channel's message, was no word of the answer.
    if name != "openai" and all(piece.kind != "call" for piece in whole):
        assert "".join(piece.text for piece in whole).count("word") == text.count("word")


def call(name: str, arguments: str) -> list[Piece]:
    return [Piece("call", name), Piece("arguments", arguments)]


def say(text: str) -> Piece:
    return Piece("content", text)


PARIS = '{"city": "Paris", "days": [1, {"a": "}"}]}'
FENCED = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n" + PARIS + "\n```<｜tool▁call▁end｜>"


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        (
            "hermes",
            f'I look.\n<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>\n<tool_call>\n'
            '{"name": "now"}\n</tool_call>',
            [say("I look."), *call("weather", PARIS), *call("now", "{}")],
        ),
        ("hermes", f'<tool_call>{{"arguments": {PARIS}, "name": "f"}}</tool_call>.', [*call("f", PARIS), say(".")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', call("f", '{"a": 1}')),
        ("hermes", "a <tool_call> is\nno call ", [say("a <tool_call> is\nno call ")]),
        ("hermes", '<tool_call>{"name": 7}</tool_call>', [say('<tool_call>{"name": 7}</tool_call>')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a', call("f", '{"a')),
        (
            "granite",
            f'<|tool_call|>[{{"name": "weather", "arguments": {PARIS}}}, {{"name": "now", "arguments": {{}}}}]',
            [*call("weather", PARIS), *call("now", "{}")],
        ),
        ("mistral", f'Hm.[TOOL_CALLS] [{{"name": "f", "arguments": {PARIS}}}]', [say("Hm."), *call("f", PARIS)]),
        (
            "mistral",
            f"[TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]now[CALL_ID]12[ARGS]{{}}",
            [*call("weather", PARIS), *call("now", "{}")],
        ),
        (
            "llama3_json",
            f'{{"name": "weather", "parameters": {PARIS}}}; {{"name": "now", "parameters": {{}}}}',
            [*call("weather", PARIS), *call("now", "{}")],
        ),
        ("llama3_json", f'<|python_tag|>{{"name": "f", "parameters": {PARIS}}}', call("f", PARIS)),
        ("llama3_json", f"Such as {PARIS}", [say(f"Such as {PARIS}")]),
        ("llama3_json", PARIS, [say(PARIS)]),
        (
            "pythonic",
            "[weather(city='Paris', days=[1, {'a': None}], at=-1.5), a.now()]",
            [*call("weather", '{"city": "Paris", "days": [1, {"a": null}], "at": -1.5}'), *call("a.now", "{}")],
        ),
        ("pythonic", "[1](link) and (more)", [say("[1](link) and (more)")]),
        ("deepseek_v3", f"<｜tool▁calls▁begin｜>{FENCED}\n{FENCED}<｜tool▁calls▁end｜>", call("weather", PARIS) * 2),
        (
            "deepseek_v3",
            f"Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{PARIS}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            [say("Hm."), *call("f", PARIS)],
        ),
        (
            "deepseek_v3",
            "<｜tool▁calls▁begin｜>none<｜tool▁calls▁end｜>",
            [say("<｜tool▁calls▁begin｜>none<｜tool▁calls▁end｜>")],
        ),
        (
            "kimi_k2",
            f"<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{PARIS}"
            "<|tool_call_end|><|tool_calls_section_end|>",
            call("f", PARIS),
        ),
        (
            "glm45",
            "Hm.\n<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>12</arg_value>\n<arg_key>b</arg_key>\n"
            "<arg_value>true</arg_value>\n<arg_key>n</arg_key><arg_value>NaN</arg_value></tool_call>\n",
            [say("Hm."), *call("f", '{"s": "12", "b": true, "n": "NaN"}')],
        ),
        ("glm45", "<tool_call>now\n</tool_call>", call("now", "{}")),
        (
            "qwen3_coder",
            "<tool_call>\n<function=f>\n<parameter=s>\n12\n</parameter>\n<parameter=b>\n[1]\n</parameter>\n"
            "</function>\n</tool_call>",
            call("f", '{"s": "12", "b": [1]}'),
        ),
        (
            "seed_oss",
            "So.\n<seed:tool_call>\n<function=f>\n<parameter=s>12</parameter>\n</function>\n</seed:tool_call>",
            [say("So."), *call("f", '{"s": "12"}')],
        ),
        (
            "gemma4",
            'Hm. <|tool_call>call:f{a:<|"|>1, "{x}"\n<|"|>,b:-1.5,c:[true,{d:None,e:[]}],f:word}<tool_call|>\n'
            "<|tool_call>call:a.now{}<tool_call|>.",
            [
                say("Hm."),
                *call("f", '{"a": "1, \\"{x}\\"\\n", "b": -1.5, "c": [true, {"d": null, "e": []}], "f": "word"}'),
                *call("a.now", "{}"),
                say("."),
            ],
        ),
        ("gemma4", '<|tool_call>call:f{"a":"x, y","b":[1', call("f", '{"a": "x, y", "b": [')),
        ("gemma4", "<|tool_call>call:f{a:{b:1<tool_call|>", call("f", '{"a": {"b": 1}}')),
        ("gemma4", "<|tool_call>no{a:1}", [say("<|tool_call>no{a:1}")]),
        (
            "functiongemma",
            "<start_function_call>call:weather{city:<escape>Paris<escape>}<end_function_call>",
            call("weather", '{"city": "Paris"}'),
        ),
        ("qwen3_coder", "<tool_call>\nno</tool_call>", [say("<tool_call>\nno</tool_call>")]),
        (
            "forced",
            f'[{{"name": "f", "parameters": {PARIS}}}, {{"name": "g", "parameters": {{}}}}]',
            [*call("f", PARIS), *call("g", "{}")],
        ),
        ("forced", f'[{{"name": "f", "parameters": {PARIS}}}, {{"na', call("f", PARIS)),
        ("named", PARIS, call("f", PARIS)),
        (
            "openai",
            "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>commentary<|message|>Hm.<|end|>"
            f"<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{PARIS}<|call|>",
            [Piece("reasoning", "so"), say("Hm."), *call("f", PARIS)],
        ),
        ("thinking", "<think>\nso\n</think>\n\nHi <think>", [Piece("reasoning", "so"), say("Hi <think>")]),
        ("thinking", "Hi <think>so", [say("Hi <think>so")]),
        ("begun", "\nso <\n\nso</think>Hi", [Piece("reasoning", "so <\n\nso"), say("Hi")]),
        ("begun", "<think>so</think>", [Piece("reasoning", "so")]),
        (
            "words",
            "Here's my thought: Here is one. Here is my response: Here is mine.",
            [Piece("reasoning", "Here is one."), say("Here is mine.")],
        ),
        ("words", "Here is none.", [say("Here is none.")]),
        ("begun", "cut off ", [Piece("reasoning", "cut off ")]),
    ],
)
def test_forms(name: str, text: str, found: list[Piece]) -> None:
    assert pieces(PARSERS[name](), [text]) == found
    assert pieces(PARSERS[name](), list(text)) == found


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("hermes", '<tool_call>{{"name": "f", "arguments": {{"s": "{}"}}}}</tool_call>'),
        ("pythonic", '[f(s="{}")]'),
        ("glm45", "<tool_call>f\n<arg_key>s</arg_key><arg_value>{}</arg_value></tool_call>"),
        ("qwen3_coder", "<tool_call><function=f><parameter=s>{}</parameter></function></tool_call>"),
        ("gemma4", '<|tool_call>call:f{{s:<|"|>{}<|"|>}}<tool_call|>'),
    ],
)
def test_long_arguments_cost_no_more_a_token(name: str, form: str) -> None:
    """Agents write whole files: six times the text is six times the work, where looking at all of it again is 36."""

    def cost_s(size: int) -> float:
        text = form.format("x > y " * (size // 6))
        parser = PARSERS[name]()
        begun_s = time.process_time()
        found = [piece for at in range(0, len(text), 4) for piece in parser.feed(text[at : at + 4])]
        assert [piece.text for piece in found if piece.kind == "call"] == ["f"]
        return time.process_time() - begun_s

    short_s = min(cost_s(2_000) for _ in range(3))
    assert cost_s(12_000) < 16 * short_s
