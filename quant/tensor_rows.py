"""From a piece's published bytes to those of a store: what each worker does, with memory of its own.

`published_rows` reads, `stored_rows` turns rows into one representation; both know nothing of files being written.
`Published` may be a checkpoint or, for exports, a store (quant/export/source.py).
"""

import threading
from math import prod

import torch

from quant.encoding import PLAIN_CODES, Errors, encode_published
from quant.formats import F32, FORMATS, FP8_BLOCK_SIDE, QuantTensor
from quant.kernels.decode import PACKED_CODES, decode
from quant.kernels.threads import call
from quant.kernels.widen import SPARE_VALUES, widen
from quant.packed import PACKED_FORMATS, PackedFormat
from quant.pieces import Piece, Published, rows_bytes
from quant.safetensors_file import FileSpan
from quant.shard_reader import ShardReader


class Scratch(threading.local):
    """Memory of one thread that grows to what its largest piece needs and is used again."""

    def __init__(self) -> None:
        self._stored, self._values = torch.empty(0, dtype=torch.uint8), torch.empty(0)

    def stored(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], with any content."""
        if self._stored.numel() < nbytes:
            self._stored = torch.empty(nbytes, dtype=torch.uint8)
        return self._stored[:nbytes]

    def values(self, count: int) -> torch.Tensor:
        """float32 [count], with any content and room for SPARE_VALUES more."""
        if self._values.numel() < count + SPARE_VALUES:
            self._values = torch.empty(count + SPARE_VALUES)
        return self._values[:count]


def rows_span(source: Published, piece: Piece) -> FileSpan:
    """Where the weights of a piece lie."""
    fmt, span, _ = source.place(piece.spec.name)
    before = rows_bytes(fmt, (piece.first, *piece.shape[1:]))
    return FileSpan(span.path, span.begin + before, rows_bytes(fmt, piece.shape))


def scale_rows_span(source: Published, piece: Piece) -> FileSpan | None:
    """Where the scales of a piece lie, if its tensor has any."""
    fmt, _, span = source.place(piece.spec.name)
    if span is None or isinstance(fmt, PackedFormat):
        return None
    rows, blocks = fmt.scale_shape(piece.shape) or (0, 0)
    row_bytes = blocks * 4
    return FileSpan(span.path, span.begin + piece.first // FP8_BLOCK_SIDE * row_bytes, rows * row_bytes)


def published_rows(
    source: Published, piece: Piece, reader: ShardReader, scales: bytes | None, scratch: Scratch
) -> QuantTensor:
    """The rows of a piece as they are published, in `scratch`. scales: its bytes of them, where its tensor has any."""
    fmt, span = source.place(piece.spec.name)[0], rows_span(source, piece)
    data = scratch.stored(span.nbytes)
    reader.read(span, data.numpy().data)
    if isinstance(fmt, PackedFormat):
        return QuantTensor(fmt, piece.shape, data)
    scale = None
    if scales is not None:
        scale = torch.frombuffer(bytearray(scales), dtype=torch.float32).view(fmt.scale_shape(piece.shape) or ())
    return QuantTensor(fmt, piece.shape, data.view(fmt.dtype).view(piece.shape), scale)


def float_rows(rows: QuantTensor, scratch: Scratch) -> torch.Tensor:
    """The values, float32, in `scratch` unless they are that already."""
    if rows.format is F32:
        return rows.data
    if len(rows.shape) == 1:
        return rows.dequantize(torch.float32)
    out = scratch.values(prod(rows.shape))
    if isinstance(rows.format, PackedFormat):
        call(decode, (rows.data.data_ptr(), out.data_ptr(), *rows.shape, PACKED_CODES[rows.format.name]), 1)
        return out.view(rows.shape)
    scale = 0 if rows.scale is None else rows.scale.data_ptr()
    call(widen, (rows.data.data_ptr(), scale, out.data_ptr(), *rows.shape, PLAIN_CODES[rows.format.name]), 1)
    return out.view(rows.shape)


def stored_rows(
    rows: QuantTensor, representation: str, columns: torch.Tensor | None, scratch: Scratch
) -> tuple[torch.Tensor, Errors | None]:
    """Rows of a tensor as a store keeps them in `representation`: uint8 [bytes]; what was lost, where that is packed.

    columns: how much each counts, float32 [columns], by default alike. Raises ValueError for values that are not
    finite, where the representation is a packed one.
    """
    if representation in PACKED_FORMATS:
        errors = Errors()
        return encode_published(rows, PACKED_FORMATS[representation], columns, errors), errors
    is_same = rows.format.name == representation
    plain = rows.data if is_same else float_rows(rows, scratch).to(FORMATS[representation].dtype)
    return plain.contiguous().view(torch.uint8).reshape(-1), None
