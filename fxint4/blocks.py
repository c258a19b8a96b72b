"""Quantise and pack a weight a block at a time, so that beside it only blocks are held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from fxint4.quantize import quantize, row_blocks
from fxint4.tiles import TileShape, pack_scale_and_zero, pad_codes, pad_parameters

__all__ = ["Block", "quantized_blocks", "write"]

#: Blocks of rows that can be packed by themselves: the CPU op packs 64 rows together.
_ROWS = 64


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows of one matrix, or some whole matrices of a batch.

    Attributes:
        start: the first row, or the first matrix.
        codes: uint8 ``[..., rows, k_padded]``.
        scale: bfloat16 ``[..., rows, groups]``.
        zero: like scale.
        signal: sum of squares of the weight there.
        noise: sum of squares of what quantising changed.
    """

    start: int
    codes: Tensor
    scale: Tensor
    zero: Tensor
    signal: float = 0.0
    noise: float = 0.0


def quantized_blocks(weight: Tensor, shape: TileShape) -> Iterator[Block]:
    """Quantise a weight ``[N, K]`` or ``[E, N, K]``, any float dtype and strides.

    shape: its group_size and k_padded are those of the blocks.
    """
    for start, stop in row_blocks(weight, _ROWS if weight.ndim == 2 else 1):
        part = weight[start:stop]
        made = quantize(part.reshape(-1, part.shape[-1]), shape.group_size, shape.k_padded)
        values = (made.codes, made.scale, made.zero)
        codes, scale, zero = (value.view(*part.shape[:-1], -1) for value in values)
        yield Block(start, codes, scale, zero, made.signal, made.noise)


def write(
    tiles: Tensor,
    scale_and_zero: Tensor,
    block: Block,
    shape: TileShape,
    pack_rows: Callable[[Tensor], Tensor],
    rows_per_tile: int,
) -> None:
    """Pack a block into its place, with the pad that belongs to it.

    tiles: where packed codes go, its first axis the rows (or matrices) of `shape`.
    scale_and_zero: bfloat16 ``[..., groups, n_padded, 2]``.
    pack_rows: packs codes whose rows are padded.
    rows_per_tile: rows that one entry of the first axis of `tiles` holds, without a batch.
    """
    start, stop = block.start, block.start + len(block.codes)
    if block.codes.ndim > 2:
        n = shape.n_padded
        where: tuple[slice, ...] = (slice(start, stop),)
        parameters = scale_and_zero[start:stop]
    else:
        n = shape.n_padded - start if stop == shape.n else stop - start
        where = (slice(start // rows_per_tile, (start + n) // rows_per_tile),)
        parameters = scale_and_zero[:, start : start + n]
    tiles[where] = pack_rows(pad_codes(block.codes, replace(shape, n_padded=n)))
    parameters.copy_(pack_scale_and_zero(*pad_parameters(block.scale, block.zero, n)))
