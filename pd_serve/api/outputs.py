"""What outputs of a served model are made of: reasoning, calls, content, in its template's form; and grammars for them.

One a model, shared by all requests; only what is found out about its template is kept. ``prompt`` is always the
request's, in token ids: its end says whether the model is thinking already.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from pd_serve.api import grammars
from pd_serve.api.chat_template import ChatTemplates
from pd_serve.api.conversation import joined
from pd_serve.api.errors import APIError
from pd_serve.api.grammars import Wanted
from pd_serve.api.parsers import forced, registry
from pd_serve.api.parsers.harmony import Harmony
from pd_serve.api.parsers.json_calls import Forced, Named
from pd_serve.api.parsers.message import MessageParser
from pd_serve.api.parsers.pieces import Parser
from pd_serve.api.parsers.reasoning import Thinking
from pd_serve.api.schemas import ChatCompletionRequest, CompletionRequest
from pd_serve.api.tokenizer import TextTokenizer

_END_TOKENS = 16  # of a prompt: as many as a template puts behind the last message


class ParserNames(NamedTuple):
    """Of :mod:`pd_serve.api.parsers.registry`."""

    tools: str = registry.AUTO
    reasoning: str = registry.AUTO


class Outputs:
    def __init__(self, tokenizer: TextTokenizer, templates: ChatTemplates) -> None:
        self._tokenizer = tokenizer
        self._templates = templates
        self._chosen: dict[ParserNames, ParserNames] = {}
        self._specials: dict[ParserNames, frozenset[int]] = {}
        self._switched: dict[str, bool] = {}

    def message_parser(
        self, request: ChatCompletionRequest, prompt: list[int], names: ParserNames
    ) -> MessageParser | None:
        """What tells reasoning and calls from the content of one choice; None: all of it is content."""
        reasoning = self._reasoning(request, prompt, names)
        if reasoning is not None and reasoning.thinks and not self._close_ids(names):
            # A grammar that could not be told when to begin holds from the first token, and it allows no reasoning.
            reasoning = None if self.wanted_grammar(request, prompt, names) else reasoning
        calls: Parser | None = None
        tools = request.tools_shown
        if tools and request.tool_named is not None:
            calls = Named(request.tool_named.function.name)
        elif tools and request.tool_choice == "required":
            calls = Forced()
        elif tools and not isinstance(reasoning, Harmony):  # which tells them itself
            parameters = {tool.function.name: forced.parameters(tool) for tool in tools}
            calls = registry.make_tool_parser(self._parsers(names).tools, parameters)
        if reasoning is None and calls is None:
            return None
        several, told = request.parallel_tool_calls is not False, request.include_reasoning is not False
        return MessageParser(reasoning, calls, several=several, with_reasoning=told)

    def wanted_grammar(
        self, request: CompletionRequest | ChatCompletionRequest, prompt: list[int], names: ParserNames
    ) -> Wanted | None:
        """What the request makes of its output, behind reasoning. A call that must be made leaves no room for more;
        one that may be made is another thing that the output may be.

        Raises APIError(400) where fields contradict each other.
        """
        wanted = grammars.wanted_grammar(request)
        if not isinstance(request, ChatCompletionRequest):
            return wanted
        after = self.reasoning_end(request, prompt, names)
        if (calls := forced.forced_grammar(request, after)) is not None:
            return Wanted("tool_choice", calls)
        if wanted is None:
            return None
        grammar = msgspec.structs.replace(wanted.grammar, after=after)
        called = [tool.function.name for tool in request.tools_shown or ()]
        openings = registry.openings(self._parsers(names).tools, called) if called else ()
        return wanted._replace(grammar=grammars.or_calls(grammar, openings) if openings else grammar)

    def reasoning_end(self, request: ChatCompletionRequest, prompt: list[int], names: ParserNames) -> tuple[int, ...]:
        """The token that ends the reasoning which is to be expected; none: none is, or its end is no token."""
        left = self._left(request, prompt, names)
        thinks = left == "reasoning" or (left == "open" and self._opens_by_itself(names))
        return self._close_ids(names) if thinks else ()

    def _opens_by_itself(self, names: ParserNames) -> bool:
        """A model whose template closes the reasoning where none is wanted opens it where it is."""
        mark = registry.close_mark(self._parsers(names).reasoning)
        if mark and mark not in self._switched:
            variables = {"enable_thinking": False, "thinking": False}
            try:
                text = self._templates.render([{"role": "user", "content": "Hello"}], extra=variables)
            except APIError:
                text = ""
            self._switched[mark] = text.rstrip().endswith(mark)
        return bool(mark) and self._switched[mark]

    def _close_ids(self, names: ParserNames) -> tuple[int, ...]:
        mark = registry.close_mark(self._parsers(names).reasoning)
        ids = self._tokenizer.encode(mark, add_special_tokens=False) if mark else []
        return tuple(ids) if len(ids) == 1 else ()

    def shown_specials(self, names: ParserNames) -> frozenset[int]:
        """Special tokens that parsers have to see."""
        parsers = self._parsers(names)
        if parsers not in self._specials:
            markers = registry.markers(*parsers)
            found = (id for id in self._tokenizer.special_ids if self._tokenizer.token(id) in markers)
            self._specials[parsers] = frozenset(found)
        return self._specials[parsers]

    def _parsers(self, names: ParserNames) -> ParserNames:
        """Names with nothing left to choose."""
        if names not in self._chosen:
            source = "\n".join(self._templates.sources())
            tools = "hermes" if names.tools == registry.AUTO and self._templates.ignores_tools() else names.tools
            self._chosen[names] = ParserNames(
                registry.tool_parser(tools, source), registry.reasoning_parser(names.reasoning, source)
            )
        return self._chosen[names]

    def _reasoning(
        self, request: ChatCompletionRequest, prompt: list[int], names: ParserNames
    ) -> Thinking | Harmony | None:
        return registry.make_reasoning_parser(self._parsers(names).reasoning, self._left(request, prompt, names))

    def _left(self, request: ChatCompletionRequest, prompt: list[int], names: ParserNames) -> registry.Left:
        name = self._parsers(names).reasoning
        if name == registry.NONE:
            return "answer"
        end = self._tokenizer.decode(prompt[-_END_TOKENS:], skip_special_tokens=False)
        continued = joined(request.messages[-1].content) if request.continue_final_message else None
        return registry.left_by_prompt(name, end, continued)
