"""What a prefill server's answer gives to the decode server, kept from the one request to the other.

One for each attempt on a pair, found by the attempt's id. The prefill part hands, the decode part is called with what
was handed, at once or when it comes. Where nobody takes it (the decode server has refused, or the client left), whoever
opened the handover is told, because the prefill server keeps KV for it until somebody has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Handed:
    """``params``: the prefill server's ``kv_transfer_params``, as it wrote them; empty: it has kept nothing.

    ``first``: the first token, where decoding goes on after it. ``num_cached``: prompt tokens that it had before.
    """

    params: bytes = b""
    first: tuple[int, ...] = ()
    num_cached: int = 0


Taker = Callable[[Handed], None]


class Handover:
    """Joined by each part once, and left once."""

    def __init__(self, forget: Callable[[], None]) -> None:
        self._forget = forget
        self._parts = 0
        self._handed: Handed | None = None
        self._taker: Taker | None = None
        self._stranded: Taker | None = None
        self._taken = False

    def join(self, stranded: Taker | None = None) -> None:
        """``stranded`` is called with what nobody has taken when the last part has left."""
        self._parts += 1
        self._stranded = stranded or self._stranded

    def hand(self, handed: Handed) -> None:
        self._handed = handed
        if self._taker is not None:
            self._taker(handed)

    def wait(self, taker: Taker) -> None:
        self._taker = taker
        if self._handed is not None:
            taker(self._handed)

    def taken(self, taken: bool = True) -> None:
        """The decode server has it; with False it has refused it."""
        self._taken = taken

    def leave(self) -> None:
        self._parts -= 1
        if self._parts:
            return
        self._forget()
        if self._handed is not None and self._handed.params and not self._taken and self._stranded is not None:
            self._stranded(self._handed)


class Handovers:
    def __init__(self) -> None:
        self._open: dict[str, Handover] = {}

    def __len__(self) -> int:
        return len(self._open)

    def of(self, key: str) -> Handover:
        found = self._open.get(key)
        if found is None:
            found = self._open[key] = Handover(functools.partial(self._forget, key))
        return found

    def _forget(self, key: str) -> None:
        self._open.pop(key, None)
