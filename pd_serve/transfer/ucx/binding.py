"""The few calls of UCX that the transport needs, through ucxx's low-level API (no asyncio, no threads of its own).

The only module that knows ucxx. One :class:`Worker` a transport, one :class:`Endpoint` a session and side; a message is
named by its 64-bit tag. Nothing here waits: an :class:`Operation` is asked whether it has ended, and
``Worker.progress`` does what can be done at once.

Facts about ucxx 0.52 and UCX 1.21 that shape it:

- Importing ucxx changes settings in ``os.environ`` that NIXL's own UCX would then read too: they are put back.
- Without peer error handling a dead peer is never noticed, and closing an endpoint can wait for it for ever. With it,
  UCX leaves shared memory out, and messages inside one host go over TCP at an eighth of the speed, unless the shared
  memory transports are told to offer error handling as well.
- When a peer dies in the middle of a message, UCX ends the receive by way of its registration cache. Without memory
  events there is no such cache, and it crashes. But to see memory events it rewrites functions of libc and of the CUDA
  driver while other threads run in them, or replaces malloc, which breaks NIXL. So it is told that somebody else
  reports them. Nobody does: what is sent from and received into here stays mapped until the transport is closed.
- A request can be cancelled in C++ only; ucxx's Python class does it when it is garbage collected, when nobody can ask
  any more whether it has ended. The C++ method is called instead.
- ``UCXEndpoint.close`` forgets to pass the force flag and so waits for the peer; ``close_blocking`` passes it, and then
  returns at once, whatever the peer does. Bytes that a peer sends later are dropped.
- An endpoint that failed is freed with its worker only: a few KiB for each peer that died.
"""

from __future__ import annotations

import ctypes
import os
import time
from types import ModuleType
from typing import Any

from pd_serve.errors import FailureKind, TransferError

# Read when the library is loaded; a user's own value wins.
LIBRARY_DEFAULTS = {
    "UCX_LOG_FILE": "stderr",  # its default, stdout, belongs to the commands' own output
    "UCX_LOG_LEVEL": "fatal",  # a peer's death is an error in UCX's log and an event in ours
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}

# Read when the library is loaded, and not the user's to choose: see memory events above.
LIBRARY_NEEDS = {"UCX_MEM_EVENTS": "y", "UCX_MEMTYPE_CACHE": "n"}

MEMORY_EVENTS = 1 << 16 | 1 << 17 | 1 << 20 | 1 << 21  # UCM_EVENT_VM_MAPPED, VM_UNMAPPED, MEM_TYPE_ALLOC, MEM_TYPE_FREE

# Of this transport's context alone; a user's own value wins.
CONTEXT_DEFAULTS = {
    "POSIX_ERROR_HANDLING": "y",
    "SYSV_ERROR_HANDLING": "y",
    "KEEPALIVE_INTERVAL": "1s",  # how soon a dead process is noticed where no connection breaks; asked while bytes move
    "MAX_RNDV_RAILS": "1",  # ucxx's own default
}

# For GPU memory the reader fetches the bytes: a source that writes them by cuda_ipc, is stopped and goes on, could
# write to blocks that have been given back. (For host memory, UCX withdraws what it had registered for a dead peer.)
DEVICE_DEFAULTS = {
    "RNDV_SCHEME": "get_zcopy",
    "RNDV_FRAG_MEM_TYPE": "cuda",  # ucxx's own default
}

CANCEL_SYMBOL = "_ZN4ucxx7Request6cancelEv"  # ucxx::Request::cancel()


class DeviceBytes:
    """Device memory, as ucxx wants to see it."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (size_bytes,),
            "typestr": "|u1",
            "version": 3,
        }


class Operation:
    """A send or a receive. Its memory belongs to UCX until ``ended``, also after ``cancel``."""

    def __init__(self, ucx: Ucx, request: Any) -> None:
        self._ucx = ucx
        self._request = request

    def ended(self) -> bool:
        return bool(self._request.completed)

    def error(self) -> str | None:
        """Once ended: why it did not succeed."""
        try:
            self._request.check_error()
        except self._ucx.lib.UCXError as error:
            return str(error) or type(error).__name__
        return None

    def cancel(self) -> None:
        """Ends it if it has not begun to move; otherwise it ends by itself."""
        if not self.ended():
            self._ucx.cancel(self._request.ucxx_ptr)


class Endpoint:
    """The way to one peer's worker."""

    def __init__(self, ucx: Ucx, endpoint: Any) -> None:
        self._ucx = ucx
        self._endpoint = endpoint

    @property
    def alive(self) -> bool:
        return bool(self._endpoint.alive)

    def send(self, address: int, size_bytes: int, tag: int, *, on_device: bool) -> Operation:
        """Raises TransferError when the endpoint has failed."""
        lib = self._ucx.lib
        try:
            request = self._endpoint.tag_send(self._ucx.array(address, size_bytes, on_device), lib.UCXXTag(tag))
        except (lib.UCXError, ValueError) as error:
            raise TransferError(FailureKind.PEER_LOST, f"UCX cannot send: {error}") from error
        return Operation(self._ucx, request)

    def close(self) -> None:
        """By force: sends that are under way end with an error, whatever the peer does."""
        self._endpoint.close_blocking()


