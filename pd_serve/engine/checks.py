"""What a submit must be to be taken: the last check before its values meet others' in a batch.

Routers check what clients send; an engine relies on nobody's word, because one bad value in a step harms all of its
sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from urllib.parse import urlsplit

import numpy as np

from pd_serve.wire.link import SamplingParams, Source, Submit
from pd_serve.wire.peer import MAX_RANKS

MAX_FLOAT = 1e6  # far beyond what makes sense, and far from where float32 overflows
MAX_AGE_S = 1e6


def problem(submit: Submit, vocab_size: int, max_model_len: int) -> str:
    """Why this attempt can never be served here; empty when it can. A sentence for whoever sent it."""
    if not submit.tokens or len(submit.tokens) % 4:
        return "the prompt has no tokens"
    tokens = np.frombuffer(submit.tokens, dtype="<i4")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        return f"token ids must be between 0 and {vocab_size - 1}"
    if len(tokens) >= max_model_len:
        return f"{len(tokens)} tokens leave no room to answer: {max_model_len} is the limit here"
    if not 0 <= submit.num_output < min(len(tokens), submit.sampling.max_tokens):
        return "num_output does not fit tokens and max_tokens"
    if not 0 <= submit.age_s <= MAX_AGE_S:
        return f"age_s must be between 0 and {MAX_AGE_S:g}"
    if submit.source is not None and (why := source_problem(submit.source)):
        return why
    return _sampling_problem(submit.sampling, vocab_size)


def source_problem(source: Source) -> str:
    """Why no prefill node can be there; empty when one can."""
    if not 1 <= len(source.addresses) <= MAX_RANKS:
        return f"a prefill node with {len(source.addresses)} ranks cannot be"
    for address in source.addresses:
        try:
            parts = urlsplit(address)
            fits = parts.scheme == "tcp" and bool(parts.hostname) and bool(parts.port)
        except ValueError:
            fits = False
        if not fits:
            return f"{address[:100]!r} is no address of a prefill node: tcp://host:port is"
    return ""


def _sampling_problem(params: SamplingParams, vocab_size: int) -> str:
    ranges: tuple[tuple[str, float, float], ...] = (
        ("temperature", 0.0, MAX_FLOAT),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("presence_penalty", -MAX_FLOAT, MAX_FLOAT),
        ("frequency_penalty", -MAX_FLOAT, MAX_FLOAT),
        ("repetition_penalty", 1 / MAX_FLOAT, MAX_FLOAT),
        ("min_tokens", 0, math.inf),
        ("logprobs", -1, vocab_size),
        ("prompt_logprobs", -1, vocab_size),
    )
    for name, low, high in ranges:
        if not low <= getattr(params, name) <= high:  # not so for NaN
            return f"{name} must be between {low:g} and {high:g}, not {getattr(params, name)!r}"
    if not 0 <= params.seed < 1 << 64:
        return "seed must be between 0 and 2**64 - 1"
    if not all(abs(bias) <= MAX_FLOAT for bias in params.logit_bias.values()):
        return f"the values of logit_bias must be between {-MAX_FLOAT:g} and {MAX_FLOAT:g}"
    named = {
        "logit_bias": params.logit_bias,
        "stop_token_ids": params.stop_token_ids,
        "allowed_token_ids": params.allowed_token_ids,
        "bad_words": [id for word in params.bad_words for id in word],
    }
    if not all(params.bad_words):
        return "bad_words has one without tokens"
    for name, ids in named.items():
        if not _within(ids, vocab_size):
            return f"{name} names a token that does not exist: ids are between 0 and {vocab_size - 1}"
    return ""


def _within(ids: Iterable[int], vocab_size: int) -> bool:
    return all(0 <= id < vocab_size for id in ids)
