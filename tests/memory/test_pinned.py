"""Nothing of the package pins host memory without having asked ``should_pin_memory``; read from the source.

An answer has the name ``pin`` (``_pin`` of an object) wherever it goes, the setting has the name ``pin_memory``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pd_serve

_PACKAGE = Path(pd_serve.__file__).parent
_ANSWER, _PINNER = {"pin", "_pin"}, {"pinner", "_pinner"}
_CALLS = {
    "cuMemHostRegister",
    "cuMemHostAlloc",
    "cuMemAllocHost",
    "cudaHostRegister",
    "cudaHostAlloc",
    "cudaMallocHost",
}
# where memory is pinned, for whoever asked; or why without asking
_PLACES = {
    "memory/cuda_driver.py": "the call of the driver",
    "memory/host_buffers.py": "given a pinner where the answer was yes",
    "compute/cuda/host_copies.py": "a thread that is started where the answer was yes",
    "integrations/vllm/device.py": "a word, read while the device writes it",
    "transfer/movers/cuda_buffers.py": "kernels read addresses there: a few MiB, whatever is answered for copies",
    **dict.fromkeys(
        ("compute/cuda/delivery.py", "compute/cuda/inputs.py", "compute/cuda/sampler.py"),
        "kernels read and write there what a step needs and what it sampled: some KiB",
    ),
}


def _name(node: ast.expr | None) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""


def _asked(value: ast.expr) -> bool:
    """Whether it is the answer, no, or both of them in a condition."""
    if isinstance(value, ast.BoolOp) and isinstance(value.op, ast.And):
        return any(_asked(part) for part in value.values)
    if isinstance(value, ast.Call):
        return _name(value.func) == "should_pin_memory"
    return _name(value) in _ANSWER or (isinstance(value, ast.Constant) and value.value in (False, None))


def _may_pin(value: ast.expr) -> bool:
    """Of a pinner, which pins."""
    if isinstance(value, ast.IfExp):
        return _asked(value.test) and isinstance(value.orelse, ast.Constant) and value.orelse.value is None
    return _name(value) in _PINNER or (isinstance(value, ast.Constant) and value.value is None)


def _of_call(call: ast.Call) -> Iterator[str]:
    """What is wrong with it."""
    name, keywords = _name(call.func), {keyword.arg: keyword.value for keyword in call.keywords}
    if name == "pin_memory":
        yield "a tensor is pinned"
    if "pin" in keywords and not _asked(keywords["pin"]):
        yield f"pin={ast.unparse(keywords['pin'])}"
    if "pin_memory" in keywords:
        value = keywords["pin_memory"]
        if not _asked(value) and _name(value) != "pin_memory":
            yield f"pin_memory={ast.unparse(value)}"
    if name in ("HostBuffer", "HostBuffers"):
        pinners = [*call.args[1 if name == "HostBuffer" else 0 :], *(keywords[k] for k in ("pinner",) if k in keywords)]
        yield from (f"{name} with {ast.unparse(pinner)}" for pinner in pinners if not _may_pin(pinner))


def _pins(node: ast.AST) -> bool:
    """For which a module needs a reason."""
    if isinstance(node, ast.Attribute | ast.Name):
        return _name(node) in _CALLS
    if isinstance(node, ast.Constant):
        return node.value in _CALLS
    if not isinstance(node, ast.Call):
        return False
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    to_host = _name(node.func) == "to" and "cpu" in ast.unparse(node) and keywords.get("non_blocking") == "True"
    of_torch = "pin_memory" in keywords and ast.unparse(node.func).startswith("torch.")
    return to_host or of_torch or (isinstance(node.func, ast.Attribute) and node.func.attr == "pin")


def wrong(source: str, module: str) -> list[str]:
    if module in _PLACES:
        return []
    found = []
    for node in ast.walk(ast.parse(source)):
        problems = list(_of_call(node)) if isinstance(node, ast.Call) else []
        if isinstance(node, ast.Assign) and any(_name(target) in _ANSWER for target in node.targets):
            problems += [] if _asked(node.value) else [f"pin is {ast.unparse(node.value)}"]
        if isinstance(node, ast.FunctionDef):
            parameters = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            problems += [
                f"{p.arg} is {ast.unparse(d)}" for p, d in parameters if p.arg == "pin" and d and not _asked(d)
            ]
        if _pins(node):
            problems.append(f"{ast.unparse(node)} pins")
        found += [f"{module}:{getattr(node, 'lineno', 0)}: {problem}" for problem in problems]
    return found


def test_nothing_is_pinned_without_asking() -> None:
    found = []
    for path in sorted(_PACKAGE.rglob("*.py")):
        found += wrong(path.read_text(), str(path.relative_to(_PACKAGE)))
    assert not found, f"ask pd_serve.memory.pinned.should_pin_memory, and call the answer pin: {found}"


def test_every_place_that_pins_still_does() -> None:
    for module in _PLACES:
        assert any(map(_pins, ast.walk(ast.parse((_PACKAGE / module).read_text())))), module


@pytest.mark.parametrize(
    "source",
    [
        "torch.empty(5, pin_memory=True)",
        "torch.empty(5, pin_memory=torch.cuda.is_available())",
        "torch.empty(5, pin_memory=config.pin_memory)",
        "torch.empty(5, pin_memory=pin)",  # it would be rounded up to a power of two
        "torch.empty(5).pin_memory()",
        "Upload(device, pin=True)",
        "DeviceMemory(0, pin=config.pin_memory)",
        "make_mover(layout, pin_memory=True)",
        "HostBuffer(5, CudaDriver())",
        "HostBuffers(pinner=driver)",
        "HostBuffer(5, driver if config.pin_memory else None)",
        "pin = True",
        "self._pin = torch.cuda.is_available()",
        "def make(*, pin: bool = True) -> None: ...",
        "driver.pin(address, size)",
        "self._call('cuMemHostRegister', address, size, 1)",
        "runtime.cudaHostAlloc(5, 0)",
        "tokens.to('cpu', non_blocking=True)",
    ],
)
def test_whoever_pins_without_asking_is_found(source: str) -> None:
    assert wrong(source, "some/module.py")


@pytest.mark.parametrize(
    "source",
    [
        "Settings(pin_memory=config.pin_memory)",
        "Upload(device, pin=should_pin_memory(config.pin_memory, 0))",
        "CudaHostMover(pool, pin=not directory and should_pin_memory(pin_memory, 0))",
        "HostBuffer(5, self._driver if self._pin else None)",
        "self._pin = pin",
        "x.to(device, non_blocking=True)",
    ],
)
def test_whoever_asks_is_not(source: str) -> None:
    assert not wrong(source, "some/module.py")
