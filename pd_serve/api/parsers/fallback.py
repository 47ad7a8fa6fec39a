"""Tools for models whose chat template shows nothing of them: a system message, answered in Hermes' format."""

from __future__ import annotations

import json
from typing import Any

_TEXT = """You can call functions. These are there, each with the JSON schema of its parameters:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as JSON between these tags, once for each call:
<tool_call>
{{"name": "the function's name", "arguments": {{"a parameter": "its value"}}}}
</tool_call>
Call none where none helps: answer in words then."""


def with_tools_told(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation, with a system message that tells of the tools: before all, or as a part of the first."""
    text = _TEXT.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
    if messages and messages[0]["role"] in ("system", "developer"):
        first, rest = messages[0], messages[1:]
        content = first.get("content") or ""
        if isinstance(content, list):
            content = "\n".join(part["text"] for part in content)
        return [{**first, "content": f"{content}\n\n{text}" if content else text}, *rest]
    return [{"role": "system", "content": text}, *messages]


def shown_call(function: dict[str, Any]) -> str:
    """A call of the conversation's past, as the model is asked to write them."""
    return f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>"
