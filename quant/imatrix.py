"""Importance matrices made by llama.cpp, as GGUF or in its older form: mean squares of matrices' inputs.

Older form (.dat), little-endian: int32 entries; of each int32 length and the name, int32 calls, int32 values, and
float32 [values], which are mean squares times calls. GGUF: tensors NAME.in_sum2, float32 [matrices, columns], sums of
squares, and NAME.counts, float32 [matrices], the tokens summed over. Names are llama.cpp's; experts lie one after the
other.
"""

import hashlib
import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from quant.errors import Dsr1Error
from quant.files import sha256_of
from quant.inventory import TensorSpec
from quant.report import ImportanceSummary

MAGIC = b"GGUF"
VERSIONS = (2, 3)
F32_TYPE, STRING_TYPE, ARRAY_TYPE = 0, 8, 9
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of GGUF's types of values
MOST_DIMS, MOST_DEPTH = 4, 4
MOST_ENTRIES, MOST_NAME = 1 << 20, 1 << 10
ALIGNMENT = 32
LEAST_COUNT = 32  # tokens; an expert that saw fewer gets its layer's mean squares
SUMS, COUNTS = ".in_sum2", ".counts"

LLAMA_NAMES = {
    "head": "output",
    "attn.wq": "attn_q",
    "attn.wq_a": "attn_q_a",
    "attn.wq_b": "attn_q_b",
    "attn.wkv_a": "attn_kv_a_mqa",
    "attn.wkv_b": "attn_kv_b",
    "attn.wo": "attn_output",
    **{f"ffn.{ours}": f"ffn_{theirs}" for ours, theirs in (("w1", "gate"), ("w3", "up"), ("w2", "down"))},
    **{
        f"ffn.{kind}.{ours}": f"ffn_{theirs}_{suffix}"
        for kind, suffix in (("experts", "exps"), ("shared_experts", "shexp"))
        for ours, theirs in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
    },
}


def llama_name(spec: TensorSpec) -> str:
    """What llama.cpp calls a matrix, or the stack of experts that it belongs to; empty for what it does not tell of."""
    if spec.layer is None:
        return f"{LLAMA_NAMES[spec.name]}.weight" if spec.name in LLAMA_NAMES else ""
    within = spec.name.removeprefix(f"layers.{spec.layer}.")
    if spec.expert is not None:
        within = within.replace(f".experts.{spec.expert}.", ".experts.")
    return f"blk.{spec.layer}.{LLAMA_NAMES[within]}.weight" if within in LLAMA_NAMES else ""


@dataclass(frozen=True, eq=False)
class Entry:
    """values: float32, of all matrices one after the other. counts: what each matrix's are divided by, float32."""

    values: NDArray[np.float32]
    counts: NDArray[np.float32]


class Imatrix:
    """An importance matrix in a file (`Importance`)."""

    def __init__(self, path: Path) -> None:
        """Raises Dsr1Error for a file that is none."""
        self.path, self.identity = path, hashlib.sha256(f"imatrix {sha256_of(path)}".encode()).hexdigest()
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                reader = _Reader(data)
                self.entries = _gguf_entries(reader) if data[:4] == MAGIC else _old_entries(reader)
        except (_DamagedError, ValueError, OSError) as error:
            raise Dsr1Error(
                f"{path} is no importance matrix that dsr1 can read ({error}); give the file that llama.cpp's "
                "llama-imatrix wrote"
            ) from None
        self._missing: set[str] = set()
        self._experts: dict[str, bool] = {}

    def of(self, spec: TensorSpec) -> torch.Tensor | None:
        """As `Importance`. Raises Dsr1Error if the file has another number of columns than the matrix."""
        entry = self.entries.get(llama_name(spec)) if len(spec.shape) == 2 else None
        if entry is None:
            if len(spec.shape) == 2 and spec.component not in ("router", "embed"):
                self._missing.add(spec.name)
            return None
        columns = spec.shape[1]
        if len(entry.values) % columns or (spec.expert or 0) >= len(entry.values) // columns:
            raise Dsr1Error(
                f"{self.path} has {len(entry.values)} values for {llama_name(spec)}, and its rows have {columns}; give "
                "the importance matrix of this model"
            )
        means = entry.values.reshape(-1, columns)
        counts = np.broadcast_to(entry.counts[:, None], (len(means), 1))
        if spec.expert is None:
            return torch.from_numpy(means[0] / max(counts[0, 0], 1))
        return torch.from_numpy(self._of_expert(spec, means, counts))

    def _of_expert(
        self, spec: TensorSpec, sums: NDArray[np.float32], counts: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Mean squares of one expert, or of its whole layer where it saw too little."""
        assert spec.expert is not None
        tells = len(np.unique(counts)) > 1  # the older form does not say what each expert saw
        rare = not sums[spec.expert].any() or (tells and counts[spec.expert, 0] < LEAST_COUNT)
        self._experts[spec.name.rpartition(".")[0]] = bool(rare)
        if rare:
            return (sums.sum(0) / max(counts.sum(), 1)).astype(np.float32)
        return (sums[spec.expert] / max(counts[spec.expert, 0], 1)).astype(np.float32)

    def summary(self) -> ImportanceSummary:
        rare = sum(self._experts.values())
        return ImportanceSummary("imatrix", self.path.name, 0, rare, len(self._experts), len(self._missing))


class _DamagedError(Exception):
    """A file that is not what it should be."""


class _Reader:
    """Takes values from the front of a file, never beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, nbytes: int) -> bytes:
        if not 0 <= nbytes <= len(self.data) - self.at:
            raise _DamagedError(f"it ends where {nbytes} bytes should follow byte {self.at}")
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def number(self, kind: str) -> int:
        """kind: as struct has it, such as "i"."""
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0])

    def text(self, length: int) -> str:
        if not 0 <= length <= MOST_NAME:
            raise _DamagedError(f"a name of {length} bytes stands at byte {self.at}")
        return self.take(length).decode("utf-8", "replace")

    def floats(self, count: int, at: int | None = None) -> NDArray[np.float32]:
        """float32 [count], finite and not below 0, copied."""
        self.at = self.at if at is None else at
        values = np.frombuffer(self.take(4 * count), "<f4").astype(np.float32)
        if not np.isfinite(values).all() or (values < 0).any():
            raise _DamagedError("it has values that are no mean squares")
        return values

    def count(self, kind: str) -> int:
        found = self.number(kind)
        if not 0 <= found <= MOST_ENTRIES:
            raise _DamagedError(f"it tells of {found} entries")
        return found


