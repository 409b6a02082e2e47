"""The experts of a layer, copied into the memory of NUMA nodes: rows of every expert are split over the nodes.

    record of an expert in the store        w1 .............. w3 .............. w2 ..............
    copy in node 0                          w1 ....           w3 ....           w2 ....
    copy in node 1                              .... etc.

A node's workers read only their node's rows. Blocks of 128 rows are the unit of w1 and w3, because their 128 hidden
values are quantised together; tiles of 16 rows are that of w2. Node n of N has units U n // N to U (n + 1) // N. With
one node, its copy is the record without its padding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch
from torch import Tensor

from offload.memory import OnceRead, bind, huge_memory, run_near
from offload.topology import Topology
from quant.packed import BLOCK_K, TENSOR_ALIGNMENT, TILE_ROWS, ExpertRecord, blocks_per_row, tiles
from quant.safetensors_file import FileSpan

BLOCK_TILES = BLOCK_K // TILE_ROWS  # tiles of w1, and of w3, that give one block of hidden values
NOT_BOUND = (
    "the system does not let memory be bound to NUMA nodes (a container needs CAP_SYS_NICE for that), so experts lie "
    "where they were read, as long as each node has room"
)


@dataclass(frozen=True)
class Piece:
    """A range of one matrix's tiles. begin: in the record; skipped: in the matrix; place: in the node's copy. Bytes."""

    begin: int
    skipped: int
    nbytes: int
    place: int

    @property
    def bias(self) -> int:
        """Where tile 0 of the matrix would lie, from the start of the copy: less than 0 for tiles of other nodes."""
        return self.place - self.skipped


@dataclass(frozen=True)
class NodeShare:
    """What one node holds of each expert. pieces: of w1, w3 and w2. nbytes: of its copy of an expert, whole lines."""

    pieces: tuple[Piece, ...]
    nbytes: int


def split_records(record: ExpertRecord, nodes: int) -> tuple[NodeShare, ...]:
    """What each of `nodes` nodes holds of an expert's record. No byte of a matrix is left out or comes twice."""
    return tuple(_share(record, node, nodes) for node in range(nodes))


def _share(record: ExpertRecord, node: int, nodes: int) -> NodeShare:
    up, down = (record.inter_dim, record.dim), (record.dim, record.inter_dim)
    blocks = blocks_per_row(down)
    up_bounds = [min(tiles(up), blocks * number // nodes * BLOCK_TILES) for number in (node, node + 1)]
    down_bounds = [tiles(down) * number // nodes for number in (node, node + 1)]
    pieces: list[Piece] = []
    place = 0
    for begin, fmt, shape, (first, end) in (
        (record.w1, record.format, up, up_bounds),
        (record.w3, record.format, up, up_bounds),
        (record.w2, record.down_format, down, down_bounds),
    ):
        tile_bytes = fmt.tile_bytes(shape)
        skipped, nbytes = first * tile_bytes, (end - first) * tile_bytes
        pieces.append(Piece(begin + skipped, skipped, nbytes, place))
        place += ceil(nbytes / TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
    return NodeShare(tuple(pieces), place)


@dataclass(frozen=True, eq=False)
class NodeExperts:
    """The experts of a layer in the memory of nodes. parts: of each node, uint8 [E, bytes of its share]."""

    parts: tuple[Tensor, ...]
    record: ExpertRecord

    def __post_init__(self) -> None:
        shapes = [tuple(part.shape) for part in self.parts]
        expected = [(shapes[0][0], share.nbytes) for share in split_records(self.record, len(shapes))]
        if shapes != expected or any(part.dtype != torch.uint8 or not part.is_contiguous() for part in self.parts):
            raise ValueError(f"parts of shapes {shapes} are not a layer's experts on {len(shapes)} nodes: {expected}")

    def table(self) -> Tensor:
        """int64 [N * E, 3]: for node n and expert e, in row n * E + e, addresses of w1, w3 and w2.

        They are those of tile 0 if the node's tiles followed it: address + tile * tile_bytes is right for its tiles.
        """
        rows = []
        for part, share in zip(self.parts, split_records(self.record, len(self.parts)), strict=True):
            bases = part.data_ptr() + torch.arange(len(part), dtype=torch.int64) * share.nbytes
            rows.append(bases[:, None] + torch.tensor([piece.bias for piece in share.pieces]))
        return torch.cat(rows)


def copy_records(span: FileSpan, record: ExpertRecord, topology: Topology, notes: list[str]) -> NodeExperts:
    """The experts whose records fill `span`, copied into the nodes of `topology`.

    The file's pages leave the page cache on the way. What a user should know is added to `notes`, once. Raises
    StoreError if the file is shorter than it was.
    """
    count, shares = span.nbytes // record.nbytes, split_records(record, len(topology.nodes))
    parts = tuple(huge_memory(count * share.nbytes).view(count, share.nbytes) for share in shares)
    if len(parts) > 1:  # with one, others may help out
        bound = [bind(part, node.number) for part, node in zip(parts, topology.nodes, strict=True)]
        if not all(bound) and NOT_BOUND not in notes:
            notes.append(NOT_BOUND)
    with OnceRead(span.path) as source:
        run_near(
            (node.cpus, _readers(source, span.begin, part, share, record))
            for node, part, share in zip(topology.nodes, parts, shares, strict=True)
        )
        source.forget(span.begin, span.nbytes)  # pages that two nodes' rows share
    return NodeExperts(parts, record)


def _readers(
    source: OnceRead, begin: int, part: Tensor, share: NodeShare, record: ExpertRecord
) -> Iterator[Callable[[], None]]:
    """A job for each expert: reads a node's share of it. begin: of the records in the file."""
    for number, target in enumerate(part):
        yield partial(_read_share, source, begin + number * record.nbytes, target, share)


def _read_share(source: OnceRead, begin: int, target: Tensor, share: NodeShare) -> None:
    for piece in share.pieces:
        source.read(begin + piece.begin, target[piece.place : piece.place + piece.nbytes])
