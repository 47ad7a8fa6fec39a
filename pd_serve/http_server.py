"""uvicorn's server as the router and the nodes run it: its TLS listeners are ours, and it sleeps until it is to end."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import uvicorn

from pd_serve.tls_listener import TlsListener

# libuv accepts one connection of a descriptor each turn of the loop. Where turns are long (many streams have a token)
# the last connection of a burst would wait for as many turns as there are others before it.
_ACCEPTED = 15
_DATE_S = 1.0  # between two looks at the clock, for the Date header


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        self._exits = False
        self._exit = asyncio.Event()
        self.loop: asyncio.AbstractEventLoop | None = None  # once it serves
        super().__init__(config)

    @property
    def should_exit(self) -> bool:
        return self._exits

    @should_exit.setter
    def should_exit(self, exits: bool) -> None:
        self._exits = exits
        if exits and self.loop is not None:
            self.loop.call_soon_threadsafe(self._exit.set)

    async def main_loop(self) -> None:
        """uvicorn's wakes up ten times a second, most of what an idle node cost. This wakes for the date, where
        answers have one."""
        self.loop = asyncio.get_running_loop()
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DATE_S if self.config.date_header else None):
                    await self._exit.wait()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.on_tick(0)  # the first answers have a date, too
        if self.config.ssl is None:
            # Originals too: they are closed by who gave them, and a descriptor more accepts one more.
            taken = [listener.dup() for listener in sockets or () for _ in range(_ACCEPTED)]
            await super().startup([*(sockets or ()), *taken] or None)
            return
        await super().startup([])
        http = self.config.http_protocol_class

        def make_protocol() -> asyncio.Protocol:
            return http(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)  # type: ignore[call-arg]

        connections = self.server_state.connections
        self.servers = [
            TlsListener(listener, self.config.ssl, make_protocol, http.bounds, lambda: len(connections))  # type: ignore[attr-defined, misc]
            for listener in sockets or ()
        ]
