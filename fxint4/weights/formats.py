"""Packing formats: which devices have one, and how many rows of activation they serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fxint4._pytorch.tensors import aten, mkldnn_supports
from fxint4.kernels.devices import PerDevice
from fxint4.kernels.select import gpu_of
from fxint4.kernels.triton_common import triton
from fxint4.quant.tile_layout import TileShape

__all__ = [
    "UNBOUNDED",
    "Dense",
    "Format",
    "activation_dtype",
    "aten_op",
    "choose_format",
    "device_fault",
    "format_specs",
    "fp8_fault",
    "fuses",
    "has_fp8",
    "int4_format",
    "most_int4_rows",
    "rows_multiple",
]

#: The most rows for which the CPU int4 op is faster than Inductor's dense matmul, by dtype of the
#: model, measured by benchmarks/cpu_matmul.py. Above, a dequantized copy is multiplied.
_CPU_ROWS = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 64}
#: A limit of rows that is never reached.
UNBOUNDED = 2**62


@dataclass(frozen=True)
class Dense:
    """The format of a dequantized copy that replaces the original constant.

    Attributes:
        dtype: The dtype of the copy.
        size: Its size, as the matmul reads it.
        stride: Its strides, as the matmul reads it.
        axes: The order of its axes, a key of `fxint4.weights.expression.AXES`.
    """

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    axes: str


#: A packing format: "tiles" (int32 tiles and bf16 scale_and_zero, for `aten._weight_int4pack_mm`),
#: "cpu" (uint8 bytes and bf16 scale_and_zero, for `aten._weight_int4pack_mm_for_cpu`), or `Dense`.
Format = str | Dense


@PerDevice
def device_fault(device: torch.device) -> str | None:
    """Why packed weights do not run on a device, or None if they do."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"device {device.type} has no int4 matmul (CPU and CUDA have)"
    if torch.version.hip is not None:
        return "ROCm lays its int4 tiles out differently"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        have = ".".join(map(str, capability))
        return f"the GPU has compute capability {have}; int4 tiles need 8.0 (Ampere) or newer"
    return None


def has_fp8(device: torch.device, experts: bool = False) -> bool:
    """Whether a GPU multiplies e4m3, and there is Triton to write it; true for other devices.

    Args:
        device: A device.
        experts: Whether by many weights at a time.
    """
    gpu = gpu_of(device)
    return triton is not None and gpu.fp8 and (gpu.wgmma or not experts)


def fp8_fault(n: int, k: int, dtype: torch.dtype) -> str:
    """Why no GPU computes a matmul in fp8; empty if one could.

    Args:
        n: Out features of the weight.
        k: In features.
        dtype: Of the activation.
    """
    if dtype is not torch.bfloat16:
        return "only bf16 models have them in fp8"
    if n % 16 or k % 16:
        return f"fp8 takes sizes that 16 divides, not {n}x{k}"
    return ""


def rows_multiple(device: torch.device) -> int:
    """The number that N is padded to a multiple of: 8 for tiles, 16 for the CPU op's blocks."""
    return 16 if device.type == "cpu" else 8


def int4_format(device: torch.device) -> Format:
    """The packed format that the device's int4 op reads."""
    return "cpu" if device.type == "cpu" else "tiles"


def activation_dtype(format: Format, dtype: torch.dtype) -> torch.dtype:
    """The dtype that activations are cast to for the int4 op; the result is cast back.

    Args:
        format: "tiles" or "cpu".
        dtype: The dtype of the activation.
    """
    native = format == "tiles" and dtype is torch.float16
    return dtype if native else torch.bfloat16


def aten_op(format: Format, dtype: torch.dtype, weights: int) -> Any | None:
    """ATen's op for a packed format, or None if `fxint4::linears` is called instead.

    Args:
        format: "tiles" or "cpu".
        dtype: The dtype of the activation, after the cast to `activation_dtype`.
        weights: The number of weights of the matmul.
    """
    if weights > 1 or dtype is not torch.bfloat16:
        return None  # ATen's ops take one weight, and bf16
    cpu = format == "cpu"
    return (aten._weight_int4pack_mm_for_cpu if cpu else aten._weight_int4pack_mm).default


def fuses(device: torch.device) -> bool:
    """Whether one matmul by several weights is faster than one matmul by each.

    It is on a GPU: fewer launches, and more programs at a time keep the memory busy.
    """
    return device.type == "cuda"


def most_int4_rows(device: torch.device, dtype: torch.dtype) -> int:
    """The largest M for which the int4 op is used; above, the fallback is a `Dense` copy.

    Args:
        device: The device of the matmul.
        dtype: The dtype of its activation.
    """
    if device.type == "cuda":
        return UNBOUNDED  # its lowering has a kernel for every M
    if dtype is torch.float32 or (dtype in _CPU_ROWS and mkldnn_supports(dtype)):
        return _CPU_ROWS[dtype]
    # Without hardware for it a dense fp16 or bf16 matmul is slower than the int4 op at every M.
    return UNBOUNDED


def choose_format(
    format: Format, fallback: Format | None, most_rows: int, rows: int | None
) -> Format | None:
    """The format for one matmul; None if it is left alone.

    Args:
        format: The packed format of the device.
        fallback: The format above `most_rows`; None to leave the matmul alone there.
        most_rows: The largest M for the packed format.
        rows: M; None if it is not known before the graph runs.
    """
    if rows == 0:  # the ops take no empty input
        return None
    return format if rows is not None and rows <= most_rows else fallback


def format_specs(
    shape: TileShape, format: Format
) -> tuple[tuple[tuple[int, ...], tuple[int, ...] | None, torch.dtype], ...]:
    """Size, stride (None: contiguous) and dtype of each tensor of a weight in a format."""
    if isinstance(format, Dense):
        return ((format.size, format.stride, format.dtype),)
    further: list[tuple[tuple[int, ...], None, torch.dtype]]
    further = [(shape.scale_and_zero_shape, None, torch.bfloat16)]
    if shape.pre_scaled:
        further.append(((shape.k,), None, torch.float32))
    if format == "cpu":
        size = (*shape.batch, shape.n_padded, shape.k_padded // 2)
        return ((size, None, torch.uint8), *further)
    return ((shape.tiles_shape, None, torch.int32), *further)
