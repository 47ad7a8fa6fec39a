"""Proofs that two ends know the same secret, without saying it, and what vouches for every frame after them.

Used by links between router and node, by peer connections between engines, and by registration. No sockets, no clocks.

A proof is HMAC-SHA256 over who proves and over what was said, fresh nonces among it: it is worth nothing in another
connection, in the other direction or for other words. Where neither end has a secret the key is empty: they pair, and
so does anybody else. Whoever sees proofs can try guesses against them, so a secret must be long and random. Nothing
here hides what is said.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

NONCE_BYTES = 32
TAG_BYTES = 16

SECRET_ADVICE = "start router and nodes with the same --secret-file (or PD_SERVE_SECRET)"


def nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def proof(secret: bytes, who: bytes, *parts: bytes) -> bytes:
    """``who``: the purpose, a constant of ours. ``parts``: what was said, in an order that both ends know."""
    return hmac.digest(secret, who + b"".join(hashlib.sha256(part).digest() for part in parts), "sha256")


def holds(mac: bytes, secret: bytes, who: bytes, *parts: bytes) -> bool:
    """Whether ``mac`` is that proof; takes the same time whatever is wrong."""
    return hmac.compare_digest(mac, proof(secret, who, *parts))


def why_not(mac: bytes, secret: bytes, who: bytes, *parts: bytes) -> str:
    """What is known of a proof that does not hold: which end lacks a secret. For people to read."""
    if not secret:
        return "it has a secret and this process has none"
    if holds(mac, b"", who, *parts):
        return "it has no secret and this process has one"
    return "its secret is another one"


def admin_token(secret: bytes) -> str:
    """What operators show instead of the secret, which cannot be found from it."""
    return proof(secret, b"admin").hex()


class Seal:
    """MACs of one direction's frames, in their order; both ends make the same ones. Without a secret there are none.

    Keyed BLAKE2b over the frame's number and its bytes, under a key of this session and direction: what was changed,
    dropped, repeated, reordered, sent back or put in does not hold. It is a MAC by itself, and the standard library's
    cheapest for frames of a few KiB.
    """

    def __init__(self, secret: bytes = b"", who: bytes = b"", *parts: bytes) -> None:
        self._keyed = None
        if secret:
            self._keyed = hashlib.blake2b(key=proof(secret, who, *parts), digest_size=TAG_BYTES)
        self._number = 0

    def close(self, frame: bytes) -> bytes:
        """The next frame with its MAC behind it."""
        return frame + self.tag(frame)

    def open(self, sealed: bytes) -> bytes | None:
        """The next frame; None where its MAC does not hold."""
        if self._keyed is None:
            return sealed
        frame = sealed[:-TAG_BYTES]
        return frame if hmac.compare_digest(sealed[-TAG_BYTES:], self.tag(frame)) else None

    def tag(self, frame: bytes) -> bytes:
        """The MAC alone of the next frame, for who writes it behind the frame's bytes; empty without a secret."""
        if self._keyed is None:
            return b""
        mac = self._keyed.copy()
        mac.update(self._number.to_bytes(8, "little"))
        mac.update(frame)
        self._number += 1
        return mac.digest()
