"""KV blocks over UCX messages (ucxx): the lane for machines without NIXL, and an independent one beside it.

Two-sided: the reader asks for pieces by a control message over the peer channel, the source sends them by tag::

    binding.py    the few calls of ucxx, and what has to be known about them
    messages.py   control messages between the two ends
    plan.py       which pieces travel together (pure arithmetic)
    staging.py    bounded memory for messages that are packed or unpacked
    reader.py     decode: receives into its pool, or into staging and unpacks
    source.py     prefill: sends from its pool, or packs into staging first
    transport.py  the Transport: one UCX worker, all sessions
"""

from pd_serve.transfer.ucx.transport import UcxTransport

__all__ = ["UcxTransport"]
