"""Quantize and pack a weight block by block: only one block is held beside the weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxint4.quant.chunks import row_blocks
from fxint4.quant.metrics import sqnr_db
from fxint4.quant.primitives import Quantized, dequantize
from fxint4.quant.recipe import RTN, Recipe
from fxint4.quant.tile_layout import TileShape, pack_scale_and_zero, pad_codes, pad_parameters

__all__ = ["Block", "dequantize_block", "fake_quantized", "pack_block", "quantize_by_blocks"]

#: Rows of a block are a multiple of this, because the CPU op packs 64 rows together.
_ROWS = 64


@dataclass(frozen=True, eq=False)
class Block:
    """Some quantized rows of one matrix, or some quantized matrices of a batch.

    Attributes:
        start: The first row, or the first matrix.
        codes: uint8 ``[rows, k_padded]``, or ``[matrices, N, k_padded]``.
        scale: bfloat16 ``[rows, groups]``, or ``[matrices, N, groups]``.
        zero: Shape and dtype of scale.
        signal: Sum of squares of these weights.
        noise: Sum of squares of the quantization errors of these weights.
    """

    start: int
    codes: Tensor
    scale: Tensor
    zero: Tensor
    signal: float = 0.0
    noise: float = 0.0


def quantized_blocks(weight: Tensor, shape: TileShape, recipe: Recipe = RTN) -> Iterator[Block]:
    """Quantize a weight block by block.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, any float dtype and strides, finite.
        shape: The packed shape; group_size and k_padded are read.
        recipe: How codes are chosen.

    Yields:
        The blocks, in order of their start.

    Raises:
        ValueError: The weight holds inf or NaN.
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


def quantize_by_blocks(
    weight: Tensor, shape: TileShape, recipe: Recipe, write: Callable[[Block], None]
) -> float:
    """Quantize a weight, one block after the other.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, any float dtype and strides, finite.
        shape: The packed shape; group_size and k_padded are read.
        recipe: How codes are chosen.
        write: Called with each block, in order of their start.

    Returns:
        The signal-to-quantization-noise ratio in dB.

    Raises:
        ValueError: The weight holds inf or NaN.
    """
    signal = noise = 0.0
    for block in quantized_blocks(weight, shape, recipe):
        write(block)
        signal += block.signal
        noise += block.noise
    return sqnr_db(signal, noise)


def fake_quantized(
    weight: Tensor, shape: TileShape, recipe: Recipe, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """Quantize a weight and dequantize it again.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, any float dtype and strides, finite.
        shape: The packed shape; group_size and k_padded are read.
        recipe: How codes are chosen.
        dtype: The dtype of the result.

    Returns:
        The dequantized weight, with the shape of the weight, contiguous; the
        signal-to-quantization-noise ratio in dB.

    Raises:
        ValueError: The weight holds inf or NaN.
    """
    made = torch.empty(weight.shape, dtype=dtype, device=weight.device)

    def write(block: Block) -> None:
        values = dequantize_block(block, shape, recipe, dtype)
        made[block.start : block.start + len(values)] = values

    return made, quantize_by_blocks(weight, shape, recipe, write)


def dequantize_block(block: Block, shape: TileShape, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    """Dequantize a block: ``[rows, K]`` or ``[matrices, N, K]`` of dtype."""
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
    """Pack a block, with its padding, into its place in the buffers of the whole weight.

    Args:
        tiles: Packed codes of the whole weight, written to. The first axis holds the matrices of
            a batch, or the rows of one matrix.
        scale_and_zero: bfloat16 ``[groups, n_padded, 2]`` or ``[E, groups, n_padded, 2]``, written
            to.
        block: The block.
        shape: The packed shape of the whole weight.
        pack_rows: Packs padded codes, uint8 ``[..., rows, k_padded]``.
        rows_per_tile: Rows that one entry of the first axis of `tiles` holds, for one matrix.
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
