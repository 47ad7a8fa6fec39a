"""``python -m pd_serve.prefill``: the engine process of a prefill node."""

from __future__ import annotations

import sys

from pd_serve.engine.boot import Parts, main
from pd_serve.prefill.outbox import Outbox
from pd_serve.prefill.role import PrefillRole
from pd_serve.transfer.choice import transport_factory


def make_role(parts: Parts) -> PrefillRole:
    config = parts.config
    outbox = Outbox(
        parts.identity, transport_factory(parts.identity), parts.regions, host=config.peer_host, lease_s=config.lease_s
    )
    outbox.begin()
    return PrefillRole(parts.kv, parts.scheduler, outbox)


if __name__ == "__main__":
    sys.exit(main(make_role))
