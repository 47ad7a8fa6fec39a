"""The peer channel's connections: frames over TCP, read and written on the transfer thread itself.

A message that another thread carries in between costs two more wake-ups a hop, which on an idle machine is longer than
NVLink takes for a whole chunk; so the transfer thread owns its sockets, and its poller is all that a message wakes.
Nothing here waits. A frame is its length (4 bytes, little-endian), then its bytes; once the connection is sealed
the last bytes of a frame are its MAC.

A process that dies closes its connections; a machine that vanishes is noticed by TCP after ``SILENCE_S``. The kernel
answers TCP for a process that is stopped: that is for the heartbeats among the messages to find out.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import select
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urlsplit

from pd_serve.auth import Seal
from pd_serve.net import netloc
from pd_serve.transfer.session.tls import Stream, Tls

log = logging.getLogger(__name__)

SILENCE_S = 6

MAX_FRAME_BYTES = 16 << 20
MAX_UNSENT_BYTES = 64 << 20  # what a peer may leave unread before it counts as lost
READ_BYTES = 256 << 10
READS_A_TURN = 16  # so that one peer that talks much does not silence the others

_LENGTH_BYTES = 4

TLS_ADVICE = "give all nodes certificates of the same authority (--ssl-certfile, --ssl-keyfile, --ssl-ca), or none"


class Connection:
    """One connection. ``ended``: why it is over; empty while it lives. ``refused``: it never came about.

    ``nonsense``: it ended because the other end does not speak this protocol. ``forged``: because a MAC did not hold.
    ``untrusted``: because TLS did not come about.
    """

    def __init__(self, connected: socket.socket, *, connecting: bool = False, tls: Stream | None = None) -> None:
        self.ended = ""
        self.refused = False
        self.nonsense = False
        self.forged = False
        self.untrusted = False
        self.max_frame_bytes = MAX_FRAME_BYTES
        self.changed: Callable[[], None] = lambda: None  # called when ``interest`` has changed
        self._socket = connected
        self._connecting = connecting
        self._outgoing = self._incoming = Seal()
        self._tls = tls
        self._unsent = bytearray()
        if tls is not None:
            self._unsent += tls.unsent()
        self._received = bytearray()
        self._told = self.interest
        connected.setblocking(False)
        _tune(connected)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def interest(self) -> int:
        """What to poll for."""
        return select.EPOLLIN | (select.EPOLLOUT if self._connecting or self._unsent else 0)

    @property
    def peer(self) -> str:
        """The other end's address, for people."""
        try:
            return str(self._socket.getpeername()[0])
        except OSError:
            return "unknown"

    def seal(self, outgoing: Seal, incoming: Seal) -> None:
        """From the next frame on, in both directions, frames carry MACs. May be called between frames of a turn."""
        self._outgoing, self._incoming = outgoing, incoming

    def send(self, frame: bytes) -> None:
        """Sends, now or later, as long as the connection lives. A peer that does not read ends it."""
        if self.ended:
            return
        idle = not self._unsent and not self._connecting
        tag = self._outgoing.tag(frame)
        length = (len(frame) + len(tag)).to_bytes(_LENGTH_BYTES, "little")
        if self._tls is None:
            self._unsent += length
            self._unsent += frame
            self._unsent += tag
        else:
            self._tls.write(length + frame + tag)
            self._unsent += self._tls.unsent()
        if idle:
            self._flush()
        if len(self._unsent) + (0 if self._tls is None else self._tls.waiting_bytes) > MAX_UNSENT_BYTES:
            self.ended = "it does not read its messages"
        self._tell()

    def advance(self) -> Iterator[bytes]:
        """Does what the poller has found possible; then the frames that came, the last ones of an ended one too.

        Each is cut and checked when it is asked for: what one of them changes (bounds, seals) holds for the next.
        """
        if self._connecting and not self._connected():
            return iter(())
        if self._unsent:
            self._flush()
        if not self.ended:
            self._read()
        self._tell()
        return self._frames()

    def _connected(self) -> bool:
        error = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self.refused = True
            self.ended = "nobody listens there"
            return False
        try:
            self._socket.getpeername()
        except OSError:
            return False  # not yet
        self._connecting = False
        return True

    def _tell(self) -> None:
        if self.interest != self._told:
            self._told = self.interest
            self.changed()

    def _flush(self) -> None:
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent)
                del self._unsent[:sent]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._unsent.clear()  # what the peer said before is still to be read

    def _read(self) -> None:
        try:
            for _ in range(READS_A_TURN):
                data = self._socket.recv(READ_BYTES)
                if not data:
                    self._end()
                    return
                self._received += data if self._tls is None else self._decrypt(self._tls, data)
                if self.ended:
                    return
                if len(data) < READ_BYTES:
                    return
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._end()

    def _end(self) -> None:
        self.ended = "its connection ended"
        if self._tls is not None and not self._tls.established:
            self.untrusted = True
            self.ended = f"it ended the connection instead of a TLS handshake; {TLS_ADVICE}"

    def _decrypt(self, tls: Stream, data: bytes) -> bytes:
        said = b""
        try:
            said = tls.receive(data)
        except ssl.SSLError as error:
            self.untrusted = True
            self.ended = f"TLS failed ({error.reason or error}); {TLS_ADVICE}"
        self._unsent += tls.unsent()
        self._flush()
        return said

    def _frames(self) -> Iterator[bytes]:
        at = 0
        try:
            while len(self._received) >= at + _LENGTH_BYTES:
                size = int.from_bytes(self._received[at : at + _LENGTH_BYTES], "little")
                if size > self.max_frame_bytes:
                    self.nonsense = True
                    self.ended = f"it announces a message of {size} bytes, which cannot be"
                    return
                begin, end = at + _LENGTH_BYTES, at + _LENGTH_BYTES + size
                if len(self._received) < end:
                    return
                at = end
                frame = self._incoming.open(bytes(self._received[begin:end]))
                if frame is None:
                    self.forged = True
                    self.ended = (
                        "a message was changed, repeated or put in on its way: its MAC does not hold; look for who "
                        "else is on this network"
                    )
                    return
                yield frame
        finally:
            del self._received[:at]

    def close(self) -> None:
        """Ends it; what was sent last is still delivered where the network takes it at once."""
        self._flush()
        with contextlib.suppress(OSError):
            # unread bytes would turn the end into a reset, which can overtake what was sent last
            for _ in range(READS_A_TURN):
                if not self._socket.recv(READ_BYTES):
                    break
        self._socket.close()
        self.ended = self.ended or "closed"


