"""Messages between the engines of two nodes (the *peer channel*): a decode engine dials a prefill engine.

TCP, one frame a message (:mod:`pd_serve.transfer.session.connection`), MessagePack. KV bytes never travel
here: they are read over one of the lanes that the handshake found both ends to have.

A connection begins so: ``Hello``, ``Challenge``, ``Proof`` with ``Introduction`` right behind it, ``Welcome``, then
``LaneMessage`` as lanes need it, and ``Chosen`` after the self-test. Neither end says anything of itself before the
other has proved the secret. Where there is one, every frame after its sender's proof ends with a MAC
(:mod:`pd_serve.auth`). What a peer says is checked by :mod:`pd_serve.transfer.session.handshake`.

A node with tensor parallelism has *ranks*, each with its own connections: a rank that decodes reads a prompt from all
ranks of the prefill node that hold heads of its own (:func:`pd_serve.transfer.slices.counterparts`), and claims, keeps
alive and releases it at each of them.

A *lease* is a prefill node's promise not to reuse a request's blocks. It is renewed by heartbeats
while the decode node waits and ends by release, cancel, expiry, or a new epoch of the peer.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from pd_serve.kv.layout import KVLayout
from pd_serve.memory.region import Region

# Versions of this protocol that this build speaks; both ends settle on the newest they share.
PROTOCOL_MIN = 4
PROTOCOL_MAX = 4

MAX_RANKS = 1024  # of a node

Rank = Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)]
Ranks = Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Mac = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Reasons = Annotated[dict[Name, Annotated[str, msgspec.Meta(max_length=4096)]], msgspec.Meta(max_length=16)]
# what each transport says of itself (``Transport.describe``), the sender's favourite first
Described = Annotated[dict[Name, bytes], msgspec.Meta(max_length=16)]
Regions = Annotated[list[Region], msgspec.Meta(max_length=257)]

# Nothing longer is looked at before its sender has proved the secret: this protocol's messages are far shorter, but
# the first one of protocol 2, which is to be answered, told of lanes and memory.
MAX_UNPROVED_BYTES = 64 << 10
MAX_INTRODUCTION_BYTES = 1 << 20


class Version(msgspec.Struct, tag="hello"):
    """What every version's ``Hello`` has: enough to refuse one that cannot be read."""

    protocol_min: int
    protocol_max: int


class Hello(msgspec.Struct, tag="hello"):
    """Decode to prefill, first message of a connection. It tells nothing to whoever may have been dialled."""

    protocol_min: int
    protocol_max: int
    nonce: Nonce


class Challenge(msgspec.Struct, tag="challenge"):
    """Prefill to decode: it knows the secret, if ``mac`` holds (:mod:`pd_serve.auth`). It says no more yet."""

    protocol: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]  # the newest that both speak
    nonce: Nonce
    mac: Mac


class Proof(msgspec.Struct, tag="proof"):
    """Decode to prefill: it knows the secret too."""

    mac: Mac


class Introduction(msgspec.Struct, tag="introduction"):
    """Decode to prefill, right behind ``Proof``: what it says of itself."""

    node_id: Name
    epoch: Name
    rank: Rank
    ranks: Ranks
    model: Name  # model fingerprint
    layout: KVLayout
    regions: Regions
    lanes: Described
    checksums: bool  # whether it wants checksums with the blocks


class Welcome(msgspec.Struct, tag="welcome"):
    """Prefill to decode: the handshake succeeded; what the prefill node says of itself."""

    node_id: Name
    epoch: Name
    rank: Rank
    ranks: Ranks
    layout: KVLayout
    regions: Regions
    lanes: Described  # those that both have and this end could prepare
    why_not: Reasons  # the others of the decode node's
    lease_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)]
    checksums: bool  # announced blocks come with them


class Refused(msgspec.Struct, tag="refused"):
    """Either end: these two cannot work together; ``reason`` says why."""

    reason: str


class LaneMessage(msgspec.Struct, tag="lane"):
    """Either end, after ``Welcome``: what one end of a transport has to tell the other."""

    lane: str
    payload: bytes


class Chosen(msgspec.Struct, tag="chosen"):
    """Decode to prefill, once: the lane that it will pull over. The others are not used any more."""

    lane: Name
    bytes_per_s: float  # measured; 0: not measured
    why_not: Reasons


class Claim(msgspec.Struct, tag="claim"):
    """Decode to prefill: this rank will pull the request with this key (it may not be there yet).

    So will the others of its node that read from here: the lease ends well when each has released it.
    """

    key: str


class Blocks(msgspec.Struct, array_like=True):
    """Consecutive logical blocks of one layer group: prompt block ``first + i`` is pool block ``ids[i]``."""

    group: int
    first: int
    ids: bytes  # int32 little-endian
    checksums: bytes = b""  # uint64 little-endian, one a piece (see pd_serve.transfer.slices); empty: switched off


class First(msgspec.Struct, array_like=True):
    """The token sampled from the prompt's last position (output index = Submit.num_output)."""

    token: int


class Ready(msgspec.Struct, tag="ready"):
    """Prefill to decode: these blocks are computed. The last one carries ``first``."""

    key: str
    num_tokens: int  # prompt tokens whose KV is ready, from 0
    blocks: list[Blocks]
    first: First | None = None


class Heartbeat(msgspec.Struct, tag="heartbeat"):
    """Decode to prefill: extend the leases of these keys."""

    seq: int
    keys: list[str]


class HeartbeatAck(msgspec.Struct, tag="heartbeat_ack"):
    seq: int
    gone: list[str]  # keys that hold no lease here (any more)


class Release(msgspec.Struct, tag="release"):
    """Decode to prefill: all bytes of ``key`` have arrived (done), or are not wanted by any rank (not done)."""

    key: str
    done: bool


class Released(msgspec.Struct, tag="released"):
    """Prefill to decode, answer to ``Release(done=True)``: only with ``valid`` may the blocks be used.

    ``valid`` says that the lease had not ended at any moment before the release arrived.
    """

    key: str
    valid: bool


class Cancel(msgspec.Struct, tag="cancel"):
    """Prefill to decode: the request ended here (aborted, failed, or finished with its first token)."""

    key: str
    reason: str


class Bye(msgspec.Struct, tag="bye"):
    """Either end leaves on purpose."""

    epoch: str


ToSource = Hello | Proof | Introduction | Refused | LaneMessage | Chosen | Claim | Heartbeat | Release | Bye
ToReader = Challenge | Welcome | Refused | LaneMessage | Ready | HeartbeatAck | Released | Cancel | Bye

encoder = msgspec.msgpack.Encoder()
decode_to_source = msgspec.msgpack.Decoder(ToSource).decode
decode_to_reader = msgspec.msgpack.Decoder(ToReader).decode
decode_version = msgspec.msgpack.Decoder(Version).decode
