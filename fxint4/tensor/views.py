"""Operators that keep a weight packed: slicing, joining, axes, dtype and device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import functional as F

from fxint4._pytorch.tensors import aten
from fxint4.config.int4_config import Int4Config
from fxint4.errors import UnsupportedOpError
from fxint4.quant.tile_layout import DTYPES, MIDDLE_CODE, pack, unpack
from fxint4.tensor.core import (
    NEW_AXIS,
    Int4TileTensor,
    implements,
    is_dequantizing,
    padded_pre_scale,
)
from fxint4.tensor.in_a_row import InARow

__all__ = ["tight"]

#: A word of tiles that holds eight `MIDDLE_CODE`s, as a signed number.
_PAD_WORD = sum(MIDDLE_CODE << 4 * place for place in range(8)) - 2**32


def _wrapped(dim: int, ndim: int) -> int:
    """The non-negative number of an axis; IndexError if there is no such axis."""
    if not -ndim <= dim < ndim:
        raise IndexError(f"axis {dim} is none of the weight's {ndim}")
    return dim % ndim


# --- copies and conversions ----------------------------------------------------------------------


@implements(aten.detach.default, aten.alias.default)
def _alias(weight: Int4TileTensor) -> Int4TileTensor:
    return weight.on_buffers(Tensor.detach)


@implements(aten.clone.default)
def _clone(weight: Int4TileTensor, *, memory_format: Any = None) -> Int4TileTensor:
    return weight.on_buffers(
        lambda buffer: buffer.clone(memory_format=torch.contiguous_format), is_part=False
    )


@implements(aten.empty_like.default)
def _empty_like(
    weight: Int4TileTensor,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    layout: Any = None,
    pin_memory: bool | None = None,
    memory_format: Any = None,
) -> Any:
    if dtype not in (None, weight.dtype):
        return NotImplemented
    if weight.is_part:  # a tensor with values of its own needs none that belong to another
        stored = tight(weight)
        weight = weight if stored is None else stored
    made = weight.on_batch(lambda buffer: torch.empty_like(buffer, device=device), is_part=False)
    if weight.pre_scale is None:
        return made
    # `copy_` of a float tensor into it divides by these.
    return made.like(pre_scale=torch.ones_like(weight.pre_scale, device=device))


@implements(aten.new_zeros.default, aten.new_empty.default)
def _new_zeros(
    weight: Int4TileTensor,
    size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: bool | None = None,
) -> Any:
    """Zeros of another number of rows, or of matrices: `fully_shard` copies a part into them.

    Raises:
        UnsupportedOpError: Another shape than that of one of several equal parts.
    """
    if is_dequantizing():
        return NotImplemented
    wanted, own = list(size), list(weight.shape)
    fits = len(wanted) == weight.ndim and wanted[1:] == own[1:] and wanted[0] > 0
    in_order = weight.axes == tuple(range(weight.ndim))
    if not (fits and in_order) or own[0] % wanted[0] or dtype not in (None, weight.dtype):
        raise UnsupportedOpError(
            f"no zeros of {tuple(size)} are like {weight!r}: processes can split a packed weight "
            "along its first axis alone, into equal parts. Leave the layer out (ignored_params of "
            "fully_shard), or call fxint4.dequantize_(layer) first"
        )
    part = _slice(weight, 0, 0, wanted[0])
    made: Int4TileTensor = part.on_buffers(
        lambda buffer: torch.zeros_like(
            buffer, device=device, memory_format=torch.contiguous_format
        ),
        is_part=False,
    )
    made.tiles.fill_(_PAD_WORD)
    return made


@implements(aten.copy_.default)
def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(target, Int4TileTensor):
        return NotImplemented
    target.copy_from(source)
    # This runs below autograd, where in-place ops do not change the version. Caches made from the
    # buffers (the CPU op's bytes) are keyed by it.
    buffers = target.buffers.values()
    increment_version([buffer for buffer in buffers if not buffer.is_inference()])
    return target


@implements(torch.ops.prims.convert_element_type.default)
def _convert_element_type(weight: Int4TileTensor, dtype: torch.dtype) -> Any:
    return _to_copy(weight, dtype=dtype)


@implements(aten._to_copy.default)
def _to_copy(
    weight: Int4TileTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> Any:
    dtype = dtype or weight.dtype
    if dtype not in DTYPES:
        return NotImplemented
    # Tiles are the same on every device; what the CPU op reads is made from them on the machine.
    return weight.on_buffers(
        lambda buffer: buffer.to(device, non_blocking=non_blocking, copy=True),
        dtype=dtype,
        is_part=False,
    )


@implements(aten.is_pinned.default)
def _is_pinned(weight: Int4TileTensor, device: Any = None) -> bool:
    return all(buffer.is_pinned() for buffer in weight.buffers.values())


@implements(aten._pin_memory.default)
def _pin_memory(weight: Int4TileTensor, device: Any = None) -> Int4TileTensor:
    return weight.on_buffers(lambda buffer: aten._pin_memory(buffer.contiguous()), is_part=False)


@implements(aten.record_stream.default)
def _record_stream(weight: Int4TileTensor, stream: Any) -> None:
    for buffer in weight.buffers.values():
        buffer.record_stream(stream)


@implements(aten.equal.default)
def _equal(left: Any, right: Any) -> Any:
    if not (isinstance(left, Int4TileTensor) and isinstance(right, Int4TileTensor)):
        return NotImplemented
    same = (left.shape, left.dtype, left.axes) == (right.shape, right.dtype, right.axes)
    if not same or left.plain_group != right.plain_group:
        return NotImplemented
    if (left.pre_scale is None) != (right.pre_scale is None):
        return NotImplemented
    if not left.multiplies_alike(right):
        return False
    return all(torch.equal(a, b) for a, b in zip(left.get_plain(), right.get_plain(), strict=True))


# --- axes ----------------------------------------------------------------------------------------


@implements(aten.t.default)
def _t(weight: Int4TileTensor) -> Int4TileTensor:
    if weight.ndim > 2:
        raise ValueError(f"t() takes a matrix, the packed weight is {tuple(weight.shape)}")
    return weight.like(axes=weight.axes[::-1])


@implements(aten.transpose.int)
def _transpose(weight: Int4TileTensor, first: int, second: int) -> Int4TileTensor:
    axes = list(weight.axes)
    axes[first], axes[second] = axes[second], axes[first]
    return weight.like(axes=tuple(axes))


@implements(aten.permute.default)
def _permute(weight: Int4TileTensor, order: Sequence[int]) -> Int4TileTensor:
    order = [_wrapped(dim, weight.ndim) for dim in order]
    if sorted(order) != list(range(weight.ndim)):
        raise ValueError(f"{order} is no order of the axes of {tuple(weight.shape)}")
    return weight.like(axes=tuple(weight.axes[axis] for axis in order))


@implements(aten.unsqueeze.default)
def _unsqueeze(weight: Int4TileTensor, dim: int) -> Int4TileTensor:
    dim = _wrapped(dim, weight.ndim + 1)
    return weight.like(axes=(*weight.axes[:dim], NEW_AXIS, *weight.axes[dim:]))


@implements(aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(weight: Int4TileTensor, dims: int | Sequence[int]) -> Any:
    chosen = {_wrapped(dim, weight.ndim) for dim in ([dims] if isinstance(dims, int) else dims)}
    return _view(weight, [n for dim, n in enumerate(weight.shape) if n != 1 or dim not in chosen])


@implements(aten.view.default, aten._unsafe_view.default)
def _view(weight: Int4TileTensor, size: Sequence[int]) -> Any:
    """Add and drop axes of size 1; split and join axes in front of N and K.

    Joining such an axis with N concatenates the rows of all matrices, which copies. All axes joined
    are an `InARow`.
    """
    wanted = list(size)
    if wanted in ([-1], [weight.numel()]) and weight.ndim > 1:
        return NotImplemented if is_dequantizing() else InARow(weight)
    if wanted.count(-1) == 1:
        wanted[wanted.index(-1)] = weight.numel() // -math.prod(wanted)
    if math.prod(wanted) != weight.numel():
        raise ValueError(f"shape {list(size)} is invalid for a weight of {tuple(weight.shape)}")
    weight = _with_batch_in_order(weight)
    # N and K stay as they are. Match the runs of other axes before, between and behind them.
    batch: dict[int, Sequence[int]] = dict.fromkeys(range(weight.batch_axes), ())
    axes: list[int] = []
    at = 0
    for run, matrix_axis in _runs(weight):
        count = math.prod(weight.shape[dim] for dim in run)
        start = at
        if matrix_axis is None:
            at = len(wanted)
        else:
            n = weight.shape[matrix_axis]
            while at < len(wanted) and (math.prod(wanted[start:at]), wanted[at]) != (count, n):
                at += 1
        if at == len(wanted) and (matrix_axis is not None or math.prod(wanted[start:]) != count):
            return _view_of_joined_rows(weight, wanted)
        stored = [weight.axes[dim] for dim in run if weight.axes[dim] != NEW_AXIS]
        if stored:
            batch[stored[0]] = wanted[start:at]
        # `_with_batch` renumbers them, once the number of stored axes is known.
        axes += [stored[0] if stored else NEW_AXIS] * (at - start)
        if matrix_axis is not None:
            axes.append(weight.axes[matrix_axis])
            at += 1
    return _with_batch(weight, [batch[axis] for axis in sorted(batch)], axes)


def _runs(weight: Int4TileTensor) -> list[tuple[list[int], int | None]]:
    """Runs of logical axes, each with the N or K axis that ends it; None for the last run."""
    runs: list[tuple[list[int], int | None]] = []
    run: list[int] = []
    for dim, axis in enumerate(weight.axes):
        if axis < weight.batch_axes:
            run.append(dim)
        else:
            runs.append((run, dim))
            run = []
    return [*runs, (run, None)]


def _with_batch_in_order(weight: Int4TileTensor) -> Int4TileTensor:
    """The same weight with its batch axes stored in the order of the logical shape."""
    order = [axis for axis in weight.axes if 0 <= axis < weight.batch_axes]
    axes = [order.index(axis) if axis in order else axis for axis in weight.axes]
    return weight.on_batch(
        lambda buffer: buffer.permute(*order, *range(len(order), buffer.ndim)), axes=tuple(axes)
    )


def _with_batch(
    weight: Int4TileTensor, sizes: Sequence[Sequence[int]], axes: Sequence[int]
) -> Int4TileTensor:
    """Split or join stored batch axes.

    Args:
        weight: The weight.
        sizes: The new sizes for each stored batch axis; empty if it joins the one before.
        axes: The old stored axis of each logical axis, repeated if that is split.
    """
    new = [n for axis in sizes for n in axis]
    firsts = [sum(map(len, sizes[:axis])) for axis in range(len(sizes) + 1)]
    shift = len(new) - len(sizes)
    renumbered = []
    seen: dict[int, int] = {}
    for axis in axes:
        if axis == NEW_AXIS:
            renumbered.append(axis)
        elif axis >= len(sizes):
            renumbered.append(axis + shift)
        else:
            renumbered.append(firsts[axis] + seen.get(axis, 0))
            seen[axis] = seen.get(axis, 0) + 1
    ndim = len(sizes)
    return weight.on_batch(
        lambda buffer: buffer.reshape(*new, *buffer.shape[ndim:]), axes=tuple(renumbered)
    )


def _view_of_joined_rows(weight: Int4TileTensor, size: Sequence[int]) -> Any:
    """View ``[E, N, K]`` as ``[E*N, K]``, and that as `size`; N must follow E."""
    stored = [axis for axis in weight.axes if axis != NEW_AXIS]
    if weight.batch_axes != 1 or stored.index(0) + 1 != stored.index(1):
        return NotImplemented
    dim = weight.axes.index(0)
    joined = _cat_rows([_select(weight, dim, index) for index in range(weight.shape[dim])])
    return _view(joined, size)


@implements(aten.expand.default)
def _expand(weight: Int4TileTensor, size: Sequence[int], *, implicit: bool = False) -> Any:
    """Repeat axes of size 1 other than N and K; they are stored with stride 0."""
    while weight.ndim < len(size):
        weight = _unsqueeze(weight, 0)
    for dim, n in reversed(list(enumerate(size))):
        if n in (-1, weight.shape[dim]):
            continue
        if weight.axes[dim] == NEW_AXIS:
            weight = _with_new_axis_stored(weight, dim)
        axis = weight.axes[dim]
        if axis >= weight.batch_axes or weight.shape[dim] != 1:
            return NotImplemented
        sizes = [n if a == axis else -1 for a in range(weight.batch_axes)]
        weight = weight.like(
            tiles=weight.tiles.expand(*sizes, -1, -1, -1, -1),
            scale_and_zero=weight.scale_and_zero.expand(*sizes, -1, -1, -1),
        )
    return weight.like()


def _with_new_axis_stored(weight: Int4TileTensor, dim: int) -> Int4TileTensor:
    """The same weight with a `NEW_AXIS` turned into the first stored axis."""
    axes = [axis if axis == NEW_AXIS else axis + 1 for axis in weight.axes]
    axes[dim] = 0
    return weight.on_batch(lambda buffer: buffer.unsqueeze(0), axes=tuple(axes))


@implements(aten.as_strided.default)
def _as_strided(
    weight: Int4TileTensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Any:
    """The weight itself, for its own shape."""
    own = (list(weight.shape), list(weight.stride()))
    if (list(size), list(stride)) != own or storage_offset:
        return NotImplemented
    return _alias(weight)


# --- parts ---------------------------------------------------------------------------------------


@implements(aten.slice.Tensor)
def _slice(
    weight: Int4TileTensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    dim = _wrapped(dim, weight.ndim)
    size = weight.shape[dim]
    start, end, step = slice(start, end, step).indices(size)
    if start >= end:
        return NotImplemented
    if (start, end, step) == (0, size, 1):
        return _alias(weight)
    axis = weight.axes[dim]
    if axis == NEW_AXIS:
        return NotImplemented
    if axis < weight.batch_axes:
        return weight.on_batch(lambda buffer: aten.slice(buffer, axis, start, end, step))
    if not _is_n(weight, dim):
        return _slice_columns(weight, start, end) if step == 1 else NotImplemented
    if step == 1 and start % 8 == 0:
        return _slice_rows(weight, start, end)
    return _rows(weight, torch.arange(start, end, step))


def _is_n(weight: Int4TileTensor, dim: int) -> bool:
    return weight.axes[dim] == weight.batch_axes


def _slice_rows(weight: Int4TileTensor, start: int, end: int) -> Int4TileTensor:
    """A view of the tiles that hold the rows from start, a multiple of 8, to end."""
    stop = -(-end // 8) * 8
    return weight.like(
        tiles=weight.tiles[..., start // 8 : stop // 8, :, :, :],
        scale_and_zero=weight.scale_and_zero[..., start:stop, :],
        n=end - start,
        is_part=True,
    )


def _rows(weight: Int4TileTensor, rows: Tensor) -> Any:
    """Copy rows in any order; only the words of these rows are read.

    Args:
        weight: The weight.
        rows: int32 or int64 ``[R]``, at least 0.

    Raises:
        IndexError: A row is N or more, as for index_select.
    """
    if not len(rows):
        return NotImplemented
    rows = rows.to(weight.device)
    # First, because index_select checks the rows.
    parameters = weight.scale_and_zero[..., : weight.n, :].index_select(-2, rows)
    tile = rows // 8
    return _of_words(weight, _words(weight)[..., tile, rows - 8 * tile, :, :, :], parameters)


def _words(weight: Int4TileTensor) -> Tensor:
    """View the tiles by row: int32 ``[..., N/8, 8, K/(16*inner_k_tiles), 4, inner_k_tiles/2]``.

    Word t of a tile belongs to row t // 4, see `fxint4.quant.tile_layout`.
    """
    *lead, _, per_word = weight.tiles.shape
    return weight.tiles.view(*lead, 8, 4, per_word).transpose(-4, -3)


def _of_words(weight: Int4TileTensor, words: Tensor, scale_and_zero: Tensor) -> Int4TileTensor:
    """Build a weight like this one from other rows, of any number; the inverse of `_words`.

    Args:
        weight: The weight.
        words: int32 ``[..., N, K/(16*inner_k_tiles), 4, inner_k_tiles/2]``.
        scale_and_zero: bfloat16 ``[..., K/group_size, N, 2]``.
    """
    n = words.shape[-4]
    more = -n % 8
    words = F.pad(words, (0, 0, 0, 0, 0, 0, 0, more), value=_PAD_WORD)
    *batch, rows, k_tiles, _, per_word = words.shape
    tiles = words.reshape(*batch, rows // 8, 8, k_tiles, 4, per_word).transpose(-4, -3)
    parameters = F.pad(scale_and_zero, (0, 0, 0, more))
    return weight.like(
        tiles=tiles.flatten(-3, -2), scale_and_zero=parameters.contiguous(), n=n, is_part=False
    )


def _slice_columns(weight: Int4TileTensor, start: int, end: int) -> Int4TileTensor:
    """A view of the tiles and groups that hold the logical columns from start to end."""
    columns: list[tuple[int, int]] = []
    seen = 0
    for first, last in weight.columns:
        low, high = max(start - seen, 0), min(end - seen, last - first)
        if low < high:
            columns.append((first + low, first + high))
        seen += last - first
    span = 16 * weight.inner_k_tiles
    unit = math.lcm(span, weight.group_size)
    low = columns[0][0] // unit * unit
    high = -(-columns[-1][1] // unit) * unit
    return weight.like(
        tiles=weight.tiles[..., low // span : high // span, :, :],
        scale_and_zero=weight.scale_and_zero[
            ..., low // weight.group_size : high // weight.group_size, :, :
        ],
        pre_scale=None if weight.pre_scale is None else weight.pre_scale[low:high],
        columns=tuple((start - low, stop - low) for start, stop in columns),
        is_part=True,
    )


@implements(aten.select.int)
def _select(weight: Int4TileTensor, dim: int, index: int) -> Any:
    dim = _wrapped(dim, weight.ndim)
    size = weight.shape[dim]
    if not -size <= index < size:
        raise IndexError(f"index {index} is beyond axis {dim} of size {size}")
    axis = weight.axes[dim]
    axes = tuple(a - (a > axis >= 0) for d, a in enumerate(weight.axes) if d != dim)
    if axis == NEW_AXIS:
        return weight.like(axes=axes)
    if axis < weight.batch_axes:
        return weight.on_batch(lambda buffer: buffer.select(axis, index), axes=axes)
    # A single row or column has no tiles.
    index = index % size
    return _slice(weight, dim, index, index + 1).dequantize().squeeze(dim)


@implements(aten.unbind.int)
def _unbind(weight: Int4TileTensor, dim: int = 0) -> list[Any]:
    return [_select(weight, dim, index) for index in range(weight.shape[dim])]


@implements(aten.split.Tensor)
def _split(weight: Int4TileTensor, size: int, dim: int = 0) -> list[Any]:
    whole = weight.shape[dim]
    return [_slice(weight, dim, start, start + size) for start in range(0, whole, size)]


@implements(aten.split_with_sizes.default)
def _split_with_sizes(weight: Int4TileTensor, sizes: Sequence[int], dim: int = 0) -> Any:
    if min(sizes) < 0 or sum(sizes) != weight.shape[dim]:
        raise ValueError(f"{list(sizes)} do not add up to axis {dim} of {tuple(weight.shape)}")
    if 0 in sizes:
        return NotImplemented
    ends = [sum(sizes[: count + 1]) for count in range(len(sizes))]
    return [_slice(weight, dim, start, end) for start, end in pairwise([0, *ends])]


@implements(aten.index_select.default)
def _index_select(weight: Int4TileTensor, dim: int, index: Tensor) -> Any:
    axis = weight.axes[dim]
    if axis == NEW_AXIS or index.ndim != 1:
        return NotImplemented
    if axis < weight.batch_axes:
        return weight.on_batch(lambda buffer: buffer.index_select(axis, index))
    return _rows(weight, index) if _is_n(weight, dim) else NotImplemented


@implements(aten.index.Tensor)
def _index(weight: Int4TileTensor, indices: Sequence[Tensor | None]) -> Any:
    chosen = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(chosen) != 1:
        return NotImplemented
    dim, index = chosen[0]
    axis = weight.axes[dim]
    size = weight.shape[dim]
    if axis == NEW_AXIS or index.dtype not in (torch.bool, torch.int32, torch.int64):
        return NotImplemented
    if index.dtype is torch.bool:
        if index.ndim != 1:
            return NotImplemented
        if len(index) != size:
            raise IndexError(f"a mask of {len(index)} values for axis {dim} of size {size}")
        index = index.nonzero().flatten()
    if index.ndim == 0:
        picked = _index(weight, [*[None] * dim, index.reshape(1)])
        return picked if picked is NotImplemented else _select(picked, dim, 0)
    if axis < weight.batch_axes:
        # Indexing each buffer raises for an index out of range, as for any tensor.
        where = [None] * axis + [index.flatten()]
        picked = weight.on_batch(lambda buffer: aten.index.Tensor(buffer, where))
        shape = (*weight.shape[:dim], *index.shape, *weight.shape[dim + 1 :])
        return picked if index.ndim == 1 else _view(picked, shape)
    if not _is_n(weight, dim) or index.ndim > 1:
        return NotImplemented
    return _rows(weight, torch.where(index < 0, index + size, index))


@implements(aten.embedding.default)
def _embedding(
    weight: Int4TileTensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Look up rows and dequantize only these."""
    if weight.axes != (0, 1):
        return NotImplemented
    if not indices.numel():
        return indices.new_empty((*indices.shape, weight.shape[1]), dtype=weight.dtype)
    return _rows(weight, indices.flatten()).dequantize().view(*indices.shape, -1)


