"""Prompts of 5 to 900 tokens: prose, code, lists, other scripts. Deterministic."""

from __future__ import annotations

import functools
import inspect
import json
import textwrap
from collections.abc import Sequence

TEXTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "Water boils at 100 degrees Celsius because",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "The three laws of thermodynamics are: 1)",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "naïve café — 你好，世界 🙂 is a mix of",
    "SELECT name, COUNT(*) FROM users WHERE",
    "In 1969, the first humans landed on the",
    "Ingredients:\n- 2 eggs\n- 200 g flour\n- 1 pinch of salt\n\nMethod:\n1.",
    "To be, or not to be, that is the question:",
]
# Standard library prose and code: long, real text that every Python has.
SOURCES = [textwrap.dedent, json.JSONEncoder, functools.partial, functools.lru_cache, inspect.signature, json.loads]


@functools.cache
def raw_prompts() -> Sequence[str]:
    """24 prompts: 12 short ones, 11 of 50 to about 300 tokens, and one of about 900."""
    long = []
    for i, source in enumerate(SOURCES):
        text = f"# Part {i}\n" + inspect.getsource(source)
        long.append(text[: 200 + 60 * i])
        long.append(text[: 400 + 120 * i] + "\n\nSummary of the above:")
    long[-1] = "# The longest\n" + inspect.getsource(json.JSONEncoder)[:3900]
    return (*TEXTS, *long)


def chats() -> list[list[dict[str, str]]]:
    """24 conversations over the same texts."""
    ask = ["Continue this:", "What is this about?", "Answer in one sentence:"]
    return [[{"role": "user", "content": f"{ask[i % 3]}\n{text}"}] for i, text in enumerate(raw_prompts())]
