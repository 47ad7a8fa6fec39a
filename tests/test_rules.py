"""The rules of docs/architecture.md that a program can check: who may import whom, and how long a function may be.

Imports are read from the source, so that one which only runs later counts too. Where a rule has to give way, the place
is named here with its reason (imports) or says why itself (functions, ``# long: ...``).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import pd_serve

_PACKAGE = Path(pd_serve.__file__).parent
_MAX_LINES = 60

# Which rooms a room may import; all may import the files beside them ("ground"), which import no room.
_ROOMS = {
    "api": {"wire"},
    "bench": {"kv", "memory", "transfer", "transfer.nixl"},
    "compute": {"kv", "memory", "wire"},
    "compute.cpu": {"compute", "distributed", "kv", "memory", "models", "wire"},
    "compute.cuda": {"compute", "distributed", "kv", "memory", "models", "wire"},
    "decode": {"engine", "kv", "transfer", "wire"},
    "distributed": set(),
    "doctor": {"bench", "memory", "transfer", "transfer.nixl"},
    "engine": {"compute", "grammar", "kv", "memory", "models", "wire"},
    "grammar": {"wire"},
    "integrations": {"decode", "kv", "memory", "models", "prefill", "transfer", "wire"},
    "ground": set(),
    "kv": {"wire"},
    "memory": {"kv", "wire"},
    "models": {"kv", "wire"},
    "node": {"grammar", "wire"},
    "prefill": {"engine", "kv", "transfer", "wire"},
    "router": {"api", "grammar", "wire"},
    "transfer": {"kv", "memory", "wire"},
    "transfer.nixl": {"memory", "transfer", "transfer.packing"},
    "transfer.packing": {"transfer"},
    "transfer.ucx": {"memory", "transfer", "transfer.packing"},
    "wire": set(),
}
# Modules that reach further, and what they may import beyond their room's.
_FURTHER = {
    "cli": {"bench", "doctor", "node", "router"},  # the commands
    "config": {"api.chat_template"},  # a template that a user gives is checked where settings are read
    "engine.__main__": {"decode", "prefill", "transfer"},  # gives it its abilities
    "compute.backend": {"compute.cpu", "compute.cuda", "distributed", "models"},  # chooses a device
    "engine.boot": {"transfer"},  # puts an engine together
    "engine.ends": {"decode", "prefill", "transfer"},  # a rank's transfer end
    "engine.ranks": {"distributed", "transfer.relay"},  # starts the other ranks, and gives its role their ends
    "engine.worker": {"transfer.relay"},  # another rank
    "integrations.vllm.connector": {"engine.ends"},  # a rank's transfer end
    # how engines start
    "node.main": {"memory.choice", "memory.switches", "memory.visible", "models.source", "transfer.session.tls"},
    "transfer.choice": {"transfer.nixl", "transfer.ucx"},  # chooses lanes
    "up": {"memory.choice", "memory.visible", "models.sizes", "models.source", "wire.model"},  # the same for a machine
    "wire.peer": {"kv.layout", "memory.region"},  # plain data: what peers tell each other
}


def _name(path: Path) -> str:
    """Without ``pd_serve.``; the package itself is empty."""
    parts = path.relative_to(_PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache  # and not while tests are collected, which every worker does
def _trees() -> dict[str, ast.Module]:
    return {_name(path): ast.parse(path.read_text()) for path in sorted(_PACKAGE.rglob("*.py"))}


def _statements(nodes: Iterable[ast.AST], *, lazy: bool) -> Iterator[ast.AST]:
    """All that run when a module is imported; with ``lazy`` also those of its functions. Neither those for types nor
    those of a script."""
    for node in nodes:
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            yield from _statements(node.orelse, lazy=lazy)
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                yield from _statements(getattr(node, field, ()), lazy=lazy)


def _imports(module: str, *, lazy: bool) -> set[str]:
    """The modules of the package that it imports."""
    found = set()
    for node in _statements(_trees()[module].body, lazy=lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name.removeprefix("pd_serve.") in _trees() else str(node.module) for name in names}
    return {name.removeprefix("pd_serve.") for name in found if name.startswith("pd_serve.")}


def _room(module: str) -> str:
    """The longest name in the table that it lies in."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in _ROOMS), "ground")


def _reaches() -> Iterator[tuple[str, str]]:
    """Imports that the table of rooms does not allow."""
    for module in _trees():
        own = _room(module)
        for other in _imports(module, lazy=True):
            if _room(other) not in {own, "ground", *_ROOMS[own]}:
                yield module, other


def _within(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def test_imports_point_one_way() -> None:
    wrong = [
        f"{module} imports {other}" for module, other in _reaches() if not _within(other, _FURTHER.get(module, ()))
    ]
    assert not wrong, f"not allowed by the table of rooms: {wrong}"


def test_whoever_reaches_further_still_needs_to() -> None:
    needed = list(_reaches())
    for module, names in _FURTHER.items():
        for name in names:
            assert any(own == module and _within(other, [name]) for own, other in needed), f"{module}: {name}"


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in _PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == {room.split(".")[0] for room in _ROOMS} - {"ground"}


@pytest.mark.parametrize("of", ["rooms", "modules"])
def test_neither_rooms_nor_modules_import_in_a_circle(of: str) -> None:
    graph = _ROOMS if of == "rooms" else {module: _imports(module, lazy=False) for module in _trees()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_processes_without_an_engine_import_no_torch() -> None:
    rooms = {"api", "ground", "node", "router", "wire"}
    modules = [f"pd_serve.{module}" for module in _trees() if _room(module) in rooms and module not in ("", "jit")]
    code = f"""import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    if heavy := {{"numba", "torch", "transformers"}} & set(sys.modules):
        sys.exit(f"{{module}} imports {{heavy}}")
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr


def test_functions_are_short_or_say_why_not() -> None:
    wrong = []
    for path in sorted(_PACKAGE.rglob("*.py")):
        lines = path.read_text().splitlines()
        for node in ast.walk(_trees()[_name(path)]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or 0) - node.lineno + 1
                said = any("# long: " in line for line in lines[node.lineno : node.end_lineno])
                if (count > _MAX_LINES) != said:
                    wrong.append(f"{_name(path)}.{node.name}: {count} lines{', which are few' if said else ''}")
    assert not wrong, f"shorten them, or say why not ('# long: ...' below the docstring): {wrong}"
