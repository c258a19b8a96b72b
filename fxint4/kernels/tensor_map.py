"""Tensor maps: how Hopper's tensor memory accelerator finds a matrix."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from fxint4.kernels.nvrtc import in_context, needed

__all__ = ["TensorMap", "tensor_map"]


class TensorMap(ctypes.Structure):
    """CUtensorMap: the kernel argument by which boxes of a matrix are copied."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


def tensor_map(matrix: Tensor, box: tuple[int, int], swizzled: bool = False) -> TensorMap:
    """The tensor map of a matrix.

    Args:
        matrix: bf16, fp16, e4m3, fp32 or int32 ``[rows, columns]``, contiguous; its rows and its
            address are multiples of 16 bytes. Where a box goes beyond the matrix, it has zeros.
        box: Rows and columns of a box.
        swizzled: Whether the 16-byte chunks of a box's rows, which then have 128 bytes, lie in
            shared memory in the order in which wgmma reads them.

    Raises:
        RuntimeError: The driver refuses these sizes, or its bindings are missing.
    """
    rows, columns = matrix.shape
    address, device = matrix.data_ptr(), matrix.device
    return _tensor_map(matrix.dtype, address, device, rows, columns, box, swizzled)


@functools.lru_cache(maxsize=2**12)  # making a map takes longer than a launch
def _tensor_map(
    dtype: torch.dtype,
    address: int,
    device: torch.device,
    rows: int,
    columns: int,
    box: tuple[int, int],
    swizzled: bool,
) -> TensorMap:
    _, driver, _ = needed()
    types, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    kind = {
        torch.bfloat16: types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        torch.float8_e4m3fn: types.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        torch.float32: types.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        torch.int32: types.CU_TENSOR_MAP_DATA_TYPE_INT32,
    }[dtype]
    encode = functools.partial(
        driver.cuTensorMapEncodeTiled,
        kind,
        2,
        address,
        [driver.cuuint64_t(size) for size in (columns, rows)],
        [driver.cuuint64_t(columns * dtype.itemsize)],
        [driver.cuuint32_t(size) for size in reversed(box)],
        [driver.cuuint32_t(1)] * 2,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzles.CU_TENSOR_MAP_SWIZZLE_128B if swizzled else swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    result, made = in_context(driver, device, encode)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA has no boxes {box} of a matrix {(rows, columns)}: {result.name}")
    return TensorMap((ctypes.c_uint64 * 16)(*map(int, made.opaque)))
