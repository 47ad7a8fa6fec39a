"""``python -m tests.precompile``: the tests, compiled once, on all cores.

As pytest does it, with its assertions: else each of its workers does that for itself, ten seconds of a processor each.
pytest does not offer that, so where a version has other names for it nothing is done, and nothing is wrong. What nodes,
engines and workers import is imported by one process, the nursery, and so compiled once anyway.
"""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from _pytest.assertion import rewrite


def compile_as_pytest(path: Path) -> None:
    compiled = rewrite.get_cache_dir(path) / (path.stem + rewrite.PYC_TAIL)
    with contextlib.suppress(OSError, SyntaxError):  # pytest will say so
        if compiled.exists() and compiled.stat().st_mtime > path.stat().st_mtime:
            return
        compiled.parent.mkdir(parents=True, exist_ok=True)
        stat, code = rewrite._rewrite_test(path, None)  # type: ignore[arg-type]  # only read for a hook of plugins
        rewrite._write_pyc(None, code, stat, compiled)  # type: ignore[arg-type]


def main() -> None:
    tests = [path for path in Path(__file__).parent.rglob("*.py") if path.name.startswith(("test_", "conftest"))]
    with ProcessPoolExecutor(os.cpu_count()) as pool, contextlib.suppress(AttributeError, TypeError):
        list(pool.map(compile_as_pytest, sorted(tests), chunksize=8))


if __name__ == "__main__":
    main()
