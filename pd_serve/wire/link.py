"""Messages between a router and a node, and unchanged between a node's process and its engine.

A router holds one WebSocket (the *link*) to each node; every frame is one MessagePack message of
the unions ``ToNode`` or ``FromNode``. The node process forwards frames to its engine over ZeroMQ
without decoding what it does not need.

Token indices count a request's *output* tokens from 0, over the whole life of the request: a
resumed attempt continues the count, so that the router can join and de-duplicate by index alone.
"""

from __future__ import annotations

import msgspec

from pd_serve.wire.memory import MemoryReport

LINK_VERSION = 2


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


class Source(msgspec.Struct, frozen=True):
    """Where a decode node pulls a prompt's KV blocks from."""

    node_id: str
    epoch: str
    address: str  # of the prefill engine's peer channel, e.g. tcp://10.0.0.1:7301


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


class Abort(msgspec.Struct, tag="abort"):
    """Ends the attempts named. Unknown ids are ignored. No answer is sent for them afterwards."""

    ids: list[str]


class Peers(msgspec.Struct, tag="peers"):
    """To decode nodes: the prefill nodes that may be named as a source, to connect ahead of use."""

    sources: list[Source]


ToNode = Submit | Abort | Peers


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability (natural, after penalties, before temperature truncation) of one position."""

    token: int
    logprob: float
    rank: int  # 1 = most likely
    top: list[tuple[int, float]]  # the k most likely (id, logprob), best first


class Failure(msgspec.Struct, frozen=True):
    """Why an attempt ended without finishing.

    kind: "refused" (queue full, draining: nothing was done, try elsewhere or later),
    "invalid" (the request can never be served here), "transfer" (KV could not be pulled: prefill
    again), "internal" (a fault of this node).
    """

    kind: str
    message: str
    retry_after_s: float = 0.0


class Output(msgspec.Struct, array_like=True):
    """What one step produced for one attempt."""

    id: str
    index: int  # output index of tokens[0]
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish: str | None = None  # "stop" | "length" (the router adds stop strings and aborts)
    stop_token: int | None = None  # the stop token id that ended it, if not EOS
    failure: Failure | None = None
    # "accepted": a decode node has room for the attempt, now or within its bound on waiting, and will not refuse it any
    # more; "local": accepted, and it computes the prompt itself; "arrived": KV is here
    event: str | None = None
    num_cached: int = 0  # prompt tokens that came out of this node's prefix cache (with index 0)
    prompt_logprobs: list[TokenLogprob | None] | None = None


class Outputs(msgspec.Struct, tag="outputs"):
    """All outputs of one engine step for one router."""

    items: list[Output]


class GroupUsage(msgspec.Struct, frozen=True):
    """Blocks of one layer group: used + cached + free = total."""

    total: int
    used: int  # referenced by a sequence or a lease
    cached: int  # unreferenced, content kept for prefix hits (can be taken at any time)
    free: int


class Load(msgspec.Struct, frozen=True):
    """A node's load, pushed at least once a second and on every change of ``draining``."""

    waiting: int  # admitted, no blocks yet
    running: int
    waiting_tokens: int  # prompt tokens not computed yet, of waiting and running sequences
    groups: list[GroupUsage]
    leases: int = 0  # prefill: leased requests
    pulling: int = 0  # decode: requests whose KV is being pulled
    draining: bool = False
    queued: int = 0  # admitted without blocks, wherever they wait; refused beyond ``max_queue``
    max_queue: int = 0
    queue_wait_s: float = 0.0  # how long a request that comes now is expected to wait for memory


class Running(msgspec.Struct, frozen=True):
    """The step that an engine computes, told by a thread that does not wait for it."""

    step: int  # counts from 1
    tokens: int
    seconds: float  # since it began
    limit_s: float  # beyond this it counts as hanging


class Status(msgspec.Struct, tag="status"):
    """Load and cumulative counters (monotonic since the engine started)."""

    load: Load
    counters: dict[str, float] = {}
    memory: MemoryReport | None = None
    last_submit: int = 0  # number of the last submit of this link that ``load`` includes
    running: Running | None = None  # None: between steps
    # Decode: node ids of sources that this node cannot read from, and why; while it is so.
    misfits: dict[str, str] = {}


class ModelInfo(msgspec.Struct, frozen=True):
    name: str  # the served name
    fingerprint: str  # of configuration, weights' identity and dtype: equal on all nodes of a model
    max_model_len: int  # prompt + output tokens
    vocab_size: int
    eos_token_ids: list[int]
    text: str = ""  # of the bundle at the node's /model: a router whose copy has another one reads it anew


class Hello(msgspec.Struct, tag="hello"):
    """First frame from a node on every link."""

    link_version: int
    node_id: str
    role: str  # "prefill" | "decode"
    url: str
    model: ModelInfo
    layout: str  # layout fingerprint
    epoch: str  # new at every engine start, and after every sleep
    peer_address: str
    transport: str
    local_prefill_tokens: int  # decode: prompts up to so many uncached tokens are computed here
    load: Load


FromNode = Hello | Status | Outputs

encoder = msgspec.msgpack.Encoder()
decode_to_node = msgspec.msgpack.Decoder(ToNode).decode
decode_from_node = msgspec.msgpack.Decoder(FromNode).decode
