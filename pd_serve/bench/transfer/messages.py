"""What the reader and a source say to each other: MessagePack over a connection of their own."""

from __future__ import annotations

import msgspec

from pd_serve.kv.layout import KVLayout
from pd_serve.memory.region import Region

SEED = 1  # of the content of source rank 0; the next ranks' follow


class Open(msgspec.Struct, tag="open"):
    """To the source: make a pool and a transport."""

    lane: str
    device: int | None
    cumem: bool
    layout: KVLayout
    num_blocks: tuple[int, ...]
    seed: int


class Opened(msgspec.Struct, tag="opened"):
    """From the source: it can be read."""

    describe: bytes
    regions: tuple[Region, ...]


class Serve(msgspec.Struct, tag="serve"):
    """To the source: a reader that will connect."""

    describe: bytes
    layout: KVLayout
    regions: tuple[Region, ...]


class Serving(msgspec.Struct, tag="serving"):
    pass


class Payload(msgspec.Struct, tag="payload"):
    """Either way: a message of the transport."""

    data: bytes


class Close(msgspec.Struct, tag="close"):
    """To the source, last: end in order. ``again``: another :class:`Open` follows."""

    again: bool = False


class Failed(msgspec.Struct, tag="failed"):
    """From the source: nothing more of what was opened last."""

    message: str


ToSource = Open | Serve | Payload | Close
ToReader = Opened | Serving | Payload | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_source = msgspec.msgpack.Decoder(ToSource).decode
decode_to_reader = msgspec.msgpack.Decoder(ToReader).decode
