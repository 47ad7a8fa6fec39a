"""Chat templates, rendered with the conventions that models' templates are written for (those of transformers).

Called by the router's prompt preparation. The template comes from the model's directory, the messages from
the client; it runs in Jinja's immutable sandbox. Jinja itself is imported on first use.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pd_serve.api.conversation import Traits, joined
from pd_serve.api.errors import bad_request

if TYPE_CHECKING:
    from jinja2 import Template

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})


class ChatTemplates:
    """The templates of one model, compiled on first use."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._sources = dict(templates)
        self._special = dict(special_tokens)
        self._compiled: dict[str, Template] = {}
        self._traits: dict[str, Traits] = {}

    def source(self, name: str) -> str | None:
        return self._sources.get(name)

    def sources(self) -> list[str]:
        return list(self._sources.values())

    def ignores_tools(self) -> bool:
        """Whether the template that is used with tools shows nothing of them."""
        name = self._name(with_tools=True)
        return name in self._sources and self._traits_of(name).ignores_tools()

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages are brought into the template's form first (see :mod:`pd_serve.api.conversation`).

        Raises APIError(400) when the model has no template or the template rejects the messages.
        """
        name = self._name(with_tools=bool(tools))
        if name not in self._sources:
            raise bad_request(
                "this model has no chat template (it is a base model): use /v1/completions with a 'prompt'",
                "messages",
                "no_chat_template",
            )
        variables = dict(extra or {})
        taken = sorted(_RESERVED & variables.keys())
        if taken:
            raise bad_request(f"'{taken[0]}' cannot be set here: use the request's own field", "chat_template_kwargs")
        traits = self._traits_of(name)
        marker = ""
        try:
            if continue_final_message:
                # A mark at the end of the last message tells where to cut, whatever the template puts around it.
                marker = f"<cut-{secrets.token_hex(8)}>"
                messages = [*messages[:-1], {**messages[-1], "content": joined(messages[-1]["content"]) + marker + " "}]
            text = self._template(name).render(
                {
                    **self._special,
                    "documents": None,
                    **variables,
                    "messages": traits.repaired(messages),
                    "tools": tools or traits.no_tools(),
                    "add_generation_prompt": add_generation_prompt and not continue_final_message,
                }
            )
        except Exception as error:  # templates raise anything, on input that the client chose
            raise bad_request(
                f"the model's chat template rejected the messages: {error}", "messages", "chat_template_error"
            ) from error
        if not marker:
            return text
        place = text.rfind(marker)
        if place < 0:
            raise bad_request("the model's chat template drops the final message: it cannot be continued", "messages")
        # A template that trims the content takes the mark's space away, and would have trimmed the text's own.
        kept = text.startswith(marker + " ", place)
        return text[:place] if kept else text[:place].rstrip()

    def _name(self, *, with_tools: bool) -> str:
        return "tool_use" if with_tools and "tool_use" in self._sources else "default"

    def _traits_of(self, name: str) -> Traits:
        if name not in self._traits:

            def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
                variables = {**self._special, "documents": None, "add_generation_prompt": False}
                return str(self._template(name).render({**variables, "messages": messages, "tools": tools}))

            self._traits[name] = Traits(render, self._sources[name])
        return self._traits[name]

    def _template(self, name: str) -> Template:
        if name not in self._compiled:
            self._compiled[name] = _environment().from_string(self._sources[name])
        return self._compiled[name]


def check_template(source: str) -> None:
    """Raises ValueError that says where a template is broken."""
    from jinja2 import TemplateSyntaxError

    try:
        _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from None


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's text for training; here it is its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML characters, which no model was trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