# --- joining -------------------------------------------------------------------------------------


@implements(aten.cat.default)
def _cat(weights: Sequence[Tensor], dim: int = 0) -> Any:
    packed = [weight for weight in weights if isinstance(weight, Int4TileTensor)]
    if len(packed) != len(weights):
        return NotImplemented
    first = packed[0]
    dim = _wrapped(dim, first.ndim)
    if any(weight.axes != first.axes for weight in packed):
        return NotImplemented
    for weight in packed[1:]:
        if len(weight.shape) != len(first.shape) or any(
            have != want
            for d, (have, want) in enumerate(zip(weight.shape, first.shape, strict=True))
            if d != dim
        ):
            shapes = ", ".join(str(tuple(weight.shape)) for weight in packed)
            raise ValueError(f"cannot join {shapes} along axis {dim}: other axes differ")
    if len({weight.dtype for weight in packed}) > 1:
        return NotImplemented
    if len({weight.activations for weight in packed}) > 1:  # what costs no accuracy
        packed = [weight.like(activations=None) for weight in packed]
    if first.axes[dim] == NEW_AXIS:
        packed = [_with_new_axis_stored(weight, dim) for weight in packed]
    axis = packed[0].axes[dim]
    # Drop padded rows that tiles do not need: their number may differ between the weights.
    packed = [_slice_rows(weight, 0, weight.n) for weight in packed]
    if axis == packed[0].batch_axes + 1:
        return _cat_columns(packed)
    packed = _with_equal_columns(packed)
    if not packed or not all(weight.multiplies_alike(packed[0]) for weight in packed):
        return NotImplemented
    return _cat_rows(packed) if axis == packed[0].batch_axes else _cat_batch(packed, axis)


