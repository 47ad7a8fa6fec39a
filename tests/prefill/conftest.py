"""An outbox over its real socket, on a clock of the test's, and a client that has greeted it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pd_serve.wire import peer as wire
from tests.prefill.client import LEASE_S, Client
from tests.transfer.harness import Clock, PrefillEnd
from tests.transfer.scripted import copy_lanes


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def end(clock: Clock) -> Iterator[PrefillEnd]:
    made = PrefillEnd(lease_s=LEASE_S, clock=clock, lanes=copy_lanes)
    yield made
    made.close()
    assert made.worker.internal_errors == 0


@pytest.fixture
def client(end: PrefillEnd) -> Iterator[Client]:
    made = Client(end)
    assert isinstance(made.greet(), wire.Welcome)
    yield made
    made.close()
