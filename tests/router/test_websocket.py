"""A link that closes: nothing that is written to it raises, at any moment, and its end is told."""

from __future__ import annotations

import asyncio

import pytest

from pd_serve.router.websocket import connect
from tests.router.conftest import StartNode


@pytest.mark.parametrize("how", ["close frame", "end of stream", "abort", "own close"])
async def test_nothing_raises_between_a_close_and_its_end(start_node: StartNode, how: str) -> None:
    node = await start_node("decode")
    socket = await connect(node.url, "/link", lambda _: None, 5.0, None)
    if how == "close frame":
        socket.data_received(b"\x88\x02\x03\xe9")
    elif how == "end of stream":
        socket.eof_received()
    elif how == "abort":
        socket.abort("a test")
    else:
        socket.close("é" * 100)  # a reason may be longer than a close frame, and is cut within a character
    assert not socket.closed.done()
    for _ in range(2):
        socket.send(b"x")
        socket.ping()
        socket.close("again")
        socket.abort("again")
    assert await asyncio.wait_for(socket.closed, 5)
    socket.send(b"x")
    socket.close("once more")
