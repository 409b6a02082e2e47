"""One safetensors file, mapped: nothing but its header is read until a tensor's values are used.

Layout: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, data_offsets), the data.
Source: https://github.com/huggingface/safetensors, section Format.
"""

import math
import mmap
import os
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from quant.errors import CheckpointError
from quant.json_object import parse_json_object

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_RANK = 64
MAX_ELEMENTS = 2**62  # beyond this, strides overflow even where an empty dimension makes the size 0

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a header. dtype: its name there, as "BF16". begin, end: bytes from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Bytes of a file."""

    path: Path
    begin: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class SafetensorsFile:
    """A file whose header has been checked: each tensor lies inside the file, and no two share a byte.

    metadata: the header's `__metadata__`, unchecked.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    data_start: int
    file_bytes: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    _mapping: list[weakref.ref[mmap.mmap]] = field(default_factory=list, repr=False)

    @classmethod
    def open(cls, path: Path) -> "SafetensorsFile":
        """Read and check the header. Raises CheckpointError if the file is missing, truncated or damaged."""
        try:
            with path.open("rb") as file:
                file_bytes = os.fstat(file.fileno()).st_size
                header = _read_header(file, file_bytes, path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; download this file") from None
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}); check the disk and its permissions"
            ) from None
        return cls.of_header(path, header, file_bytes)

    @classmethod
    def of_header(cls, path: Path, header: bytes, file_bytes: int) -> "SafetensorsFile":
        """A file of `file_bytes` that need not be there yet. header: the JSON. Raises CheckpointError, as `open`."""
        data_start = LENGTH_BYTES + len(header)
        tensors, metadata = _parse_header(header, path)
        _check_layout(tensors, file_bytes - data_start, path)
        return cls(path, tensors, data_start, file_bytes, metadata)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return self.file_bytes - self.data_start

    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def spec(self, name: str) -> StoredTensor:
        """dtype, shape and place of a tensor. Raises KeyError if the file has none of this name."""
        return self.tensors[name]

    def span(self, name: str) -> FileSpan:
        """Where a tensor's bytes lie. Raises KeyError for an unknown name."""
        stored = self.tensors[name]
        return FileSpan(self.path, self.data_start + stored.begin, stored.end - stored.begin)

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the mapped file; writing to it changes neither the file nor another process's view.

        Only a tensor that does not begin at a multiple of its item size is copied. The mapping lives as long as
        the last tensor of it. Raises KeyError for an unknown name, CheckpointError if the file changed since `open`.
        """
        stored = self.tensors[name]
        dtype, start, size = DTYPES[stored.dtype], self.data_start + stored.begin, stored.end - stored.begin
        if not size:
            return torch.empty(stored.shape, dtype=dtype)
        mapping = self._map()
        if start % dtype.itemsize:
            data = torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=start).clone().view(dtype)
        else:
            data = torch.frombuffer(mapping, dtype=dtype, count=size // dtype.itemsize, offset=start)
        return data.view(stored.shape)

    def _map(self) -> mmap.mmap:
        """The mapping that live tensors share, or a new one."""
        mapping = self._mapping[-1]() if self._mapping else None
        if mapping is None:
            mapping = _map_file(self.path, self.file_bytes)
            self._mapping[:] = [weakref.ref(mapping)]
        return mapping


def _map_file(path: Path, expected_bytes: int) -> mmap.mmap:
    """Map copy-on-write: torch wants writable memory, and nobody writes, so no page is ever copied."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected_bytes:
                raise CheckpointError(
                    f"{path} changed while it was in use ({expected_bytes} bytes, now {size}); start again"
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be mapped ({error.strerror}); check that it is on a local disk") from None


def damaged(path: Path, what: str) -> CheckpointError:
    """The error of a file that only a new download mends."""
    return CheckpointError(f"{path} is damaged: {what}; download this file again")


def _read_header(file: BinaryIO, file_bytes: int, path: Path) -> bytes:
    return file.read(header_length(file.read(LENGTH_BYTES), file_bytes, path))


def header_length(first: bytes, file_bytes: int, path: Path) -> int:
    """Bytes of the header, from the first 8 of the file. Raises CheckpointError if a file of that size has no such."""
    length = int.from_bytes(first, "little")
    if file_bytes < LENGTH_BYTES or length > file_bytes - LENGTH_BYTES:
        raise damaged(path, f"it has {file_bytes} bytes, fewer than its header needs")
    if length > MAX_HEADER_BYTES:
        raise damaged(path, f"its header claims {length} bytes")
    return length


def _parse_header(header: bytes, path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """The tensors, and what `__metadata__` says, which nobody has to fill in."""
    try:
        entries = parse_json_object(header)
    except ValueError as error:
        raise damaged(path, f"its header cannot be read ({error})") from None
    metadata = entries.pop("__metadata__", None)
    tensors = {name: _parse_entry(name, entry, path) for name, entry in entries.items()}
    return tensors, metadata if isinstance(metadata, dict) else {}


def _parse_entry(name: str, entry: Any, path: Path) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"tensor {name!r} has other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the type {str(dtype)[:40]!r}, which this version does not read; "
            "download the model as it was published"
        )
    if not _are_counts(shape) or len(shape) > MAX_RANK or math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        raise damaged(path, f"tensor {name!r} has an impossible shape")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise damaged(path, f"tensor {name!r} has impossible data_offsets")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise damaged(
            path, f"tensor {name!r} of {dtype} {shape} takes {expected} bytes, and its data_offsets are {offsets}"
        )
    return StoredTensor(dtype, tuple(shape), *offsets)


def _are_counts(values: Any) -> bool:
    """Whether `values` is a list of whole numbers that a file offset can hold."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_layout(tensors: Mapping[str, StoredTensor], data_bytes: int, path: Path) -> None:
    """Require the tensors to fill the data without overlap or hole, so that a truncated file is noticed."""
    end = 0
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != end:
            how = "overlaps the tensor before it" if stored.begin < end else "leaves a hole before it"
            raise damaged(path, f"tensor {name!r} at bytes {stored.begin} to {stored.end} {how}")
        if stored.end > data_bytes:
            raise damaged(path, f"tensor {name!r} ends at byte {stored.end} of the data, which has {data_bytes}")
        end = stored.end
    if end != data_bytes:
        raise damaged(path, f"its data has {data_bytes} bytes, and its tensors take {end}")
