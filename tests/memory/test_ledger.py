"""The ledger's arithmetic, by numbers of a GPU that there is not."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace

import pytest

from pd_serve.errors import ConfigError
from pd_serve.memory.cuda_driver import CudaDriver
from pd_serve.memory.gauge import DeviceGauge
from pd_serve.memory.ledger import ACTIVATIONS, GRAPHS, LIBRARIES, SPARE_BYTES, Ledger, MemoryChanged, Reading
from pd_serve.memory.usage import KV_CACHE, WEIGHTS

GIB, MIB = 1 << 30, 1 << 20


class Device:
    """80 GiB, some of it another process's."""

    def __init__(self, *, others: int = 0, tells: bool = True) -> None:
        self.total, self.others, self.own, self.books, self.tells = 80 * GIB, others, 0, 0, tells

    def read(self) -> Reading:
        return Reading(self.total - self.others - self.own, self.total, self.others if self.tells else None)

    def take(self, size: int, *, booked: bool = False) -> None:
        self.own += size
        self.books += size if booked else 0


def started(device: Device) -> Ledger:
    """Up to the point where the KV pool is small and graphs are captured."""
    before = Reading(device.total - device.others, device.total, device.others)
    ledger = Ledger(device.read, books=lambda: device.books, before=before)
    with ledger.phase(LIBRARIES):
        device.take(GIB // 2 - 90 * MIB)
    with ledger.phase(WEIGHTS):
        device.take(15 * GIB, booked=True)
    with ledger.phase(KV_CACHE, booked=True):
        device.take(64 * MIB, booked=True)
        device.take(90 * MIB)  # kernels that it loaded
    with ledger.phase(ACTIVATIONS):
        device.take(2 * GIB, booked=True)
    with ledger.phase(GRAPHS):
        device.take(GIB)
    return ledger


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("others", [0, 3 * GIB])
def test_kv_gets_what_phases_leave(tells: bool, others: int) -> None:
    device = Device(others=others, tells=tells)
    ledger = started(device)
    plan = ledger.plan(0.9)
    assert plan.phases == {LIBRARIES: GIB // 2, WEIGHTS: 15 * GIB, ACTIVATIONS: 2 * GIB, GRAPHS: GIB}
    assert plan.kv_bytes == 72 * GIB - 37 * GIB // 2
    with ledger.phase(KV_CACHE, booked=True):
        device.take(plan.kv_bytes - 64 * MIB, booked=True)
    assert ledger.phases[KV_CACHE] == plan.kv_bytes
    assert device.own == 72 * GIB
    assert ledger.unexplained_bytes() == 0
    device.take(100 * MIB)
    assert ledger.unexplained_bytes() == 100 * MIB


def test_utilisations_with_and_without_graphs() -> None:
    device = Device()
    ledger = started(device)
    plan = ledger.plan(0.9)
    without = 15 * GIB + 2 * GIB + GIB // 2
    assert int(plan.without_graphs * plan.total) - without == pytest.approx(plan.kv_bytes, abs=2)
    assert plan.as_before is not None
    assert ledger.plan(plan.as_before).kv_bytes == pytest.approx(0.9 * plan.total - without, abs=2)
    line = plan.line("cuda:0")
    assert line == (
        "cuda:0: 72.00 of 80.00 GiB (--gpu-memory-utilization 0.9): weights 15.00, activations 2.00, graphs 1.00, "
        "libraries 0.50, KV 53.50 GiB. Were graphs not counted, 0.8875 would give the same KV; 0.9125 has room for "
        "the KV that 0.9 would give then"
    )
    assert "no utilisation has room" in ledger.plan(0.99).line("cuda:0")


def test_graphs_that_were_not_measured_are_not_spoken_of() -> None:
    device = Device()
    ledger = Ledger(device.read)
    with ledger.phase(WEIGHTS):
        device.take(15 * GIB)
    assert ledger.plan(0.5).line("cuda:1") == (
        "cuda:1: 40.00 of 80.00 GiB (--gpu-memory-utilization 0.5): weights 15.00, libraries 0.00, KV 25.00 GiB"
    )


def set_to(error: pytest.ExceptionInfo[ConfigError]) -> float:
    found = re.search(r"set --gpu-memory-utilization ([\d.]+)$", str(error.value))
    assert found, error.value
    return float(found[1])


def test_too_low_a_utilisation_names_the_one_to_set() -> None:
    ledger = started(Device())
    with pytest.raises(ConfigError, match="leaves 0B for KV") as error:
        ledger.plan(0.2, least_bytes=GIB)
    assert set_to(error) == 0.25
    assert ledger.plan(set_to(error), least_bytes=GIB).kv_bytes >= GIB
    with pytest.raises(ConfigError):
        ledger.plan(set_to(error) - 0.01, least_bytes=GIB)


def test_too_high_a_utilisation_names_the_one_to_set() -> None:
    ledger = started(Device(others=10 * GIB))
    with pytest.raises(ConfigError, match="other processes 10GiB") as error:
        ledger.plan(0.98)
    assert set_to(error) == 0.87
    plan = ledger.plan(set_to(error))
    assert plan.room == 70 * GIB - 37 * GIB // 2 - SPARE_BYTES
    with pytest.raises(ConfigError):
        ledger.plan(set_to(error) + 0.01)


def test_where_no_utilisation_helps() -> None:
    device = Device(others=61 * GIB)
    ledger = started(device)
    for utilization in (0.1, 0.5, 0.99):
        with pytest.raises(ConfigError, match="at any --gpu-memory-utilization"):
            ledger.plan(utilization, least_bytes=GIB)
    for utilization in (0.0, 1.01):
        with pytest.raises(ConfigError, match="above 0"):
            ledger.plan(utilization)


@pytest.mark.parametrize(("change", "word"), [(GIB, "took 1GiB"), (-GIB, "returned 1GiB")])
def test_others_that_change_are_noticed_by_process(change: int, word: str) -> None:
    device = Device(others=4 * GIB)
    ledger = started(device)

    def measure() -> None:
        with ledger.phase(GRAPHS):
            device.take(3 * GIB)
            device.others += change

    with pytest.raises(MemoryChanged, match=f"{word} .* by the time 'graphs' was measured"):
        measure()


def test_others_that_change_are_noticed_by_books() -> None:
    """Where processes are not told apart: memory that went away though ours grew, and that came while nothing ran."""
    device = Device(others=4 * GIB, tells=False)
    ledger = started(device)

    def measure() -> None:
        with ledger.phase(ACTIVATIONS):
            device.take(2 * GIB, booked=True)
            device.others -= GIB

    with pytest.raises(MemoryChanged, match="returned 1GiB"):
        measure()

    device = Device(tells=False)
    ledger = started(device)
    device.others += GIB
    with pytest.raises(MemoryChanged, match="took 1GiB"), ledger.phase(GRAPHS):
        pytest.fail("the body must not run")


def test_small_changes_are_not_ours() -> None:
    device = Device()
    ledger = started(device)
    with ledger.phase(GRAPHS):
        device.take(GIB)
        device.others += 100 * MIB
    assert ledger.phases[GRAPHS] == 2 * GIB
    device.take(10 * MIB)  # between phases
    with ledger.phase(WEIGHTS):
        device.own -= GIB
    assert ledger.phases[WEIGHTS] == 14 * GIB
    assert ledger.phases[LIBRARIES] == GIB // 2 + 10 * MIB
    assert ledger.unexplained_bytes() == 0
    device.others += 100 * MIB  # in all more than is let pass
    with pytest.raises(MemoryChanged, match="took 200MiB"), ledger.phase(GRAPHS):
        pytest.fail("the body must not run")


def test_what_was_used_before_counts_as_ours_where_nobody_tells() -> None:
    device = Device(others=4 * GIB, tells=False)
    ledger = Ledger(device.read)
    assert ledger.plan(0.5).kv_bytes == 36 * GIB


# readings


class Nvml:
    """As much of pynvml as a gauge asks."""

    class NVMLError(Exception):
        pass

    def __init__(self, pid: int, size: int | None, *, broken: bool = False) -> None:
        self._processes = [SimpleNamespace(pid=pid, usedGpuMemory=size), SimpleNamespace(pid=1, usedGpuMemory=GIB)]
        self.broken = broken
        self.uuid = ""

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.uuid = uuid
        return uuid

    def nvmlDeviceGetMemoryInfo(self, _handle: str) -> SimpleNamespace:
        return SimpleNamespace(free=70 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, _handle: str) -> list[SimpleNamespace]:
        return self._processes


class Driver(CudaDriver):
    def __init__(self) -> None: ...

    def device_facts(self, device: int) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(uuid="00112233445566778899aabbccddeeff", total_bytes=80 * GIB)

    def synchronize(self, device: int) -> None: ...

    def memory_info(self, device: int) -> tuple[int, int]:
        return 60 * GIB, 80 * GIB


def test_a_gauge_tells_processes_apart_where_it_sees_itself() -> None:
    nvml = Nvml(os.getpid(), 12 * GIB)
    gauge = DeviceGauge(Driver(), 0, nvml)
    assert nvml.uuid == "GPU-00112233-4455-6677-8899-aabbccddeeff"
    assert gauge.before_context() == Reading(70 * GIB, 80 * GIB, 10 * GIB)
    assert gauge.read() == Reading(60 * GIB, 80 * GIB, 8 * GIB)
    gauge.close()
    assert gauge.read().others is None
    for hidden in (Nvml(0, 12 * GIB), Nvml(os.getpid(), None), Nvml(os.getpid(), 1, broken=True)):
        assert DeviceGauge(Driver(), 0, hidden).read().others is None
    assert DeviceGauge(Driver(), 0, Nvml(0, 0, broken=True)).before_context() is None
