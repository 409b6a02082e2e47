"""The layout of a GGUF file: its header is known before any value is.

Layout: "GGUF", version, number of tensors and of fields; the fields; of each tensor name, sizes, type and place; the
tensors, each at a multiple of 32. Source: docs/gguf.md of https://github.com/ggml-org/ggml.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from quant.export.block_types import BlockType

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # types of fields

Value = int | float | bool | str | Sequence[str] | Sequence[int]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to be written. shape: rows before columns, as in NumPy; the file has it the other way round."""

    name: str
    shape: tuple[int, ...]
    type: BlockType

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(self.shape)


T = TypeVar("T", bound=GgufTensor)


@dataclass(frozen=True)
class GgufPlan(Generic[T]):
    """A file before it is written. head: all that stands before the first tensor, filled up to a multiple of 32."""

    head: bytes
    tensors: tuple[T, ...]

    @staticmethod
    def of(tensors: Sequence[T], fields: Mapping[str, Value]) -> "GgufPlan[T]":
        """Place `tensors` in their order. Whole numbers in `fields` must fit 32 bits."""
        parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(fields))]
        parts += [_string(key) + _field(value) for key, value in fields.items()]
        begin = 0
        for tensor in tensors:
            parts.append(_tensor_info(tensor, begin))
            begin += _aligned(tensor.nbytes)
        head = b"".join(parts)
        return GgufPlan(head.ljust(_aligned(len(head)), b"\0"), tuple(tensors))

    @property
    def begins(self) -> Iterator[int]:
        """Where each tensor begins, from the start of the file."""
        begin = len(self.head)
        for tensor in self.tensors:
            yield begin
            begin += _aligned(tensor.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.head) + sum(_aligned(tensor.nbytes) for tensor in self.tensors)


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _field(value: Value) -> bytes:
    """A value with its type before it. Lists hold strings, or whole numbers, which are written with a sign."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    texts = [item for item in value if isinstance(item, str)]
    if texts or not value:
        return struct.pack("<IIQ", ARRAY, STRING, len(texts)) + b"".join(map(_string, texts))
    return struct.pack(f"<IIQ{len(value)}i", ARRAY, I32, len(value), *value)


def _tensor_info(tensor: GgufTensor, begin: int) -> bytes:
    assert tensor.type.number is not None
    sizes = tensor.shape[::-1]
    numbers = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, tensor.type.number, begin)
    return _string(tensor.name) + numbers
