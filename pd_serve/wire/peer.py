"""Messages between the engines of two nodes (the *peer channel*): a decode engine dials a prefill engine.

ZeroMQ DEALER (decode) to ROUTER (prefill), one frame a message, MessagePack. KV bytes never travel
here: they are read by the transport that the handshake settled on.

A *lease* is a prefill node's promise not to reuse a request's blocks. It is renewed by heartbeats
while the decode node waits and ends by release, cancel, expiry, or a new epoch of the peer.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

# Versions of this protocol that this build speaks; both ends settle on the newest they share.
PROTOCOL_MIN = 1
PROTOCOL_MAX = 1


class FailureKind(StrEnum):
    """Why a pull ended without usable blocks."""

    HANDSHAKE = "handshake"  # version, model, layout or transport do not match
    CONNECT = "connect"  # the peer cannot be reached
    PEER_LOST = "peer_lost"  # it stopped answering, or came back with another epoch
    EXPIRED = "expired"  # the lease had ended when the bytes arrived
    CANCELLED = "cancelled"  # the prefill node gave the request up
    TRANSFER = "transfer"  # the transport reported an error
    TIMEOUT = "timeout"  # nothing moved for too long


class Hello(msgspec.Struct, tag="hello"):
    """Decode to prefill, first message of a connection."""

    protocol_min: int
    protocol_max: int
    node_id: str
    epoch: str
    model: str  # model fingerprint
    layout: str  # layout fingerprint
    transports: list[str]  # what this end can pull with, preferred first
    layout_text: str = ""  # what ``layout`` stands for, for a refusal that says what differs


class Welcome(msgspec.Struct, tag="welcome"):
    """Prefill to decode: the handshake succeeded."""

    protocol: int
    node_id: str
    epoch: str
    transport: str
    endpoint: bytes  # Transport.describe() of the prefill end
    lease_s: float


class Refused(msgspec.Struct, tag="refused"):
    """Prefill to decode: these two cannot work together; ``reason`` names both sides' values."""

    reason: str


class Claim(msgspec.Struct, tag="claim"):
    """Decode to prefill: this engine will pull the request with this key (it may not be there yet)."""

    key: str


class Blocks(msgspec.Struct, array_like=True):
    """Consecutive logical blocks of one layer group: prompt block ``first + i`` is pool block ``ids[i]``."""

    group: int
    first: int
    ids: bytes  # int32 little-endian


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
    """Decode to prefill: all bytes of ``key`` have arrived (done), or are not wanted (not done)."""

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


ToPrefill = Hello | Claim | Heartbeat | Release | Bye
ToDecode = Welcome | Refused | Ready | HeartbeatAck | Released | Cancel | Bye

encoder = msgspec.msgpack.Encoder()
decode_to_prefill = msgspec.msgpack.Decoder(ToPrefill).decode
decode_to_decode = msgspec.msgpack.Decoder(ToDecode).decode
