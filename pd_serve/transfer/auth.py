"""Proofs that two ends of a peer connection know the same secret, without saying it, and what vouches for every
message after them. No sockets, no clocks.

A proof is HMAC-SHA256 over who proves, a fresh nonce of each end, the first message of the connection and the protocol
version settled on: it is worth nothing in another connection, in the other direction, or for another first message.
Without a secret on both ends the key is empty: they pair, and so does anybody else. Proofs can be tried against guesses
by whoever saw them, so a secret must be long and random.

After the proofs every message carries a MAC of its own: keyed BLAKE2b over its number in its direction and its bytes,
with a key of this connection and this direction (HMAC-SHA256 of the secret). What was changed, dropped, repeated,
reordered, sent back or put in by somebody else does not hold. Keyed BLAKE2b is a MAC by itself and the cheapest of the
standard library for messages of a few KiB; nothing here hides what is said.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from enum import Enum

NONCE_BYTES = 32
TAG_BYTES = 16


class Prover(Enum):
    """Who proves."""

    SOURCE = b"prefill"
    READER = b"decode"


class Speaker(Enum):
    """Whose messages a key vouches for."""

    SOURCE = b"messages of prefill"
    READER = b"messages of decode"


@dataclass(frozen=True)
class Said:
    """What both ends of a connection have said so far. ``hello``: the frame that opened it."""

    reader_nonce: bytes
    source_nonce: bytes
    hello: bytes
    protocol: int

    def text(self, purpose: bytes) -> bytes:
        nonces = self.reader_nonce + self.source_nonce
        return purpose + nonces + hashlib.sha256(self.hello).digest() + self.protocol.to_bytes(8, "little")


def nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def proof(secret: bytes, prover: Prover, said: Said) -> bytes:
    return hmac.digest(secret, said.text(prover.value), "sha256")


def holds(mac: bytes, secret: bytes, prover: Prover, said: Said) -> bool:
    """Whether ``mac`` is that proof; takes the same time whatever is wrong."""
    return hmac.compare_digest(mac, proof(secret, prover, said))


def why_not(mac: bytes, secret: bytes, prover: Prover, said: Said) -> str:
    """What is known of a proof that does not hold: which end lacks a secret. For people to read."""
    if not secret:
        return "it has a secret and this node has none"
    if holds(mac, b"", prover, said):
        return "it has no secret and this node has one"
    return "its secret is not this node's"


class Seal:
    """MACs of one direction's frames, in their order. Both ends make the same ones."""

    def __init__(self, secret: bytes, speaker: Speaker, said: Said) -> None:
        key = hmac.digest(secret, said.text(speaker.value), "sha256")
        self._keyed = hashlib.blake2b(key=key, digest_size=TAG_BYTES)
        self._number = 0

    def tag(self, frame: bytes) -> bytes:
        """Of the next frame."""
        mac = self._keyed.copy()
        mac.update(self._number.to_bytes(8, "little"))
        mac.update(frame)
        self._number += 1
        return mac.digest()

    def holds(self, tag: bytes, frame: bytes) -> bool:
        """Whether ``tag`` is the next frame's."""
        return hmac.compare_digest(tag, self.tag(frame))
