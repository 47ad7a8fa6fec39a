"""What vLLM is asked and what it says, as :mod:`pd_serve.router.backends.vllm` sends and reads it: no connection here.

Both paths, ``/inference/v1/generate`` and ``/v1/completions``, take the same words for sampling and answer in the same
structures, of which this has what is read.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pd_serve.router.backends.served import tokens_of
from pd_serve.wire import link as wire

# What the prefill server is asked to keep: the plain protocol of vLLM's own proxies.
KEEP: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_OURS = 1  # version of what pd-serve's connector writes


class _Top(msgspec.Struct):
    token_id: int | None = None
    token: str = ""
    logprob: float = 0.0
    rank: int | None = None
    top_logprobs: list[_Top] = []


class _Logprobs(msgspec.Struct):
    """Of either path."""

    content: list[_Top] | None = None
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class _PromptLogprob(msgspec.Struct):
    logprob: float
    rank: int | None = None


_Prompt = list[dict[str, _PromptLogprob] | None]


class Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: _Logprobs | None = None
    prompt_logprobs: _Prompt | None = None


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _Cached | None = None


class Answered(msgspec.Struct):
    """A whole answer, or an event of a streamed one."""

    choices: list[Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()
    kv_transfer_params: msgspec.Raw = msgspec.Raw()
    prompt_logprobs: _Prompt | None = None

    @property
    def num_cached(self) -> int:
        details = self.usage.prompt_tokens_details if self.usage is not None else None
        return (details.cached_tokens or 0) if details is not None else 0


class _Pdserve(msgspec.Struct):
    v: int
    num_tokens: int


class Params(msgspec.Struct):
    """The little that is read of them."""

    remote_prefill_cached_tokens: int | None = None
    pd_serve: msgspec.Raw = msgspec.Raw()


answered = msgspec.json.Decoder(Answered).decode


def raw_of(raw: msgspec.Raw) -> bytes:
    """JSON as it came; empty where there was none, or null."""
    found = bytes(raw)
    return b"" if found == b"null" else found


def is_ours(raw: msgspec.Raw, prompt_tokens: int) -> bool:
    """The connector is pd-serve's, and it has kept all of the prompt."""
    try:
        found = msgspec.json.decode(given, type=_Pdserve) if (given := raw_of(raw)) else None
    except msgspec.DecodeError:
        return False
    return found is not None and found.v == _OURS and found.num_tokens == prompt_tokens


def sampling_of(submit: wire.Submit, extra: int, limit: int) -> dict[str, Any]:
    """In vLLM's names; the same on both paths. What a model's files set is known to the router, so that all is said."""
    asked = submit.sampling
    made = submit.num_output + extra
    count = limit or asked.max_tokens - made
    found: dict[str, Any] = {
        "max_tokens": count,
        "temperature": asked.temperature,
        "top_k": asked.top_k,
        "top_p": asked.top_p,
        "min_p": asked.min_p,
        "repetition_penalty": asked.repetition_penalty,
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "min_tokens": max(0, min(asked.min_tokens - made, count)),
        "ignore_eos": asked.ignore_eos,
    }
    if asked.seeded and asked.temperature:
        found["seed"] = (asked.seed + made) % 2**63
    if asked.stop_token_ids:
        found["stop_token_ids"] = asked.stop_token_ids
    if asked.logit_bias:
        found["logit_bias"] = {str(id): bias for id, bias in asked.logit_bias.items()}
    if asked.allowed_token_ids:
        found["allowed_token_ids"] = asked.allowed_token_ids
    if asked.logprobs >= 0:
        found["logprobs"] = asked.logprobs
    if asked.prompt_logprobs >= 0:
        found["prompt_logprobs"] = asked.prompt_logprobs
    if asked.grammar is not None:
        found["structured_outputs"] = _structured(asked.grammar)
    return found


def _structured(grammar: wire.Grammar) -> dict[str, Any]:
    match grammar.kind:
        case "json_schema":
            return {"json": grammar.text}
        case "json_object":
            return {"json_object": True}
        case "choice":
            return {"choice": msgspec.json.decode(grammar.text)}
        case "regex" | "structural_tag":
            return {grammar.kind: grammar.text}
    return {"grammar": grammar.text}


def _id(token: str) -> int:
    """Of ``token_id:7``; -1 of what has none."""
    number = token.rpartition(":")[2]
    return int(number) if number.isdecimal() else -1


def logprobs_of(given: _Logprobs | None, tokens: list[int], tops: int) -> list[wire.TokenLogprob]:
    """Raises nothing: what is missing is very unlikely."""
    found = []
    for place, token in enumerate(tokens):
        logprob, rank, top = -9999.0, 0, list[tuple[int, float]]()
        if given is not None and given.content is not None and place < len(given.content):
            entry = given.content[place]
            logprob, rank = entry.logprob, entry.rank or 0
            top = [(_id(t.token) if t.token_id is None else t.token_id, t.logprob) for t in entry.top_logprobs]
        elif given is not None and place < len(given.token_logprobs):
            value = given.token_logprobs[place]
            logprob = -9999.0 if value is None else value
            tells = (given.top_logprobs or [])[place : place + 1]
            top = [(_id(t), p) for t, p in ((tells and tells[0]) or {}).items()]
        top = sorted((entry for entry in top if entry[0] >= 0), key=lambda entry: -entry[1])
        ranks = {id: n for n, (id, _) in enumerate(top, 1)}
        found.append(wire.TokenLogprob(token, logprob, rank or ranks.get(token, len(top) + 1), top[: max(0, tops)]))
    return found


def prompt_logprobs_of(given: _Prompt | None, submit: wire.Submit) -> list[wire.TokenLogprob | None]:
    tokens = tokens_of(submit)
    found: list[wire.TokenLogprob | None] = []
    for place, token in enumerate(tokens):
        entries = given[place] if given is not None and place < len(given) else None
        own = (entries or {}).get(str(token))
        if entries is None or own is None:
            found.append(None)
            continue
        top = sorted(((int(id), entry.logprob) for id, entry in entries.items()), key=lambda entry: -entry[1])
        found.append(wire.TokenLogprob(token, own.logprob, own.rank or 0, top[: submit.sampling.prompt_logprobs]))
    return found
