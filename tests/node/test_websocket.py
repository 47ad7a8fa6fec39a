"""What a stranger may send on a link, and what a proven router may."""

from __future__ import annotations

import pytest
import uvicorn
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from pd_serve.node.websocket import LinkProtocol
from pd_serve.wire import link
from tests.node.harness import StartNode, receive, submit

LONG = 100_000  # bytes


def test_only_who_is_proved_may_send_long_frames(start_node: StartNode) -> None:
    node = start_node("echoes")
    whole, endless = node.dial(), node.dial()
    whole.send(bytes(LONG))
    announced = Frame(Opcode.BINARY, bytes(link.MAX_FRAME_BYTES)).serialize(mask=True)
    endless.socket.sendall(announced[:LONG])
    for stranger in (whole, endless):
        with pytest.raises(ConnectionClosed) as closed:
            stranger.recv(timeout=5)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
    router = node.link()
    assert isinstance(receive(router), link.Hello)
    frame = submit("long", [7] * (LONG // 4))
    assert len(frame) > LONG
    router.send(frame)
    while not isinstance(message := receive(router), link.Outputs):
        pass
    assert (message.items[0].id, message.items[0].tokens) == ("long", [7])


def test_uvicorn_has_what_the_protocol_relies_on() -> None:
    config = uvicorn.Config(lambda: None, ws=LinkProtocol, log_config=None)
    config.load()
    assert config.ws_protocol_class is LinkProtocol
    theirs = LinkProtocol.__mro__[1]
    assert hasattr(theirs, "handle_connect")
