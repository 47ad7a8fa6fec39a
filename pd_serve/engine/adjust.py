"""What is done to a sequence's logits before a token is chosen, as its request asks.

Pure functions of sampling parameters and output, called by the step builder for sequences that ask for such things.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pd_serve.compute.step import Bias
from pd_serve.wire.link import SamplingParams


def penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def biases(params: SamplingParams) -> bool:
    """Whether something is added to logits, for one of its tokens at least."""
    return bool(params.logit_bias or params.min_tokens or params.allowed_token_ids or params.bad_words)


def waits(params: SamplingParams) -> bool:
    """Whether what may be sampled depends on the tokens before."""
    return params.grammar is not None or any(len(word) > 1 for word in params.bad_words)


def forbidden(
    params: SamplingParams, output: npt.NDArray[np.int32], index: int, eos: tuple[int, ...]
) -> frozenset[int]:
    """Which tokens may not be output token ``index``: ends before ``min_tokens``, and the last ones of bad words.

    Bad words are vLLM's: sequences of tokens, of which the ``output`` must have none.
    """
    found: set[int] = set()
    if index < params.min_tokens:
        found.update(params.stop_token_ids if params.ignore_eos else (*eos, *params.stop_token_ids))
    if params.bad_words:
        tail = tuple(output[-max(map(len, params.bad_words)) :].tolist())
        for *before, last in params.bad_words:
            if not before or tail[-len(before) :] == tuple(before):
                found.add(last)
    return frozenset(found)


def bias(line: int, params: SamplingParams, never: frozenset[int]) -> Bias:
    """``never``: may not be sampled; but where nothing else is allowed, what is allowed counts."""
    values = dict.fromkeys(params.allowed_token_ids, 0.0)
    only = bool(values)
    if only:
        values |= {id: value for id, value in params.logit_bias.items() if id in values}
        if never >= values.keys():
            never = frozenset()
        values |= dict.fromkeys(never & values.keys(), -np.inf)
    else:
        values = params.logit_bias | dict.fromkeys(never, -np.inf)
    return Bias(line, np.array(list(values), np.int32), np.array(list(values.values()), np.float32), only)
