"""Where an export keeps what of each tensor, and the pieces of rows that its parts are made of."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from quant.export.block_types import BlockType
from quant.inventory import TensorSpec
from quant.pieces import Piece, Target, cuts

# Of a matrix: all of it; of wkv_b, each head's rows for keys, turned, or those for values; of blocks, their codes or
# their scales; or the number of its rows and columns.
Part = Literal["whole", "keys", "values", "codes", "scales", "shape"]


@dataclass(frozen=True)
class Place:
    """Where a file keeps a part of a tensor. begin: its first byte, from the start of the file.

    kind: what values become. rows, nbytes: so many rows of the tensor (values, of a vector) take so many bytes.
    """

    spec: TensorSpec
    file: str
    begin: int
    kind: BlockType
    rows: int
    nbytes: int
    part: Part = "whole"


@dataclass(frozen=True)
class PartTarget(Target):
    """A target of which an encoder knows what belongs there."""

    kind: BlockType
    part: Part


def whole(spec: TensorSpec, file: str, begin: int, kind: BlockType) -> Place:
    """The place of all of a tensor."""
    return Place(spec, file, begin, kind, 1, kind.row_bytes(spec.shape[1] if len(spec.shape) > 1 else 1))


def export_pieces(spec: TensorSpec, places: list[Place]) -> Iterator[Piece]:
    """The pieces of a tensor whose parts an export keeps at `places`."""
    for first, shape in cuts(spec.shape, max(place.rows for place in places)):
        yield Piece(spec, first, shape, tuple(_targets(places, first, shape[0])))


def _targets(places: list[Place], first: int, rows: int) -> Iterator[PartTarget]:
    for place in places:
        if place.part == "shape" and first:  # which the first piece writes
            continue
        before, nbytes = (count // place.rows * place.nbytes for count in (first, rows))
        if place.part == "shape":
            nbytes = place.nbytes
        yield PartTarget(place.kind.name, place.file, place.begin + before, nbytes, place.kind, place.part)
