"""What engines compute on: a GPU that can be used; the cores where there is none; never one in place of the other."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from pd_serve.errors import ConfigError
from pd_serve.memory.choice import Choice, Libraries, choose, has_gpu, torch_versions, what_there_is
from pd_serve.memory.cuda_driver import NO_BINDINGS, NO_LIBRARY, DeviceFacts
from pd_serve.memory.driver import DriverError

GOOD = Libraries(("2.11.0", "13.0"), "3.6.0", "0.6.12")


class Driver:
    """Of one GPU, unless ``count`` says otherwise."""

    def __init__(self, capability: tuple[int, int] = (9, 0), cuda: str = "13.0", count: int = 1) -> None:
        self._capability, self._cuda, self._count = capability, cuda, count

    def __call__(self) -> Any:
        return self

    def device_count(self) -> int:
        return self._count

    def version(self) -> str:
        return self._cuda

    def device_facts(self, device: int) -> DeviceFacts:
        bits = (True, True, True, True, True, False, False)
        return DeviceFacts(device, "NVIDIA H100", "ab", "0000:04:00.0", 80 << 30, self._capability, *bits)


def broken(code: str) -> Any:
    def make() -> Any:
        raise DriverError("cuInit", code)

    return make


def found(root: Path, driver: Any = None, libraries: Libraries = GOOD, environ: dict[str, str] | None = None) -> Choice:
    return what_there_is(root, environ or {}, driver or Driver(), lambda: libraries)


def with_driver(root: Path) -> Path:
    (root / "dev").mkdir()
    (root / "dev/nvidiactl").touch()
    return root


def with_card(root: Path, vendor: str = "0x10de", kind: str = "0x030200") -> Path:
    device = root / "sys/bus/pci/devices/0000:04:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    return root


def test_a_gpu_that_can_be_used_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    chosen = choose("auto", lambda: found(with_driver(tmp_path)))
    assert chosen.device == "cuda"
    chosen.log()
    (line,) = caplog.messages
    assert line == "engines compute on GPUs: NVIDIA H100"


@pytest.mark.parametrize("code", [NO_LIBRARY, NO_BINDINGS, "CUDA_ERROR_NO_DEVICE"])
def test_the_cores_where_there_is_no_gpu(tmp_path: Path, caplog: pytest.LogCaptureFixture, code: str) -> None:
    caplog.set_level(logging.INFO)
    chosen = choose("auto", lambda: found(tmp_path, broken(code)))
    assert chosen.device == "cpu"
    chosen.log()
    (line,) = caplog.messages
    assert line == "engines compute on the machine's cores: there is no NVIDIA GPU"


@pytest.mark.parametrize(
    ("driver", "libraries", "said"),
    [
        (broken(NO_LIBRARY), GOOD, "the NVIDIA driver is not installed, or not visible in this container"),
        (broken(NO_BINDINGS), GOOD, r"cuda-bindings is not installed: pip install 'pd-serve\[cuda\]'"),
        (broken("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"), GOOD, "differ in version"),
        (Driver(count=0), GOOD, "sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (Driver((7, 5)), GOOD, r"compute capability 7.5, but 8.0 \(Ampere\) is the least"),
        (Driver(), Libraries(None, None, None), "torch is not installed"),
        (Driver(), Libraries(("2.13.0", ""), "3.6.0", "0.6.12"), "torch 2.13.0 is built for CPUs"),
        (Driver(cuda="12.4"), GOOD, "torch was built for CUDA 13.0, and the driver supports 12.4: update the driver"),
        (Driver(), Libraries(GOOD.torch, "3.6.0", None), r"FlashInfer is not installed: pip install 'pd-serve\["),
        (Driver(), Libraries(GOOD.torch, None, None), "triton and FlashInfer are not installed"),
        (Driver(), Libraries(GOOD.torch, None, "0.6.12"), "triton is not installed"),
        (Driver(), Libraries(GOOD.torch, "3.6.0", "0.7.1"), "FlashInfer 0.7.1 is not supported: pip install"),
        (Driver(), Libraries(GOOD.torch, "3.6.0", "0.6.9"), "FlashInfer 0.6.9 is not supported: pip install"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_an_error_with_its_remedy(
    tmp_path: Path, driver: Any, libraries: Libraries, said: str
) -> None:
    root = with_card(tmp_path)
    with pytest.raises(ConfigError, match=f"NVIDIA GPU that cannot be used: .*{said}.*--device cpu"):
        choose("auto", lambda: found(root, driver, libraries))
    with pytest.raises(ConfigError, match=f"^--device cuda: .*{said}"):
        choose("cuda", lambda: found(root, driver, libraries))
    assert choose("cpu", lambda: found(root, driver, libraries)) == Choice("cpu", "")


def test_what_was_asked_for_and_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--device cuda: there is no NVIDIA GPU"):
        choose("cuda", lambda: found(tmp_path, broken(NO_LIBRARY)))


@pytest.mark.parametrize(
    ("variable", "value"),
    [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("NVIDIA_VISIBLE_DEVICES", "void")],
)
def test_who_hides_gpus_does_not_want_them(tmp_path: Path, variable: str, value: str) -> None:
    assert choose("auto", lambda: found(with_driver(tmp_path), environ={variable: value})).device == "cpu"
    with pytest.raises(ConfigError, match=f"--device cuda: {variable}={value} hides all GPUs"):
        choose("cuda", lambda: found(tmp_path, environ={variable: value}))


def test_a_card_without_a_driver_is_seen(tmp_path: Path) -> None:
    assert not has_gpu(tmp_path)
    assert has_gpu(with_card(tmp_path))


@pytest.mark.parametrize(("vendor", "kind"), [("0x1002", "0x030000"), ("0x10de", "0x068000")])
def test_other_devices_are_no_gpus(tmp_path: Path, vendor: str, kind: str) -> None:
    """Another maker's card, and NVIDIA's switches."""
    assert not has_gpu(with_card(tmp_path, vendor, kind))


def test_versions_are_those_that_are_imported() -> None:
    assert torch_versions() == (torch.__version__, torch.version.cuda or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_gpu() -> None:
    assert what_there_is() == Choice("cuda", torch.cuda.get_device_name(0))
