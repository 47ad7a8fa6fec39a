"""Which lanes a node starts, by the setting ``transport`` and the memory that its pool lives in.

Called where a node's transfer thread is set up; libraries are imported only when the thread starts a lane. Starting one
takes a part of a second, so nothing is started here that could not be chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pd_serve.errors import ConfigError
from pd_serve.memory.region import PoolMemory
from pd_serve.transfer.base import Transport
from pd_serve.transfer.lanes import LaneFactory, Lanes
from pd_serve.transfer.movers.base import Mover

NAMES = ("nvlink", "nixl", "ucx")  # preferred first, where measurements are equal


def lanes_for(
    wanted: str,
    agent_name: str,
    memory: PoolMemory,
    *,
    reads_only: bool,
    nixl_backend: str = "UCX",
    nixl_options: Mapping[str, str] | None = None,
    nvlink_socket_dir: str = "",
    make_mover: Callable[[], Mover] | None = None,
) -> Lanes:
    """``wanted``: "auto" or one name, which then must work. ``agent_name``: new at every start (node and epoch).

    ``reads_only``: this node is never read. ``make_mover``: another than the one for ``memory`` (called on the transfer
    thread). Raises ConfigError.
    """
    if wanted not in ("auto", *NAMES):
        raise ConfigError(f"unknown transport {wanted!r}; known: auto, {', '.join(NAMES)}")
    if wanted == "nvlink" and memory.device is None:
        raise ConfigError(
            "transport nvlink reads GPU memory, and this node's KV is in host memory; set --transport auto"
        )

    def nvlink(mover: Mover) -> Transport:
        from pd_serve.memory.cuda_driver import CudaDriver
        from pd_serve.transfer.nvlink import NvlinkTransport, socket_directory

        return NvlinkTransport(CudaDriver(), mover, socket_directory(nvlink_socket_dir))

    def nixl(mover: Mover) -> Transport:
        from pd_serve.transfer.nixl import NixlTransport

        return NixlTransport(agent_name, mover, nixl_backend, nixl_options, reads_only=reads_only)

    def ucx(mover: Mover) -> Transport:
        from pd_serve.transfer.ucx import UcxTransport

        return UcxTransport(mover)

    factories = {"nvlink": LaneFactory(nvlink), "nixl": LaneFactory(nixl), "ucx": LaneFactory(ucx)}
    if wanted != "auto":
        chosen = {wanted: factories[wanted]}
    elif memory.device is None:
        # in host memory NIXL is never slower than the same library's two-sided messages
        chosen = {"nixl": factories["nixl"], "ucx": LaneFactory(ucx, instead_of="nixl")}
    else:
        chosen = factories
    return Lanes(memory, chosen, make_mover or mover_maker(memory), required=wanted != "auto")


def mover_maker(memory: PoolMemory) -> Callable[[], Mover]:
    """Makes what copies and sums in this memory, on the thread that will use it."""

    def make() -> Mover:
        if memory.device is None:
            from pd_serve.transfer.movers.host import HostMover

            return HostMover()
        from pd_serve.transfer.movers.cuda import CudaMover

        return CudaMover(memory.device)

    return make
