"""The project's own exceptions. Each message says what went wrong and what to do next.

Imported by every room; imports nothing of pd_serve and nothing heavy.
"""

from __future__ import annotations

from enum import StrEnum


class PDServeError(Exception):
    """Base of all errors that pd-serve raises on purpose."""


class ConfigError(PDServeError):
    """A setting, a flag, a variable or a configuration file is wrong."""


class ModelError(PDServeError):
    """A model cannot be found, read, converted or served."""


class FailureKind(StrEnum):
    """Why a pull ended without usable blocks."""

    HANDSHAKE = "handshake"  # secret, version, model, layout or transport do not match
    CONNECT = "connect"  # the peer cannot be reached
    PEER_LOST = "peer_lost"  # it stopped answering, or came back with another epoch
    EXPIRED = "expired"  # the lease had ended when it was claimed, or when the bytes arrived
    CANCELLED = "cancelled"  # the prefill node gave the request up
    TRANSFER = "transfer"  # the transport reported an error
    TIMEOUT = "timeout"  # nothing moved for too long
    CHECKSUM = "checksum"  # what arrived is not what was announced


class TransferError(PDServeError):
    """A KV transfer failed. Nothing of what it delivered may be used.

    ``kind`` is one of :class:`FailureKind`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class HandshakeError(TransferError):
    """Two nodes cannot exchange KV blocks (version, model, layout or transport differ)."""

    def __init__(self, message: str) -> None:
        super().__init__(FailureKind.HANDSHAKE, message)


class PoolExhausted(PDServeError):
    """A block pool has fewer free blocks than were asked for. The caller waits or preempts."""
