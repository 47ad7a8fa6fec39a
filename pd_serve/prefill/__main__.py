"""``python -m pd_serve.prefill``: the engine process of a prefill node."""

from __future__ import annotations

import sys

from pd_serve.engine.boot import Parts, main
from pd_serve.prefill.outbox import Outbox
from pd_serve.prefill.role import PrefillRole
from pd_serve.transfer.session.tls import Tls


def make_role(parts: Parts) -> PrefillRole:
    config = parts.config
    outbox = Outbox(
        parts.identity,
        parts.lanes(reads_only=False),
        host=config.peer_host,
        lease_s=config.lease_s,
        handshake_s=config.peer_handshake_s,
        tls=Tls.load(config.ssl_certfile, config.ssl_keyfile, config.ssl_ca),
        unclaimed_s=config.lease_s + config.step_timeout_s,
    )
    outbox.begin()
    return PrefillRole(parts.kv, parts.scheduler, outbox)


if __name__ == "__main__":
    sys.exit(main(make_role))
