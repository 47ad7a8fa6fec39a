"""Reads the structure of a GGUF file: metadata and where each tensor lies. Dequantising is the ``gguf`` package's.

Called by the conversion only. The ``gguf`` package's own reader makes a numpy object of every string, which takes
seconds for a vocabulary of 262,144 tokens; this one reads the same in a fraction of one. Must never trust a length
in the file: every read is checked against the file's end.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pd_serve.errors import ModelError

_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_DEFAULT_ALIGNMENT = 32  # bytes


@dataclass(frozen=True)
class GGUFTensor:
    name: str
    shape: tuple[int, ...]  # as PyTorch orders it: rows first
    type: int  # GGMLQuantizationType
    offset: int  # from the start of the file, bytes


class GGUFFile:
    """An open GGUF file (version 2 or 3, little-endian). A context manager; arrays must not outlive it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from None
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._parse()
        except (struct.error, IndexError, UnicodeDecodeError, KeyError) as error:
            self.close()
            raise ModelError(f"{path} is cut off or not a GGUF file ({error}); download it again.") from None
        except ModelError:
            self.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._map.close()
        self._file.close()

    def dequantize(self, tensor: GGUFTensor) -> npt.NDArray[np.float32]:
        """The tensor's values in float32, shaped as PyTorch orders them."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            kind = GGMLQuantizationType(tensor.type)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise ModelError(f"{self.path}: tensor {tensor.name} has the unknown type {tensor.type}.") from None
        row_bytes = tensor.shape[-1] // block * block_bytes
        rows = 1
        for n in tensor.shape[:-1]:
            rows *= n
        self._check(tensor.offset, rows * row_bytes)
        # a copy, so that nothing keeps the map open
        data = np.array(np.frombuffer(self._map, np.uint8, rows * row_bytes, tensor.offset)).reshape(rows, row_bytes)
        try:
            values = dequantize(data, kind)
        except NotImplementedError:
            raise ModelError(
                f"{self.path}: tensor {tensor.name} is quantised as {kind.name}, which cannot be read: use another."
            ) from None
        return np.ascontiguousarray(values, dtype=np.float32).reshape(tensor.shape)

    def _check(self, at: int, size: int) -> None:
        if at + size > len(self._map):
            raise ModelError(f"{self.path} is cut off: {at + size} bytes needed, {len(self._map)} there. Get it again.")

    def _parse(self) -> None:
        magic, version = self._map[:4], self._scalar("<u4", skip=4)
        if magic != b"GGUF" or version not in (2, 3):
            raise ModelError(f"{self.path} is not a GGUF file of version 2 or 3 (starts with {magic!r}, {version}).")
        num_tensors, num_keys = self._scalar("<u8"), self._scalar("<u8")
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<u4"))
        found = []
        for _ in range(num_tensors):
            name = self._string()
            shape = tuple(int(n) for n in self._numbers("<u8", self._scalar("<u4")))[::-1]
            found.append((name, shape, self._scalar("<u4"), self._scalar("<u8")))
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: GGUFTensor(name, shape, kind, start + offset) for name, shape, kind, offset in found}

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            value = self._scalar(_SCALARS[kind])
            # the decimal that was meant: 1e-05, not the float32 nearest to it written out in float64
            return float(str(np.float32(value))) if kind == _FLOAT32 else value
        item, count = self._scalar("<u4"), self._scalar("<u8")
        if item == _STRING:
            return [self._string() for _ in range(count)]
        if item == _ARRAY:
            return [self._value(_ARRAY) for _ in range(count)]
        return self._numbers(_SCALARS[item], count)

    def _scalar(self, code: str, skip: int = 0) -> Any:
        self._at += skip
        return self._numbers(code, 1)[0]

    def _numbers(self, code: str, count: int) -> list[Any]:
        size = np.dtype(code).itemsize * count
        self._check(self._at, size)
        values = np.frombuffer(self._map[self._at : self._at + size], code).tolist()
        self._at += size
        return values  # type: ignore[no-any-return]

    def _string(self) -> str:
        at = self._at
        (size,) = struct.unpack_from("<Q", self._map, at)
        self._check(at + 8, size)
        self._at = at + 8 + size
        return self._map[at + 8 : at + 8 + size].decode("utf-8")
