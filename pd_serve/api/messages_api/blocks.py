"""Messages of Anthropic's blocks as the messages of a chat."""

from __future__ import annotations

import json
from typing import Any

from pd_serve.api.errors import bad_request
from pd_serve.api.translated import said

_Message = dict[str, Any]
_TEXT = ("text",)


def messages(system: str | list[Any] | None, given: list[dict[str, Any]]) -> list[_Message]:
    """Raises APIError(400) that names the block."""
    found: list[_Message] = []
    if system:
        found.append({"role": "system", "content": said(system, "system", _TEXT)})
    for place, message in enumerate(given):
        where, role, content = f"messages.{place}", message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise bad_request(f"{where}.role: must be user or assistant", f"{where}.role")
        if isinstance(content, list):
            found += _assistant(content, where) if role == "assistant" else _user(role, content, where)
        elif isinstance(content, str):
            found.append({"role": role, "content": content})
        else:
            raise bad_request(f"{where}.content: must be a string or a list of blocks", f"{where}.content")
    return found


def _assistant(blocks: list[Any], where: str) -> list[_Message]:
    message: _Message = {"role": "assistant", "content": None}
    texts, calls, thoughts = [], [], []
    for place, block in enumerate(blocks):
        kind = _kind(block)
        if kind == "tool_use":
            name, id, given = block.get("name"), block.get("id"), block.get("input")
            if not isinstance(name, str) or not isinstance(id, str):
                raise _bad(where, place, "a tool_use needs an 'id' and a 'name'")
            function = {"name": name, "arguments": json.dumps(given or {}, ensure_ascii=False)}
            calls.append({"id": id, "type": "function", "function": function})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind != "redacted_thinking":  # which is only there in a form that nobody here can read
            texts.append(_text(block, where, place))
    if texts:
        message["content"] = _parts(texts)
    if calls:
        message["tool_calls"] = calls
    if any(thoughts):
        message["reasoning_content"] = "\n".join(thoughts)
    return [message]


def _user(role: str, blocks: list[Any], where: str) -> list[_Message]:
    """Results of tools are messages of their own; what stands between them stays there."""
    found: list[_Message] = []
    texts: list[str] = []
    for place, block in enumerate(blocks):
        if _kind(block) != "tool_result":
            texts.append(_text(block, where, place))
            continue
        if texts:
            found.append({"role": role, "content": _parts(texts)})
            texts = []
        if not isinstance(block.get("tool_use_id"), str):
            raise _bad(where, place, "a tool_result needs a 'tool_use_id'")
        content = said(block.get("content"), f"{where}.content.{place}.content", _TEXT)
        if block.get("is_error") and not content:
            content = "error"
        found.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": content or ""})
    if texts or not found:
        found.append({"role": role, "content": _parts(texts)})
    return found


def _kind(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else None


def _text(block: Any, where: str, place: int) -> str:
    if _kind(block) == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    raise _bad(
        where,
        place,
        f"blocks of type '{str(_kind(block))[:40]}' are not supported here: these models take text, tool_use of the "
        "assistant and tool_result of the user",
    )


def _parts(texts: list[str]) -> str | list[dict[str, str]]:
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def _bad(where: str, place: int, message: str) -> Exception:
    place_of = f"{where}.content.{place}"
    return bad_request(f"{place_of}: {message}", place_of, "unsupported_block")
