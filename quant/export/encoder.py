"""Rows of a tensor as other programs keep them: what each worker of an export does with a piece."""

import torch

from quant.config import ModelConfig
from quant.encoding import Errors
from quant.export.block_types import BF16, BlockType
from quant.export.blocks import encode_blocks, split_blocks
from quant.export.targets import PartTarget
from quant.export.transfer import CODES_OF, transfer
from quant.formats import QuantTensor
from quant.pieces import Piece
from quant.tensor_rows import Scratch, float_rows


class BlockEncoder:
    """Parts of tensors in blocks (`Encoder`)."""

    def __init__(self, config: ModelConfig) -> None:
        self._nope, self._value = config.qk_nope_head_dim, config.v_head_dim

    def columns(self, piece: Piece) -> None:
        """All alike."""

    def encode(
        self, piece: Piece, rows: QuantTensor, columns: torch.Tensor | None, scratch: Scratch
    ) -> list[tuple[torch.Tensor, Errors | None]]:
        made = _Rows(rows, scratch)
        return [(self._part(piece, target, made), None) for target in piece.targets if isinstance(target, PartTarget)]

    def _part(self, piece: Piece, target: PartTarget, made: "_Rows") -> torch.Tensor:
        match target.part:
            case "shape":
                return torch.tensor(piece.spec.shape).view(torch.uint8)
            case "keys":  # of each head [rank, nope], as attention multiplies with them
                heads = made.values.unflatten(0, (-1, self._nope + self._value))
                return encode_blocks(heads[:, : self._nope].mT.contiguous(), target.kind, threads=1)
            case "values":
                heads = made.values.unflatten(0, (-1, self._nope + self._value))
                return encode_blocks(heads[:, self._nope :].contiguous(), target.kind, threads=1)
            case "codes":
                return split_blocks(made.blocks(target.kind), target.kind)[0]
            case "scales":
                return split_blocks(made.blocks(target.kind), target.kind)[1]
        return made.blocks(target.kind)


class _Rows:
    """Rows of a piece, decoded and encoded once at most."""

    def __init__(self, rows: QuantTensor, scratch: Scratch) -> None:
        self._rows, self._scratch = rows, scratch
        self._values: torch.Tensor | None = None
        self._blocks: dict[BlockType, torch.Tensor] = {}

    @property
    def values(self) -> torch.Tensor:
        """float32."""
        if self._values is None:
            self._values = float_rows(self._rows, self._scratch)
        return self._values

    def blocks(self, kind: BlockType) -> torch.Tensor:
        """uint8 [bytes]; codes are taken over where both formats have the same kind."""
        if kind not in self._blocks:
            self._blocks[kind] = self._encode(kind)
        return self._blocks[kind]

    def _encode(self, kind: BlockType) -> torch.Tensor:
        if self._rows.format is CODES_OF.get(kind):
            return torch.from_numpy(transfer(self._rows, kind).reshape(-1))
        if kind is BF16 and self._rows.format.name == "bf16":
            return self._rows.data.view(torch.uint8).reshape(-1)
        return encode_blocks(self.values, kind, threads=1)
