"""KV blocks out of a peer GPU's mapped memory. See :mod:`pd_serve.transfer.nvlink.transport`."""

from pd_serve.transfer.nvlink.directory import socket_directory
from pd_serve.transfer.nvlink.transport import NvlinkTransport

__all__ = ["NvlinkTransport", "socket_directory"]
