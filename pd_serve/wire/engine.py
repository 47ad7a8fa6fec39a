"""Messages between a node's asyncio process and its engine process (ZeroMQ over a Unix socket).

Every message has two frames: the *origin* (4 bytes, little-endian: which router link; 0 = the node
itself) and one MessagePack payload. With origin > 0 the payloads are those of :mod:`pd_serve.wire.link`
(``Submit``, ``Abort`` in; ``Outputs`` out), which the node passes on without decoding them. With origin
0 they are the unions below. The node binds, the engine connects; the engine's configuration
(:class:`pd_serve.config.EngineConfig`) travels as JSON on its standard input. A second socket carries the engine's
pulse: ``Beat`` messages of one frame.
"""

from __future__ import annotations

import msgspec

from pd_serve.wire.link import Load, ModelInfo, Peers, Running, Status

NODE = (0).to_bytes(4, "little")


class EngineReady(msgspec.Struct, tag="engine_ready"):
    """Engine to node, at the start and after each sleep: it can serve. Epoch and peer address are new each time."""

    model: ModelInfo
    layout: str  # KVLayout.kin()
    layout_text: str  # KVLayout.describe()
    epoch: str
    peer_addresses: tuple[str, ...]
    transport: str
    load: Load
    start_s: dict[str, float]  # how long each phase of the start, or of waking, took


class EngineFailed(msgspec.Struct, tag="engine_failed"):
    """Engine to node, before it exits: why it cannot serve (a sentence for the user)."""

    message: str


class Drop(msgspec.Struct, tag="drop"):
    """Node to engine: the router with this origin is gone; end its attempts."""

    origin: int


class Drain(msgspec.Struct, tag="drain"):
    """Node to engine: refuse new work; answer ``Drained`` when nothing runs and no lease is held."""


class Drained(msgspec.Struct, tag="drained"):
    """Engine to node."""


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Node to engine: end now."""


class Sleep(msgspec.Struct, tag="sleep"):
    """Node to engine: refuse new work; when nothing runs and no lease is held, withdraw the pool from peers and give
    memory back. Answered by ``SleepState``. ``now``, in a second message of the same number: end what is left.
    """

    number: int  # of the order; its answer bears the same
    level: int  # 1: the KV cache goes, weights move to or stay in host memory; 2: weights go too
    now: bool = False


class Wake(msgspec.Struct, tag="wake"):
    """Node to engine: bring back what these tags held. Answered by ``SleepState``; before it, where nothing is left
    asleep, comes ``EngineReady``.
    """

    number: int
    tags: list[str]


class Listen(msgspec.Struct, tag="listen"):
    """Node to engine: let readers in, from now on and after every sleep. Answered as ``Wake`` is; ``EngineReady`` names
    the addresses they dial, unless the engine sleeps.
    """

    number: int


class Forget(msgspec.Struct, tag="forget"):
    """Node to engine: no later prompt may find KV that is cached now, in any tier. Answered by ``SleepState``."""

    number: int


class SleepState(msgspec.Struct, tag="sleep_state"):
    """Engine to node: what ``Sleep``, ``Wake``, ``Listen`` or ``Forget`` led to."""

    number: int
    level: int  # 0: awake
    asleep: list[str]  # tags
    failure: str = ""  # why the order was not carried out (a sentence for the user); the rest says what is so now


class Report(msgspec.Struct, tag="report"):
    """Engine to node, at least once a second between steps. ``submits``: by origin, the number of the last submit that
    ``status`` includes; the node puts each into the status of its link.
    """

    status: Status
    submits: dict[int, int] = {}


class Timeline(msgspec.Struct, tag="timeline"):
    """Engine to node, when an attempt whose submit named a span has ended here: what happened when.

    Times are seconds of the machine's monotonic clock, 0: never. ``pulled``: its KV was to come from another node.
    """

    id: str
    trace: str
    admitted_s: float
    ended_s: float
    end: str  # "finished", "handed over", "aborted", or what went wrong
    failed: bool
    pulled: bool
    handoff: bool
    placed_s: float  # it got blocks for KV that is to be pulled
    started_s: float  # it ran, or its KV was here
    first_token_s: float  # of this attempt
    tokens: int  # of the prompt, output of earlier attempts included
    cached: int  # of these, out of the prefix cache
    made: int  # output tokens of this attempt


class Beat(msgspec.Struct, tag="beat"):
    """The engine's pulse, from a thread that does not wait for the main one."""

    running: Running | None = None  # what the main thread is busy with; None: it waits, or moves memory


ToEngine = Drop | Drain | Shutdown | Peers | Sleep | Wake | Listen | Forget
FromEngine = EngineReady | EngineFailed | Report | Drained | SleepState | Timeline

encoder = msgspec.msgpack.Encoder()
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
decode_beat = msgspec.msgpack.Decoder(Beat).decode
