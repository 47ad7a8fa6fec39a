"""Conversations as clients send them, brought into the form that a model's chat template takes.

Templates differ in what they take: parts lists or strings, arguments as objects or as JSON text, one system
message or several, tool calls or none. What one does is found by rendering small conversations with it and looking
whether everything said in them is in the text; a template that shows everything gets the messages as they are. Called
by :mod:`pd_serve.api.chat_template`; no I/O, no state of a request.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from pd_serve.api.parsers.fallback import shown_call

Message = dict[str, Any]
Render = Callable[[list[Message], list[dict[str, Any]] | None], str]

_INSTRUCTIONS = ("system", "developer")
_ABSENT = object()
_SHORT_ID = 9  # characters of the ids that Mistral's templates insist on
_WORDS = ("probeone", "probetwo", "probethree", "probefour")
_TOOL = {
    "type": "function",
    "function": {
        "name": "probefunction",
        "description": "probe",
        "parameters": {"type": "object", "properties": {"probekey": {"type": "string", "description": "probe"}}},
    },
}


class _CallForm(NamedTuple):
    """How a template takes an assistant's tool calls."""

    empty: Any  # the content of a message that has none: "", None or _ABSENT
    arguments_as_text: bool
    short_ids: bool
    text: str  # what becomes of text beside calls: it stays "beside" them, is a message "apart", or is "dropped"


