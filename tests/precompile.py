"""``python -m tests.precompile``: what the tests' processes import, compiled once, on all cores.

Tests are compiled as pytest does it, with its assertions: else each of its workers does that for itself, ten seconds of
a processor each. pytest does not offer that, so where a version has other names for it nothing is done, and nothing is
wrong. Of packages, what a node or an engine imports: to import it is to compile it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from _pytest.assertion import rewrite

from tests.nursery import PRELOADED


def compile_as_pytest(path: Path) -> None:
    folder = rewrite.get_cache_dir(path)
    with contextlib.suppress(OSError, SyntaxError):  # pytest will say so
        folder.mkdir(parents=True, exist_ok=True)
        stat, code = rewrite._rewrite_test(path, None)  # type: ignore[arg-type]  # only read for a hook of plugins
        rewrite._write_pyc(None, code, stat, folder / (path.stem + rewrite.PYC_TAIL))  # type: ignore[arg-type]


def main() -> None:
    tests = [path for path in Path(__file__).parent.rglob("*.py") if path.name.startswith(("test_", "conftest"))]
    with ProcessPoolExecutor(os.cpu_count()) as pool, contextlib.suppress(AttributeError, TypeError):
        compiled = pool.map(compile_as_pytest, sorted(tests), chunksize=8)
        for name in PRELOADED:
            importlib.import_module(name)
        list(compiled)


if __name__ == "__main__":
    main()
