"""A pull: what is read directly and what travels packed, as one. See :class:`pd_serve.transfer.base.Pull`."""

from __future__ import annotations

from pd_serve.errors import TransferError
from pd_serve.transfer.base import PullState
from pd_serve.transfer.nixl.chunks import PackedPull
from pd_serve.transfer.nixl.reads import Read
from pd_serve.transfer.nixl.unpacker import Unpacker


class NixlPull:
    """Either part may be missing. It has failed as soon as one of them has."""

    work = None

    def __init__(
        self,
        size_bytes: int,
        num_descriptors: int,
        read: Read | None,
        packed: PackedPull | None,
        unpacker: Unpacker,
    ) -> None:
        self.size_bytes = size_bytes
        self.num_descriptors = num_descriptors
        self._read = read
        self._packed = packed
        self._unpacker = unpacker
        self._state = PullState.RUNNING
        self._error: TransferError | None = None

    def poll(self) -> PullState:
        if self._state is PullState.RUNNING:
            self._state = self._look()
        return self._state

    def _look(self) -> PullState:
        read, packed = self._read, self._packed  # what is packed moves on with its transport
        if read is not None and read.poll() is PullState.FAILED:
            self._error = read.error()
            return PullState.FAILED
        if packed is not None and packed.state is PullState.FAILED:
            self._error = packed.failure
            return PullState.FAILED
        done = (read is None or read.poll() is PullState.DONE) and (packed is None or packed.state is PullState.DONE)
        return PullState.DONE if done else PullState.RUNNING

    def error(self) -> TransferError:
        assert self._error is not None, "only after FAILED"
        return self._error

    def close(self) -> bool:
        packed_ended = True
        if self._packed is not None:
            self._unpacker.advance()
            packed_ended = self._unpacker.end(self._packed)
            self._unpacker.flush()
        read_ended = self._read is None or self._read.close()
        return packed_ended and read_ended
