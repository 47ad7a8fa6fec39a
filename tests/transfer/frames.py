"""The peer channel's frames over a blocking socket: what a bare client or a scripted node speaks."""

from __future__ import annotations

import select
import socket
import struct

from pd_serve.auth import Seal
from pd_serve.transfer.session.handshake import Greeting, Reception


class Frames:
    def __init__(self, connected: socket.socket) -> None:
        self.raw = connected
        self.outgoing = self._incoming = Seal()
        self._received = b""

    @classmethod
    def dial(cls, address: str) -> Frames:
        host, port = address.removeprefix("tcp://").rsplit(":", 1)
        return cls(socket.create_connection((host, int(port)), timeout=10))

    def seal(self, end: Greeting | Reception) -> None:
        """All that follows is sealed."""
        self.outgoing, self._incoming = end.outgoing, end.incoming

    def send(self, frame: bytes) -> None:
        frame = self.outgoing.close(frame)
        self.raw.sendall(struct.pack("<I", len(frame)) + frame)

    def poll(self, timeout_s: float) -> bool:
        """Whether there is something to read: a frame, a part of one, or the end."""
        return self._whole() or bool(select.select([self.raw], [], [], timeout_s)[0])

    def receive(self) -> bytes:
        """The next frame. Raises EOFError at the end of the connection."""
        while not self._whole():
            try:
                data = self.raw.recv(1 << 16)
            except ConnectionError:
                data = b""
            if not data:
                raise EOFError
            self._received += data
        (size,) = struct.unpack_from("<I", self._received)
        frame, self._received = self._received[4 : 4 + size], self._received[4 + size :]
        opened = self._incoming.open(frame)
        assert opened is not None, "a MAC does not hold"
        return opened

    def _whole(self) -> bool:
        return len(self._received) >= 4 and len(self._received) >= 4 + struct.unpack_from("<I", self._received)[0]

    def ended(self, timeout_s: float = 5.0) -> bool:
        """Whether the other end closes the connection in time; what it still says is dropped."""
        self.raw.settimeout(timeout_s)
        try:
            while self.raw.recv(1 << 16):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        self.raw.close()
