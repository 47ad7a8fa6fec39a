"""The project's own exceptions. Each message says what went wrong and what to do next.

Imported by every room; imports nothing of pd_serve and nothing heavy.
"""

from __future__ import annotations


class PDServeError(Exception):
    """Base of all errors that pd-serve raises on purpose."""


class ConfigError(PDServeError):
    """A setting, a flag, a variable or a configuration file is wrong."""


class ModelError(PDServeError):
    """A model cannot be found, read, converted or served."""


class TransferError(PDServeError):
    """A KV transfer failed. Nothing of what it delivered may be used.

    ``kind`` is one of the ``FailureKind`` values in :mod:`pd_serve.wire.peer`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class HandshakeError(TransferError):
    """Two nodes cannot exchange KV blocks (version, model, layout or transport differ)."""

    def __init__(self, message: str) -> None:
        super().__init__("handshake", message)


class PoolExhausted(PDServeError):
    """A block pool has fewer free blocks than were asked for. The caller waits or preempts."""