@implements(aten.constant_pad_nd.default)
def _constant_pad_nd(weight: Int4TileTensor, pad: Sequence[int], value: float = 0) -> Any:
    """Zeros at the end of one axis: DTensor fills up the parts of an uneven split."""
    at_end = {weight.ndim - 1 - index: more for index, more in enumerate(pad[1::2]) if more}
    if any(pad[::2]) or value != 0 or min(at_end.values(), default=0) < 0 or len(at_end) > 1:
        return NotImplemented
    for dim, more in at_end.items():
        shape = [more if axis == dim else size for axis, size in enumerate(weight.shape)]
        zeros = torch.zeros([shape[axis] for axis in _stored_order(weight)], device=weight.device)
        filling = Int4TileTensor.from_float(
            zeros.to(weight.dtype),
            Int4Config(
                group_size=weight.group_size,
                inner_k_tiles=weight.inner_k_tiles,
                activations=weight.activations,
            ),
        )
        weight = _cat([weight, filling.like(axes=weight.axes)], dim)
    return weight


def _stored_order(weight: Int4TileTensor) -> list[int]:
    """The logical axis of each stored axis."""
    return [weight.axes.index(axis) for axis in range(weight.batch_axes + 2)]


@implements(aten.stack.default)
def _stack(weights: Sequence[Tensor], dim: int = 0) -> Any:
    if not all(isinstance(weight, Int4TileTensor) for weight in weights):
        return NotImplemented
    return _cat([weight.unsqueeze(dim) for weight in weights], dim)


