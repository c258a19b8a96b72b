"""Small sums over the processes of a group, each by one kernel, in the place of NCCL's.

`torch.ops.fxint4.all_reduce` is in graphs that `use_one_shot` changed, and nowhere else.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, fx

from fxint4._pytorch.distributed import (
    functional,
    group_of,
    one_shot_sum,
    symmetric_memory,
)
from fxint4._pytorch.tensors import real_tensors
from fxint4.graph.build import Build
from fxint4.graph.symbolic import value_of

__all__ = ["use_one_shot"]

logger = logging.getLogger("fxint4")

#: The most bytes that a process reads of the others': each reads the whole of all of them. Two
#: H200s take 22 us for as many and NCCL 30; for 2**24 they take 134 and NCCL 76, which moves less.
MOST_BYTES = 2**21
#: Dtypes that PyTorch's kernel is compiled for.
_DTYPES = (torch.bfloat16, torch.float32)


def use_one_shot(gm: fx.GraphModule) -> None:
    """Let each sum over processes on GPUs be one op, which chooses how by its size.

    All processes of a group must come here with such a graph, as they must run it.

    Args:
        gm: An aten graph whose nodes have fake values; changed in place.

    Raises:
        OptionError: The GPUs don't reach each other's memory.
    """
    if not torch.distributed.is_available():
        return
    seen, changed = 0, 0
    for node in gm.graph.find_nodes(op="call_function", target=functional.wait_tensor.default):
        [reduced] = node.args
        if reduced.target != functional.all_reduce.default or len(reduced.users) > 1:
            continue
        seen += 1
        x, how, group = reduced.args
        value: Any = value_of(node)
        on_gpu = value.device.type == "cuda" and value.dtype in _DTYPES
        if on_gpu and how == "sum" and isinstance(group, str) and _may_be_few(value, group):
            with real_tensors():  # here, because a CUDA graph would take it for its own
                symmetric_memory(group, value.device, MOST_BYTES)
            # Not in the same node, which may tell Inductor the strides of another op's inputs.
            summed = Build(node, value.fake_mode)(torch.ops.fxint4.all_reduce.default, x, group)
            node.replace_all_uses_with(summed)
            gm.graph.erase_node(node)
            gm.graph.erase_node(reduced)
            changed += 1
    logger.debug("one_shot_all_reduce: %d of %d all-reduces of a graph", changed, seen)
    if changed:
        gm.recompile()


def _may_be_few(value: Tensor, group: str) -> bool:
    """Whether other processes have that much, or may have if a size is not known yet."""
    others: int = group_of(group).size() - 1
    size: Any = value.numel()
    few = not isinstance(size, int) or size * value.element_size() * others <= MOST_BYTES
    return others > 0 and few


def _all_reduce(x: Tensor, group: str) -> Tensor:
    x = x.contiguous()
    aligned = x.nbytes % 16 == 0 and x.data_ptr() % 16 == 0  # it reads 16 bytes at a time
    if x.numel() and aligned and _may_be_few(x, group):
        return one_shot_sum(x, group, symmetric_memory(group, x.device, MOST_BYTES))
    summed: Tensor = functional.wait_tensor(functional.all_reduce(x, "sum", group))
    return summed


def _shape(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library: Any = torch.library.Library("fxint4", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("all_reduce(Tensor x, str group) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("all_reduce", _all_reduce, "CUDA")
torch.library.register_fake("fxint4::all_reduce", _shape, lib=_library)
