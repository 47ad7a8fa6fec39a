"""Whether two nodes may and can exchange blocks: the first messages of a peer connection, without sockets or clocks.

:class:`Greeting` is the reader's half, :class:`Reception` the source's; each belongs to one connection. What comes
from a peer is checked here before anything is made of it. The source says nothing of itself before the reader has
proved that it knows the secret.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from pd_serve.errors import HandshakeError
from pd_serve.kv.layout import DTYPE_BYTES, KVLayout
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS, Region
from pd_serve.transfer import auth
from pd_serve.transfer.auth import Prover
from pd_serve.transfer.base import Pair
from pd_serve.transfer.slices import Slicing, slicings
from pd_serve.wire import peer as wire
from pd_serve.wire.peer import PROTOCOL_MAX, PROTOCOL_MIN

SECRET_ADVICE = "start both with the same --secret-file (or PD_SERVE_SECRET)"

# Bounds of what a peer may say of its memory: generous, and small enough to compute with.
MAX_LAYERS = 4096
MAX_TOKENS = 1 << 16  # of a block
MAX_HEADS = 1 << 12
MAX_HEAD_DIM = 1 << 16
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
    protocol_min: int = PROTOCOL_MIN
    protocol_max: int = PROTOCOL_MAX


class Greeting:
    """A decode node's half. ``hello``: the frame to begin with."""

    def __init__(self, me: Identity, regions: tuple[Region, ...], lanes: dict[str, bytes]) -> None:
        self._me = me
        self._regions = regions
        self._nonce = auth.nonce()
        self._challenge: wire.Challenge | None = None
        self.hello = wire.encoder.encode(
            wire.Hello(
                protocol_min=me.protocol_min,
                protocol_max=me.protocol_max,
                node_id=me.node_id,
                epoch=me.epoch,
                model=me.model,
                layout=me.layout,
                regions=list(regions),
                lanes=lanes,
                checksums=me.checksums,
                nonce=self._nonce,
            )
        )

    @property
    def challenged(self) -> bool:
        return self._challenge is not None

    def prove(self, challenge: wire.Challenge) -> wire.Proof:
        """Raises HandshakeError when the other end does not know the secret; then nothing more should be said to it."""
        secret = self._me.secret
        said = (self._nonce, challenge.nonce, self.hello)
        if not auth.holds(challenge.mac, secret, Prover.SOURCE, *said):
            why = auth.why_not(challenge.mac, secret, Prover.SOURCE, *said)
            raise HandshakeError(f"it could not prove that it knows the secret of this node: {why}; {SECRET_ADVICE}")
        self._challenge = challenge
        return wire.Proof(auth.proof(secret, Prover.READER, *said))

    def accept(self, welcome: wire.Welcome) -> tuple[wire.About, Pair]:
        """What the source says of itself, and how the two pools fit together. Raises HandshakeError."""
        me, challenge = self._me, self._challenge
        said = (self._nonce, challenge.nonce if challenge is not None else b"", self.hello, welcome.about)
        if challenge is None or not auth.holds(welcome.mac, me.secret, Prover.WELCOME, *said):
            raise HandshakeError(f"its welcome is not proved to come from who knows the secret; {SECRET_ADVICE}")
        try:
            about = wire.decode_about(welcome.about)
        except msgspec.DecodeError as error:
            raise HandshakeError(f"its welcome cannot be read ({error}); run the same version on both nodes") from error
        if not me.protocol_min <= about.protocol <= me.protocol_max:
            raise HandshakeError(
                f"it settled on peer protocol {about.protocol}; this node speaks {me.protocol_min}..{me.protocol_max}"
            )
        return about, pair_of((about.layout, tuple(about.regions)), (me.layout, self._regions))


