"""Names of prompts' prefixes that routers and nodes agree on: a keyed hash chain over chunks of tokens.

They say where a prefix is likely to be cached, and never serve KV: a node compares exact tokens. Chunks are of one size
whatever a node's blocks are, and long, so that naming a prompt costs less than tokenising it.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

CHUNK_TOKENS = 512
_BYTES = 4 * CHUNK_TOKENS


def chain(fingerprint: str, tokens: bytes, after: int = 0) -> list[int]:
    """The name of the prefix that ends with each full chunk of ``tokens`` (int32, little-endian).

    ``fingerprint``: of the model. ``after``: the name of what comes before the tokens, :func:`start` for nothing.
    """
    key, names = fingerprint.encode()[:64], []
    for start in range(0, len(tokens) - _BYTES + 1, _BYTES):
        content = after.to_bytes(8, "little") + tokens[start : start + _BYTES]
        after = int.from_bytes(blake2b(content, digest_size=8, key=key).digest(), "little")
        names.append(after)
    return names


def start(salt: bytes) -> int:
    """What a chain begins after: prompts with other salts have other names throughout."""
    return int.from_bytes(blake2b(salt, digest_size=8).digest(), "little") if salt else 0


def pack(names: Iterable[int]) -> bytes:
    return b"".join(name.to_bytes(8, "little") for name in names)


def unpack(packed: bytes) -> list[int]:
    """Raises ValueError where it is not whole."""
    if len(packed) % 8:
        raise ValueError(f"{len(packed)} bytes are no names of 8 bytes each")
    return [int.from_bytes(packed[at : at + 8], "little") for at in range(0, len(packed), 8)]
