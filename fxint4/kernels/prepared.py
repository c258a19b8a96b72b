"""Matmuls of eager code, prepared: all that the shape of x decides is decided once.

Between two kernels of eager code the GPU waits for the host. A call through an op's dispatcher, a
choice, checks and a launch whose arguments are looked up by name take the host longer than a small
matmul takes the GPU. Here a call allocates y and launches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from fxint4._pytorch.cuda import current_device, current_stream, empty
from fxint4.kernels import counters, triton_linear
from fxint4.kernels.select import MatmulShape, select_kernel
from fxint4.kernels.triton_common import Blocks, Launch, direct, run

__all__ = ["Prepared", "prepared"]

#: Multiplies x ``[..., K]`` by the transpose of a weight, given as tiles and scale_and_zero:
#: ``[..., n]``. All are contiguous and on the device that it was prepared for.
Prepared: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@functools.lru_cache(4096)
def prepared(
    rows: Sequence[int],
    k: int,
    n: int,
    tiles: Sequence[int],
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
    activations: str | None = None,
) -> Prepared | None:
    """A matmul of one shape; weights of one shape share it. None if no Triton kernel does it.

    Args:
        rows: The shape of x but for its last axis; no axis is 0.
        k: Columns of x, as many as the weight has, padding included.
        n: Out features to compute.
        tiles: The shape of the tiles of the weight, a matrix.
        group_size: Neighbouring k that share a scale and a zero.
        dtype: Of x, bf16 or fp16.
        device: A CUDA device with its index.
        activations: See `Int4Config.activations`.
    """
    m = math.prod(rows)
    shape = MatmulShape(m, n, k, group_size, 2 * tiles[-1], dtype, activations)
    choice = select_kernel(shape, device, "direct")
    sizes, k_padded, half_inner = triton_linear.sizes_of([tiles], [n])
    of_weight = (sizes, k_padded, group_size, half_inner, dtype)
    if isinstance(choice.blocks, Blocks):
        launch = triton_linear.launch_of(m, k, *of_weight, choice.blocks, reduce=True)
        return _Fused((*rows, n), dtype, device, launch, choice.blocks)
    if choice.kernel == "dequantize":
        launch = triton_linear.dequantize_launch_of(k, *of_weight)
        return _Dense((n, k), dtype, device, launch)
    return None


class _OfLaunch:
    """A matmul by a launch of a Triton kernel that differs in the addresses of tensors alone.

    Args:
        size: The shape of the tensor that the kernel writes.
        dtype: Its dtype.
        device: A CUDA device with its index.
        launch: The launch.
    """

    def __init__(
        self, size: Sequence[int], dtype: torch.dtype, device: torch.device, launch: Launch
    ) -> None:
        strides = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
        self._output = (tuple(size), tuple(strides), dtype)
        self._device = device.index
        self._launch = launch
        self._names = launch.tensor_names()
        self._direct: Callable[..., None] | None = None
        self._tried = False

    def __call__(self, x: Tensor, tiles: Tensor, scale_and_zero: Tensor) -> Tensor:
        if current_device() != self._device:
            with torch.cuda.device(self._device):
                return self(x, tiles, scale_and_zero)
        return self._product(x, tiles, scale_and_zero, current_stream(self._device))

    def _product(self, x: Tensor, tiles: Tensor, scale_and_zero: Tensor, stream: int) -> Tensor:
        """The product, on the current device and stream."""
        raise NotImplementedError

    def _order(self, *names: str) -> list[int]:
        """For each tensor of the signature the position of its name; any of W's stand for all."""
        return [
            next(i for i, known in enumerate(names) if name.startswith(known))
            for name in self._names
        ]

    def _run(self, tensors: Sequence[Tensor], stream: int) -> None:
        """Launch the kernel on the current stream.

        Args:
            tensors: In the order of its signature.
            stream: Its address.
        """
        addresses = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        aligned = not bits & 15  # as `run` asks for variants that it caches
        if aligned and self._direct is not None:
            self._direct(addresses, stream)
            return
        named = dict(zip(self._names, tensors, strict=True))
        run(self._launch, named)
        if aligned and not self._tried:
            self._direct, self._tried = direct(self._launch, named), True


class _Fused(_OfLaunch):
    """The Triton kernel that unpacks W in registers.

    Args:
        size: The shape of y.
        dtype: Of x and y.
        device: A CUDA device with its index.
        launch: The launch.
        blocks: What each program computes.
    """

    def __init__(
        self,
        size: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        launch: Launch,
        blocks: Blocks,
    ) -> None:
        super().__init__(size, dtype, device, launch)
        self._places = self._order("x", "y", "partial", "counters", "tiles", "params")
        shared = int(triton_linear.shared_programs(launch))
        self._partial = ((shared * blocks.rows * blocks.features,), (1,), torch.float32)
        self._counters = shared // int(launch.arguments["SPLITS"]) if shared else 0

    def _product(self, x: Tensor, tiles: Tensor, scale_and_zero: Tensor, stream: int) -> Tensor:
        y = empty(*self._output)
        partial = counted = y  # a stand-in where the launch uses none
        if self._counters:
            partial = empty(*self._partial)
            counted = counters.zeroed(self._counters, x)
        given = (x, y, partial, counted, tiles, scale_and_zero)
        self._run([given[place] for place in self._places], stream)
        return y


class _Dense(_OfLaunch):
    """W is written out, and cuBLAS multiplies.

    Args:
        size: The shape of W.
        dtype: Of W.
        device: A CUDA device with its index.
        launch: The launch that writes W out.
    """

    def __init__(
        self, size: Sequence[int], dtype: torch.dtype, device: torch.device, launch: Launch
    ) -> None:
        super().__init__(size, dtype, device, launch)
        # What scales e4m3 is not read here.
        self._places = self._order("w", "tiles", "params", "scales")

    def _product(self, x: Tensor, tiles: Tensor, scale_and_zero: Tensor, stream: int) -> Tensor:
        w = empty(*self._output)
        given = (w, tiles, scale_and_zero, w)
        self._run([given[place] for place in self._places], stream)
        return F.linear(x, w)
