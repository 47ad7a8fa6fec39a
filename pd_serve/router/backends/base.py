"""What a node is to the rest of the router, whichever engine it runs: something that takes the link's messages.

A backend opens one :class:`Link` for each node; :mod:`pd_serve.router.links` keeps it. What a link hears it tells its
node (outputs) and the registry (loads) in the words of :mod:`pd_serve.wire.link`, so that placement, retries, limits
and all that operators see are the same for every kind. What an engine's own protocol looks like stays within its
backend.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple, Protocol

from pd_serve import values
from pd_serve.config import BACKENDS
from pd_serve.errors import PDServeError
from pd_serve.router.nodes import Node
from pd_serve.wire import link as wire
from pd_serve.wire.link import ROLES
from pd_serve.wire.model import ModelBundle

OWN = "pd-serve"


class Unfit(PDServeError):
    """The node and this router cannot work together; trying again will not help soon."""


class Place(NamedTuple):
    """Where a node is, and what it is said to be. ``role``: empty where it says so itself."""

    url: str
    backend: str
    role: str = ""

    @classmethod
    def parse(cls, line: str) -> Place:
        """``URL``, or ``URL BACKEND ROLE`` of another engine's server. Raises ValueError."""
        url, *rest = line.split()
        url = str(values.URL.parse(url))
        if not rest:
            return cls(url, OWN)
        if len(rest) != 2 or rest[0] not in BACKENDS or rest[1] not in ROLES:
            raise ValueError(f"must be a URL, or a URL, {' or '.join(BACKENDS)}, and {', '.join(ROLES)}, not {line!r}")
        return cls(url, *rest)

    def __str__(self) -> str:
        return " ".join((self.url, *(() if self.backend == OWN else (self.backend, self.role))))


class Link(Protocol):
    """An open link. Only ``bundle`` may raise; the end of the link is told by ``closed``, with the reason."""

    hello: wire.Hello
    closed: asyncio.Future[str]
    heard_s: float  # when anything was heard of it
    spoke_s: float  # when its engine was
    patience: float  # how many times longer than a node of pd-serve it may be silent

    async def bundle(self) -> ModelBundle:
        """The model's text side. Raises OSError, PDServeError."""

    def begin(self, node: Node) -> None:
        """``node`` is in the registry, and hears from now on."""

    def send(self, message: wire.ToNode) -> None: ...

    def ping(self) -> None:
        """Whatever makes a live node be heard."""

    def close(self, why: str) -> None:
        """Says good-bye, where there is something to say."""

    def abort(self, why: str) -> None:
        """For a node that does not answer."""


class Backend(Protocol):
    async def open(self, place: Place) -> Link:
        """Greeted, and not in use. Raises OSError where it is not there, Unfit or another PDServeError where it cannot
        be used, msgspec.DecodeError where it speaks something else."""
