"""NIXL between two GPUs (or two processes on one), directly and packed: the benchmark, small. It checks every byte."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch


@pytest.mark.gpu
def test_what_arrives_is_what_was_there() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    devices = "0,1" if torch.cuda.device_count() > 1 else "0,0"
    command = [sys.executable, "-m", "benchmarks.nixl_pack", "--device", "cuda", "--devices", devices]
    options = ["--size", str(32 << 20), "--blocks", "32768,2097152"]
    run = subprocess.run([*command, *options], capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "packed" in run.stdout
