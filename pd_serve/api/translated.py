"""What the APIs beside OpenAI's own two share: a request that becomes a chat's, an answer made of a chat's chunks.

Each of them (:mod:`pd_serve.api.responses_api`, :mod:`pd_serve.api.messages_api`) says how its request is a chat, and
how the parts of a message (reasoning, text, tool calls) are told in its events; a whole answer is its own stream's
events added up, so that the two cannot differ. Everything between, from placement to stop strings, sees a chat. No I/O.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import msgspec

from pd_serve.api.errors import APIError, bad_request
from pd_serve.api.leniency import Leniency
from pd_serve.api.parsing import checked
from pd_serve.api.responses import Finish, Format, Usage
from pd_serve.api.schemas import ChatCompletionRequest, GenerationRequest

NOTHING = b":\n\n"  # an empty comment: a step may have nothing to tell, and an empty chunk would end the answer
_THEIRS = ("max_output_tokens", "stop_sequences")  # fields of these APIs, which chats have under other names
_json = msgspec.json.encode


class MakeFormat(Protocol):
    """``id``: unique, without a prefix. ``usage``: so far, at any time."""

    def __call__(self, *, id: str, created_s: int, model: str, usage: Callable[[], Usage]) -> TranslatedFormat: ...


class TranslatedRequest(GenerationRequest):
    """A request of another API. The sampling fields that chats have beyond its own are taken, too."""

    ignored = ChatCompletionRequest.ignored
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **{name: neutral for name, neutral in ChatCompletionRequest.unsupported.items() if name not in _THEIRS},
        # What its answers have no place for.
        "n": (1,),
        "best_of": (1,),
        "prompt_logprobs": (),
        "return_token_ids": (False,),
    }
    # Fields of the same name as a chat's that are not handed on as they are.
    own: ClassVar[frozenset[str]] = frozenset()
    # Of a chat's fields that errors may name: what they are called here.
    names: ClassVar[dict[str, str]] = {}

    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None

    @abstractmethod
    def chat(self, leniency: Leniency) -> ChatCompletionRequest:
        """Raises APIError(400) that names this API's fields."""

    def in_own_words(self, error: APIError) -> APIError:
        """An error about the chat, with this API's names of its fields."""
        message, param = error.message, error.param
        for name, own in self.names.items():
            message = re.sub(rf"(?<![\w.]){name}(?=[.:'])", own, message)
            param = param and re.sub(rf"^{name}(?=\.|$)", own, param)
        return APIError(error.status, message, param=param, code=error.code, retry_after_s=error.retry_after_s)

    def translated(self, leniency: Leniency, **fields: Any) -> ChatCompletionRequest:
        """A chat with ``fields``, and what this request says under a chat's names."""
        dropped = self.own | {"stream_options"}
        kept = {
            name: getattr(self, name)
            for name in self.model_fields_set & ChatCompletionRequest.model_fields.keys() - dropped
        }
        given = {name: value for name, value in (kept | fields).items() if value is not None}
        try:
            return checked(ChatCompletionRequest, given, leniency)
        except APIError as error:
            raise self.in_own_words(error) from None


class AnsweredRequest(TranslatedRequest):
    def output_tokens(self, room: int) -> int | None:
        """The most to be made, where the prompt left ``room``; None: what :meth:`chat` says."""
        return None

    @abstractmethod
    def make_format(self, *, id: str, created_s: int, model: str, usage: Callable[[], Usage]) -> TranslatedFormat: ...


