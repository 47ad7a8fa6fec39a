"""The transfer end of one rank: its thread, its lanes, and on them an outbox and an inbox.

For ranks of our own engine, and for what computes in another's process (:mod:`pd_serve.integrations`): no engine is
needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pd_serve.config import NodeConfig
from pd_serve.decode import ranks as inboxes
from pd_serve.decode.inbox import Inbox
from pd_serve.memory.region import PoolMemory
from pd_serve.prefill import ranks as outboxes
from pd_serve.prefill.outbox import Outbox
from pd_serve.transfer.choice import lanes_for
from pd_serve.transfer.relay import End
from pd_serve.transfer.session.handshake import Identity
from pd_serve.transfer.session.tls import Tls
from pd_serve.transfer.worker import TransferWorker


@dataclass(frozen=True)
class RankEnds:
    """The door is closed until somebody listens."""

    worker: TransferWorker
    outbox: Outbox
    inbox: Inbox

    @property
    def remote(self) -> Mapping[str, End]:
        """As rank 0 reaches them, where this is another rank."""
        return {outboxes.NAME: outboxes.RemoteOutbox(self.outbox), inboxes.NAME: inboxes.RemoteInbox(self.inbox)}


def open_ends(config: NodeConfig, identity: Identity, memory: PoolMemory) -> RankEnds:
    """Starts the transfer thread. Raises PDServeError."""
    tls = Tls.load(config.ssl_certfile, config.ssl_keyfile, config.ssl_ca)
    lanes = lanes_for(
        config.transport,
        f"{identity.node_id}-{identity.rank}-{identity.epoch}",
        memory,
        # a node may take another role later (docs/api.md, Role)
        reads_only=config.role == "decode",
        nixl_backend=config.nixl_backend,
        nixl_options=config.nixl_backend_options(),
        nvlink_socket_dir=config.nvlink_socket_dir,
    )
    worker = TransferWorker(lanes)
    outbox = Outbox(
        identity,
        worker,
        host=config.peer_host,
        lease_s=config.lease_s,
        handshake_s=config.peer_handshake_s,
        tls=tls,
        unclaimed_s=config.lease_s + config.step_timeout_s,
    )
    inbox = Inbox(
        identity,
        worker,
        pull_timeout_s=config.pull_timeout_s,
        handshake_s=config.peer_handshake_s,
        tls=tls,
        allow_insecure=config.allow_insecure_nodes,
    )
    worker.start()
    return RankEnds(worker, outbox, inbox)
