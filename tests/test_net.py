"""Addresses and sockets."""

from __future__ import annotations

import select
import socket

import pytest

from pd_serve.net import end_unread, listen


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel's, on Linux")
def test_a_connection_that_the_other_side_does_not_read_ends() -> None:
    with listen("127.0.0.1", 0) as listener:
        end_unread(listener, 0.5)
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as ours:
            ours.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    ours.send(bytes(1 << 16))
            poller = select.poll()
            poller.register(ours, select.POLLERR)
            assert poller.poll(20_000), "it is still open"
            with pytest.raises(TimeoutError):
                ours.send(b"x")
