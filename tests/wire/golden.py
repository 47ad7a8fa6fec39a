"""The bytes of every message: nodes and routers of other builds speak them too.

``python -m tests.wire.golden`` writes golden.txt anew, after a change of messages that is meant. A change of what the
link, the peers or an engine say needs another version there (``LINK_VERSION``, ``PROTOCOL_MAX``).
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

import pd_serve.wire

FILE = Path(__file__).with_name("golden.txt")


def structs() -> Iterator[tuple[str, type[msgspec.Struct]]]:
    for info in pkgutil.iter_modules(pd_serve.wire.__path__):
        module = importlib.import_module(f"pd_serve.wire.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == module.__name__:
                yield f"{info.name}.{name}", value


def examples() -> Iterator[tuple[str, msgspec.Struct]]:
    """Each struct with all that it can say, and again with no more than it has to."""
    for name, kind in structs():
        yield name, _example(kind)
        if any(not field.required for field in msgspec.structs.fields(kind)):
            yield f"{name} (least)", _example(kind, least=True)


def _example(kind: Any, name: str = "", *, least: bool = False) -> Any:
    """A value of a type that depends on nothing but the type and the field's ``name``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        meta = next(extra for extra in arguments[1:] if isinstance(extra, msgspec.Meta))
        value = _example(arguments[0], name)
        return value * meta.min_length if isinstance(value, bytes) and meta.min_length else value
    if origin is typing.Literal:
        return arguments[0]
    if origin in (typing.Union, types.UnionType):
        return _example(arguments[0], name)
    if origin in (list, tuple):
        return origin([_example(argument, name) for argument in arguments if argument is not ...])
    if origin is dict:
        return {_example(arguments[0], name): _example(arguments[1], name)}
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        wanted = {field.name for field in msgspec.structs.fields(kind) if field.required or not least}
    elif dataclasses.is_dataclass(kind):
        wanted = {field.name for field in dataclasses.fields(kind)}
    else:
        return {int: len(name), float: len(name) + 0.5, str: name, bytes: b"\1", bool: True}[kind]
    hints = typing.get_type_hints(kind, include_extras=True)
    return kind(**{name: _example(hints[name], name) for name in wanted})


if __name__ == "__main__":
    FILE.write_text("".join(f"{name}: {msgspec.msgpack.encode(value).hex()}\n" for name, value in examples()))
