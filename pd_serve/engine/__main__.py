"""``python -m pd_serve.engine``: the engine process of a node, whatever its role."""

from __future__ import annotations

import sys

from pd_serve.decode.ranks import RankedInbox
from pd_serve.decode.receiver import InboxReceiver
from pd_serve.engine.boot import Parts, main
from pd_serve.engine.ends import open_ends
from pd_serve.engine.role import Role
from pd_serve.prefill.ranks import RankedOutbox
from pd_serve.prefill.sender import OutboxSender
from pd_serve.transfer.relay import RankedThread


def make_role(parts: Parts) -> Role:
    """Starts the transfer threads of all ranks; the doors stay closed."""
    config, kv, scheduler, relays = parts.config, parts.kv, parts.scheduler, parts.relays
    if relays is not None:
        relays.open(parts.identity.epoch, config.transport_timeout_s)
    ends = open_ends(config, parts.identity, parts.memory)
    if relays is None:
        sender = OutboxSender(kv, scheduler, ends.outbox)
        return Role(ends.worker, sender, InboxReceiver(kv, scheduler, ends.inbox, config.local_prefill_tokens))
    sender = OutboxSender(kv, scheduler, RankedOutbox(ends.outbox, relays))
    receiver = InboxReceiver(kv, scheduler, RankedInbox(ends.inbox, relays), config.local_prefill_tokens)
    return Role(RankedThread(ends.worker, relays), sender, receiver)


if __name__ == "__main__":
    sys.exit(main(make_role))
