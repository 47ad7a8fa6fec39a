"""KV blocks over NIXL: reads of a peer's pool by RDMA, NVLink, shared memory or TCP, whatever its backend finds.

- ``bindings``: NIXL itself, an agent with a dozen verbs, and the settings of UCX.
- ``reads``: one read under way, and a remote agent that is read from.
- ``direct``: descriptor lists, prepared once a peer; a pull names pieces in them by index.
- ``packer`` (source), ``unpacker`` (reader): pieces too small to be read one by one travel *packed*, many in one read;
  ``chunks`` are what travels together, ``staging`` is where, and ``local_ring`` shares the reader's among its sources;
  how pieces are asked for, and copied there, is :mod:`pd_serve.transfer.packing`'s, which the ucx lane uses too.
- ``messages``: what the two ends say to each other.
- ``peer``, ``transport``: the interface of :mod:`pd_serve.transfer.base`.

Nothing here waits: every call returns at once, and what is under way is asked for. (With two exceptions: where UCX
copies host memory itself, inside of one machine, it does so while a read is posted; and a source on a GPU gives a chunk
up to 0.1 ms to be packed, so that it can be read while the next one is.)

What NIXL 1.5.1 does that shapes all of it:

- A reader needs the target's UCX to make progress while the two connect, and for the whole transfer where UCX has to
  fall back to TCP. The target's threads may be busy computing, so NIXL's own progress thread is on. Its Python agent
  hard-codes a delay of 0, with which that thread spins; ``bindings`` takes a delay, and the thread then sleeps until a
  descriptor is readable. Only a reader whose bytes GPUs move has none (``transport`` says why).
- Releasing a request that is under way, or forgetting its peer, frees the handle but does not stop the bytes: they
  still arrive. So a running read is never released; what it writes to is held until it has ended.
- A peer that died is an error of the next call; a peer that is stopped (SIGSTOP) answers nothing for as long as it is
  stopped, and then goes on where it was.
- A descriptor costs 7 µs over NVLink and 1.6 µs in the memory of one host, whatever its size.
"""

from __future__ import annotations

from pd_serve.transfer.nixl.bindings import load_bindings
from pd_serve.transfer.nixl.limits import Limits
from pd_serve.transfer.nixl.transport import NixlTransport

__all__ = ["Limits", "NixlTransport", "load_bindings"]
