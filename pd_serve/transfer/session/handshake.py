"""Whether two nodes may and can exchange blocks: the first messages of a peer connection, without sockets or clocks.

:class:`Greeting` is the reader's half, :class:`Reception` the source's; each belongs to one connection. What comes
from a peer is checked here before anything is made of it. Neither says anything of itself before the other has proved
that it knows the secret: the source proves first, with what anybody may know (a nonce and a version).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from pd_serve import auth
from pd_serve.errors import HandshakeError
from pd_serve.kv.layout import DTYPE_BYTES, KVLayout, Plane
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS, Region
from pd_serve.transfer.base import Pair
from pd_serve.transfer.slices import Slicing, counterparts, placed, slicings
from pd_serve.wire import peer as wire
from pd_serve.wire.peer import PROTOCOL_MAX, PROTOCOL_MIN

# Who proves, and whose messages a key vouches for.
SOURCE, READER = b"peer: prefill", b"peer: decode"
FROM_SOURCE, FROM_READER = b"peer: messages of prefill", b"peer: messages of decode"

# From dialling, or being dialled, to the end of the handshake; for a reader to the end of the self-test.
HANDSHAKE_S = 10.0

# Bounds of what a peer may say of its memory: generous, and small enough to compute with.
MAX_LAYERS = 4096
MAX_TOKENS = 1 << 16  # of a block
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 16
MAX_PLANES = 16
MAX_OPAQUE_BYTES = 1 << 40
MAX_NAME = 512
MAX_BLOCKS = 1 << 31
MAX_ADDRESS = 1 << 64
MAX_SHOWN = 1500  # characters


@dataclass(frozen=True)
class Identity:
    """What a node says of itself. ``epoch`` is new at every engine start."""

    node_id: str
    epoch: str
    model: str  # fingerprint
    layout: KVLayout
    secret: bytes = field(default=b"", repr=False)  # what peers must know too; empty: whoever has none either
    checksums: bool = True
    rank: int = 0  # of ``ranks`` with a share of the heads each
    ranks: int = 1
    protocol_min: int = PROTOCOL_MIN
    protocol_max: int = PROTOCOL_MAX


def said(reader_nonce: bytes, source_nonce: bytes, hello: bytes, protocol: int) -> tuple[bytes, ...]:
    """What both ends of a connection have said, as proofs have it. ``hello``: the frame that opened it."""
    return reader_nonce, source_nonce, hello, protocol.to_bytes(8, "little")


class Greeting:
    """A decode node's half. ``hello``: the frame to begin with.

    ``outgoing`` and ``incoming`` seal all messages once the source is proved.
    """

    outgoing: auth.Seal
    incoming: auth.Seal

    def __init__(self, me: Identity, regions: tuple[Region, ...], lanes: dict[str, bytes]) -> None:
        self._me = me
        self._regions = regions
        self._lanes = lanes
        self._nonce = auth.nonce()
        self.challenged = False  # and the source has proved itself
        self.hello = wire.encoder.encode(wire.Hello(me.protocol_min, me.protocol_max, self._nonce))

    def prove(self, challenge: wire.Challenge) -> wire.Proof:
        """Raises HandshakeError when the other end does not know the secret; then nothing more should be said to it."""
        me = self._me
        parts = said(self._nonce, challenge.nonce, self.hello, challenge.protocol)
        if not auth.holds(challenge.mac, me.secret, SOURCE, *parts):
            why = auth.why_not(challenge.mac, me.secret, SOURCE, *parts)
            raise HandshakeError(f"it could not prove that it knows the secret: {why}; {auth.SECRET_ADVICE}")
        if not me.protocol_min <= challenge.protocol <= me.protocol_max:
            raise HandshakeError(
                f"it settled on peer protocol {challenge.protocol}; this node speaks "
                f"{me.protocol_min}..{me.protocol_max}; upgrade the older one"
            )
        self.challenged = True
        self.outgoing = auth.Seal(me.secret, FROM_READER, *parts)
        self.incoming = auth.Seal(me.secret, FROM_SOURCE, *parts)
        return wire.Proof(auth.proof(me.secret, READER, *parts))

    def introduction(self) -> wire.Introduction:
        """What is only said to a source that has proved itself."""
        assert self.challenged
        me = self._me
        return wire.Introduction(
            me.node_id, me.epoch, me.rank, me.ranks, me.model, me.layout, list(self._regions), self._lanes, me.checksums
        )

    def accept(self, welcome: wire.Welcome) -> Pair:
        """How the two pools fit together. Raises HandshakeError."""
        me = self._me
        shares = shares_of((welcome.rank, welcome.ranks), (me.rank, me.ranks))
        return pair_of((welcome.layout, tuple(welcome.regions)), (me.layout, self._regions), shares)


class Reception:
    """A prefill node's half, from ``hello`` (which came as ``frame``) on. ``challenge``: the answer to it.

    ``outgoing`` and ``incoming`` seal all messages once the reader is proved. Raises HandshakeError when no version of
    the peer protocol is spoken by both.
    """

    outgoing: auth.Seal
    incoming: auth.Seal

    def __init__(self, me: Identity, hello: wire.Hello, frame: bytes) -> None:
        check_protocol(me, hello)
        self._me = me
        self.proved = False
        protocol, nonce = min(me.protocol_max, hello.protocol_max), auth.nonce()
        self._said = said(hello.nonce, nonce, frame, protocol)
        self.challenge = wire.Challenge(protocol, nonce, auth.proof(me.secret, SOURCE, *self._said))

    def check(self, proof: wire.Proof) -> None:
        """Raises HandshakeError unless the reader knows the secret. Says nothing that it need not know."""
        secret = self._me.secret
        if not auth.holds(proof.mac, secret, READER, *self._said):
            why = auth.why_not(proof.mac, secret, READER, *self._said)
            raise HandshakeError(f"it could not prove that it knows the secret: {why}; {auth.SECRET_ADVICE}")
        self.proved = True
        self.outgoing = auth.Seal(secret, FROM_SOURCE, *self._said)
        self.incoming = auth.Seal(secret, FROM_READER, *self._said)

    def pair(self, them: wire.Introduction, regions: tuple[Region, ...]) -> Pair:
        """How the two pools fit together. Raises HandshakeError, with both sides' values, where they do not."""
        me = self._me
        if me.model != them.model:
            raise HandshakeError(
                f"models differ: prefill node {me.node_id} serves {me.model}, decode node {them.node_id} serves "
                f"{them.model} (fingerprints of configuration, weights and dtype); start both with the same --model, "
                f"--dtype and --load-format"
            )
        shares = shares_of((me.rank, me.ranks), (them.rank, them.ranks))
        return pair_of((me.layout, regions), (them.layout, tuple(them.regions)), shares)

    def welcome(
        self,
        them: wire.Introduction,
        regions: tuple[Region, ...],
        lanes: dict[str, bytes],
        why_not: dict[str, str],
        lease_s: float,
    ) -> wire.Welcome:
        """After ``pair``."""
        me = self._me
        return wire.Welcome(
            node_id=me.node_id,
            epoch=me.epoch,
            rank=me.rank,
            ranks=me.ranks,
            layout=me.layout,
            regions=list(regions),
            lanes=lanes,
            why_not={name: why[:4096] for name, why in why_not.items()},
            lease_s=lease_s,
            checksums=me.checksums and them.checksums,
        )