def said(content: Any, where: str, kinds: Sequence[str] = ("text", "input_text", "output_text")) -> Any:
    """Text, or parts of text, as a chat's content. Raises APIError(400) for everything else."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{where}: must be a string or a list of text parts", where)
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind in kinds else part.get("refusal") if kind == "refusal" else None
        if not isinstance(text, str):
            raise bad_request(
                f"{where}.{place}: only text parts are supported (these models neither see nor hear), "
                f"got a part of type '{str(kind)[:40]}'",
                f"{where}.{place}",
            )
        texts.append({"type": "text", "text": text})
    return texts[0]["text"] if len(texts) == 1 else texts


class Part(NamedTuple):
    """What a message is made of, in the order in which it is said."""

    kind: Literal["reasoning", "text", "call"]
    number: int = 0  # of a call
    id: str = ""
    name: str = ""


_TEXT, _REASONING = Part("text"), Part("reasoning")


class TranslatedFormat(Format, ABC):
    """A chat's chunks in, another API's events out. One message: choice 0."""

    def __init__(self, *, id: str, created_s: int, model: str, usage: Callable[[], Usage]) -> None:
        super().__init__(id=id, created_s=created_s, model=model, chat=True, stream=True)
        self.id, self.model, self.usage = id, model, usage
        self.begun = False
        self.part: Part | None = None  # under way
        self._waiting: list[Any] = []  # log-probabilities of tokens that have no text yet

    # --- what an API says ---------------------------------------------------------------------------------

    @abstractmethod
    def begin(self) -> bytes: ...

    @abstractmethod
    def start(self, part: Part) -> bytes: ...

    @abstractmethod
    def more(self, text: str, scores: list[Any] | None = None) -> bytes:
        """Of the part under way. ``scores``: log-probabilities, as chats have them."""

    @abstractmethod
    def stop(self, *, cut: bool) -> bytes:
        """Ends the part under way. ``cut``: before the model had ended it."""

    @abstractmethod
    def finish(self, reason: str, stop: str | int | None) -> bytes: ...

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """The whole answer, when it is finished."""

    # --- Format -------------------------------------------------------------------------------------------

    def first(self, index: int, prompt_token_ids: Sequence[int] | None = None, *, usage: Usage | None = None) -> bytes:
        return self._begin()

    def text(self, index: int, text: str) -> bytes:
        if not text:
            return NOTHING
        return self.more(text) if self.part is _TEXT else self._into(_TEXT, text)

    def chunk(self, index: int, text: str, *, finish: Finish | None = None, **fields: Any) -> bytes:
        logprobs = fields.get("logprobs")
        choice = self._make_choice(index, text, logprobs, finish, "delta", fields.get("message"))
        return self.translate(choice["delta"], logprobs, finish) or NOTHING

    def document(self, choices: list[dict[str, Any]], usage: Usage, **of_prompt: Any) -> bytes:
        (choice,) = choices
        self._begin()
        self.translate(
            choice["message"], choice["logprobs"], Finish(choice["finish_reason"], choice.get("stop_reason"))
        )
        return _json(self.result())

    def end(self, usage: Usage) -> bytes:
        return b""  # the last event was the finish

    # --- parts --------------------------------------------------------------------------------------------

    def translate(self, delta: dict[str, Any], logprobs: Any, finish: Finish | None) -> bytes:
        """The events of one chunk of a chat; a whole message is one chunk, too."""
        events = b""
        scores = (logprobs or {}).get("content") or []
        if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
            events += self._into(_REASONING, reasoning)
        if content := delta.get("content"):
            events += self._into(_TEXT, content, self._waiting + scores)
            self._waiting = []
        elif self.part is _TEXT and scores:
            events += self.more("", scores)
        else:
            self._waiting += scores
        for place, call in enumerate(delta.get("tool_calls") or ()):
            events += self._into_call(call, place)
        if finish is not None:
            if self.part is not None:
                events += self._stop(cut=finish.reason == "length")
            events += self.finish(finish.reason, finish.stop)
        return events

    def _begin(self) -> bytes:
        self.begun = True
        return self.begin()

    def _into(self, part: Part, text: str, scores: list[Any] | None = None) -> bytes:
        events = self._to(part)
        return events + self.more(text, scores) if text else events

    def _into_call(self, call: dict[str, Any], place: int) -> bytes:
        function = call.get("function") or {}
        number = call.get("index", place)
        part = self.part
        if part is None or part.kind != "call" or part.number != number:
            part = Part("call", number, call.get("id") or "", function.get("name") or "")
        return self._into(part, function.get("arguments") or "")

    def _to(self, part: Part) -> bytes:
        if part is self.part:
            return b""
        events = b"" if self.part is None else self._stop(cut=False)
        self.part = part
        return events + self.start(part)

    def _stop(self, *, cut: bool) -> bytes:
        events = self.stop(cut=cut)
        self.part = None
        return events

    def empty_text(self) -> bytes:
        """For APIs whose clients look for a text in every answer."""
        return self._to(_TEXT) + self._stop(cut=False)
