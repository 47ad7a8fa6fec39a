"""``python -m pd_serve.decode``: the engine process of a decode node."""

from __future__ import annotations

import sys

from pd_serve.decode.inbox import Inbox
from pd_serve.decode.role import DecodeRole
from pd_serve.engine.boot import Parts, main
from pd_serve.transfer.session.tls import Tls


def make_role(parts: Parts) -> DecodeRole:
    config = parts.config
    inbox = Inbox(
        parts.identity,
        parts.lanes(reads_only=True),
        pull_timeout_s=config.pull_timeout_s,
        handshake_s=config.peer_handshake_s,
        tls=Tls.load(config.ssl_certfile, config.ssl_keyfile, config.ssl_ca),
        allow_insecure=config.allow_insecure_nodes,
    )
    inbox.begin()
    return DecodeRole(parts.kv, parts.scheduler, inbox, config.local_prefill_tokens)


if __name__ == "__main__":
    sys.exit(main(make_role))