def _cat_columns(packed: Sequence[Int4TileTensor]) -> Int4TileTensor:
    """Join stored columns, padding included; `columns` tells which ones are logical."""
    packed = _with_equal_units(packed)
    columns: list[tuple[int, int]] = []
    before = 0
    for weight in packed:
        for start, stop in weight.columns:
            if columns and columns[-1][1] == before + start:
                columns[-1] = (columns[-1][0], before + stop)
            else:
                columns.append((before + start, before + stop))
        before += weight.stored.k_padded
    pre_scale = None
    if any(weight.pre_scale is not None for weight in packed):
        pre_scale = torch.cat([_factors(weight) for weight in packed])
    return packed[0].like(
        tiles=torch.cat([weight.tiles for weight in packed], -3),
        scale_and_zero=torch.cat([weight.scale_and_zero for weight in packed], -3),
        pre_scale=pre_scale,
        columns=tuple(columns),
        is_part=False,
    )


def _factors(weight: Int4TileTensor) -> Tensor:
    """The pre-scale, float32 ``[K]``; ones if there is none."""
    if weight.pre_scale is not None:
        return weight.pre_scale
    return torch.ones(weight.stored.k_padded, dtype=torch.float32, device=weight.device)


def _cat_rows(packed: Sequence[Int4TileTensor]) -> Int4TileTensor:
    """Join the rows of weights whose columns are stored at the same places."""
    parts = [weight.scale_and_zero[..., : weight.n, :] for weight in packed]
    words = [_words(weight).flatten(-5, -4)[..., : weight.n, :, :, :] for weight in packed]
    return _of_words(packed[0], torch.cat(words, -4), torch.cat(parts, -2))


