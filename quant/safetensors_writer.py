"""Writing one safetensors file from front to back: its header is known before any value is.

So memory holds one piece of one tensor, and the file's layout can be compared with another's before it is written.
The format is that of quant/safetensors_file.py.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Generic, TypeVar

from quant.files import Report, ignore, new_file
from quant.packed import TENSOR_ALIGNMENT

DATA_ALIGNMENT = 4096  # of the first byte of data
LENGTH_BYTES = 8
ITEM_BYTES = {"U8": 1, "BF16": 2, "F32": 4, "I32": 4}
PADDING = "padding."


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written. dtype: as in a header, "BF16". alignment: of its first byte in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    alignment: int = TENSOR_ALIGNMENT

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


T = TypeVar("T", bound=NewTensor)


@dataclass(frozen=True)
class FilePlan(Generic[T]):
    """A file before it is written.

    head: length and header, filled up with spaces to a multiple of 4096. begins: of each tensor, in the data.
    """

    head: bytes
    tensors: tuple[T, ...]
    begins: tuple[int, ...]

    @staticmethod
    def of(tensors: Sequence[T], metadata: Mapping[str, str]) -> "FilePlan[T]":
        """Place `tensors`, at least one, in their order."""
        begins, end = [], 0
        entries: dict[str, object] = {"__metadata__": dict(metadata)}
        for tensor in tensors:
            begin = _align(end, tensor.alignment)
            if begin > end:
                padding = f"{PADDING}{sum(name.startswith(PADDING) for name in entries)}"
                entries[padding] = _entry("U8", (begin - end,), end, begin)
            end = begin + tensor.nbytes
            entries[tensor.name] = _entry(tensor.dtype, tensor.shape, begin, end)
            begins.append(begin)
        return FilePlan(_head(entries), tuple(tensors), tuple(begins))

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.head) + self.begins[-1] + self.tensors[-1].nbytes


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _entry(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _head(entries: Mapping[str, object]) -> bytes:
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = _align(LENGTH_BYTES + len(text), DATA_ALIGNMENT) - LENGTH_BYTES
    return length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)


def write_safetensors(
    path: Path, plan: FilePlan[T], values: Callable[[T], Iterable[memoryview]], report: Report = ignore
) -> str:
    """Write the file of `plan` and return its SHA-256. `values`: the bytes of one tensor, in pieces.

    Raises StoreError when the disk refuses; the file appears only when it is whole.
    """
    with new_file(path, report) as file:
        file.write(plan.head)
        for tensor, begin in zip(plan.tensors, plan.begins, strict=True):
            begin += len(plan.head)
            file.write(bytes(begin - file.position))
            for piece in values(tensor):
                file.write(piece)
            if file.position != begin + tensor.nbytes:
                raise ValueError(f"{tensor.name} takes {tensor.nbytes} bytes, not {file.position - begin}")
    return file.sha256