class Worker:
    """UCX's connections and messages of one transport."""

    def __init__(self, ucx: Ucx, *, on_device: bool) -> None:
        self._ucx = ucx
        lib = ucx.lib
        try:
            self._context = lib.UCXContext(_context_settings(on_device), feature_flags=(lib.Feature.TAG,))
            self._worker = lib.UCXWorker(self._context)
        except lib.UCXError as error:
            raise TransferError(
                FailureKind.TRANSFER,
                f"UCX cannot start ({error}); check UCX_TLS and UCX_NET_DEVICES",
            ) from error
        if on_device and not self._context.cuda_support:
            raise TransferError(
                FailureKind.TRANSFER,
                "this UCX cannot move GPU memory: let UCX_TLS include cuda_copy and cuda_ipc",
            )
        self.address: bytes = self._worker.address.tobytes()
        self._any = lib.UCXXTag(0), lib.UCXXTagMask(0)

    def connect(self, address: bytes) -> Endpoint:
        """``address``: intact, for UCX crashes on one that is not. Raises TransferError: no way to that worker."""
        lib = self._ucx.lib
        try:
            peer = lib.UCXAddress.create_from_buffer(address)
            endpoint = self._worker.create_endpoint_from_worker_address(peer, True)
        except lib.UCXError as error:
            raise TransferError(
                FailureKind.CONNECT,
                f"UCX finds no way to the peer ({error}); compare UCX_TLS and UCX_NET_DEVICES of both ends",
            ) from error
        return Endpoint(self._ucx, endpoint)

    def receive(self, address: int, size_bytes: int, tag: int, *, on_device: bool) -> Operation:
        lib = self._ucx.lib
        try:
            request = self._worker.tag_recv(self._ucx.array(address, size_bytes, on_device), lib.UCXXTag(tag))
        except lib.UCXError as error:
            raise TransferError(FailureKind.TRANSFER, f"UCX cannot receive: {error}") from error
        return Operation(self._ucx, request)

    def unexpected(self) -> int | None:
        """The tag of a message that nobody has asked for (any more); it waits until it is received."""
        found = self._worker.tag_probe(*self._any)
        return int(found.sender_tag.value) if found.matched else None

    def progress(self, budget_s: float) -> bool:
        """Moves what can be moved without waiting, for about ``budget_s``; whether anything moved."""
        until_s = time.monotonic() + budget_s
        moved = False
        while self._worker.progress_once():
            moved = True
            if time.monotonic() > until_s:
                break
        self._worker.cancel_inflight_requests()  # of endpoints that have failed
        return moved


class Ucx:
    """ucxx, loaded. Raises TransferError where it is not installed."""

    def __init__(self) -> None:
        self.lib, self._array, self._cancel = _load()

    def array(self, address: int, size_bytes: int, on_device: bool) -> Any:
        if on_device:
            return self._array(DeviceBytes(address, size_bytes))
        return self._array((ctypes.c_ubyte * size_bytes).from_address(address))

    def cancel(self, request: int) -> None:
        self._cancel(request)


def _load() -> tuple[ModuleType, Any, Any]:
    before = dict(os.environ)
    try:
        for key, value in LIBRARY_DEFAULTS.items():
            os.environ.setdefault(key, value)
        os.environ.update(LIBRARY_NEEDS)
        import libucxx as native
        from ucxx._lib import arr, libucxx

        cancel = getattr(native.load_library(), CANCEL_SYMBOL)
        ctypes.CDLL("libucm.so.0").ucm_set_external_event(MEMORY_EVENTS)  # the copy that is loaded
    except ImportError as error:
        raise TransferError(
            FailureKind.TRANSFER, f"ucxx cannot be loaded ({error}); pip install 'pd-serve[ucx]'"
        ) from error
    except (AttributeError, OSError) as error:
        raise TransferError(
            FailureKind.TRANSFER, f"this build of ucxx is not known here ({error}); pip install 'ucxx-cu13==0.52.*'"
        ) from error
    finally:
        for key in os.environ.keys() - before.keys():
            del os.environ[key]
        for key, value in before.items():
            if os.environ.get(key) != value:
                os.environ[key] = value
    cancel.argtypes, cancel.restype = (ctypes.c_void_p,), None
    return libucxx, arr.Array, cancel


def _context_settings(on_device: bool) -> dict[str, str]:
    """Defaults for what the environment does not say."""
    settings = {**CONTEXT_DEFAULTS, **(DEVICE_DEFAULTS if on_device else {})}
    return {key: value for key, value in settings.items() if f"UCX_{key}" not in os.environ}
