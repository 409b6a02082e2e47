"""A conversion cut into pieces: rows of one tensor, and every place where a store keeps them.

Pieces are what is done or not done. They follow from the checkpoint and the recipe alone, never from the number of
threads, so that another run knows them again.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm, prod
from pathlib import Path
from typing import Protocol, TypeVar

from quant.formats import FP8_BLOCK_SIDE, Format
from quant.inventory import TensorSpec
from quant.journal import Key
from quant.packed import PackedFormat
from quant.safetensors_file import FileSpan, SafetensorsFile
from quant.store_formats import stored_bytes
from quant.store_layout import Placement

PIECE_WEIGHTS = 1 << 22  # 16 MiB in float32: many threads have theirs at a time, and one is busy for a while


class Published(Protocol):
    """What is converted: a Checkpoint, or whatever else says where its tensors lie."""

    @property
    def folder(self) -> Path: ...
    @property
    def shards(self) -> Sequence[SafetensorsFile]: ...
    def place(self, name: str) -> tuple[Format | PackedFormat, FileSpan, FileSpan | None]:
        """Format of a tensor, where its bytes lie, and where its scales do, if they lie apart."""


class HasSpec(Protocol):
    """A place for a tensor, in whatever is written."""

    @property
    def spec(self) -> TensorSpec: ...


Placed = TypeVar("Placed", bound=HasSpec)


@dataclass(frozen=True)
class Target:
    """Where the bytes of a piece go. begin: from the start of the file."""

    representation: str
    file: str
    begin: int
    nbytes: int

    @property
    def key(self) -> Key:
        """How a journal names it."""
        return self.file, self.begin, self.nbytes


@dataclass(frozen=True)
class Piece:
    """`shape[0]` rows of a tensor from row `first` on, a multiple of 128; a vector is one piece, its shape [values]."""

    spec: TensorSpec
    first: int
    shape: tuple[int, ...]
    targets: tuple[Target, ...]


def pieces_by_shard(
    source: Published, places: Iterable[Placed], cut: Callable[[TensorSpec, list[Placed]], Iterable[Piece]]
) -> dict[Path, list[Piece]]:
    """All pieces, by the shard that holds their weights, in the order of `places`. cut: a tensor by all its places."""
    by_spec: dict[TensorSpec, list[Placed]] = defaultdict(list)
    for place in places:
        by_spec[place.spec].append(place)
    by_shard: dict[Path, list[Piece]] = {shard.path: [] for shard in source.shards}
    for spec, its in by_spec.items():
        by_shard[source.place(spec.name)[1].path] += cut(spec, its)
    return by_shard


def store_pieces(spec: TensorSpec, places: list[Placement]) -> Iterator[Piece]:
    """The pieces of a tensor that a store keeps at `places`."""
    for first, shape in cuts(spec.shape):
        yield Piece(spec, first, shape, tuple(_target(place, first, shape) for place in places))


def cuts(shape: tuple[int, ...], whole_rows: int = 1) -> Iterator[tuple[int, tuple[int, ...]]]:
    """First row and shape of each piece: multiples of 128 rows, so that FP8 blocks and row tiles stay whole.

    whole_rows: so many rows stay together, too.
    """
    if len(shape) == 1:
        yield 0, shape
        return
    rows, columns = shape
    together = lcm(FP8_BLOCK_SIDE, whole_rows)
    step = max(PIECE_WEIGHTS // columns // together, 1) * together
    for first in range(0, rows, step):
        yield first, (min(step, rows - first), columns)


def _target(place: Placement, first: int, shape: tuple[int, ...]) -> Target:
    before = stored_bytes(place.representation, (first, *shape[1:])) if first else 0
    return Target(place.representation, place.file, place.begin + before, stored_bytes(place.representation, shape))


def targets_by_file(pieces: Mapping[Path, list[Piece]]) -> dict[str, list[Target]]:
    """What is written into each file of the store, from front to back."""
    by_file: dict[str, list[Target]] = defaultdict(list)
    for piece in (piece for of_shard in pieces.values() for piece in of_shard):
        for target in piece.targets:
            by_file[target.file].append(target)
    return {file: sorted(targets, key=lambda target: target.begin) for file, targets in by_file.items()}


def source_bytes(pieces: Iterable[Piece], source: Published) -> int:
    """Bytes of the pieces' weights as they are published, without scales that lie apart."""
    return sum(rows_bytes(source.place(piece.spec.name)[0], piece.shape) for piece in pieces)


def rows_bytes(fmt: Format | PackedFormat, shape: tuple[int, ...]) -> int:
    """Bytes of whole rows, without scales that lie apart."""
    return fmt.nbytes(shape) if isinstance(fmt, PackedFormat) else prod(shape) * fmt.bits // 8
