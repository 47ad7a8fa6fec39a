"""Grammars that clients ask for: found good or refused before a node sees them.

Off the loop, in a process of its own (:mod:`pd_serve.grammar.checker`), which starts with the first grammar.
"""

from __future__ import annotations

import math

from pd_serve.api.errors import APIError, bad_request
from pd_serve.api.grammars import Wanted
from pd_serve.api.text_model import TextModel
from pd_serve.config import BACKENDS
from pd_serve.grammar.checker import Busy, Checker, Tokenizer
from pd_serve.grammar.forms import GrammarError, missing
from pd_serve.router.groups import Group
from pd_serve.wire.link import Grammar

_RETRY_S = 2.0


class Grammars:
    def __init__(self) -> None:
        self._checker = Checker()

    async def lowered(self, wanted: Wanted, group: Group, text: TextModel) -> Grammar:
        """As nodes take it; for other engines' servers as it is.

        Raises APIError: 400 with what is wrong with it, 501 where something is not installed."""
        nodes = [*group.prefill.values(), *group.decode.values()]
        if nodes and all(node.hello.transport in BACKENDS for node in nodes):
            return wanted.grammar  # their engines have compilers of their own, and say what is wrong
        why = missing()
        for node in nodes:
            why = why or ("" if node.hello.grammars else f"{node.title} knows no grammars: {_INSTALL}")
        if why:
            raise APIError(501, f"'{wanted.param}': {why}", param=wanted.param, code="not_installed")
        info = text.info
        key = f"{info.fingerprint} {info.text} {info.vocab_size}"
        tokenizer = Tokenizer(key, text.tokenizer_json, info.vocab_size, info.eos_token_ids)
        try:
            return await self._checker.lowered(tokenizer, wanted.grammar)
        except GrammarError as error:
            message = f"'{wanted.param}' cannot be followed: {error}"
            raise bad_request(message, wanted.param, "invalid_grammar") from None
        except Busy as error:
            message = f"{error}: try again in {math.ceil(_RETRY_S)} s"
            raise APIError(503, message, code="overloaded", retry_after_s=_RETRY_S) from None

    def close(self) -> None:
        self._checker.close()


_INSTALL = "pip install 'pd-serve[structured]' there"
