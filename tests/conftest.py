"""What all tests share: the real models, converted once into the cache that users have too; and who runs which file.

A file of tests is one worker's (``pytest -n 4``): its fixtures are made once. Four workers fill two cores: much of a
test is waiting. Workers are forks of the nursery that nodes and engines of tests are forks of, too.
"""

from __future__ import annotations

import gc
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from pd_serve.models.source import resolve
from tests.certificates import make_certificate
from tests.nursery import open_nursery

collect_ignore = ["clients"]  # of another environment: see clients/run.sh
REAL_MODELS = {"smollm2", "gemma3"}
# What takes longest begins first, so that workers end together: names of files, or what a name begins with.
# Files in one entry share a system, and therefore a worker: those of the first entry the fixture ``smol``.
FIRST = (
    tuple(f"e2e/test_{name}." for name in ("parity", "openai", "replies", "fields", "limits", "grafana")),
    ("e2e/test_parity_gemma",),
    ("e2e/test_chaos",),
    ("e2e/test_failures",),
    ("deploy/test_slurm",),
    ("e2e/",),
    ("doctor/test_doctor",),
    ("bench/test_transfer",),
    ("node/test_node",),
    ("transfer/test_nixl.",),
    ("decode/test_kills",),
    ("transfer/test_ucx_processes",),
    ("models/test_gguf.", "models/test_gguf_"),
)

# Whoever started us behind a shell's & or nohup ignores Ctrl-C, and so would every process that a test sends it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers whose torch computes with all cores would wait for each other, turning. Engines have their own setting.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Workers are forks of the nursery."""
    if workers := getattr(config.option, "tx", None):
        open_nursery()
        python = f"{shlex.quote(sys.executable)} -S -E {shlex.quote(str(Path(__file__).with_name('worker.py')))}"
        config.option.tx = [f"{worker}//python={python}" for worker in workers]


def _place(name: str) -> int:
    """Of a test's file in :data:`FIRST`."""
    path = name.split("::")[0].removeprefix("tests/")
    return next((place for place, names in enumerate(FIRST) if path.startswith(names)), len(FIRST))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a real model is slow: it may have to be downloaded and converted first."""
    for item in items:
        if REAL_MODELS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        if "smol" in getattr(item, "fixturenames", ()) and _place(item.nodeid) != 0:
            raise pytest.UsageError(f"{item.nodeid} asks for smol: name its file in FIRST, or it starts another one")
    items.sort(key=lambda item: _place(item.nodeid))


def pytest_collection_finish() -> None:
    """Half a million objects of imported modules: a full garbage collection took 0.2 s, and some tests make many."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, place = nodeid.split("::")[0], _place(nodeid)
            return str(FIRST[place]) if place < len(FIRST) and len(FIRST[place]) > 1 else file

    config.option.loadscopereorder = False  # in the order above
    return ByFile(config, log)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in float32, in HuggingFace form."""
    return Path(resolve("smollm2-135m", "float32", "auto").directory)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M (a base model with sliding windows) in float32, in HuggingFace form."""
    return Path(resolve("gemma3-270m", "float32", "auto").directory)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Files of a certificate for 127.0.0.1, signed by itself, and of its key."""
    return make_certificate(tmp_path_factory.mktemp("tls"))
