"""Whether two nodes can exchange blocks: pure decisions on the peer channel's first messages."""

from __future__ import annotations

from dataclasses import dataclass

from pd_serve.wire.peer import PROTOCOL_MAX, PROTOCOL_MIN, Hello, Refused, Welcome


@dataclass(frozen=True)
class Identity:
    """What a node says of itself. ``epoch`` is new at every engine start."""

    node_id: str
    epoch: str
    model: str  # fingerprint
    layout: str  # fingerprint
    layout_text: str  # what it stands for, shown when fingerprints differ
    transports: tuple[str, ...]  # preferred first
    protocol_min: int = PROTOCOL_MIN
    protocol_max: int = PROTOCOL_MAX


def hello(me: Identity) -> Hello:
    """A decode node's first message."""
    return Hello(
        protocol_min=me.protocol_min,
        protocol_max=me.protocol_max,
        node_id=me.node_id,
        epoch=me.epoch,
        model=me.model,
        layout=me.layout,
        transports=list(me.transports),
        layout_text=me.layout_text,
    )


def answer(me: Identity, them: Hello, endpoint: bytes, lease_s: float) -> Welcome | Refused:
    """A prefill node's answer: the newest protocol and the first transport that both have, or why not."""
    protocol = min(me.protocol_max, them.protocol_max)
    if protocol < max(me.protocol_min, them.protocol_min):
        return Refused(
            f"peer protocol versions do not overlap: prefill node {me.node_id} speaks "
            f"{me.protocol_min}..{me.protocol_max}, decode node {them.node_id} "
            f"{them.protocol_min}..{them.protocol_max}; upgrade the older one"
        )
    if me.model != them.model:
        return Refused(
            f"models differ: prefill node {me.node_id} serves {me.model}, decode node {them.node_id} serves "
            f"{them.model} (fingerprints of configuration, weights and dtype); start both with the same --model, "
            f"--dtype and --load-format"
        )
    if me.layout != them.layout:
        return Refused(
            f"KV layouts differ: prefill node {me.node_id} has {me.layout} ({me.layout_text}), decode node "
            f"{them.node_id} has {them.layout} ({them.layout_text or 'not told'}); start both with the same "
            f"--block-size and --dtype"
        )
    transport = next((name for name in them.transports if name in me.transports), None)
    if transport is None:
        return Refused(
            f"no transport in common: prefill node {me.node_id} offers {', '.join(me.transports)}, decode node "
            f"{them.node_id} can use {', '.join(them.transports) or 'none'}; set --transport auto on both"
        )
    return Welcome(
        protocol=protocol,
        node_id=me.node_id,
        epoch=me.epoch,
        transport=transport,
        endpoint=endpoint,
        lease_s=lease_s,
    )
