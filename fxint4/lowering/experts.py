"""Lowers the int4 matmuls of experts for packages on a GPU.

The ops of experts need fxint4 and Python where they run, and a package has neither. So Inductor
generates their code in a package: it casts, sorts the rows if each row names its expert, and
launches the Triton kernel like its own. If the number of rows varies, every run reaches a launch
for each size of blocks, and all but the one that suits the number have no programs.
"""

from __future__ import annotations

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
    """Why a package for a device cannot multiply by packed experts; None if it can."""
    if device.type != "cuda":
        return f"a package for {device.type} has no kernel for packed experts"
    if triton_common.triton is None:
        return "a package's kernel for packed experts needs Triton to be compiled"
    return None


def lowerings() -> Mapping[Any, Callable[..., Any]]:
    """The function that lowers each op of experts in a package."""
    ours = torch.ops.fxint4
    return {
        ours.bmm.packaged: _bmm,
        ours.grouped_mm.packaged: _grouped_mm,
        ours.indexed_mm.packaged: _indexed_mm,
    }


# Below, tensors are values of Inductor's IR. `fxint4.weights.ops` describes shapes and dtypes.


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
    # Inductor's own lowering of sort may assume that the number of rows is small.
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
    """Each row of x times the weight of its expert: ``[S, n]``, in the dtype of x.

    Args:
        x: ``[S, K]``, of any float dtype.
        tiles: int32 ``[E, Np/8, Kp/(16*inner_k_tiles), 32, inner_k_tiles/2]``.
        scale_and_zero: bf16 ``[E, Kp/group_size, Np, 2]``.
        of_experts: int32 ``[E]``, where the rows of each expert end; by row, int32 or int64
            ``[S]``, the expert of each row.
        group_size: Neighbouring k that share a scale and a zero.
        n: Out features of each expert.
        by_row: Whether each row names its expert.
    """
    dtype = x.get_dtype()
    x = inductor.to_dtype(torch.bfloat16, x)
    rows, k = x.get_size()
    values = {"x": x, "tiles": tiles, "scale_and_zero": scale_and_zero, "experts": of_experts}
    metas = {name: _meta(value) for name, value in values.items()}
    triton_experts.check(**metas, group_size=group_size, n=n, by_row=by_row)
    y = inductor.empty([rows, n], x, torch.bfloat16)
    pointers = ("x_ptr", "tiles_ptr", "params_ptr", "experts_ptr")
    tensors = dict(zip(pointers, map(inductor.contiguous, values.values()), strict=True))
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
    """The launches for a number of rows; at run time at most one of them has programs.

    Args:
        rows: A size of Inductor's; a number if by_row.
        k: In features of x.
        tiles: The shape of the tiles.
        group_size: Neighbouring k that share a scale and a zero.
        n: Out features of each expert.
        by_row: Whether each row names its expert.
        shared: Bytes of shared memory that a program may have.
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
        active = inductor.indicator(rows, first, last)
        yield replace(
            launch,
            programs=active * row_blocks * launch.programs,  # launch has those of one row block
            arguments={**launch.arguments, "M": rows},
        )


def _numbers(start: int, count: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The integers start, start + 1, ...: ``[count]``."""
    options = {"step": 1, "dtype": dtype, "device": device, "requires_grad": False}
    return inductor.call(torch.ops.prims.iota.default, count, start=start, **options)


def _at_most(size: Any, most: int) -> Any:
    """The minimum of a size and a number."""
    return size - (size - most) * inductor.indicator(size, most, None)


def _meta(value: Any) -> Tensor:
    """A meta tensor of a value's shape and dtype; sizes that vary become 1."""
    known = [inductor.static(size) for size in value.get_size()]
    size = [1 if each is None else each for each in known]
    return torch.empty(size, dtype=value.get_dtype(), device="meta")
