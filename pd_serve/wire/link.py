"""Messages between a router and a node, and unchanged between a node's process and its engine.

A router holds one WebSocket (the *link*) to each node; every frame is one MessagePack message of
the unions ``ToNode`` or ``FromNode``. The node process forwards frames to its engine over ZeroMQ
without decoding what it does not need. How a link begins, and what is appended to its frames where there is a
secret: :mod:`pd_serve.wire.handshake`.

Token indices count a request's *output* tokens from 0, over the whole life of the request: a
resumed attempt continues the count, so that the router can join and de-duplicate by index alone.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pd_serve.wire.memory import MemoryReport

# Raised where an older end would misread messages, or pass over what changes answers: allowed_token_ids, bad_words and
# a prompt's salt came with version 5. Ends of different versions refuse each other and say so.
LINK_VERSION = 5

ROLES = ("prefill", "decode", "both")

MAX_FRAME_BYTES = 64 << 20  # a prompt of 16 million tokens

# What a proven end says is bounded as well: a fault of its must not become the other's.
Count = Annotated[int, Meta(ge=0, le=2**62)]
Index = Annotated[int, Meta(ge=0, lt=2**31)]
Seconds = Annotated[float, Meta(ge=0)]


class Greeting(msgspec.Struct, tag="greeting", frozen=True):
    """First frame of a link, from the router."""

    link_version: int
    nonce: Annotated[bytes, Meta(min_length=16, max_length=64)]


class Challenge(msgspec.Struct, tag="challenge", frozen=True):
    """The node's answer: it knows the secret, if ``mac`` holds."""

    link_version: int
    nonce: Annotated[bytes, Meta(min_length=16, max_length=64)]
    mac: bytes


class Proof(msgspec.Struct, tag="proof", frozen=True):
    """The router's: it knows the secret too."""

    mac: bytes


class Grammar(msgspec.Struct, frozen=True, omit_defaults=True):
    """What output text has to be. Both ends compile it with the same library; the router first, to say what is wrong.

    ``kind``: what ``text`` is. "json_schema" (a JSON schema), "json_object" (no text: any JSON object), "regex" (the
    whole output matches it), "choice" (a JSON list of strings: one of them), "ebnf" (rules such as ``root ::= "a"``),
    "lark" (a grammar in Lark's notation as llguidance reads it).
    """

    kind: str
    text: str = ""
    # Token ids: the constraint begins after the first of them in the output; what comes before, a model's reasoning, is
    # free. Empty: it begins with the first token.
    after: tuple[int, ...] = ()


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How output tokens are chosen. Validated by the API before it gets here.

    Randomness is a pure function of ``(seed, output index)``: the same seed gives the same text
    whatever else is in the batch, on whichever node each token is sampled.
    """

    max_tokens: int  # total output tokens of the request, tokens of earlier attempts included
    seed: int  # 0 <= seed < 2**64; drawn by the router where the client gave none
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0  # before it no EOS and no stop token can be sampled
    stop_token_ids: tuple[int, ...] = ()  # in addition to the model's EOS ids
    ignore_eos: bool = False
    logprobs: int = -1  # -1 none, 0 the chosen token's only, k also the k most likely
    prompt_logprobs: int = -1  # the same for prompt tokens (completions with echo)
    grammar: Grammar | None = None  # ends the output where it is complete
    allowed_token_ids: tuple[int, ...] = ()  # none but these can be sampled; empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # tokens that the output must not have one after the other
    seeded: bool = False  # the client gave the seed: for engines that sample more slowly with one


class Source(msgspec.Struct, frozen=True):
    """Where a decode node pulls a prompt's KV blocks from."""

    node_id: str
    epoch: str
    addresses: tuple[str, ...]  # of its ranks' peer channels, in order, e.g. tcp://10.0.0.1:7301


