"""The first messages of a link, without sockets or clocks: each end proves that it knows the secret.

The router greets, the node answers with a proof, the router proves itself; only then the node sends its Hello. Nothing
but a version and a nonce is said to an end that has not proved itself. From Hello on every frame is sealed.
"""

from __future__ import annotations

import msgspec

from pd_serve import auth
from pd_serve.errors import PDServeError
from pd_serve.wire import link

BROKEN_SEAL = "a frame's MAC does not hold: somebody on the network changed, dropped or inserted something"
NO_GREETING = f"link version {link.LINK_VERSION}: the router must greet first; update the older of the two"

_NODE, _ROUTER = b"link: node", b"link: router"
_FROM_NODE, _FROM_ROUTER = b"link: frames of node", b"link: frames of router"


class LinkRefused(PDServeError):
    """The two ends cannot work together, or one could not prove that it knows the secret."""


class RouterHalf:
    """``greeting``: the frame to begin with. ``outgoing`` and ``incoming`` seal all frames once the node is proved."""

    outgoing: auth.Seal
    incoming: auth.Seal

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.greeting = link.encoder.encode(link.Greeting(link.LINK_VERSION, auth.nonce()))

    def prove(self, frame: bytes) -> bytes:
        """What to answer to the node's first frame. Raises LinkRefused."""
        try:
            challenge = link.decode_first_from_node(frame)
        except msgspec.DecodeError as error:
            raise LinkRefused(f"its first message is none of the link ({error}): update the older of the two") from None
        version = challenge.link_version
        if version != link.LINK_VERSION or isinstance(challenge, link.OldHello):
            raise LinkRefused(
                f"it speaks version {version} of the link, this router {link.LINK_VERSION}: update the older of the two"
            )
        said = (self.greeting, challenge.nonce)
        if not auth.holds(challenge.mac, self._secret, _NODE, *said):
            why = auth.why_not(challenge.mac, self._secret, _NODE, *said)
            raise LinkRefused(f"it could not prove that it knows the secret: {why}; {auth.SECRET_ADVICE}")
        self.outgoing = auth.Seal(self._secret, _FROM_ROUTER, *said)
        self.incoming = auth.Seal(self._secret, _FROM_NODE, *said)
        return link.encoder.encode(link.Proof(auth.proof(self._secret, _ROUTER, *said)))


class NodeHalf:
    """``outgoing`` and ``incoming`` seal all frames once the router is proved."""

    outgoing: auth.Seal
    incoming: auth.Seal

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._said: tuple[bytes, bytes] = (b"", b"")

    def challenge(self, frame: bytes) -> bytes:
        """What to answer to the router's greeting. Raises LinkRefused; a version that differs is answered as well."""
        try:
            greeting = link.decode_opening(frame)
        except msgspec.DecodeError as error:
            raise LinkRefused(f"its first message is no greeting ({error}): update the older of the two") from None
        if not isinstance(greeting, link.Greeting):
            raise LinkRefused(NO_GREETING)
        if greeting.link_version != link.LINK_VERSION:
            raise LinkRefused(
                f"the router speaks version {greeting.link_version} of the link, this node {link.LINK_VERSION}: "
                "update the older of the two"
            )
        nonce = auth.nonce()
        self._said = (frame, nonce)
        mac = auth.proof(self._secret, _NODE, *self._said)
        return link.encoder.encode(link.Challenge(link.LINK_VERSION, nonce, mac))

    def check(self, frame: bytes) -> None:
        """Raises LinkRefused unless the router knows the secret."""
        try:
            proof = link.decode_opening(frame)
        except msgspec.DecodeError as error:
            raise LinkRefused(f"its second message is no proof ({error})") from None
        if not isinstance(proof, link.Proof):
            raise LinkRefused("its second message is no proof")
        if not auth.holds(proof.mac, self._secret, _ROUTER, *self._said):
            why = auth.why_not(proof.mac, self._secret, _ROUTER, *self._said)
            raise LinkRefused(f"the router could not prove that it knows the secret: {why}; {auth.SECRET_ADVICE}")
        self.outgoing = auth.Seal(self._secret, _FROM_NODE, *self._said)
        self.incoming = auth.Seal(self._secret, _FROM_ROUTER, *self._said)
