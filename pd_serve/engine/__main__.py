"""``python -m pd_serve.engine``: the engine process of a node, whatever its role."""

from __future__ import annotations

import sys

from pd_serve.decode.inbox import Inbox
from pd_serve.decode.receiver import InboxReceiver
from pd_serve.engine.boot import Parts, main
from pd_serve.engine.role import Role
from pd_serve.prefill.outbox import Outbox
from pd_serve.prefill.sender import OutboxSender
from pd_serve.transfer.session.tls import Tls
from pd_serve.transfer.worker import TransferWorker


def make_role(parts: Parts) -> Role:
    """Starts the transfer thread; the door stays closed."""
    config = parts.config
    tls = Tls.load(config.ssl_certfile, config.ssl_keyfile, config.ssl_ca)
    worker = TransferWorker(parts.lanes())
    outbox = Outbox(
        parts.identity,
        worker,
        host=config.peer_host,
        lease_s=config.lease_s,
        handshake_s=config.peer_handshake_s,
        tls=tls,
        unclaimed_s=config.lease_s + config.step_timeout_s,
    )
    inbox = Inbox(
        parts.identity,
        worker,
        pull_timeout_s=config.pull_timeout_s,
        handshake_s=config.peer_handshake_s,
        tls=tls,
        allow_insecure=config.allow_insecure_nodes,
    )
    worker.start()
    sender = OutboxSender(parts.kv, parts.scheduler, outbox)
    return Role(worker, sender, InboxReceiver(parts.kv, parts.scheduler, inbox, config.local_prefill_tokens))


if __name__ == "__main__":
    sys.exit(main(make_role))
