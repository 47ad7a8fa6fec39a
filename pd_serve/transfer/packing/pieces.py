"""Pieces of a group in a reader's message: int32, little-endian. It comes from another node: ``decode`` checks it."""

from __future__ import annotations

import numpy as np

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.base import Pair
from pd_serve.transfer.movers.base import I64


def encode(pieces: I64) -> bytes:
    return pieces.astype("<i4").tobytes()


def decode(data: bytes, group: int, pair: Pair) -> I64:
    """Raises TransferError for what the source's pool does not have."""
    if not 0 <= group < len(pair.slicings) or not data or len(data) % 4:
        raise TransferError(
            FailureKind.TRANSFER, f"a peer asks for pieces of group {group} in {len(data)} bytes, which cannot be"
        )
    pieces = np.frombuffer(data, dtype="<i4").astype(np.int64)
    pair.slicings[group].source.check(pieces, pair.source[group], "the prefill node")
    return pieces