class Submit(msgspec.Struct, tag="submit"):
    """One attempt at one sequence (a choice of a request).

    To a prefill node with ``handoff=True``: compute the prompt, sample one token, lease the blocks
    under ``id``. To a decode node with a ``source``: pull blocks leased under the same ``id`` there.
    With neither: compute everything on this node.
    """

    id: str  # unique for each attempt; same on both nodes; also the lease key
    tokens: bytes  # int32 little-endian: prompt, then the output tokens of earlier attempts
    num_output: int  # how many of ``tokens`` (at the end) are output of earlier attempts
    sampling: SamplingParams
    handoff: bool = False
    source: Source | None = None
    number: int = 0  # counts the submits of a link from 1: a status names the last one that it includes
    age_s: float = 0.0  # since the request reached the router: nodes serve the oldest first
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0  # a lower one comes before all of a higher one
    # Cached prefixes are found by those with the same salt only. A digest: what clients send is theirs
    salt: Annotated[bytes, Meta(max_length=64)] = b""
    trace: Annotated[str, Meta(max_length=64)] = ""  # W3C's traceparent of the attempt's span; empty: not sampled


class Abort(msgspec.Struct, tag="abort"):
    """Ends the attempts named. Unknown ids are ignored. No answer is sent for them afterwards."""

    ids: list[str]


class Peers(msgspec.Struct, tag="peers"):
    """To decode nodes: the prefill nodes that may be named as a source, to connect ahead of use."""

    sources: list[Source]


class GetModel(msgspec.Struct, tag="get_model"):
    """The router has no copy of the model's text side: the node answers with ``Model``. Once a link."""


class GetPrefixes(msgspec.Struct, tag="get_prefixes"):
    """The router wants to know what is cached: the node answers with all of it, and says from then on what changes."""


ToNode = Submit | Abort | Peers | GetModel | GetPrefixes


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability (natural, after penalties, before temperature truncation) of one position."""

    token: Index
    logprob: float
    rank: int  # 1 = most likely
    top: list[tuple[Index, float]]  # the k most likely (id, logprob), best first


class Failure(msgspec.Struct, frozen=True):
    """Why an attempt ended without finishing.

    kind: "refused" (queue full, draining: nothing was done, try elsewhere or later),
    "invalid" (the request can never be served here), "transfer" (KV could not be pulled: prefill
    again), "internal" (a fault of this node).
    """

    kind: str
    message: str
    retry_after_s: Seconds = 0.0


class Output(msgspec.Struct, array_like=True):
    """What one step produced for one attempt."""

    id: str
    index: Index  # output index of tokens[0]
    tokens: list[Index]
    logprobs: list[TokenLogprob] | None = None
    finish: str | None = None  # "stop" | "length" (the router adds stop strings and aborts)
    stop_token: Index | None = None  # the stop token id that ended it, if not EOS
    failure: Failure | None = None
    # "accepted": a decode node has room for the attempt, now or within its bound on waiting, and will not refuse it any
    # more; "local": accepted, and it computes the prompt itself; "arrived": KV is here
    event: str | None = None
    num_cached: Index = 0  # prompt tokens that came out of this node's prefix cache (with index 0)
    prompt_logprobs: list[TokenLogprob | None] | None = None


class Outputs(msgspec.Struct, tag="outputs"):
    """All outputs of one engine step for one router."""

    items: list[Output]


class GroupUsage(msgspec.Struct, frozen=True):
    """Blocks of one layer group: used + cached + free = total."""

    total: Count
    used: Count  # referenced by a sequence or a lease
    cached: Count  # unreferenced, content kept for prefix hits (can be taken at any time)
    free: Count


class Load(msgspec.Struct, frozen=True):
    """A node's load, pushed at least once a second and on every change of ``draining``."""

    waiting: Count  # admitted, no blocks yet
    running: Count
    waiting_tokens: Count  # prompt tokens not computed yet, of waiting and running sequences
    groups: list[GroupUsage]
    leases: Count = 0  # prefill: leased requests
    pulling: Count = 0  # decode: requests whose KV is being pulled
    draining: bool = False
    queued: Count = 0  # admitted without blocks, wherever they wait; refused beyond ``max_queue``
    max_queue: Count = 0
    queue_wait_s: Seconds = 0.0  # how long a request that comes now is expected to wait for memory
    host_groups: list[GroupUsage] = []  # of the host tier: used = copies on their way; empty: there is none


