"""Bodies of requests: prompts of the lengths that are asked for, the same for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import TypeVar

from pd_serve.bench.datasets import Ask
from pd_serve.config import BenchConfig

BLOCK_TOKENS = 512  # of a trace's named parts of prompts
_FIRST_TOKEN_ID = 100  # below it many vocabularies keep their special tokens
_WORDS = """time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point home water room
mother area money story fact month lot right study book eye job word business issue side kind head house service
friend father power hour game line end member law car city community name president team minute idea body""".split()

_T = TypeVar("_T")


class Bodies:
    """Request bodies for a model, each with a prompt of its own but for what an :class:`Ask` says is shared."""

    def __init__(self, config: BenchConfig, model: str, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._random = random.Random(seed)
        self._fixed: dict[str, object] = {
            "model": model,
            "temperature": config.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if config.ignore_eos:
            self._fixed["ignore_eos"] = True

    def next(self) -> bytes:
        """Of the lengths that the settings say."""
        return self.of(Ask(self._config.input_len, self._config.output_len))

    def of(self, ask: Ask) -> bytes:
        config, prompt = self._config, dict[str, object]()
        if config.endpoint == "chat":
            prompt["messages"] = [{"role": "user", "content": self._text(ask)}]
        elif config.prompt == "text" or ask.text:
            prompt["prompt"] = self._text(ask)
        else:
            prompt["prompt"] = self._items(ask, range(_FIRST_TOKEN_ID, config.max_token_id))
        return json.dumps(self._fixed | {"max_tokens": ask.output_len} | prompt).encode()

    def _text(self, ask: Ask) -> str:
        return ask.text or " ".join(self._items(ask, _WORDS))

    def _items(self, ask: Ask, among: Sequence[_T]) -> list[_T]:
        found: list[_T] = []
        for name in ask.blocks:
            found += random.Random(f"{self._seed} {name}").choices(among, k=BLOCK_TOKENS)
        del found[ask.input_len :]
        return found + self._random.choices(among, k=ask.input_len - len(found))