def _cat_batch(packed: Sequence[Int4TileTensor], axis: int) -> Int4TileTensor:
    return packed[0].like(
        tiles=torch.cat([weight.tiles for weight in packed], axis),
        scale_and_zero=torch.cat([weight.scale_and_zero for weight in packed], axis),
        is_part=False,
    )


def _with_equal_units(packed: Sequence[Int4TileTensor]) -> list[Int4TileTensor]:
    """The same weights with the largest group_size and inner_k_tiles that all can have."""
    group = math.gcd(*(weight.group_size for weight in packed))
    inner = min(weight.inner_k_tiles for weight in packed)
    made = []
    for weight in packed:
        if weight.group_size != group:
            times = weight.group_size // group
            repeated = weight.scale_and_zero.repeat_interleave(times, -3)
            weight = weight.like(scale_and_zero=repeated, group_size=group)
        if weight.inner_k_tiles != inner:
            weight = weight.like(tiles=pack(unpack(weight.tiles), inner))
        made.append(weight)
    return made


def _with_equal_columns(packed: Sequence[Int4TileTensor]) -> list[Int4TileTensor]:
    """The same weights with columns stored at the same places; empty if no group size allows."""
    packed = _with_equal_units(packed)
    stored = {(weight.columns, weight.stored.k_padded) for weight in packed}
    if len(stored) == 1:
        return packed
    compacted = [_compacted(weight) for weight in packed]
    packed = _with_equal_units([weight for weight in compacted if weight is not None])
    if len(packed) < len(compacted):
        return []
    widest = max(weight.stored.k_padded for weight in packed)
    return [_widened(weight, widest) for weight in packed]


