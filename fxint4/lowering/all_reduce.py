"""Small sums over the processes of a group, each by one kernel, in the place of NCCL's.

`torch.ops.fxint4.all_reduce` is in graphs that `use_one_shot` changed, and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxint4._pytorch.distributed import functional, one_shot_sum, size_of_group
from fxint4.graph.build import Build
from fxint4.graph.symbolic import value_of

__all__ = ["use_one_shot"]

#: The most bytes that a process reads of the others': each reads the whole of all of them. Two
#: H200s take 22 us for as many and NCCL 30; for 2**24 they take 134 and NCCL 76, which moves less.
MOST_BYTES = 2**21
#: Dtypes that PyTorch's kernel is compiled for.
_DTYPES = (torch.bfloat16, torch.float32)


def use_one_shot(gm: fx.GraphModule) -> None:
    """Let each sum over processes on GPUs be one op, which chooses how by its size.

    Args:
        gm: An aten graph whose nodes have fake values; changed in place.
    """
    changed = False
    for node in gm.graph.find_nodes(op="call_function", target=functional.wait_tensor.default):
        [reduced] = node.args
        if reduced.target != functional.all_reduce.default or len(reduced.users) > 1:
            continue
        x, how, group = reduced.args
        value = value_of(node)
        on_gpu = value.device.type == "cuda" and value.dtype in _DTYPES
        if on_gpu and how == "sum" and isinstance(group, str):
            # Not in the same node, which may tell Inductor the strides of another op's inputs.
            summed = Build(node, value.fake_mode)(torch.ops.fxint4.all_reduce.default, x, group)
            node.replace_all_uses_with(summed)
            gm.graph.erase_node(node)
            gm.graph.erase_node(reduced)
            changed = True
    if changed:
        gm.recompile()


def _all_reduce(x: Tensor, group: str) -> Tensor:
    few = 0 < x.nbytes * (size_of_group(group) - 1) <= MOST_BYTES
    if few and x.nbytes % 16 == 0:  # it reads 16 bytes at a time
        return one_shot_sum(x.contiguous(), group, MOST_BYTES)
    summed: Tensor = functional.wait_tensor(functional.all_reduce(x, "sum", group))
    return summed


def _shape(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library: Any = torch.library.Library("fxint4", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("all_reduce(Tensor x, str group) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("all_reduce", _all_reduce, "CUDA")
torch.library.register_fake("fxint4::all_reduce", _shape, lib=_library)
