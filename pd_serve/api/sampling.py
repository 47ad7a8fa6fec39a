"""Request fields to the wire's SamplingParams. Called once for each prompt; raises APIError(400), keeps nothing."""

from __future__ import annotations

import random

from pd_serve.api import restrictions
from pd_serve.api.errors import bad_request
from pd_serve.api.schemas import ChatCompletionRequest, CompletionRequest
from pd_serve.api.text_model import TextModel
from pd_serve.wire.link import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
_GREEDY_BELOW = 1e-5  # dividing logits by less would overflow; the text is greedy by then
_SEEDS = 2**64


def draw_seed() -> int:
    return random.getrandbits(64)


def sampling_params(
    request: CompletionRequest | ChatCompletionRequest, model: TextModel, prompt_tokens: int
) -> SamplingParams:
    """For the first choice; choice ``i`` adds ``i`` to the seed (see :func:`choice_seed`)."""
    room = model.info.max_model_len - prompt_tokens
    logprobs = prompt_logprobs = -1
    if isinstance(request, CompletionRequest):
        wanted = request.max_tokens
        max_tokens = min(DEFAULT_COMPLETION_TOKENS, room) if wanted is None else max(1, wanted)
        if wanted == -1:
            max_tokens = room
        if request.logprobs is not None:
            logprobs = request.logprobs
            prompt_logprobs = request.logprobs if request.echo else -1
    else:
        max_tokens = request.max_completion_tokens or request.max_tokens or room
        if request.logprobs:
            logprobs = request.top_logprobs or 0
    if request.prompt_logprobs is not None:
        prompt_logprobs = max(prompt_logprobs, request.prompt_logprobs)
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise bad_request(f"'min_tokens' ({min_tokens}) is more than 'max_tokens' ({max_tokens})", "min_tokens")
    stop_tokens = request.stop_token_ids or []
    if stop_tokens:
        model.check_ids(stop_tokens, "stop_token_ids")
    bias = {int(key): value for key, value in (request.logit_bias or {}).items()}
    if bias:
        model.check_ids(list(bias), "logit_bias")
    allowed, words = _restrictions(request, model)
    defaults = model.sampling_defaults

    def chosen(name: str, neutral: float) -> float:
        """The request's value, or the model's, or what changes nothing."""
        value = getattr(request, name)
        return float(defaults.get(name, neutral) if value is None else value)

    temperature, top_k = chosen("temperature", 1.0), int(chosen("top_k", 0))
    return SamplingParams(
        max_tokens=max_tokens,
        seed=(draw_seed() if request.seed is None else request.seed) % _SEEDS,
        temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
        top_k=min(max(0, top_k), model.info.vocab_size),
        top_p=chosen("top_p", 1.0),
        min_p=chosen("min_p", 0.0),
        repetition_penalty=chosen("repetition_penalty", 1.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=bias,
        min_tokens=min_tokens,
        stop_token_ids=tuple(stop_tokens),
        ignore_eos=bool(request.ignore_eos),
        logprobs=max(0, logprobs) if request.ranked else logprobs,
        prompt_logprobs=prompt_logprobs,
        allowed_token_ids=allowed,
        bad_words=words,
        seeded=request.seed is not None,
    )


def _restrictions(
    request: CompletionRequest | ChatCompletionRequest, model: TextModel
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Which tokens may be sampled (empty: all), and which may not come one after the other."""
    allowed = tuple(dict.fromkeys(request.allowed_token_ids or ()))
    if allowed:
        model.check_ids(list(allowed), "allowed_token_ids")
    words = restrictions.word_tokens(request.bad_words or (), model.tokenizer)
    ends = [*(request.stop_token_ids or ()), *(() if request.ignore_eos else model.info.eos_token_ids)]
    restrictions.check_something_is_left(allowed, words, ends, request.min_tokens or 0)
    return allowed, words


def choice_seed(seed: int, choice: int) -> int:
    return (seed + choice) % _SEEDS
