"""What ``up`` prints when all serves: where, and lines to type that work as they stand. Pure functions of settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence

from pd_serve.config import UpConfig

_QUESTION = "What is the capital of France?"
_BEGINNING = "The capital of France is"
_MAX_TOKENS = 64


def text(
    config: UpConfig, url: str, pages: Mapping[str, str], rows: Sequence[Sequence[str]], took_s: float, *, chat: bool
) -> str:
    """``url``: of the router. ``pages``: what there is to look at, and where. ``rows``: the table of processes.
    ``chat``: the model has a template for it."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    looks = "\n".join(f"{what}: {where}" for what, where in pages.items())
    return f"""
{table}

Ready after {took_s:.1f} s: {config.served_model_name} at {url}/v1

Try:

{_curl(config, url, chat)}

In Python (pip install openai):

{_python(config, url, chat)}

{looks}

Ctrl-C ends everything."""


def _asked(config: UpConfig, chat: bool) -> dict[str, object]:
    """Greedy: at the temperature that is the default a small model answers nonsense."""
    asked: dict[str, object] = {"model": config.served_model_name}
    asked |= {"messages": [{"role": "user", "content": _QUESTION}]} if chat else {"prompt": _BEGINNING}
    return asked | {"max_tokens": _MAX_TOKENS, "temperature": 0}


def _needs_key(config: UpConfig) -> bool:
    return bool(config.api_key or config.api_key_file)


def _curl(config: UpConfig, url: str, chat: bool) -> str:
    path = "chat/completions" if chat else "completions"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if _needs_key(config) else ""
    body = shlex.quote(json.dumps(_asked(config, chat)))
    return f"  curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d {body}"


def _python(config: UpConfig, url: str, chat: bool) -> str:
    key = "YOUR_KEY" if _needs_key(config) else "unused"
    given = ", ".join(f"{name}={json.dumps(value)}" for name, value in _asked(config, chat).items())
    create, answer = ("chat.completions", "message.content") if chat else ("completions", "text")
    return (
        f'  import openai; client = openai.OpenAI(base_url="{url}/v1", api_key="{key}")\n'
        f"  print(client.{create}.create({given}).choices[0].{answer})"
    )
