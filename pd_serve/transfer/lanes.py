"""The lanes of a node: the transports that it could start, each registered with the pool, and what moves bytes for
them.

Made by :mod:`pd_serve.transfer.choice` (and by benchmarks), owned by the transfer thread: everything but the
constructor runs there. Which lane a *pair* of nodes uses is settled by their self-test
(:mod:`pd_serve.transfer.session.probe`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pd_serve.errors import FailureKind, TransferError
from pd_serve.memory.region import PoolMemory
from pd_serve.transfer.base import Transport
from pd_serve.transfer.movers.base import Mover, Work

log = logging.getLogger(__name__)

ABANDONED_LOOK_S = 0.02


@dataclass(frozen=True)
class LaneFactory:
    """How to start a lane. ``instead_of``: only where the lane of that name could not be started."""

    make: Callable[[Mover], Transport]
    instead_of: str = ""


class Lanes:
    """``factories``, preferred first. ``required``: a lane that cannot start is an error, not left out."""

    def __init__(
        self,
        memory: PoolMemory,
        factories: Mapping[str, LaneFactory],
        make_mover: Callable[[], Mover],
        *,
        required: bool = False,
    ) -> None:
        self.memory = memory
        self._factories = dict(factories)
        self._make_mover = make_mover
        self._required = required
        self.transports: dict[str, Transport] = {}  # started, preferred first
        self.why_not: dict[str, str] = {}  # lanes that were left out
        self._mover: Mover | None = None
        self._abandoned: list[Work] = []
        self._let_go = True

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.transports)

    @property
    def mover(self) -> Mover:
        """After ``start``."""
        assert self._mover is not None, "lanes were not started"
        return self._mover

    def start(self) -> None:
        """Starts and registers. Raises TransferError where none (or, if required, not every one) can be used."""
        self._mover = self._make_mover()
        try:
            for name, factory in self._factories.items():
                if factory.instead_of not in self.transports:
                    self._start(name, factory)
        except BaseException:
            self.close()
            raise
        if not self.transports:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.why_not.items())
            self.close()
            raise TransferError(FailureKind.TRANSFER, f"no transport can be used here ({reasons}); see pd-serve doctor")
        for name, why in self.why_not.items():
            log.info("transport %s is left out: %s", name, why)

    def _start(self, name: str, factory: LaneFactory) -> None:
        transport: Transport | None = None
        try:
            transport = factory.make(self.mover)
            transport.register(self.memory)
        except Exception as error:
            if transport is not None:
                transport.close()
            if self._required:
                raise
            # a broken library of one lane must not keep the others from working
            self.why_not[name] = str(error) if isinstance(error, TransferError) else f"{type(error).__name__}: {error}"
        else:
            self.transports[name] = transport

    def describe(self) -> dict[str, bytes]:
        """What the handshake tells a peer, by name, preferred first."""
        return {name: transport.describe() for name, transport in self.transports.items()}

    def abandon(self, work: Work) -> None:
        """Nobody waits for this work of the mover any more; it ends by itself, and what it used is freed then."""
        self._abandoned.append(work)

    def progress(self) -> float:
        """Lets each lane do what is due; returns in how many seconds one wants to be called again."""
        if self._abandoned:
            self._abandoned = [work for work in self._abandoned if not _ended(work)]
        due_s = min((transport.progress() for transport in self.transports.values()), default=math.inf)
        return min(due_s, ABANDONED_LOOK_S) if self._abandoned else due_s

    def close(self) -> bool:
        """Stops all lanes, then the mover. False: a lane may still use this node's memory, its staging included, which
        then stays as it is until the process ends. Idempotent.
        """
        while self.transports:
            name, transport = self.transports.popitem()
            try:
                self._let_go &= transport.close()
            except Exception:
                log.exception("transport %s does not close", name)
                self._let_go = False
        if self._mover is not None and self._let_go:
            self._mover.close()
            self._mover = None
        return self._let_go


def _ended(work: Work) -> bool:
    try:
        return work.done()
    except TransferError:
        return True
