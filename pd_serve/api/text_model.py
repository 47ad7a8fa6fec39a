"""A served model's prompts: requests become token ids, checked against the model's limits.

Built by the router from a node's ``ModelBundle`` and ``ModelInfo``; shared by all requests for the model. What its
outputs are made of is :mod:`pd_serve.api.outputs`' to say. Its methods may be slow for long texts and may run in a
thread; they keep no state of a request.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from pd_serve.api.chat_template import ChatTemplates
from pd_serve.api.errors import APIError, bad_request
from pd_serve.api.messages import Message, Tool
from pd_serve.api.outputs import Outputs
from pd_serve.api.parsers.fallback import with_tools_told
from pd_serve.api.schemas import ChatCompletionRequest, CompletionRequest, TokenizeRequest
from pd_serve.api.tokenizer import TextTokenizer
from pd_serve.wire.link import ModelInfo
from pd_serve.wire.model import ModelBundle

log = logging.getLogger(__name__)

MAX_SEQUENCES = 1024  # prompts x n of one request
_INT32 = 2**31
_CHARACTERS_PER_TOKEN = 16  # more than usual text has
_TOO_LONG = "context_length_exceeded"


class Prompt(NamedTuple):
    ids: list[int]
    text: str | None  # as the client wrote it; None where it gave token ids, or where a part was cut off
    warning: str | None = None  # what the client should know of how it was made


class TextModel:
    def __init__(self, bundle: ModelBundle, info: ModelInfo) -> None:
        """Raises ModelError when the bundle's tokenizer cannot be loaded."""
        self.info = info
        self.tokenizer_json = bundle.tokenizer_json
        self.name = info.name
        self.tokenizer = TextTokenizer(
            bundle.tokenizer_json, bos_token=bundle.special_tokens.get("bos_token"), add_bos_token=bundle.add_bos_token
        )
        self.templates = ChatTemplates(bundle.chat_templates, bundle.special_tokens)
        self.outputs = Outputs(self.tokenizer, self.templates)
        self._special_tokens = dict(bundle.special_tokens)
        self._warned = False
        self.sampling_defaults = bundle.generation_defaults

    def completion_prompts(self, request: CompletionRequest) -> list[Prompt]:
        """One entry a prompt, each within the vocabulary and the model's length. Raises APIError(400)."""
        prompt = request.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if len(prompt) * request.choices > MAX_SEQUENCES:
            raise bad_request(f"at most {MAX_SEQUENCES} sequences (prompts x n) fit into a request: split it", "prompt")
        special = request.add_special_tokens is not False
        limit = 1 if request.max_tokens is None else request.max_tokens
        found = []
        for item in prompt:
            if isinstance(item, str):
                entry = self._cut(request, Prompt(self._encode_prompt(request, item, special, "prompt"), item))
            else:
                self.check_ids(item, "prompt")
                entry = self._cut(request, Prompt(item, None))
            self.check_length(len(entry.ids), limit, "prompt", "max_tokens")
            found.append(entry)
        return found

    def chat_prompt(self, request: ChatCompletionRequest) -> Prompt:
        text = self._chat_text(request)
        ids = self._encode_prompt(request, text, bool(request.add_special_tokens), "messages")
        prompt = self._cut(request, Prompt(ids, text, self._tools_warning() if request.tools_shown else None))
        limit = request.max_completion_tokens or request.max_tokens or 1
        self.check_length(len(prompt.ids), limit, "messages", "max_tokens")
        return prompt

    def count_chat(self, request: ChatCompletionRequest) -> int:
        """The prompt's tokens, also where they are more than the model takes."""
        return len(self.tokenizer.encode(self._chat_text(request), add_special_tokens=bool(request.add_special_tokens)))

    def _chat_text(self, request: ChatCompletionRequest) -> str:
        return self.render(
            request.messages,
            request.tools_shown,
            request.add_generation_prompt,
            request.continue_final_message,
            request.template_variables,
        )

    def _tools_warning(self) -> str | None:
        if not self.templates.ignores_tools():
            return None
        warning = f"the chat template of {self.name} knows no 'tools': a system message tells the model of them"
        if not self._warned:
            self._warned = True
            log.warning("%s (said once)", warning)
        return warning

    def _encode_prompt(
        self, request: CompletionRequest | ChatCompletionRequest, text: str, special: bool, param: str
    ) -> list[int]:
        if request.truncate_prompt_tokens is None:
            return self.encode(text, special, param)
        return self.tokenizer.encode(text, add_special_tokens=special)

    def _cut(self, request: CompletionRequest | ChatCompletionRequest, prompt: Prompt) -> Prompt:
        """``truncate_prompt_tokens``: the last so many tokens; -1: as many as leave room for the output."""
        wanted = request.truncate_prompt_tokens
        if wanted is None:
            return prompt
        if wanted == -1:
            output = request.max_tokens or 1
            if isinstance(request, ChatCompletionRequest):
                output = request.max_completion_tokens or output
            wanted = max(1, self.info.max_model_len - max(1, output))
        return prompt._replace(ids=prompt.ids[-wanted:], text=None) if len(prompt.ids) > wanted else prompt

    def render(
        self,
        messages: list[Message],
        tools: list[Tool] | None,
        add_generation_prompt: bool | None,
        continue_final_message: bool | None,
        extra: dict[str, Any] | None,
    ) -> str:
        conversation = [message.model_dump(exclude_unset=True) for message in messages]
        shown = [tool.model_dump(exclude_unset=True) for tool in tools] if tools else None
        if shown and self.templates.ignores_tools():
            conversation, shown = with_tools_told(conversation, shown), None
        return self.templates.render(
            conversation,
            tools=shown,
            add_generation_prompt=add_generation_prompt is not False,
            continue_final_message=bool(continue_final_message),
            extra=extra,
        )

    def tokenize(self, request: TokenizeRequest) -> list[int]:
        if request.messages is not None:
            text = self.render(
                request.messages,
                request.tools,
                request.add_generation_prompt,
                request.continue_final_message,
                request.chat_template_kwargs,
            )
            return self.tokenizer.encode(text, add_special_tokens=bool(request.add_special_tokens))
        assert request.prompt is not None  # the schema saw to it
        return self.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens is not False)

    def tokenizer_info(self) -> dict[str, Any]:
        """What clients need to render and count for themselves, by the names of tokenizer_config.json."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.info.max_model_len,
            "chat_template": self.templates.source("default"),
            **self._special_tokens,
        }

    def encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        limit = self.info.max_model_len
        # Megabytes of text cost seconds: a beginning that is far too long already says as much.
        size = _CHARACTERS_PER_TOKEN * limit
        while size < len(text):
            count = len(self.tokenizer.encode(text[:size], add_special_tokens=False))
            if count > 2 * limit:  # twice, because the cut may fall into a word
                raise bad_request(_too_long(f"more than {count // 2}", limit), param, _TOO_LONG)
            size *= 4
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not ids:
            raise bad_request("the prompt is empty: it must have at least one token", param, "empty_prompt")
        return ids

    def check_ids(self, ids: list[int], param: str) -> None:
        low, high = min(ids), max(ids)
        limit = min(self.info.vocab_size, _INT32)
        if low < 0 or high >= limit:
            wrong = low if low < 0 else high
            raise bad_request(f"token id {wrong} is out of range: this model's are 0 to {limit - 1}", param)

    def check_length(self, prompt_tokens: int, max_tokens: int, param: str, tokens_param: str) -> None:
        limit = self.info.max_model_len
        if prompt_tokens + max(1, max_tokens) <= limit:
            return
        if prompt_tokens + 1 > limit:
            raise bad_request(_too_long(str(prompt_tokens), limit), param, _TOO_LONG)
        raise bad_request(
            f"the prompt has {prompt_tokens} tokens and '{tokens_param}' asks for {max_tokens}, this model takes "
            f"{limit} in all: lower '{tokens_param}' to at most {limit - prompt_tokens} or shorten the prompt",
            tokens_param,
            _TOO_LONG,
        )


def _too_long(tokens: str, limit: int) -> str:
    return f"the prompt has {tokens} tokens, this model takes {limit} in all (prompt and output): shorten the prompt"


def unknown_model(name: str, known: list[str]) -> APIError:
    served = ", ".join(sorted(known))
    return APIError(
        404, f"the model '{name[:200]}' is not served here; served: {served}", param="model", code="model_not_found"
    )