class Listener:
    """Accepts connections. ``host``: the address to bind; the port is any free one. Raises OSError."""

    def __init__(self, host: str, tls: Tls | None = None) -> None:
        self._tls = tls
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family, backlog=128)
        self._socket.setblocking(False)
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self.address = f"tcp://{netloc(host, self._socket.getsockname()[1])}"

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def interest(self) -> int:
        return select.EPOLLIN

    def accept(self) -> list[Connection]:
        """Those that have come. Where the process has no file descriptor left, they are turned away."""
        accepted = []
        while True:
            try:
                connected = self._socket.accept()[0]
                accepted.append(Connection(connected, tls=None if self._tls is None else self._tls.accept()))
            except (BlockingIOError, InterruptedError):
                return accepted
            except ConnectionError:
                continue  # it left before it was accepted
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                self._turn_away(error)
                return accepted

    def _turn_away(self, error: OSError) -> None:
        """Left waiting, a connection would wake the poller again and again."""
        os.close(self._spare)
        with contextlib.suppress(OSError):  # nobody may be waiting: accept needs a descriptor to find that out
            self._socket.accept()[0].close()
            log.error("a decode node is turned away: %s; raise the limit of open files (ulimit -n)", error)
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1


Resolved = Sequence[tuple[int, tuple[object, ...]]]  # family and address, in the order to try


def resolve(address: str) -> Resolved:
    """What ``tcp://host:port`` stands for. Blocks where the host is a name. Raises OSError."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise OSError(str(error)) from error
    if not host or not port or address.lower() != f"tcp://{netloc(host, port)}":
        raise OSError(f"{address!r} is not of the form tcp://host:port")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # no name of a host looks like that
        raise OSError(f"{host!r} is no host's name") from error
    return [(family, where) for family, _, _, _, where in found]


def is_numeric(address: str) -> bool:
    """Whether no name service is needed to resolve it; also for what cannot be resolved at all."""
    try:
        host = urlsplit(address).hostname
    except ValueError:
        return True
    try:
        ipaddress.ip_address(host or "")
    except ValueError:
        return not host
    return True


def dial(resolved: Resolved, tls: Tls | None = None) -> Connection:
    """Begins to connect to the first address. Raises OSError where it cannot even begin."""
    family, address = resolved[0]
    dialling = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        dialling.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            dialling.connect(address)
    except OSError:
        dialling.close()
        raise
    return Connection(dialling, connecting=True, tls=None if tls is None else tls.dial())


def _tune(connected: socket.socket) -> None:
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENCE_S // 2 - 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)
