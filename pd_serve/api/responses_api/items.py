"""Items of a Responses request's input as the messages of a chat.

One turn of the assistant comes as several items (reasoning, text, calls), which are one message of a chat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pd_serve.api.errors import bad_request
from pd_serve.api.translated import said

_Message = dict[str, Any]


def messages(instructions: str | None, given: str | list[Any]) -> list[_Message]:
    """Raises APIError(400) that names the item."""
    found: list[_Message] = []
    if instructions:
        found.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*found, {"role": "user", "content": given}]
    if not given:
        raise bad_request("input: must not be empty", "input")
    for place, item in enumerate(given):
        where = f"input.{place}"
        if not isinstance(item, dict):
            raise bad_request(f"{where}: an item must be a JSON object", where)
        _add(found, item, where)
    return found


def _add(found: list[_Message], item: dict[str, Any], where: str) -> None:
    kind = item.get("type") or ("message" if "role" in item else None)
    match kind:
        case "message":
            _add_message(found, item, where)
        case "reasoning":
            # What is only there in a form that another server encrypted cannot be read here.
            text = "".join(_texts(item.get("content")) or _texts(item.get("summary")))
            turn = _turn(found, lambda last: not last["content"] and "tool_calls" not in last)
            turn["reasoning_content"] = turn.get("reasoning_content", "") + text
        case "function_call":
            call_id, name = item.get("call_id"), item.get("name")
            if not isinstance(call_id, str) or not isinstance(name, str):
                raise bad_request(f"{where}: a function_call needs a 'call_id' and a 'name'", where)
            function = {"name": name, "arguments": item.get("arguments") or ""}
            turn = _turn(found, lambda last: True)
            turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        case "function_call_output":
            if not isinstance(item.get("call_id"), str):
                raise bad_request(f"{where}: a function_call_output needs a 'call_id'", where)
            output = said(item.get("output"), f"{where}.output")
            found.append({"role": "tool", "tool_call_id": item["call_id"], "content": output or ""})
        case "item_reference":
            raise bad_request(f"{where}: items are not stored here: send the item itself", where, "unsupported_item")
        case _:
            raise bad_request(
                f"{where}: items of type '{str(kind)[:40]}' are not supported: there are message, reasoning, "
                "function_call and function_call_output",
                where,
                "unsupported_item",
            )


def _add_message(found: list[_Message], item: dict[str, Any], where: str) -> None:
    role, content = item.get("role"), said(item.get("content"), f"{where}.content")
    if role not in ("user", "assistant", "system", "developer"):
        raise bad_request(f"{where}.role: must be user, assistant, system or developer", f"{where}.role")
    if content is None:
        raise bad_request(f"{where}: a message needs a 'content'", f"{where}.content", "missing_field")
    if role == "assistant":
        turn = _turn(found, lambda last: not last["content"] and "tool_calls" not in last)
        turn["content"] = content
    else:
        found.append({"role": role, "content": content})


def _turn(found: list[_Message], goes_on: Callable[[_Message], bool]) -> _Message:
    """The assistant's message that an item belongs to: the last one, or a new one."""
    if not found or found[-1]["role"] != "assistant" or not goes_on(found[-1]):
        found.append({"role": "assistant", "content": None})
    return found[-1]


def _texts(parts: Any) -> list[str]:
    if not isinstance(parts, list):
        return []
    return [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
