"""Proofs that two ends of a peer connection know the same secret, without saying it. Pure functions.

HMAC-SHA256 over who proves, a fresh nonce of each end and the first message of the connection: a proof is worth nothing
in another connection, in the other direction, or for another first message. Without a secret on both ends the key is
empty: they pair, and so does anybody else. Proofs can be tried against guesses by whoever saw them, so a secret must
be long and random.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from enum import Enum

NONCE_BYTES = 32


class Prover(Enum):
    """Who proves, and with what message."""

    SOURCE = b"prefill"
    READER = b"decode"
    WELCOME = b"welcome"  # the source again, with what it says of itself


def nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def proof(
    secret: bytes, prover: Prover, reader_nonce: bytes, source_nonce: bytes, hello: bytes, about: bytes = b""
) -> bytes:
    """``hello``: the frame that opened the connection. ``about``: what the proof vouches for besides."""
    text = prover.value + reader_nonce + source_nonce + hashlib.sha256(hello).digest() + hashlib.sha256(about).digest()
    return hmac.digest(secret, text, "sha256")


def holds(
    mac: bytes,
    secret: bytes,
    prover: Prover,
    reader_nonce: bytes,
    source_nonce: bytes,
    hello: bytes,
    about: bytes = b"",
) -> bool:
    """Whether ``mac`` is that proof; takes the same time whatever is wrong."""
    return hmac.compare_digest(mac, proof(secret, prover, reader_nonce, source_nonce, hello, about))


def why_not(mac: bytes, secret: bytes, prover: Prover, reader_nonce: bytes, source_nonce: bytes, hello: bytes) -> str:
    """What is known of a proof that does not hold: which end lacks a secret. For people to read."""
    if not secret:
        return "it has a secret and this node has none"
    if holds(mac, b"", prover, reader_nonce, source_nonce, hello):
        return "it has no secret and this node has one"
    return "its secret is not this node's"
