"""Who may register and remove nodes: whoever proves the secret, or without one whoever is on this machine.

A proof answers a nonce of this router's, which is worth one order and not for long. Nonces are not kept before they are
used: a stranger who asks for many drives out nobody's.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import struct
from collections.abc import Callable
from urllib.parse import urlsplit

from pd_serve import auth
from pd_serve.api.errors import APIError
from pd_serve.trust import is_loopback
from pd_serve.wire.registration import order_proof

log = logging.getLogger(__name__)

# Between the question and the answer to it. A node gives up after its connect_timeout_s and asks anew; this is longer
# than any sensible one, and short enough to remember all that were used.
NONCE_AGE_S = 30.0
_STAMP = struct.Struct(">d16s")
_MAC_BYTES = 16
_REFUSAL_AGE_S = 60.0  # a node that is refused tries again every few seconds
_MAX_REFUSALS = 32  # that are kept: they are strangers' words


class Doors:
    """``now_s``: a monotonic clock. ``key``: of nonces, the same for all that take each other's; empty: its own."""

    def __init__(self, secret: bytes, allow_insecure: bool, now_s: Callable[[], float], key: bytes = b"") -> None:
        self._secret = secret
        self._allow_insecure = allow_insecure
        self._now_s = now_s
        self._key = key or secrets.token_bytes(32)
        self._used: dict[str, float] = {}  # nonces of proven orders, and when they expire
        self._refusals: dict[tuple[str, str, str], tuple[float, str]] = {}  # order: when it was last given, why not

    def nonce(self) -> str:
        """For one order."""
        stamp = _STAMP.pack(self._now_s(), secrets.token_bytes(16))
        return (stamp + self._mac(stamp)).hex()

    def check(self, method: str, url: str, client: str, nonce: str, proof: str, bearer: str) -> None:
        """``client``: the address that the order comes from. Raises APIError for who may not give it."""
        if self._secret:
            if bearer and hmac.compare_digest(bearer.encode(), auth.admin_token(self._secret).encode()):
                return
            self._check_proof(method, url, nonce, proof)
        elif not self._allow_insecure and not (is_loopback(client) and is_loopback(urlsplit(url).hostname or "")):
            raise APIError(
                403,
                "this router has no secret and takes nodes of its own machine only: give router and nodes the same "
                "--secret-file, or start the router with --allow-insecure-nodes",
                code="no_secret",
            )

    def refuse(self, method: str, url: str, client: str, why: str) -> None:
        """Notes an order that was not carried out; warns of it once, however often it is repeated."""
        self._forget()
        order = (method, url, client)
        if order not in self._refusals:
            if len(self._refusals) >= _MAX_REFUSALS:
                return
            log.warning("refused to %s node %s for %s: %s", method, url, client, why)
        self._refusals[order] = (self._now_s(), why)

    def refusals(self) -> list[dict[str, str]]:
        """What was refused lately, for operators who miss a node."""
        self._forget()
        return [
            {"method": method, "url": url, "client": client, "reason": why}
            for (method, url, client), (_, why) in self._refusals.items()
        ]

    def _forget(self) -> None:
        since_s = self._now_s() - _REFUSAL_AGE_S
        self._refusals = {order: refusal for order, refusal in self._refusals.items() if refusal[0] > since_s}

    def _check_proof(self, method: str, url: str, nonce: str, proof: str) -> None:
        if not proof:
            raise APIError(401, "prove that you know the secret, with the nonce of this answer", code="proof_wanted")
        now_s = self._now_s()
        if not self._fresh(nonce, now_s):
            raise APIError(401, "the nonce is used, too old or another router's: take this one", code="proof_wanted")
        mine = order_proof(self._secret, method, nonce, url)
        if not hmac.compare_digest(mine.encode(), proof.encode()):
            raise APIError(403, f"it is another secret: {auth.SECRET_ADVICE}", code="wrong_secret")
        self.use(nonce)

    def use(self, nonce: str) -> None:
        """It is worth nothing from now on."""
        now_s = self._now_s()
        self._used = {old: until_s for old, until_s in self._used.items() if until_s > now_s}
        self._used[nonce] = now_s + NONCE_AGE_S

    def _fresh(self, nonce: str, now_s: float) -> bool:
        try:
            raw = bytes.fromhex(nonce)
        except ValueError:
            return False
        if len(raw) != _STAMP.size + _MAC_BYTES or raw.hex() != nonce or nonce in self._used:
            return False
        stamp = raw[: _STAMP.size]
        if not hmac.compare_digest(raw[_STAMP.size :], self._mac(stamp)):
            return False
        made_s, _ = _STAMP.unpack(stamp)
        return bool(now_s - made_s < NONCE_AGE_S)

    def _mac(self, stamp: bytes) -> bytes:
        return hmac.digest(self._key, stamp, "sha256")[:_MAC_BYTES]