def _compacted(weight: Int4TileTensor) -> Int4TileTensor | None:
    """The same weight with its columns stored as one run from 0; None if no group size allows."""
    return weight if weight.is_whole else _stored_anew(weight)


def tight(weight: Int4TileTensor) -> Int4TileTensor | None:
    """The same weight, stored without rows and columns that belong to others or pad in vain.

    Weights of one shape that were cut from one weight are stored alike then, wherever they were
    cut. None if a part along K ends within a group: its neighbour then has none left.
    """
    part, weight = weight.is_part, _slice_rows(weight, 0, weight.n)
    k, group = sum(stop - start for start, stop in weight.columns), weight.plain_group
    whole = weight.is_whole and weight.stored.k_padded == -(-k // group) * group
    if k % group and (part or not whole):
        return None
    return weight if whole else _stored_anew(weight)


def _stored_anew(weight: Int4TileTensor) -> Int4TileTensor | None:
    group = weight.plain_group
    if group < 32:
        return None
    plain = weight.get_plain()
    made = Int4TileTensor.of_codes(
        *plain, group, weight.inner_k_tiles, weight.dtype, weight.plain_pre_scale
    )
    return made.like(axes=weight.axes, activations=weight.activations)


def _widened(weight: Int4TileTensor, k_padded: int) -> Int4TileTensor:
    """The same weight with columns of padding up to k_padded."""
    more = k_padded - weight.stored.k_padded
    if not more:
        return weight
    codes = F.pad(unpack(weight.tiles), (0, more), value=MIDDLE_CODE)
    groups = more // weight.group_size
    return weight.like(
        tiles=pack(codes, weight.inner_k_tiles),
        scale_and_zero=F.pad(weight.scale_and_zero, (0, 0, 0, 0, 0, groups)),
        pre_scale=None
        if weight.pre_scale is None
        else padded_pre_scale(weight.pre_scale, k_padded),
    )
