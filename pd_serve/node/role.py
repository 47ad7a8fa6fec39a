"""What routers use the node for, and its switch at run time.

Called by the HTTP application. Every engine can send and receive, so a switch is a word to the routers: what runs goes
on to its end, leases stay valid, and new work is placed by the new role at once. Only the door through which others
read from this node is opened when it first takes a role with prefill.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import msgspec

from pd_serve.node.engine_process import EngineProcess
from pd_serve.node.links import Links
from pd_serve.node.sleep import Refused
from pd_serve.wire.link import Role

log = logging.getLogger(__name__)


class Document(msgspec.Struct):
    """The answer to a switch."""

    role: str
    before: str


class Switch:
    """``role``: the one now."""

    def __init__(self, engine: EngineProcess, links: Links, role: str) -> None:
        self.role = role
        self._engine = engine
        self._links = links
        self._lock = asyncio.Lock()

    async def take(self, role: str) -> Document:
        """Takes another role; does nothing where it has it. The engine is there. Raises Refused."""
        async with self._lock:
            before = self.role
            if role != before:
                ready = self._engine.ready
                if role != "decode" and (ready is None or not ready.peer_addresses):
                    answer = await self._engine.listen()
                    if answer.failure:
                        raise Refused(503, f"the node stays {before}: {answer.failure}")
                self.role = role
                self.tell()
                log.info("the role is %s from now on; it was %s", role, before)
            return Document(role, before)

    def tell(self) -> None:
        ready = self._engine.ready
        if ready is not None:
            self._links.tell(Role(cast("Any", self.role), ready.peer_addresses))