class Reception:
    """A prefill node's half, from ``hello`` (which came as ``frame``) on. ``challenge``: the answer to it."""

    def __init__(self, me: Identity, hello: wire.Hello, frame: bytes) -> None:
        self.hello = hello
        self._me = me
        self._frame = frame
        self._nonce = auth.nonce()
        self.challenge = wire.Challenge(self._nonce, auth.proof(me.secret, Prover.SOURCE, *self._said))

    @property
    def _said(self) -> tuple[bytes, bytes, bytes]:
        return self.hello.nonce, self._nonce, self._frame

    def check(self, proof: wire.Proof) -> None:
        """Raises HandshakeError unless the reader knows the secret. Says nothing that it need not know."""
        secret = self._me.secret
        if not auth.holds(proof.mac, secret, Prover.READER, *self._said):
            why = auth.why_not(proof.mac, secret, Prover.READER, *self._said)
            raise HandshakeError(f"it could not prove that it knows the secret: {why}; {SECRET_ADVICE}")

    def pair(self, regions: tuple[Region, ...]) -> Pair:
        """How the two pools fit together. Raises HandshakeError, with both sides' values, where they do not."""
        me, them = self._me, self.hello
        if me.model != them.model:
            raise HandshakeError(
                f"models differ: prefill node {me.node_id} serves {me.model}, decode node {them.node_id} serves "
                f"{them.model} (fingerprints of configuration, weights and dtype); start both with the same --model, "
                f"--dtype and --load-format"
            )
        return pair_of((me.layout, regions), (them.layout, tuple(them.regions)))

    def welcome(
        self, regions: tuple[Region, ...], lanes: dict[str, bytes], why_not: dict[str, str], lease_s: float
    ) -> wire.Welcome:
        """After ``check`` and ``pair``."""
        me = self._me
        about = wire.encoder.encode(
            wire.About(
                protocol=min(me.protocol_max, self.hello.protocol_max),
                node_id=me.node_id,
                epoch=me.epoch,
                layout=me.layout,
                regions=list(regions),
                lanes=lanes,
                why_not={name: why[:4096] for name, why in why_not.items()},
                lease_s=lease_s,
                checksums=me.checksums and self.hello.checksums,
            )
        )
        return wire.Welcome(about, auth.proof(me.secret, Prover.WELCOME, *self._said, about))


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


End = tuple[KVLayout, tuple[Region, ...]]


def pair_of(source: End, reader: End) -> Pair:
    """Two ends of which one came over the network. Raises HandshakeError, with both sides' values."""
    for role, (layout, regions) in (("prefill", source), ("decode", reader)):
        check_layout(layout, role)
        check_regions(layout, regions, role)
    found = slicings(source[0], reader[0])
    for slicing in found:
        if not covers(slicing):
            raise HandshakeError(
                f"the prefill node holds a part of the KV heads that the decode node needs ({_heads(source[0])} of "
                f"{_heads(reader[0])}), and a request is read from one prefill rank; use at least as many decode ranks "
                f"as prefill ranks"
            )
    return Pair(found, source[1], reader[1])


def covers(slicing: Slicing) -> bool:
    """Whether pieces fill the reader's blocks: no byte of them would have to come from somebody else."""
    return slicing.piece_bytes * slicing.reader.pieces_per_block == slicing.reader.block_bytes


def _heads(layout: KVLayout) -> str:
    return ", ".join(f"{g.first_head}..{g.first_head + g.num_kv_heads - 1}" for g in layout.groups)


def check_layout(layout: KVLayout, role: str) -> None:
    """Raises HandshakeError for a layout that cannot be, or is too large to compute with."""
    sound = layout.dtype in DTYPE_BYTES and 1 <= layout.block_size <= MAX_TOKENS and 1 <= len(layout.groups) <= 256
    for group in layout.groups:
        sound = (
            sound
            and 1 <= len(group.layers) <= MAX_LAYERS
            and 1 <= group.num_kv_heads <= MAX_HEADS
            and 1 <= group.head_dim <= MAX_HEAD_DIM
            and 0 <= group.first_head <= MAX_HEADS
            and 0 <= group.total_kv_heads <= MAX_HEADS
        )
    if not sound:
        raise HandshakeError(f"the {role} node's KV layout makes no sense; run the same version on both nodes")


def check_regions(layout: KVLayout, regions: tuple[Region, ...], role: str) -> None:
    """Raises HandshakeError unless there is a possible region a group, and the probe region."""
    sizes = [layout.block_bytes(group) for group in range(len(layout.groups))] + [PROBE_BLOCK_BYTES]
    sound = len(regions) == len(sizes) and regions[-1].num_blocks == PROBE_BLOCKS
    for region, size in zip(regions, sizes, strict=False):
        sound = (
            sound
            and region.block_bytes == size
            and 1 <= region.num_blocks <= MAX_BLOCKS
            and 0 < region.address <= MAX_ADDRESS - region.size_bytes
        )
    if not sound:
        raise HandshakeError(f"the {role} node's regions do not fit its KV layout; run the same version on both nodes")
