"""The int4 matmuls in CUDA C++: the sizes of their blocks, their arguments and where they run.

`FewRows` describes few_rows.cu, which runs on GPUs of compute capability 8.0 and newer; `ManyRows`
describes many_rows.cu and `Fp8Rows` fp8_rows.cu, which are written for Hopper's wgmma. All read the
same tiles as the Triton kernels, and write y in one launch; `Fp8Rows` quantizes x in a launch of
its own.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, ClassVar

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
    "Fp8Rows",
    "ManyRows",
    "QuantizedRows",
    "available",
    "kernel",
    "quantize_rows",
    "reads",
]

logger = logging.getLogger("fxint4")

FEW_ROWS = 8
"""The most rows of x that few_rows.cu takes."""
STEP = 128
"""Columns of k that the kernels multiply at a time."""
E4M3 = torch.float8_e4m3fn

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


class _Fp8Arguments(ctypes.Structure):
    _fields_ = (
        *((name, TensorMap) for name in ("x", "x_sums")),
        *((f"{kind}{i}", TensorMap) for kind in ("tiles", "params") for i in range(4)),
        *((f"pairs{i}", ctypes.c_void_p) for i in range(4)),
        *((name, ctypes.c_void_p) for name in ("x_scales", "y")),
        *((f"{kind}{i}", ctypes.c_int) for kind in ("n", "n_padded") for i in range(4)),
        *((name, ctypes.c_int) for name in ("M", "k_padded", "lasting")),
    )


class _QuantizeArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "x8", "scales", "sums")),
        *((name, ctypes.c_int) for name in ("K", "columns", "all_sums")),
    )


@dataclass(frozen=True)
class QuantizedRows:
    """x ``[M, K]`` in e4m3, as quantize_rows.cu writes it for `Fp8Rows`.

    Attributes:
        values: e4m3 ``[M, columns]``, permuted inside each 32 columns; zeros from K on.
        scales: fp32 ``[M]``: the largest magnitude of each row over 448.
        sums: fp32 ``[M, groups]``: of `values` over groups of columns; zeros after the last group.
    """

    values: Tensor
    scales: Tensor
    sums: Tensor


@dataclass(frozen=True)
class CudaBlocks(ABC):
    """What one block of threads computes, and how. The fields are macros of the kernel.

    Attributes:
        name: The kernel's name.
        follows: Whether it may be a dependent launch whatever the weights, because its argument
            `lasting` tells it when to read them (see `nvrtc.Kernel.launch`).
    """

    name: ClassVar[str]
    follows: ClassVar[bool] = False

    @staticmethod
    def of(name: str, sizes: Sequence[int]) -> CudaBlocks:
        """The blocks with these `CudaBlocks.sizes` of the kernel with this name."""
        [kind] = (kind for kind in (FewRows, ManyRows, Fp8Rows) if kind.name == name)
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

    def operand(self, x: Tensor, group_size: int) -> Any:
        """What the kernel reads of x: x itself, or what this launches a kernel for.

        Args:
            x: bf16 or fp16 ``[M, K]``, contiguous.
            group_size: Neighbouring k that share a scale and a zero.
        """
        return x

    @abstractmethod
    def arguments(
        self,
        x: Any,
        buffers: Sequence[Tensor],
        y: Tensor,
        sizes: Sequence[int],
        k_padded: int,
        lasting: bool = False,
    ) -> ctypes.Structure:
        """The arguments of the kernel.

        Args:
            x: See `operand`.
            buffers: The values of `fxint4.kernels.triton_linear.buffers_of`, in its order.
            y: ``[M, N]``, of the dtype of x.
            sizes: n of four weights, then n_padded of four.
            k_padded: Columns of the weights.
            lasting: Whether nothing in the CUDA graph that is captured writes the weights.
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
        self,
        x: Any,
        buffers: Sequence[Tensor],
        y: Tensor,
        sizes: Sequence[int],
        k_padded: int,
        lasting: bool = False,
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
        unit: Steps of 128 columns that splits may not share.
    """

    name = "many_rows"
    unit: ClassVar[int] = 1
    _x_bytes: ClassVar[int] = 2  # of an item

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
        return self.rows * STEP * self._x_bytes + self.features * STEP // 2 + parameters

    def macros(
        self, group_size: int, half_inner: int, weights: int, dtype: torch.dtype
    ) -> tuple[tuple[str, int], ...]:
        """See `CudaBlocks.macros`."""
        macros = super().macros(group_size, half_inner, weights, dtype)
        return (*macros, ("STAGES", self.stages(group_size)))

    def fault(self, m: int, k: int) -> str | None:
        """See `CudaBlocks.fault`."""
        unit = STEP * self.unit
        least = STEP if self.splits == 1 else unit * self.splits
        if k >= least:
            return None
        return f"x has {k} columns: {self.splits} splits of {unit} columns and more need {least}"

    def programs(self, m: int, ns: Sequence[int]) -> int:
        """The grid: blocks for x of m rows and weights of these out features."""
        return self.splits * -(-m // self.rows) * sum(-(-n // self.features) for n in ns)

    def arguments(
        self,
        x: Any,
        buffers: Sequence[Tensor],
        y: Tensor,
        sizes: Sequence[int],
        k_padded: int,
        lasting: bool = False,
    ) -> ctypes.Structure:
        """See `CudaBlocks.arguments`."""
        maps = [self._x_map(x), *self._maps_of_weights(buffers, k_padded)]
        return _ManyArguments(*maps, y.data_ptr(), *sizes[:4], len(x), k_padded)

    def _x_map(self, x: Tensor) -> TensorMap:
        """Of boxes with rows of 128 bytes."""
        return tensor_map(x, (self.rows, 128 // x.itemsize), swizzled=True)

    def _maps_of_weights(self, buffers: Sequence[Tensor], k_padded: int) -> list[TensorMap]:
        tiles = (self.features // 8, STEP)
        group_size = k_padded // len(buffers[1])
        params = (-(-STEP // group_size), self.features)
        return [
            *(tensor_map(t.view(-1, k_padded), tiles) for t in buffers[::2]),
            *(tensor_map(p.view(torch.int32)[..., 0], params) for p in buffers[1::2]),
        ]


@dataclass(frozen=True)
class Fp8Rows(ManyRows):
    """Blocks of fp8_rows.cu, which multiplies x in e4m3; rows are 64 or 128."""

    name = "fp8_rows"
    unit = 4
    follows = True
    _x_bytes = 1

    def __str__(self) -> str:
        """The text of reports."""
        return f"fp8 {super().__str__()}"

    def fault(self, m: int, k: int) -> str | None:
        """See `CudaBlocks.fault`."""
        if k > _MOST_QUANTIZED:
            return f"x has {k} columns: in fp8 there are at most {_MOST_QUANTIZED}"
        return super().fault(m, k)

    def operand(self, x: Tensor, group_size: int) -> QuantizedRows:
        """See `CudaBlocks.operand`; raises ValueError for an x in fp16."""
        if x.dtype is not torch.bfloat16:
            raise ValueError(f"x is {x.dtype}: it is multiplied in fp8 from bfloat16 alone")
        return quantize_rows(x, min(group_size, STEP))

    def arguments(
        self,
        x: Any,
        buffers: Sequence[Tensor],
        y: Tensor,
        sizes: Sequence[int],
        k_padded: int,
        lasting: bool = False,
    ) -> ctypes.Structure:
        """See `CudaBlocks.arguments`."""
        maps = [self._x_map(x.values), self._x_map(x.sums)]
        maps += self._maps_of_weights(buffers, k_padded)
        addresses = [tensor.data_ptr() for tensor in (*buffers[1::2], x.scales, y)]
        return _Fp8Arguments(*maps, *addresses, *sizes, len(y), k_padded, lasting)


#: Columns of x for a thread of quantize_rows.cu, threads of a block, and columns that they take
#: with four times as many each.
_CHUNK, _MOST_THREADS, _MOST_QUANTIZED = 32, 512, 4 * 32 * 512


def quantize_rows(x: Tensor, group: int) -> QuantizedRows:
    """Writes x in e4m3.

    Args:
        x: bf16 ``[M, K]``, contiguous, on a GPU of compute capability 8.9 or newer; K is a multiple
            of 8, and at most 65536.
        group: Columns to sum up, 32, 64 or 128.

    Raises:
        RuntimeError: NVRTC is missing or does not compile the kernel, or the driver refuses it.
    """
    m, k = x.shape
    columns, groups = -(-k // _CHUNK) * _CHUNK, -(-k // (4 * group)) * 4
    values = x.new_empty((m, columns), dtype=E4M3)
    scales, sums = (x.new_empty(size, dtype=torch.float32) for size in ((m,), (m, groups)))
    addresses = [tensor.data_ptr() for tensor in (x, values, scales, sums)]
    arguments = _QuantizeArguments(*addresses, k, columns, groups)
    _quantizer(groups * group, group, x.device).launch(m, arguments, dependent=True)
    return QuantizedRows(values, scales, sums)


@functools.cache
def _quantizer(columns: int, group: int, device: torch.device) -> nvrtc.Kernel:
    chunks = -(-columns // _CHUNK)
    threads = min(_MOST_THREADS, -(-chunks // 32) * 32)
    of_tiles = (("HALF_INNER", 1), ("WEIGHTS", 1), ("DTYPE_FP16", 0))
    macros = (("CHUNKS", -(-chunks // threads)), ("GROUP", group), *of_tiles)
    return nvrtc.Kernel("quantize_rows", macros, device, threads, 0)


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
