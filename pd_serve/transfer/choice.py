"""Which transport a node uses, by name."""

from __future__ import annotations

from collections.abc import Callable

from pd_serve.errors import ConfigError
from pd_serve.transfer.base import Transport
from pd_serve.transfer.handshake import Identity


def transport_factory(identity: Identity) -> Callable[[], Transport]:
    """Makes the node's preferred transport, on the thread that will own it. Raises ConfigError."""
    name = identity.transports[0]
    if name != "nixl":
        raise ConfigError(f"unknown transport {name!r}; known: nixl")

    def make() -> Transport:
        from pd_serve.transfer.nixl import NixlTransport

        return NixlTransport(f"{identity.node_id}-{identity.epoch}")

    return make
