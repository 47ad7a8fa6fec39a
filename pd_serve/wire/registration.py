"""How a node proves to a router that it knows the secret when it registers and leaves (``POST`` and ``DELETE /nodes``).

The router answers an order without a proof with 401 and a nonce; the node gives the order again with the nonce and
a proof over it, the method and its URL.
"""

from __future__ import annotations

from pd_serve import auth

NONCE_HEADER = "X-PD-Serve-Nonce"
PROOF_HEADER = "X-PD-Serve-Proof"


def order_proof(secret: bytes, method: str, nonce: str, url: str) -> str:
    return auth.proof(secret, b"registration", method.encode(), nonce.encode(), url.encode()).hex()