def shortened(text: str) -> str:
    """What a peer said, at a length that fits a log."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."


def check_protocol(me: Identity, them: wire.Version | wire.Hello) -> None:
    """Raises HandshakeError when no version of the peer protocol is spoken by both."""
    if min(me.protocol_max, them.protocol_max) < max(me.protocol_min, them.protocol_min):
        raise HandshakeError(
            f"peer protocol versions do not overlap: the prefill node speaks {me.protocol_min}..{me.protocol_max}, "
            f"the decode node {them.protocol_min}..{them.protocol_max}; upgrade the older one"
        )


def shares_of(source: tuple[int, int], reader: tuple[int, int]) -> int:
    """From how many ranks of the source's node this reader reads; each is rank and ranks. Raises HandshakeError."""
    ranks = counterparts(*reader, source[1])
    if source[0] >= source[1] or reader[0] >= reader[1] or source[0] not in ranks:
        raise HandshakeError(
            f"rank {reader[0]} of {reader[1]} of the decode node reads nothing from rank {source[0]} of {source[1]} "
            "of the prefill node; connect ranks that hold the same heads"
        )
    return len(ranks)


End = tuple[KVLayout, tuple[Region, ...]]


def pair_of(source: End, reader: End, shares: int = 1) -> Pair:
    """Two ends of which one came over the network. Raises HandshakeError, with both sides' values.

    ``shares``: from how many ranks of the source's node this reader reads; whether theirs together are all that it
    needs, the inbox sees (:func:`pd_serve.transfer.slices.needed`).
    """
    for role, (layout, regions) in (("prefill", source), ("decode", reader)):
        check_layout(layout, role)
        check_regions(layout, regions, role)
    found = tuple(map(placed, slicings(source[0], reader[0]), source[1], reader[1]))
    for slicing in found:
        if not covers(slicing, shares):
            raise HandshakeError(
                f"the prefill node's rank holds too small a part of the KV heads that the decode node's needs "
                f"({_heads(source[0])} of {_heads(reader[0])}), which reads from {shares} of its node's ranks; "
                "a node's ranks must hold equal parts of the heads, in order"
            )
    return Pair(found, source[1], reader[1])


