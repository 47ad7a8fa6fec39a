"""Ranks in processes of their own, for the tests of this folder."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from pd_serve.distributed.group import Group

Scenario = Callable[[Group], object]


def _rank(wire: Connection, directory: Path, rank: int, size: int, device: str, scenario: Scenario) -> None:
    try:
        where = torch.device("cuda", rank) if device == "cuda" else torch.device(device)
        group = Group(directory, rank, size, where, timeout_s=60)
        said = scenario(group)
        group.close()
        wire.send(said)
        os._exit(0)  # where a rank was lost its kernels spin, and the interpreter's end would wait for them
    except BaseException:
        wire.send(traceback.format_exc())
        os._exit(1)


def run(scenario: Scenario, device: str, size: int = 2, timeout_s: float = 90) -> list[object]:
    """What each rank's ``scenario`` returned, a traceback where it raised, None where it ended without a word."""
    spawn = multiprocessing.get_context("spawn")
    answers: list[object] = []
    with tempfile.TemporaryDirectory(prefix="pd-ranks-") as directory:
        wires, processes = [], []
        for rank in range(size):
            mine, theirs = spawn.Pipe()
            process = spawn.Process(target=_rank, args=(theirs, Path(directory), rank, size, device, scenario))
            process.start()
            theirs.close()
            wires.append(mine)
            processes.append(process)
        for wire, process in zip(wires, processes, strict=True):
            try:
                assert wire.poll(timeout_s), "a rank does not answer"
                answers.append(wire.recv())
            except EOFError:
                answers.append(None)
            finally:
                process.join(10)
                process.kill()
    return answers
