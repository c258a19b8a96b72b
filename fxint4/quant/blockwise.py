"""Quantize and pack a weight a block at a time, so that beside it only blocks are held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxint4.quant.chunks import row_blocks
from fxint4.quant.primitives import Quantized, dequantize
from fxint4.quant.recipe import RTN, Recipe
from fxint4.quant.tile_layout import TileShape, pack_scale_and_zero, pad_codes, pad_parameters

__all__ = ["Block", "dequantize_block", "fake_quantized", "pack_block", "quantized_blocks"]

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
        noise: sum of squares of what quantizing changed.
    """

    start: int
    codes: Tensor
    scale: Tensor
    zero: Tensor
    signal: float = 0.0
    noise: float = 0.0


def quantized_blocks(weight: Tensor, shape: TileShape, recipe: Recipe = RTN) -> Iterator[Block]:
    """Quantize a weight ``[N, K]`` or ``[E, N, K]``, any float dtype and strides.

    shape: its group_size and k_padded are those of the blocks.
    recipe: how codes are chosen.
    """
    if recipe.statistics is None or weight.ndim == 2:
        quantizer = recipe.quantizer(shape.group_size, shape.k_padded, weight.device)
        for start, stop in row_blocks(weight, _ROWS if weight.ndim == 2 else 1, recipe.chunks):
            part = weight[start:stop]
            made = quantizer(part.reshape(-1, part.shape[-1]))
            yield _block(start, made, part.shape[:-1])
    else:
        for start, part in enumerate(weight):
            quantizer = recipe.quantizer(shape.group_size, shape.k_padded, weight.device, start)
            yield _block(start, quantizer(part), (1, *part.shape[:-1]))


def fake_quantized(weight: Tensor, shape: TileShape, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    """What a weight becomes once it is quantized, ``[..., N, K]`` of dtype, contiguous.

    Args:
        weight: see `quantized_blocks`.
        shape: see `quantized_blocks`.
        recipe: see `quantized_blocks`.
        dtype: of the result.
    """
    made = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for block in quantized_blocks(weight, shape, recipe):
        made[block.start : block.start + len(block.codes)] = dequantize_block(
            block, shape, recipe, dtype
        )
    return made


def dequantize_block(block: Block, shape: TileShape, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    """What the codes of a block stand for, ``[..., rows, K]`` of dtype."""
    pre_scale = recipe.pre_scale
    values = dequantize(
        block.codes.reshape(-1, shape.k_padded),
        block.scale.reshape(-1, shape.groups),
        block.zero.reshape(-1, shape.groups),
        shape.group_size,
        dtype if pre_scale is None else torch.float32,
        shape.k,
    ).view(*block.codes.shape[:-1], -1)
    if pre_scale is None:
        return values
    return values.mul_(pre_scale.to(values.device)).to(dtype)


def _block(start: int, made: Quantized, rows: Sequence[int]) -> Block:
    values = (made.codes, made.scale, made.zero)
    codes, scale, zero = (value.view(*rows, -1) for value in values)
    return Block(start, codes, scale, zero, made.signal, made.noise)


def pack_block(
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
