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
    # Without kernels in CUDA C++, whose arguments take the host long to make.
    choice = select_kernel(shape, device, "python", in_cuda=False)
    whole = n == 8 * tiles[0] and max(m * k, m * n) < 2**31  # what the op can count
    if choice.kernel == "aten" and dtype is torch.bfloat16 and whole:
        return functools.partial(_aten, group_size)
    sizes, k_padded, half_inner = triton_linear.sizes_of([tiles], [n])
    of_weight = (sizes, k_padded, group_size, half_inner, dtype)
    if isinstance(choice.blocks, Blocks):
        launch = triton_linear.launch_of(m, k, *of_weight, choice.blocks, reduce=True)
        return _Fused(m, n, _PreparedLaunch(launch, device), choice.blocks)
    if choice.kernel == "dequantize":
        launch = triton_linear.dequantize_launch_of(k, *of_weight)
        return _Dense(n, k, _PreparedLaunch(launch, device))
    return functools.partial(_any, group_size, n, choice)


class _PreparedLaunch:
    """A launch of a Triton kernel on tensors whose addresses are all that changes.

    Args:
        launch: The launch.
        device: A CUDA device with its index.
    """

    def __init__(self, launch: Launch, device: torch.device) -> None:
        self.launch = launch
        self._device = device.index
        self._names = launch.tensor_names()
        self._rest = launch.in_order(dict.fromkeys(self._names))[len(self._names) :]
        self._runner: Any = None

    def order(self, *names: str) -> list[int]:
        """For each tensor of the signature the position of its name; any of W's stand for all."""
        return [
            next(i for i, known in enumerate(names) if name.startswith(known))
            for name in self._names
        ]

    def __call__(self, tensors: Sequence[Tensor], aligned: bool) -> None:
        """Launch the kernel.

        Args:
            tensors: In the order of its signature.
            aligned: Whether all begin at a multiple of 16 bytes.
        """
        if self._runner is not None and aligned and self._device == current_device():
            self._runner(*tensors, *self._rest, stream=current_stream(self._device))
            return
        named = dict(zip(self._names, tensors, strict=True))
        run(self.launch, named)
        self._runner = runner_of(self.launch, named)


class _Fused:
    """The Triton kernel that unpacks W in registers.

    Args:
        m: Rows of x.
        n: Out features.
        launch: The launch.
        blocks: What each program computes.
    """

    def __init__(self, m: int, n: int, launch: _PreparedLaunch, blocks: Blocks) -> None:
        self._size = (m, n)
        self._launch = launch
        self._order = launch.order("x", "y", "partial", "counters", "tiles", "params")
        shared = int(triton_linear.shared_programs(launch.launch))
        self._partial = shared * blocks.rows * blocks.features
        self._counters = shared // int(launch.launch.arguments["SPLITS"]) if shared else 0

    def __call__(self, x: Tensor, tiles: Tensor, scale_and_zero: Tensor) -> Tensor:
        y = x.new_empty(self._size)
        partial = counted = y  # a stand-in where the launch uses none
        if self._counters:
            partial = x.new_empty(self._partial, dtype=torch.float32)
            counted = counters.zeroed(self._counters, x)
        given = (x, y, partial, counted, tiles, scale_and_zero)
        aligned = not (x.data_ptr() | tiles.data_ptr() | scale_and_zero.data_ptr()) & 15
        self._launch([given[place] for place in self._order], aligned)
        return y


class _Dense:
    """W is written out, and cuBLAS multiplies.

    Args:
        n: Out features.
        k: Columns of x.
        launch: The launch that writes W out.
    """

    def __init__(self, n: int, k: int, launch: _PreparedLaunch) -> None:
        self._size = (n, k)
        self._launch = launch
        self._order = launch.order("w", "tiles", "params")

    def __call__(self, x: Tensor, tiles: Tensor, scale_and_zero: Tensor) -> Tensor:
        w = x.new_empty(self._size)
        given = (w, tiles, scale_and_zero)
        aligned = not (tiles.data_ptr() | scale_and_zero.data_ptr()) & 15
        self._launch([given[place] for place in self._order], aligned)
        return x @ w.T


def _aten(group_size: int, x: Tensor, tiles: Tensor, scale_and_zero: Tensor) -> Tensor:
    return aten._weight_int4pack_mm.default(x, tiles, group_size, scale_and_zero)  # type: ignore[no-any-return]


def _any(
    group_size: int, n: int, choice: Choice, x: Tensor, tiles: Tensor, scale_and_zero: Tensor
) -> Tensor:
    return triton_linear.linears(x, [(tiles, scale_and_zero)], group_size, [n], choice)
