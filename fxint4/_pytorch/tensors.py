"""PyTorch's private API for tensors and ops.

All of it was run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "MATMULS",
    "TensorState",
    "aten",
    "call_into",
    "disabled_torch_function",
    "flat",
    "is_elementwise",
    "is_pure",
    "make_wrapper",
    "map_leaves",
    "map_tensors",
    "mkldnn_supports",
    "real_tensors",
    "share_storage",
    "view_like",
]

aten = torch.ops.aten


#: Matmuls that Inductor would decompose before the passes see them. For example, with coordinate
#: descent tuning it turns a matmul with M = 1 into mul + sum on the GPU.
MATMULS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.mv.default,
    aten.addmv.default,
)


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Run on real tensors inside the compiler, where FakeTensorMode is active; no autocast."""
    from torch.utils._python_dispatch import _disable_current_modes

    with torch.no_grad(), _disable_current_modes(), torch._C._DisableAutocast():
        yield


def is_pure(target: Any) -> bool:
    """Whether an op is deterministic and writes to none of its operands."""
    if target is operator.getitem:
        return True
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def is_elementwise(target: Any) -> bool:
    """Whether an op is elementwise: its result may overwrite an operand of the same layout."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def call_into(memory: Tensor | None, target: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an op. If possible, its result is written to `memory`."""
    if memory is not None:
        try:
            return target.overloadpacket(*args, **kwargs, out=memory)
        except (RuntimeError, TypeError):  # no overload takes these arguments with `out`
            pass
    return target(*args, **kwargs)


def mkldnn_supports(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for dense matmuls of a 16-bit dtype."""
    probes = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and probes[dtype]())


def flat(tree: Any) -> list[Any]:
    """The leaves of nested containers (a pytree)."""
    from torch.utils._pytree import tree_leaves

    return tree_leaves(tree)


# --- Tensors ------------------------------------------------------------------------------------

#: For `__torch_function__` of a subclass, so that composite functions decompose into aten ops.
disabled_torch_function = torch._C._disabled_torch_function_impl


def make_wrapper(
    cls: type[Tensor],
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Make an instance of a tensor subclass; it holds no data of its own."""
    return Tensor._make_wrapper_subclass(
        cls, size, strides=stride, dtype=dtype, device=device, requires_grad=False
    )


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to every tensor in nested containers."""
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, function, tree)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to every leaf of nested containers."""
    from torch.utils._pytree import tree_map

    return tree_map(function, tree)


def share_storage(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same storage; works for tensors without data, too."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def view_like(base: Tensor, view: Tensor) -> Tensor:
    """A view of `base` with the place, size and strides of `view`, which has the same storage.

    Unlike a view that is made within `__torch_dispatch__`, where autograd's bookkeeping is off, it
    shares the in-place version of its base: a write to one of them shows in both.
    """
    tracked = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False)
    with torch.inference_mode(False), torch.no_grad(), tracked:
        return base.as_strided(view.size(), view.stride(), view.storage_offset())


class TensorState:
    """The data that a tensor holds now: its storage, address and in-place version.

    The weak reference to the storage keeps its identity from being reused. So `matches` is exact,
    even if the allocator reuses a freed address.
    """

    __slots__ = ("_address", "_storage", "_version")

    def __init__(self, tensor: Tensor) -> None:
        """Record the state of `tensor`."""
        from torch.multiprocessing.reductions import StorageWeakRef

        self._storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._address = tensor.data_ptr()
        self._version = _version(tensor)

    def matches(self, tensor: Tensor) -> bool:
        """Whether `tensor` still holds the same data."""
        return (
            tensor.untyped_storage()._cdata == self._storage.cdata
            and tensor.data_ptr() == self._address
            and _version(tensor) == self._version
        )


def _version(tensor: Tensor) -> int:
    # Inference tensors have no version counter and raise when asked.
    return 0 if tensor.is_inference() else tensor._version
