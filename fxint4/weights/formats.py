"""On which devices packed weights run, and in which format for how many rows of activation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fxint4._pytorch.tensors import aten, mkldnn_supports
from fxint4.quant.tile_layout import TileShape

__all__ = [
    "UNBOUNDED",
    "Dense",
    "Format",
    "activation_dtype",
    "aten_op",
    "device_fault",
    "format_specs",
    "fuses",
    "int4_format",
    "most_int4_rows",
    "rows_multiple",
]

#: Rows up to which the CPU int4 op is faster than Inductor's dense matmul, by dtype of the model:
#: measured by benchmarks/cpu_matmul.py. Beyond, a dequantized copy is multiplied.
_CPU_ROWS = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 64}
#: A number of rows that none is above.
UNBOUNDED = 2**62


@dataclass(frozen=True)
class Dense:
    """A dequantized copy that stands where the original constant stood.

    Attributes:
        dtype: its dtype.
        size: its size, as the matmul reads it.
        stride: its strides, as the matmul reads it.
        axes: how its axes lie, a key of `fxint4.graph.constants.AXES`.
    """

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    axes: str


#: What a graph asks of a packed weight: "tiles" (int32 tiles and bf16 scale_and_zero, for
#: `aten._weight_int4pack_mm`), "cpu" (uint8 bytes and bf16 scale_and_zero, for
#: `aten._weight_int4pack_mm_for_cpu`), or a dense copy.
Format = str | Dense


@cache
def device_fault(device: torch.device) -> str | None:
    """Why packed weights do not run on a device, or None where they do."""
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


def rows_multiple(device: torch.device) -> int:
    """What N is padded to: the CUDA op reads tiles of 8 rows, the CPU op blocks of 16."""
    return 16 if device.type == "cpu" else 8


def int4_format(device: torch.device) -> Format:
    """The packed format that the device's int4 op reads."""
    return "cpu" if device.type == "cpu" else "tiles"


def activation_dtype(format: Format, dtype: torch.dtype) -> torch.dtype:
    """What activations are cast to for the int4 op of a format, and back from.

    Args:
        format: a packed format.
        dtype: of the activation.
    """
    native = format == "tiles" and dtype is torch.float16
    return dtype if native else torch.bfloat16


def aten_op(format: Format, dtype: torch.dtype, weights: int) -> Any | None:
    """ATen's op for a packed format, or None where `fxint4.linears` takes its place.

    Args:
        format: a packed format.
        dtype: of the activation, cast as `activation_dtype` says.
        weights: how many weights the matmul has.
    """
    if weights > 1 or dtype is not torch.bfloat16:
        return None  # ATen's ops take one weight, and bf16
    cpu = format == "cpu"
    return (aten._weight_int4pack_mm_for_cpu if cpu else aten._weight_int4pack_mm).default


def fuses(device: torch.device) -> bool:
    """Whether one matmul by several weights is faster than one by each.

    On a GPU it is: fewer launches, and more programs at a time to keep the memory busy.
    """
    return device.type == "cuda"


def most_int4_rows(device: torch.device, dtype: torch.dtype) -> int:
    """The largest M for which the int4 op is used; a `Dense` copy serves fallback it.

    Args:
        device: where the matmul runs.
        dtype: dtype of its activation.
    """
    if device.type == "cuda":
        return UNBOUNDED  # its lowering has a kernel for every M
    if dtype is torch.float32 or mkldnn_supports(dtype):
        return _CPU_ROWS[dtype]
    # Without hardware for it a dense fp16 or bf16 matmul is slower than the int4 op at every M.
    return UNBOUNDED


def choose(
    format: Format, fallback: Format | None, most_rows: int, rows: int | None
) -> Format | None:
    """The format for one matmul; None where it stays as it is.

    Args:
        format: the packed format of the device.
        fallback: what serves more rows than that; None where the matmul itself does.
        most_rows: the largest M for the packed format.
        rows: M; None where it is not known before the graph runs.
    """
    if rows == 0:  # the ops take no empty input
        return None
    return format if rows is not None and rows <= most_rows else fallback


def format_specs(
    shape: TileShape, format: Format
) -> tuple[tuple[tuple[int, ...], tuple[int, ...] | None, torch.dtype], ...]:
    """Size, stride (None: contiguous) and dtype of each tensor of a format."""
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
