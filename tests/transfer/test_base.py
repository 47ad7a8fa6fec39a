"""How something ends: once."""

from __future__ import annotations

import pytest

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.base import Outcome, PullState


def test_the_first_failure_counts() -> None:
    outcome, other = Outcome(), Outcome()
    first = TransferError(FailureKind.PEER_LOST, "gone")
    outcome.fail(first)
    outcome.fail(TransferError(FailureKind.CANCELLED, "given up"))
    assert outcome.state is PullState.FAILED
    assert outcome.error() is first
    assert other.state is PullState.RUNNING


def test_what_is_done_does_not_fail() -> None:
    outcome = Outcome()
    outcome.state = PullState.DONE
    outcome.fail(TransferError(FailureKind.CANCELLED, "given up"))
    assert outcome.state is PullState.DONE
    with pytest.raises(AssertionError):
        outcome.error()