class Running(msgspec.Struct, frozen=True):
    """The step that an engine computes, told by a thread that does not wait for it."""

    step: Count  # counts from 1
    tokens: Count
    seconds: Seconds  # since it began
    limit_s: Seconds  # beyond this it counts as hanging


class Status(msgspec.Struct, tag="status"):
    """Load and cumulative counters (monotonic since the engine started).

    Histograms are counters, too: see :mod:`pd_serve.wire.counted`.
    """

    load: Load
    counters: dict[str, float] = {}
    memory: MemoryReport | None = None
    last_submit: int = 0  # number of the last submit of this link that ``load`` includes
    running: Running | None = None  # None: between steps
    # Decode: node ids of sources that this node cannot read from, and why; while it is so.
    misfits: dict[str, str] = {}
    # Decode: for node ids of sources that it is connected to, how many prompt tokens a second their KV comes in, as the
    # self-test of the pair's lane found; those that were not measured are left out.
    lanes: dict[str, float] = {}


class ModelInfo(msgspec.Struct, frozen=True):
    name: str  # the served name
    fingerprint: str  # of configuration, weights' identity and dtype: equal on all nodes of a model
    max_model_len: int  # prompt + output tokens
    vocab_size: int
    eos_token_ids: list[int]
    text: str = ""  # of the bundle that ``GetModel`` gets: a router whose copy has another one reads it anew


class Hello(msgspec.Struct, tag="hello"):
    """First frame from a node to a router that has proved itself."""

    link_version: int
    node_id: str
    role: str  # one of ROLES
    url: str
    model: ModelInfo
    layout: str  # layout fingerprint
    epoch: str  # new at every engine start, and after every sleep
    peer_addresses: tuple[str, ...]  # of its ranks, in order; none: nobody reads from it
    transport: str
    local_prefill_tokens: Count  # decode: prompts up to so many uncached tokens are computed here
    load: Load
    layout_text: str = ""  # what the fingerprint is of, in words
    grammars: bool = False  # whether its outputs can be made to follow one


class Role(msgspec.Struct, tag="role"):
    """The node does something else from now on. What it has begun goes on to its end, and leases stay valid."""

    role: Literal["prefill", "decode", "both"]
    peer_addresses: tuple[str, ...]  # as in Hello


class OldHello(msgspec.Struct, tag="hello"):
    """What begins a link of version 1, without a handshake: enough to refuse it."""

    link_version: int


class Model(msgspec.Struct, tag="model"):
    """The answer to ``GetModel``: an encoded :class:`pd_serve.wire.model.ModelBundle`."""

    bundle: bytes


class Prefixes(msgspec.Struct, tag="prefixes"):
    """What became of cached prefixes since the frame before: names of :mod:`pd_serve.wire.chunks`, of 8 bytes each.

    Hints about where to send prompts; nodes compare exact tokens. One frame at most for each step.
    """

    number: Count  # counts frames from 1; with ``whole`` the last one that is included
    stored: bytes
    evicted: bytes = b""
    whole: bool = False  # what is stored is all there is
    # The same of the node's host tier. A name may be in both; one that is in neither is not cached.
    host_stored: bytes = b""
    host_evicted: bytes = b""


FromNode = Hello | Role | Status | Outputs | Model | Prefixes

encoder = msgspec.msgpack.Encoder()
decode_opening = msgspec.msgpack.Decoder(Greeting | Proof).decode
decode_first_from_node = msgspec.msgpack.Decoder(Challenge | OldHello).decode
decode_to_node = msgspec.msgpack.Decoder(ToNode).decode
decode_from_node = msgspec.msgpack.Decoder(FromNode).decode