def covers(slicing: Slicing, shares: int = 1) -> bool:
    """Whether pieces can fill the reader's blocks where they come from so many sources."""
    return slicing.piece_bytes * slicing.reader.pieces_per_block * shares >= slicing.reader.block_bytes


def _heads(layout: KVLayout) -> str:
    return ", ".join(f"{p.first_head}..{p.end_head - 1}" for g in layout.groups for p in g.planes[:1])


def check_layout(layout: KVLayout, role: str) -> None:
    """Raises HandshakeError for a layout that cannot be, or is too large to compute with."""
    foreign = bool(layout.foreign)
    sound = (foreign or layout.dtype in DTYPE_BYTES) and len(layout.foreign) <= MAX_NAME
    sound = sound and 1 <= layout.block_size <= MAX_TOKENS and 1 <= len(layout.groups) <= 256
    for group in layout.groups:
        sound = (
            sound
            and 1 <= len(group.layers) <= MAX_LAYERS
            and (1 <= group.opaque_bytes <= MAX_OPAQUE_BYTES if foreign else group.opaque_bytes == 0)
            and (len(group.planes) == 0 if foreign else 1 <= len(group.planes) <= MAX_PLANES)
            and all(_sound(plane) for plane in group.planes)
        )
    if not sound:
        raise HandshakeError(f"the {role} node's KV layout makes no sense; run the same version on both nodes")


def _sound(plane: Plane) -> bool:
    return (
        1 <= plane.heads <= MAX_HEADS
        and 1 <= plane.dim <= MAX_HEAD_DIM
        and 0 <= plane.first_head <= MAX_HEADS
        and 0 <= plane.total_heads <= MAX_HEADS
        and plane.dtype in ("", *DTYPE_BYTES)
    )


def check_regions(layout: KVLayout, regions: tuple[Region, ...], role: str) -> None:
    """Raises HandshakeError unless there is a possible region a group, and the probe region."""
    sizes = [layout.block_bytes(group) for group in range(len(layout.groups))] + [PROBE_BLOCK_BYTES]
    sound = len(regions) == len(sizes) and regions[-1].num_blocks == PROBE_BLOCKS
    for region, size in zip(regions, sizes, strict=False):
        sound = (
            sound
            and region.whole_bytes == size
            and (len(region.places) == 1 or bool(layout.foreign))
            and min(region.places, default=-1) == 0
            and all(here + region.size_bytes <= there for here, there in pairwise(sorted(region.places)))
            and 1 <= region.num_blocks <= MAX_BLOCKS
            and 0 < region.address <= MAX_ADDRESS - region.size_bytes - max(region.places)
        )
    if not sound:
        raise HandshakeError(f"the {role} node's regions do not fit its KV layout; run the same version on both nodes")
