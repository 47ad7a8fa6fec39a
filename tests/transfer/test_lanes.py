"""Which lanes a node starts, and what happens to those that cannot."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from pd_serve.errors import ConfigError, FailureKind, TransferError
from pd_serve.memory.region import PoolMemory
from pd_serve.transfer.choice import lanes_for
from pd_serve.transfer.lanes import LaneFactory, Lanes
from pd_serve.transfer.movers.base import Mover
from pd_serve.transfer.movers.host import HostMover
from tests.transfer.harness import SMALL, Pool
from tests.transfer.scripted import CopyTransport, Script, copy_lanes

MEMORY = Pool(SMALL, 2).memory()


def test_all_that_can_start_do_in_order() -> None:
    lanes = copy_lanes(MEMORY, a=Script(), b=Script())
    assert lanes.names == ()
    lanes.start()
    assert lanes.names == ("a", "b")
    assert lanes.describe() == {"a": b"a", "b": b"b"}
    assert lanes.progress() == float("inf")
    started = list(lanes.transports.values())
    lanes.close()
    lanes.close()
    assert all(t.closed for t in started)  # type: ignore[attr-defined]


def test_those_that_cannot_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lanes = copy_lanes(MEMORY, a=Script(cannot_start="no GPU"), b=Script(cannot_register="no memlock"), c=Script())
    lanes.start()
    assert lanes.names == ("c",)
    assert lanes.why_not == {"a": "no GPU", "b": "no memlock"}
    assert "transport a is left out: no GPU" in caplog.text
    lanes.close()


def test_none_at_all_is_an_error() -> None:
    lanes = copy_lanes(MEMORY, a=Script(cannot_start="no GPU"), b=Script(cannot_register="no memlock"))
    with pytest.raises(TransferError, match=r"a: no GPU; b: no memlock.*pd-serve doctor"):
        lanes.start()


def test_a_required_lane_must_start() -> None:
    with pytest.raises(TransferError, match="no memlock"):
        copy_lanes(MEMORY, required=True, a=Script(cannot_register="no memlock")).start()


def test_a_broken_library_is_left_out() -> None:
    def broken(mover: Mover) -> CopyTransport:
        raise OSError("libsmoke.so: cannot open")

    lanes = Lanes(
        MEMORY,
        {"a": LaneFactory(broken), "b": LaneFactory(lambda mover: CopyTransport("b", mover, Script()))},
        HostMover,
    )
    lanes.start()
    assert lanes.why_not == {"a": "OSError: libsmoke.so: cannot open"}
    lanes.close()


@pytest.mark.parametrize(("first", "names"), [(Script(), ("a",)), (Script(cannot_start="no"), ("b",))])
def test_a_stand_in_starts_only_when_it_is_needed(first: Script, names: tuple[str, ...]) -> None:
    lanes = Lanes(
        MEMORY,
        {
            "a": LaneFactory(lambda mover: CopyTransport("a", mover, first)),
            "b": LaneFactory(lambda mover: CopyTransport("b", mover, Script()), instead_of="a"),
        },
        HostMover,
    )
    lanes.start()
    assert lanes.names == names
    lanes.close()


def test_abandoned_work_is_asked_after_until_it_ends() -> None:
    class Work:
        def __init__(self) -> None:
            self.asked = 0

        def done(self) -> bool:
            self.asked += 1
            if self.asked == 3:
                raise TransferError(FailureKind.TRANSFER, "the device is gone")
            return False

    lanes = copy_lanes(MEMORY)
    lanes.start()
    work = Work()
    lanes.abandon(work)
    while lanes.progress() < 1.0:
        pass
    assert work.asked == 3
    lanes.close()


@pytest.mark.parametrize("stays", [False, True])
def test_memory_that_a_lane_may_still_use_is_not_freed(stays: bool) -> None:
    closed: list[str] = []

    class Mover(HostMover):
        def close(self) -> None:
            closed.append("mover")
            super().close()

    factories = {
        name: LaneFactory(lambda mover, name=name, script=script: CopyTransport(name, mover, script))  # type: ignore[misc]
        for name, script in (("a", Script(never_lets_go=stays)), ("b", Script()))
    }
    lanes = Lanes(MEMORY, factories, Mover)
    lanes.start()
    assert lanes.close() is not stays
    assert closed == ([] if stays else ["mover"])
    assert lanes.close() is not stays


def test_what_the_setting_starts() -> None:
    assert tuple(lanes_for("auto", "n", MEMORY, reads_only=False)._factories) == ("nixl", "ucx")
    assert lanes_for("auto", "n", MEMORY, reads_only=False)._factories["ucx"].instead_of == "nixl"
    assert tuple(lanes_for("ucx", "n", MEMORY, reads_only=False)._factories) == ("ucx",)
    on_gpu: PoolMemory = dataclasses.replace(MEMORY, device=0)
    assert tuple(lanes_for("auto", "n", on_gpu, reads_only=False)._factories) == ("nvlink", "nixl", "ucx")
    with pytest.raises(ConfigError, match="host memory"):
        lanes_for("nvlink", "n", MEMORY, reads_only=False)
    with pytest.raises(ConfigError, match="unknown transport"):
        lanes_for("smoke", "n", MEMORY, reads_only=False)