class Traits:
    """What one template does with messages. Each trait is found when it is first needed (a few renderings)."""

    def __init__(self, render: Render, source: str) -> None:
        self._render = render
        self._source = source
        self._found: dict[Any, Any] = {}

    def ignores_tools(self) -> bool:
        """Whether tool definitions change nothing in the text."""

        def find() -> bool:
            messages = [_user("probe")]
            with_tools, without = self._try(messages, [_TOOL]), self._try(messages, None)
            return with_tools is not None and with_tools == without

        return bool(self._once("tools", find))

    def no_tools(self) -> list[dict[str, Any]] | None:
        """What a request without tools hands to the template: some look through the list without asking for it."""

        def find() -> bool:
            messages = [_user("probe")]
            return self._try(messages, None) is None and self._try(messages, []) is not None

        return [] if self._once("no tools", find) else None

    def repaired(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in the form that the template takes; they may be fewer or more."""
        found = [_cleaned(message, self._source) for message in messages]
        found = self._with_instructions(found)
        found = self._with_calls(found)
        return [self._with_content(message) for message in found]

    # --- system and developer messages ----------------------------------------------------------------

    def _with_instructions(self, messages: list[Message]) -> list[Message]:
        if all(message["role"] not in _INSTRUCTIONS for message in messages):
            return messages
        as_system = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        # A template that prints any role shows a developer's message, too, but its model has never seen that role.
        known = as_system == messages or "developer" in self._source
        for candidate in [messages, as_system] if known else [as_system]:
            if self._takes_roles(candidate):
                return candidate
        front = [message for message in as_system if message["role"] == "system"]
        rest = [message for message in as_system if message["role"] != "system"]
        text = "\n\n".join(filter(None, (joined(message.get("content")) for message in front)))
        merged = [{**front[0], "content": text}, *rest]
        if self._takes_roles(merged):
            return merged
        if not self._takes_text("user") and not self._takes_parts("user"):
            return messages  # it shows nothing that anybody says
        # No system role at all (Gemma): the instructions open the first message of the user.
        for place, message in enumerate(rest):
            if message["role"] == "user":
                content = text + "\n\n" + joined(message.get("content"))
                return [*rest[:place], {**message, "content": content}, *rest[place + 1 :]]
        return merged

    def _takes_roles(self, messages: list[Message]) -> bool:
        roles = [message["role"] for message in messages]
        front = list(itertools.takewhile(_INSTRUCTIONS.__contains__, roles))
        later = sorted({role for role in roles[len(front) :] if role in _INSTRUCTIONS})
        front = front[:3]  # whoever takes three takes more

        def find() -> bool:
            words = iter(_WORDS * 2)
            said: list[str] = []

            def instruction(role: str) -> Message:
                said.append(f"{next(words)}{len(said)}")
                return {"role": role, "content": said[-1]}

            probe = [instruction(role) for role in front] + [_user("probe")]
            if later:
                probe += [_assistant("probe"), *(instruction(role) for role in later), _user("probe")]
            return self._shows(probe, said)

        return bool(self._once(("roles", *front, "later", *later), find))

    # --- tool calls -------------------------------------------------------------------------------------

    def _with_calls(self, messages: list[Message]) -> list[Message]:
        if any(len(message.get("tool_calls") or ()) > 1 for message in messages) and not self._takes_several_calls():
            messages = _one_by_one(messages)
        form = self._call_form(text=False)
        found: list[Message] = []
        for message in messages:
            if message["role"] == "tool":
                found.append(self._tool_result(message, form))
            elif "tool_calls" not in message:
                content = message.get("content")
                found.append({**message, "content": "" if content is None else content})
            else:
                found += self._calling(message, form)
        return found if self._takes_tool_role() else _merge_users(found)

    def _calling(self, message: Message, form: _CallForm | None) -> list[Message]:
        text = joined(message.get("content"))
        if text:
            form = self._call_form(text=True)
        if form is None:
            calls = [_call(call, as_text=False)["function"] for call in message["tool_calls"]]
            shown = "\n".join(map(shown_call, calls))
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            return [{**rest, "content": f"{text}\n{shown}" if text else shown}]
        return _in_form(message, text, form)

    def _tool_result(self, message: Message, form: _CallForm | None) -> Message:
        content = message.get("content")
        message = {**message, "content": "" if content is None else content}
        if form is None and not self._takes_tool_role():
            return _user(joined(content))
        if form is not None and form.short_ids and isinstance(message.get("tool_call_id"), str):
            message["tool_call_id"] = _short(message["tool_call_id"])
        return message

    def _call_form(self, *, text: bool) -> _CallForm | None:
        return self._once(("calls", text), lambda: self._find_call_form("probetext" if text else ""))  # type: ignore[no-any-return]

    def _find_call_form(self, text: str) -> _CallForm | None:
        plain = None
        if text:
            plain = self._call_form(text=False)
            if plain is None:
                return None
            forms = [plain._replace(text=place) for place in ("beside", "apart")]
        else:
            # In the order of preference; ids stay as they are where that works.
            choices = itertools.product((False, True), (None, "", _ABSENT), (False, True))
            forms = [_CallForm(empty, as_text, short_ids, "beside") for short_ids, empty, as_text in choices]
        said = ["probefunction", "probekey", "probevalue", "proberesult", "probeend", *([text] if text else [])]
        for candidate in forms:
            id = _short("callprobe") if candidate.short_ids else "call_probe-0123456789"
            calling = {"role": "assistant", "content": text, "tool_calls": [_probe_call(id)]}
            messages = [
                _user("probe"),
                *_in_form(calling, text, candidate),
                {"role": "tool", "tool_call_id": id, "name": "probefunction", "content": "proberesult"},
                _assistant("probe"),
                _user("probeend"),
            ]
            if self._shows(messages, said, ("None", "{'probekey'", '\\"probekey'), [_TOOL]):
                return candidate
        # A template that shows calls and never the text beside them: the calls are what the model knows.
        return plain._replace(text="dropped") if text and plain is not None else None

    def _takes_several_calls(self) -> bool:
        def find() -> bool:
            form = self._call_form(text=False)
            if form is None:
                return True  # they become text
            ids = [_short(f"callprobe{number}") for number in (1, 2)]
            calling = {"role": "assistant", "tool_calls": [_probe_call(id, f"value{id}") for id in ids]}
            results = [
                {"role": "tool", "tool_call_id": id, "name": "probefunction", "content": f"result{id}"} for id in ids
            ]
            messages = [_user("probe"), *_in_form(calling, "", form), *results, _assistant("probe"), _user("probeend")]
            return self._shows(messages, [f"{word}{id}" for word in ("value", "result") for id in ids], (), [_TOOL])

        return bool(self._once("several calls", find))

    def _takes_tool_role(self) -> bool:
        if self._call_form(text=False) is not None:
            return True
        result = {"role": "tool", "tool_call_id": "call_probe", "name": "probefunction", "content": "proberesult"}
        messages = [_user("probe"), _assistant("probe"), result, _assistant("probe"), _user("probe")]
        return bool(self._once("tool role", lambda: self._shows(messages, ["proberesult"])))

    # --- content ----------------------------------------------------------------------------------------

    def _with_content(self, message: Message) -> Message:
        content, role = message.get("content"), message["role"]
        if isinstance(content, list):
            takes_it = role in ("system", "user", "assistant") and self._takes_parts(role)
            return message if takes_it else {**message, "content": joined(content)}
        if content and role in ("system", "user", "assistant") and self._needs_parts(role):
            return {**message, "content": [{"type": "text", "text": content}]}
        return message

    def _takes_parts(self, role: str) -> bool:
        content = [{"type": "text", "text": word} for word in _WORDS[:2]]
        return bool(self._once(("parts", role), lambda: self._shows_content(role, content)))

    def _needs_parts(self, role: str) -> bool:
        def find() -> bool:
            return not self._takes_text(role) and self._takes_parts(role)

        return bool(self._once(("needs parts", role), find))

    def _takes_text(self, role: str) -> bool:
        return bool(self._once(("text", role), lambda: self._shows_content(role, " ".join(_WORDS[:2]))))

    def _shows_content(self, role: str, content: Any) -> bool:
        message = {"role": role, "content": content}
        around = {
            "user": [message],
            "system": [message, _user("probe")],
            "assistant": [_user("probe"), message, _user("probe")],
        }[role]
        return self._text_shows(around, _WORDS[:2], ("'type'", '"type"', "'text'"), None)

    # --- probing ----------------------------------------------------------------------------------------

    def _shows(
        self,
        messages: list[Message],
        said: Iterable[str],
        banned: Iterable[str] = (),
        tools: list[dict[str, Any]] | None = None,
    ) -> bool:
        """Whether all that was said is in the text; messages are given in the form of content that is taken."""
        messages = [self._with_content(message) for message in messages]
        return self._text_shows(messages, said, banned, tools)

    def _text_shows(
        self, messages: list[Message], said: Iterable[str], banned: Iterable[str], tools: list[dict[str, Any]] | None
    ) -> bool:
        text = self._try(messages, tools or self.no_tools())
        return text is not None and all(word in text for word in said) and not any(word in text for word in banned)

    def _try(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> str | None:
        try:
            return self._render(messages, tools)
        except Exception:  # templates raise anything
            return None

    def _once(self, key: Any, find: Callable[[], Any]) -> Any:
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]


def joined(content: Any) -> str:
    """The text of a message's content, whatever its form; parts are joined by line breaks."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _probe_call(id: str, value: str = "probevalue") -> dict[str, Any]:
    arguments = json.dumps({"probekey": value})
    return {"id": id, "type": "function", "function": {"name": "probefunction", "arguments": arguments}}


def _cleaned(message: Message, source: str) -> Message:
    """Without what says nothing; an assistant's reasoning under every name that templates know it by."""
    found = {key: value for key, value in message.items() if value is not None}
    if not found.get("tool_calls"):
        found.pop("tool_calls", None)
    reasoning = found.pop("reasoning", None) or found.pop("reasoning_content", None)
    if reasoning:
        found |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if "reasoning" not in source and not found.get("content"):
            found["thinking"] = reasoning
    return found


def _call(call: dict[str, Any], *, as_text: bool, short_ids: bool = False) -> dict[str, Any]:
    """Clients send arguments as JSON text, or none; templates take an object or JSON text of one."""
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    elif isinstance(arguments, str):
        arguments = _object(arguments)
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and not isinstance(arguments, dict):
        # A model may well have written it, and the tool's answer says what is wrong with it.
        arguments = {"arguments": arguments}
    found = {"type": "function", **call, "function": {**function, "arguments": arguments}}
    if short_ids:
        found["id"] = _short(str(call.get("id", "")))
    return found


def _object(text: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


def _in_form(message: Message, text: str, form: _CallForm) -> list[Message]:
    as_text, short_ids = form.arguments_as_text, form.short_ids
    calls = [_call(call, as_text=as_text, short_ids=short_ids) for call in message["tool_calls"]]
    calling = {key: value for key, value in message.items() if key != "content"} | {"tool_calls": calls}
    if text and form.text == "beside":
        return [{**calling, "content": message["content"]}]
    if form.empty is not _ABSENT:
        calling["content"] = form.empty
    before = {key: value for key, value in message.items() if key != "tool_calls"}
    return [before, calling] if text and form.text == "apart" else [calling]


def _one_by_one(messages: list[Message]) -> list[Message]:
    """Calls that were made at once as one after the other, each with its result."""
    found: list[Message] = []
    place = 0
    while place < len(messages):
        message = messages[place]
        place += 1
        calls = message.get("tool_calls") or ()
        if len(calls) <= 1:
            found.append(message)
            continue
        results: dict[str, list[Message]] = {}
        while place < len(messages) and messages[place]["role"] == "tool":
            results.setdefault(str(messages[place].get("tool_call_id")), []).append(messages[place])
            place += 1
        for number, call in enumerate(calls):
            rest = message if number == 0 else {"role": "assistant"}
            found += [{**rest, "tool_calls": [call]}, *results.pop(str(call.get("id")), ())]
        found += itertools.chain.from_iterable(results.values())
    return found


def _merge_users(messages: list[Message]) -> list[Message]:
    """Tool results that became the user's words, together with what the user says next to them: templates
    without a tool role often want the two sides to take turns."""
    found: list[Message] = []
    for role, group in itertools.groupby(messages, key=lambda message: message["role"]):
        said = list(group)
        if role == "user" and len(said) > 1:
            said = [{**said[0], "content": "\n".join(joined(message["content"]) for message in said)}]
        found += said
    return found


def _short(id: str) -> str:
    return re.sub("[^A-Za-z0-9]", "", id)[-_SHORT_ID:].rjust(_SHORT_ID, "0")
