"""Matmuls of eager code, prepared: all that the shape of x decides is decided once.

Between two kernels of eager code the GPU waits for the host. A call through an op's dispatcher, a
choice, checks and a launch whose arguments are looked up by name take the host longer than a small
matmul takes the GPU. Here a call allocates y and launches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fxint4._pytorch.cuda import current_device, current_stream
from fxint4._pytorch.tensors import aten
from fxint4.kernels import counters, triton_linear
from fxint4.kernels.select import Choice, MatmulShape, select_kernel
from fxint4.kernels.triton_common import Blocks, Launch, run, runner_of

__all__ = ["Prepared", "prepared"]

#: Multiplies x ``[M, K]`` by the transpose of a weight, given as tiles and scale_and_zero:
#: ``[M, n]``. All are contiguous and on the device that it was prepared for.
Prepared: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@functools.lru_cache(4096)
def prepared(
    m: int,
    k: int,
    n: int,
    tiles: Sequence[int],
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Prepared:
    """A matmul of one shape; weights of one shape share it.

    Args:
        m: Rows of x, at least 1.
        k: Columns of x, as many as the weight has, padding included.
        n: Out features to compute.
        tiles: The shape of the tiles of the weight, a matrix.
        group_size: Neighbouring k that share a scale and a zero.
        dtype: Of x, bf16 or fp16.
        device: A CUDA device with its index.
    """
    shape = MatmulShape(m, n, k, group_size, 2 * tiles[-1], dtype)
    choice = select_kernel(shape, device, "python")
    whole = n == 8 * tiles[0] and max(m * k, m * n) < 2**31  # what the op can count
    if choice.kernel == "aten" and dtype is torch.bfloat16 and whole:
        return functools.partial(_aten, group_size)
    if choice.kernel == "triton" and isinstance(choice.blocks, Blocks):
        return _Triton(m, k, n, tiles, group_size, dtype, device, choice.blocks)
    return functools.partial(_any, group_size, n, choice)


def _aten(group_size: int, x: Tensor, tiles: Tensor, scale_and_zero: Tensor) -> Tensor:
    return aten._weight_int4pack_mm.default(x, tiles, group_size, scale_and_zero)  # type: ignore[no-any-return]


def _any(
    group_size: int, n: int, choice: Choice, x: Tensor, tiles: Tensor, scale_and_zero: Tensor
) -> Tensor:
    return triton_linear.linears(x, [(tiles, scale_and_zero)], group_size, [n], choice)


class _Triton:
    """One launch of the Triton kernel.

    Args:
        m: See `prepared`, as for all others.
        k: See there.
        n: See there.
        tiles: See there.
        group_size: See there.
        dtype: See there.
        device: See there.
        blocks: What each program computes.
    """

    def __init__(
        self,
        m: int,
        k: int,
        n: int,
        tiles: Sequence[int],
        group_size: int,
        dtype: torch.dtype,
        device: torch.device,
        blocks: Blocks,
    ) -> None:
        sizes, k_padded, half_inner = triton_linear.sizes_of([tiles], [n])
        self._launch: Launch = triton_linear.launch_of(
            m, k, sizes, k_padded, group_size, half_inner, dtype, blocks, reduce=True
        )
        self._size = (m, n)
        self._device = device.index
        shared = int(triton_linear.shared_programs(self._launch))
        self._partial = shared * blocks.rows * blocks.features
        self._counters = shared // int(self._launch.arguments["SPLITS"]) if shared else 0
        names = self._launch.tensor_names()
        places = {"x_ptr": 0, "y_ptr": 1, "partial_ptr": 2, "counters_ptr": 3}
        #: Which of x, y, partial, counters, tiles and scale_and_zero each argument is.
        self._order = [places.get(name, 4 if name.startswith("tiles") else 5) for name in names]
        self._rest = self._launch.in_order(dict.fromkeys(names))[len(names) :]
        self._runner: Any = None

    def __call__(self, x: Tensor, tiles: Tensor, scale_and_zero: Tensor) -> Tensor:
        y = x.new_empty(self._size)
        partial = counted = y  # a stand-in where the launch uses none
        if self._counters:
            partial = x.new_empty(self._partial, dtype=torch.float32)
            counted = counters.zeroed(self._counters, x)
        given = (x, y, partial, counted, tiles, scale_and_zero)
        tensors = [given[place] for place in self._order]
        device = self._device
        if (
            self._runner is not None
            and device == current_device()
            and not (x.data_ptr() | tiles.data_ptr() | scale_and_zero.data_ptr()) % 16
        ):
            self._runner(*tensors, *self._rest, stream=current_stream(device))
            return y
        named: dict[str, Any] = dict(zip(self._launch.tensor_names(), tensors, strict=True))
        run(self._launch, named)
        self._runner = runner_of(self._launch, named)
        return y
