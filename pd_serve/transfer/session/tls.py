"""TLS for peer connections: both ends show a certificate of the same authority. No sockets.

Names in certificates are not compared with addresses: a router names a source by whatever address it has just now. Who
has a certificate of this authority is a node; which one, and whether it knows the secret, the handshake inside shows.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from pd_serve.errors import ConfigError

READ_BYTES = 256 << 10


@dataclass(frozen=True)
class Tls:
    """A node's certificate, for both directions."""

    dialling: ssl.SSLContext
    accepting: ssl.SSLContext

    @classmethod
    def load(cls, certfile: str, keyfile: str, ca: str) -> Tls | None:
        """None without an authority: there is nothing to know a node by then. Raises ConfigError."""
        if not ca:
            return None
        if not certfile:
            raise ConfigError(
                "ssl_ca is given without ssl_certfile: nodes show each other a certificate of that authority; give "
                "--ssl-certfile (and --ssl-keyfile) too, or leave --ssl-ca out"
            )
        contexts = []
        for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
            context = ssl.SSLContext(protocol)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname = False
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(ca)
                context.load_cert_chain(certfile, keyfile or None)
            except OSError as error:  # ssl.SSLError is one
                raise ConfigError(
                    f"TLS between nodes cannot be set up ({error}); look at --ssl-certfile {certfile!r}, --ssl-keyfile "
                    f"{keyfile!r} and --ssl-ca {ca!r}"
                ) from error
            contexts.append(context)
        return cls(*contexts)

    def dial(self) -> Stream:
        return Stream(self.dialling, accepts=False)

    def accept(self) -> Stream:
        return Stream(self.accepting, accepts=True)


class Stream:
    """One connection's bytes, to and from their encrypted form."""

    def __init__(self, context: ssl.SSLContext, *, accepts: bool) -> None:
        self.established = False
        self._received, self._unsent = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._unsent, server_side=accepts)
        self._waiting = bytearray()  # to be written once it is established
        self._greet()

    def _greet(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        self.established = True
        if self._waiting:
            self._tls.write(self._waiting)
            self._waiting.clear()

    def write(self, data: bytes | bytearray) -> None:
        if self.established:
            self._tls.write(data)
        else:
            self._waiting += data

    def unsent(self) -> bytes:
        """What is to be sent now, encrypted."""
        return self._unsent.read()

    @property
    def waiting_bytes(self) -> int:
        return len(self._waiting)

    def receive(self, data: bytes) -> bytes:
        """What was said with ``data``, as far as it is whole. Raises ssl.SSLError for who is not to be trusted."""
        self._received.write(data)
        if not self.established:
            self._greet()
        if not self.established:
            return b""
        said = bytearray()
        try:
            while piece := self._tls.read(READ_BYTES):
                said += piece
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        return bytes(said)
