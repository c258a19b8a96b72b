"""What Inductor makes of `aten._weight_int4pack_mm`, in force only inside our compile.

The graph keeps the op that PyTorch has; what runs is `fxint4.int4pack_mm`, which chooses among
kernels by the number of rows it is called with (`fxint4.kernels.linear.choose`). So one compiled
graph serves every M, and a CUDA graph holds the kernel of the M it was captured with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxint4._torch import aten

__all__ = ["lowered"]


def lowered(cuda_graphs: bool) -> Mapping[Any, Any]:
    """For each op the op that is called in its place, with the same arguments.

    Args:
        cuda_graphs: whether kernels are replayed from CUDA graphs, so that launching one costs
            nothing; else the op counts what a launch costs the host, too.
    """
    ours = torch.ops.fxint4
    op = ours.int4pack_mm.default if cuda_graphs else ours.int4pack_mm_launched.default
    return {aten._weight_int4pack_mm.default: op}
