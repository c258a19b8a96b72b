"""What Inductor makes of experts' int4 matmuls in a package for a GPU.

The ops of experts need fxint4 and Python where they run, and a package has neither. What they do is
Inductor's there: it casts, and orders the rows where each names its expert, and launches the Triton
kernel as it launches its own. Where the number of rows varies, every run launches the kernel in all
blocks that there are, with no programs where that number asks for others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxint4._pytorch import inductor
from fxint4._pytorch.tensors import aten
from fxint4.kernels import triton_common, triton_experts
from fxint4.kernels.triton_common import Launch

__all__ = ["lowerings", "package_fault"]


def package_fault(device: torch.device) -> str | None:
    """Why a package for a device can't multiply by packed experts, or None where it can."""
    if device.type != "cuda":
        return f"a package for {device.type} has no kernel for packed experts"
    if triton_common.triton is None:
        return "a package's kernel for packed experts needs Triton to be compiled"
    return None


def lowerings() -> Mapping[Any, Callable[..., Any]]:
    """For each op of experts the function that lowers it."""
    ours = torch.ops.fxint4
    multiply: dict[Any, Callable[..., Any]] = {
        ours.bmm.default: _bmm,
        ours.grouped_mm.default: _grouped_mm,
        ours.indexed_mm.default: _indexed_mm,
    }
    return {op: functools.partial(_lower, op, function) for op, function in multiply.items()}


def _lower(op: Any, multiply: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    """The op as launches in a package, and elsewhere as it is."""
    if inductor.is_aot() and package_fault(x.get_device()) is None:
        return multiply(x, *args, **kwargs)
    return inductor.call_fallback(op, x, *args, **kwargs)


# Below, tensors are Inductor's values, of the shapes and dtypes that `fxint4.weights.ops`
# describes.


def _bmm(x: Any, tiles: Any, scale_and_zero: Any, group_size: int, n: int) -> Any:
    count, rows, k = x.get_size()
    ends = inductor.call(aten.mul.Tensor, _numbers(1, count, torch.int32, x.get_device()), rows)
    x = inductor.call(aten.view.default, x, [count * rows, k])
    y = _grouped_mm(x, tiles, scale_and_zero, ends, group_size, n)
    return inductor.call(aten.view.default, y, [count, rows, n])


def _grouped_mm(x: Any, tiles: Any, scale_and_zero: Any, offs: Any, group_size: int, n: int) -> Any:
    ends = inductor.to_dtype(torch.int32, offs)
    return _multiplied(x, tiles, scale_and_zero, ends, group_size, n, by_row=False)


def _indexed_mm(x: Any, tiles: Any, scale_and_zero: Any, ids: Any, group_size: int, n: int) -> Any:
    rows, count = x.get_size()[0], int(tiles.get_size()[0])
    negative = inductor.call(aten.lt.Scalar, ids, 0)
    ids = inductor.call(aten.where.self, negative, inductor.call(aten.add.Tensor, ids, count), ids)
    known = inductor.static(rows)
    if known is not None and not triton_experts.better_sorted(known, count):
        return _multiplied(x, tiles, scale_and_zero, ids, group_size, n, by_row=True)
    # Inductor's own lowering of it may take the number of rows for a small one.
    ordered, order = inductor.call_fallback(aten.sort.default, ids)
    each = _numbers(0, count, ids.get_dtype(), ids.get_device())
    ends = inductor.call(aten.searchsorted.Tensor, ordered, each, out_int32=True, right=True)
    in_order = inductor.call(aten.index.Tensor, x, [order])
    product = _grouped_mm(in_order, tiles, scale_and_zero, ends, group_size, n)
    y = inductor.empty([rows, n], x, x.get_dtype())
    return inductor.call(aten.index_put_.default, y, [order], product)


def _multiplied(
    x: Any, tiles: Any, scale_and_zero: Any, of_experts: Any, group_size: int, n: int, by_row: bool
) -> Any:
    """The product of ``[S, K]``: ``[S, n]``, in x's dtype.

    Args:
        x: of any float dtype.
        tiles: of each expert.
        scale_and_zero: of each expert.
        of_experts: where the rows of each end, int32, or by row the expert of each.
        group_size: of all weights.
        n: out features of each.
        by_row: whether each row names its expert.
    """
    dtype = x.get_dtype()
    x = inductor.to_dtype(torch.bfloat16, x)
    rows, k = x.get_size()
    given = {"x": x, "tiles": tiles, "scale_and_zero": scale_and_zero, "experts": of_experts}
    shapes = {name: _without_numbers(value) for name, value in given.items()}
    triton_experts.check(**shapes, group_size=group_size, n=n, by_row=by_row)
    y = inductor.empty([rows, n], x, torch.bfloat16)
    pointers = ("x_ptr", "tiles_ptr", "params_ptr", "experts_ptr")
    tensors = dict(zip(pointers, map(inductor.contiguous, given.values()), strict=True))
    sizes, shared = [*map(int, tiles.get_size())], triton_experts.shared_of(x.get_device())
    for launch in _launches(rows, int(k), sizes, group_size, n, by_row, shared):
        inductor.launch_triton(
            launch.kernel,
            launch.programs,
            {**tensors, "y_ptr": y},
            launch.arguments,
            {"y_ptr"},
            launch.warps,
            launch.stages,
        )
    return inductor.to_dtype(dtype, y)


def _launches(
    rows: Any, k: int, tiles: list[int], group_size: int, n: int, by_row: bool, shared: int
) -> Iterator[Launch]:
    """What multiplies a number of rows, at most one launch of which has programs.

    Args:
        rows: a size of Inductor's; by row it is known.
        k: in features of x.
        tiles: their shape.
        group_size: see `_multiplied`.
        n: see `_multiplied`.
        by_row: see `_multiplied`.
        shared: see `fxint4.kernels.triton_experts.launch_of`.
    """
    known = inductor.static(rows)
    if known is not None:
        if known:
            yield triton_experts.launch_of(
                known, k, tiles, group_size, n, by_row=by_row, shared=shared
            )
        return
    parts = _at_most(rows, tiles[0] + 1)
    for first, last, blocks in triton_experts.blocks_by_rows(tiles[0], shared):
        launch = triton_experts.launch_of(1, k, tiles, group_size, n, by_row=False, blocks=blocks)
        row_blocks = inductor.floor_div(rows + (blocks.rows - 1) * parts, blocks.rows)
        there = inductor.indicator(rows, first, last)
        yield replace(
            launch,
            programs=there * row_blocks * launch.programs,  # of one block of rows
            arguments={**launch.arguments, "M": rows},
        )


def _numbers(start: int, count: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Neighbouring integers."""
    told = {"step": 1, "dtype": dtype, "device": device, "requires_grad": False}
    return inductor.call(torch.ops.prims.iota.default, count, start=start, **told)


def _at_most(size: Any, most: int) -> Any:
    """The smaller one of a size and a number."""
    return size - (size - most) * inductor.indicator(size, most, None)


def _without_numbers(value: Any) -> Tensor:
    """A tensor of a value's shape and dtype; sizes that vary are 1."""
    known = [inductor.static(size) for size in value.get_size()]
    size = [1 if each is None else each for each in known]
    return torch.empty(size, dtype=value.get_dtype(), device="meta")