def _old_entries(reader: _Reader) -> dict[str, Entry]:
    entries = {}
    for _ in range(reader.count("i")):
        name = reader.text(reader.number("i"))
        calls, values = reader.number("i"), reader.number("i")
        if calls < 1 or values < 1:
            raise _DamagedError(f"{name!r} has {values} values of {calls} calls")
        entries[name] = Entry(reader.floats(values), np.array([calls], np.float32))
    if not entries:
        raise _DamagedError("it is empty")
    return entries


def _gguf_entries(reader: _Reader) -> dict[str, Entry]:
    reader.take(len(MAGIC))
    if (version := reader.number("I")) not in VERSIONS:
        raise _DamagedError(f"it is GGUF of version {version}")
    tensors, pairs = reader.count("Q"), reader.count("Q")
    for _ in range(pairs):
        reader.text(reader.number("Q"))
        _skip_value(reader, reader.number("I"))
    infos = dict(_tensor_info(reader) for _ in range(tensors))
    start = -(-reader.at // ALIGNMENT) * ALIGNMENT
    entries = {}
    for name, (count, offset) in infos.items():
        if not name.endswith(SUMS):
            continue
        base = name.removesuffix(SUMS)
        if base + COUNTS not in infos:
            raise _DamagedError(f"it lacks {base + COUNTS!r}")
        n_counts, at_counts = infos[base + COUNTS]
        entries[base] = Entry(reader.floats(count, start + offset), reader.floats(n_counts, start + at_counts))
    if not entries:
        raise _DamagedError("it has no sums of squares")
    return entries


def _tensor_info(reader: _Reader) -> tuple[str, tuple[int, int]]:
    """Name; values and where they begin in the data."""
    name, dims = reader.text(reader.number("Q")), reader.number("I")
    if dims > MOST_DIMS:
        raise _DamagedError(f"{name!r} has {dims} dimensions")
    count = prod(reader.number("Q") for _ in range(dims))
    if (kind := reader.number("I")) != F32_TYPE:
        raise _DamagedError(f"{name!r} is of type {kind}, not float32")
    return name, (count, reader.number("Q"))


def _skip_value(reader: _Reader, kind: int, depth: int = 0) -> None:
    if kind == STRING_TYPE:
        reader.take(reader.number("Q"))
    elif kind == ARRAY_TYPE and depth < MOST_DEPTH:
        of, count = reader.number("I"), reader.number("Q")
        if of in SCALAR_BYTES:
            reader.take(SCALAR_BYTES[of] * count)
            return
        for _ in range(min(count, len(reader.data))):
            _skip_value(reader, of, depth + 1)
    elif kind in SCALAR_BYTES:
        reader.take(SCALAR_BYTES[kind])
    else:
        raise _DamagedError(f"it has a value of type {kind}")
