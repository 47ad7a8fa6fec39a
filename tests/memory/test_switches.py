"""Which memory is used, and what is refused at start."""

from __future__ import annotations

import logging

import pytest

from pd_serve import config
from pd_serve.errors import ConfigError
from pd_serve.memory import pinned, switches
from pd_serve.memory.cuda_driver import DeviceFacts
from pd_serve.memory.switches import Decision, check_expandable_segments, resolve


def available() -> str:
    return ""


def unavailable() -> str:
    return "the driver sees no GPU"


@pytest.mark.parametrize(
    ("cumem", "sleep", "on_gpu", "decision"),
    [
        (None, False, True, Decision(True, False)),
        (True, False, True, Decision(True, False)),
        (False, False, True, Decision(False, False)),
        (None, True, True, Decision(True, True)),
        (True, True, True, Decision(True, True)),
        (None, False, False, Decision(False, False)),
        (None, True, False, Decision(False, True)),
        (False, False, False, Decision(False, False)),
        (False, True, False, Decision(False, True)),
    ],
)
def test_decisions(cumem: bool | None, sleep: bool, on_gpu: bool, decision: Decision) -> None:
    assert resolve(cumem, sleep, on_gpu=on_gpu, why_not=available) == decision


@pytest.mark.parametrize(
    ("cumem", "sleep", "on_gpu", "why_not", "words"),
    [
        (True, False, False, available, "compute on the CPU here.*leave the flag out"),
        (True, True, False, available, "compute on the CPU here.*sleep mode works without it"),
        (True, False, True, unavailable, "--enable-cumem-allocator: the driver sees no GPU"),
        (None, True, True, unavailable, "--enable-sleep-mode needs the cumem allocator: the driver sees no GPU"),
        (False, True, True, available, "--no-enable-cumem-allocator forbids it"),
    ],
)
def test_refusals(cumem: bool | None, sleep: bool, on_gpu: bool, why_not: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(cumem, sleep, on_gpu=on_gpu, why_not=why_not)  # type: ignore[arg-type]


def test_a_gpu_without_it_starts_all_the_same_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve(None, False, on_gpu=True, why_not=unavailable) == Decision(False, False)
    assert "the driver sees no GPU" in caplog.text


def test_sleep_mode_says_once_that_it_switches_cumem_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    resolve(None, True, on_gpu=True, why_not=available)
    assert caplog.text.count("sleep mode switches the cumem allocator on") == 1
    caplog.clear()
    resolve(True, True, on_gpu=True, why_not=available)
    resolve(None, True, on_gpu=False, why_not=available)
    assert caplog.text == ""


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize("text", ["expandable_segments:True", "max_split_size_mb:64, expandable_segments : 1"])
def test_expandable_segments_without_cumem_are_refused(variable: str, text: str) -> None:
    environ = {variable: text}
    with pytest.raises(ConfigError, match=f"{variable}=.*--enable-cumem-allocator.*expandable_segments:False"):
        check_expandable_segments(on_gpu=True, cumem=False, environ=environ)
    check_expandable_segments(on_gpu=True, cumem=True, environ=environ)
    check_expandable_segments(on_gpu=False, cumem=False, environ=environ)
    check_expandable_segments(on_gpu=True, cumem=False, environ={variable: "expandable_segments:False"})


def test_sleep_and_cumem_are_available_apart_from_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switches, "cumem_unavailable_because", lambda _device=0: "no driver")
    assert not switches.is_cumem_allocator_available()
    assert switches.is_sleep_available(on_gpu=False)
    assert not switches.is_sleep_available(on_gpu=True)
    monkeypatch.setattr(switches, "cumem_unavailable_because", lambda _device=0: "")
    assert switches.is_cumem_allocator_available()
    assert switches.is_sleep_available(on_gpu=True)


def facts(**changes: object) -> DeviceFacts:
    values: dict[str, object] = {
        "ordinal": 0,
        "name": "GPU",
        "uuid": "0" * 32,
        "pci_bus_id": "0000:00:00.0",
        "total_bytes": 1 << 30,
        "compute_capability": (9, 0),
        "virtual_memory": True,
        "posix_fd_handles": True,
        "fabric_handles": True,
        "rdma_with_virtual_memory": True,
        "dma_buf": True,
        "integrated": False,
        "host_page_tables": False,
    }
    return DeviceFacts(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "device", "found", "expected"),
    [
        (True, 0, facts(), True),
        (False, 0, facts(), False),
        (True, None, facts(), False),
        (True, 0, None, False),
        (True, 0, facts(host_page_tables=True), False),  # GH200
        (True, 0, facts(integrated=True), False),
    ],
)
def test_pinning(
    monkeypatch: pytest.MonkeyPatch, setting: bool, device: int | None, found: DeviceFacts | None, expected: bool
) -> None:
    monkeypatch.setattr(pinned, "_facts", lambda _device: found)
    assert pinned.should_pin_memory(setting, device) is expected


def test_the_setting_knows_whether_it_was_given() -> None:
    def load(**flags: object) -> config.NodeConfig:
        return config.load("decode", flags, environ={})

    assert load().enable_cumem_allocator is None
    assert load(enable_cumem_allocator=False).enable_cumem_allocator is False
    assert config.load("decode", {}, environ={"PD_SERVE_ENABLE_CUMEM_ALLOCATOR": "1"}).enable_cumem_allocator is True
    assert "enable_cumem_allocator" not in config.to_json("decode", load())  # so that who reads it knows, too
    assert (load().enable_sleep_mode, load().pin_memory) == (False, True)
