"""The int4 matmuls in CUDA C++: the sizes of their blocks, their arguments and where they run.

`FewRows` describes few_rows.cu, which runs on GPUs of compute capability 8.0 and newer; `ManyRows`
describes many_rows.cu, which is written for Hopper's wgmma. Both read the same tiles as the Triton
kernels, and write y in one launch.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from fxint4.kernels import nvrtc
from fxint4.kernels.devices import PerDevice
from fxint4.kernels.tensor_map import TensorMap, tensor_map

__all__ = [
    "FEW_ROWS",
    "STEP",
    "CudaBlocks",
    "FewRows",
    "ManyRows",
    "available",
    "kernel",
    "reads",
]

logger = logging.getLogger("fxint4")

FEW_ROWS = 8
"""The most rows of x that few_rows.cu takes."""
STEP = 128
"""Columns of k that both kernels multiply at a time."""

#: Bytes of shared memory of a multiprocessor of Hopper; each block takes 1024 besides its own.
_HOPPERS_SHARED = 228 * 2**10


class _FewArguments(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        *((f"{kind}{i}", ctypes.c_void_p) for i in range(4) for kind in ("tiles", "params")),
        ("y", ctypes.c_void_p),
        *((f"{kind}{i}", ctypes.c_int) for kind in ("n", "n_padded") for i in range(4)),
        *((name, ctypes.c_int) for name in ("M", "K", "k_padded")),
    )


class _ManyArguments(ctypes.Structure):
    _fields_ = (
        ("x", TensorMap),
        *((f"{kind}{i}", TensorMap) for kind in ("tiles", "params") for i in range(4)),
        ("y", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("n0", "n1", "n2", "n3", "M", "k_padded")),
    )


@dataclass(frozen=True)
class CudaBlocks(ABC):
    """What one block of threads computes, and how. The fields are macros of the kernel.

    Attributes:
        name: The kernel's name.
    """

    name: ClassVar[str]

    @staticmethod
    def of(name: str, sizes: Sequence[int]) -> CudaBlocks:
        """The blocks with these `CudaBlocks.sizes` of the kernel with this name."""
        [kind] = (kind for kind in (FewRows, ManyRows) if kind.name == name)
        return kind(*sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The values of all fields."""
        return astuple(self)

    @property
    @abstractmethod
    def features(self) -> int:
        """Out features of a block; they belong to one weight."""

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads of a block."""

    @abstractmethod
    def shared(self, group_size: int) -> int:
        """Bytes of shared memory of a block."""

    @abstractmethod
    def fault(self, m: int, k: int) -> str | None:
        """Why the kernel cannot multiply an x ``[m, k]``; None if it can."""

    @abstractmethod
    def arguments(
        self, x: Tensor, buffers: Sequence[Tensor], y: Tensor, sizes: Sequence[int], k_padded: int
    ) -> ctypes.Structure:
        """The arguments of the kernel.

        Args:
            x: bf16 or fp16 ``[M, K]``.
            buffers: The values of `fxint4.kernels.triton_linear.buffers_of`, in its order.
            y: ``[M, N]``, of the dtype of x.
            sizes: n of four weights, then n_padded of four.
            k_padded: Columns of the weights.
        """

    @abstractmethod
    def programs(self, m: int, ns: Sequence[int]) -> int:
        """The grid: blocks for x of m rows and weights of these out features."""

    def macros(
        self, group_size: int, half_inner: int, weights: int, dtype: torch.dtype
    ) -> tuple[tuple[str, int], ...]:
        """The macros that the kernel is compiled with.

        Args:
            group_size: Neighbouring k that share a scale and a zero.
            half_inner: inner_k_tiles / 2.
            weights: How many weights lie side by side, 1 to 4.
            dtype: Of x and y, bf16 or fp16.
        """
        return (
            *((field.name.upper(), getattr(self, field.name)) for field in fields(self)),
            ("GROUP", group_size),
            ("HALF_INNER", half_inner),
            ("WEIGHTS", weights),
            ("DTYPE_FP16", int(dtype is torch.float16)),
        )


@dataclass(frozen=True)
class FewRows(CudaBlocks):
    """Blocks of few_rows.cu, for up to 8 rows of x.

    Attributes:
        subtiles: Subtiles of 16 features that a warp multiplies.
        warps_n: Warps side by side along the features.
        warps_k: Warps that share the sum over k.
        prefetch: Steps of 128 columns that are loaded while another is multiplied.
        blocks: Blocks that a multiprocessor must have registers for.
    """

    name = "few_rows"

    subtiles: int
    warps_n: int
    warps_k: int
    prefetch: int
    blocks: int = 1

    def __str__(self) -> str:
        """The text of reports."""
        return f"{FEW_ROWS}x{self.features}, {self.warps_k} warps along K"

    @property
    def features(self) -> int:
        """Out features of a block; they belong to one weight."""
        return 16 * self.subtiles * self.warps_n

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_n * self.warps_k

    def shared(self, group_size: int) -> int:
        """Bytes of shared memory: for x, and at the end for the sums of all warps."""
        x = (self.prefetch + 1) * self.warps_k * FEW_ROWS * STEP * 2
        return max(x, 4 * self.warps_k * FEW_ROWS * (self.features + 4))

    def fault(self, m: int, k: int) -> str | None:
        """See `CudaBlocks.fault`."""
        return f"x has {m} rows: these blocks take at most {FEW_ROWS}" if m > FEW_ROWS else None

    def programs(self, m: int, ns: Sequence[int]) -> int:
        """The grid: blocks for x of m rows and weights of these out features."""
        return sum(-(-n // self.features) for n in ns)

    def arguments(
        self, x: Tensor, buffers: Sequence[Tensor], y: Tensor, sizes: Sequence[int], k_padded: int
    ) -> ctypes.Structure:
        """See `CudaBlocks.arguments`."""
        addresses = [tensor.data_ptr() for tensor in (x, *buffers, y)]
        return _FewArguments(*addresses, *sizes, *x.shape, k_padded)


@dataclass(frozen=True)
class ManyRows(CudaBlocks):
    """Blocks of many_rows.cu.

    Attributes:
        rows: Rows of x, 64, 128, 192 or 256.
        warpgroups: Warpgroups of 128 threads that multiply; one more loads.
        subtiles: Subtiles of 64 features that a warpgroup multiplies.
        splits: Blocks of a cluster, which share the sum over k.
        blocks_per_sm: Blocks that a multiprocessor must have registers and shared memory for.
    """

    name = "many_rows"

    rows: int
    warpgroups: int
    subtiles: int
    splits: int = 1
    blocks_per_sm: int = 1

    def __str__(self) -> str:
        """The text of reports."""
        splits = f", {self.splits} splits" if self.splits > 1 else ""
        return f"{self.rows}x{self.features}{splits}"

    @property
    def features(self) -> int:
        """Out features of a block; they belong to one weight."""
        return 64 * self.warpgroups * self.subtiles

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * self.warpgroups + 128

    def shared(self, group_size: int) -> int:
        """Bytes of shared memory: stages of x, W and parameters, at the end sums; and barriers."""
        stages = self.stages(group_size)
        sums = self.rows * (self.features + 4) * 4
        return max(stages * self._stage(group_size), sums) + 16 * stages

    def stages(self, group_size: int) -> int:
        """Steps that shared memory holds: as many as fit."""
        return (_HOPPERS_SHARED // self.blocks_per_sm - 1024) // (self._stage(group_size) + 16)

    def _stage(self, group_size: int) -> int:
        parameters = self.features * -(-STEP // group_size) * 4
        return self.rows * STEP * 2 + self.features * STEP // 2 + parameters

    def macros(
        self, group_size: int, half_inner: int, weights: int, dtype: torch.dtype
    ) -> tuple[tuple[str, int], ...]:
        """See `CudaBlocks.macros`."""
        macros = super().macros(group_size, half_inner, weights, dtype)
        return (*macros, ("STAGES", self.stages(group_size)))

    def fault(self, m: int, k: int) -> str | None:
        """See `CudaBlocks.fault`."""
        least = STEP * self.splits
        if k >= least:
            return None
        return f"x has {k} columns: {self.splits} splits of {STEP} columns and more need {least}"

    def programs(self, m: int, ns: Sequence[int]) -> int:
        """The grid: blocks for x of m rows and weights of these out features."""
        return self.splits * -(-m // self.rows) * sum(-(-n // self.features) for n in ns)

    def arguments(
        self, x: Tensor, buffers: Sequence[Tensor], y: Tensor, sizes: Sequence[int], k_padded: int
    ) -> ctypes.Structure:
        """See `CudaBlocks.arguments`."""
        maps = [tensor_map(x, (self.rows, 64), swizzled=True)]
        tiles = (self.features // 8, STEP)
        maps += [tensor_map(t.view(-1, k_padded), tiles) for t in buffers[::2]]
        group_size = k_padded // len(buffers[1])
        params = (-(-STEP // group_size), self.features)
        maps += [tensor_map(p.view(torch.int32)[..., 0], params) for p in buffers[1::2]]
        return _ManyArguments(*maps, y.data_ptr(), *sizes[:4], len(x), k_padded)


def available(device: torch.device) -> bool:
    """Whether these kernels run on a device.

    It is tried with a kernel that does nothing: NVRTC may lack a library, or the driver may be too
    old for NVRTC's code.
    """
    if device.type != "cuda" or torch.version.cuda is None or nvrtc.version() is None:
        return False
    return _loads(device)


@PerDevice
def _loads(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        nvrtc.Kernel("nothing", (), device, threads=32, shared=0)
    except RuntimeError as error:
        logger.debug("no CUDA C++ kernels on %s, Triton's are taken instead: %s", device, error)
        return False
    return True


def reads(x: Tensor, buffers: Sequence[Tensor]) -> bool:
    """Whether the kernels, which load 16 aligned bytes at a time, can read these tensors.

    Args:
        x: bf16 or fp16 ``[M, K]``, contiguous.
        buffers: Tiles and scale_and_zero of all weights.
    """
    return x.shape[1] % 8 == 0 and all(t.data_ptr() % 16 == 0 for t in (x, *buffers))


@functools.cache
def kernel(
    blocks: CudaBlocks,
    group_size: int,
    half_inner: int,
    weights: int,
    dtype: torch.dtype,
    device: torch.device,
) -> nvrtc.Kernel:
    """The kernel, compiled and loaded once.

    Args:
        blocks: Its blocks.
        group_size: Neighbouring k that share a scale and a zero.
        half_inner: inner_k_tiles / 2.
        weights: How many weights lie side by side, 1 to 4.
        dtype: Of x and y, bf16 or fp16.
        device: A CUDA device with its index.

    Raises:
        RuntimeError: NVRTC cannot compile it, or the driver refuses it.
    """
    macros = blocks.macros(group_size, half_inner, weights, dtype)
    shared = blocks.shared(group_size)
    return nvrtc.Kernel(blocks.name, macros, device, blocks.threads, shared)
