"""PyTorch's private API for tensors and ops.

All of it was run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

__all__ = [
    "MATMULS",
    "Geometry",
    "aten",
    "call_into",
    "custom_op",
    "disabled_torch_function",
    "flat",
    "holds_own_values",
    "in_dispatch_mode",
    "is_disturbed",
    "is_elementwise",
    "is_plain",
    "is_pure",
    "make_wrapper",
    "map_leaves",
    "map_tensors",
    "mkldnn_supports",
    "real_tensors",
    "share_storage",
    "storage_key",
    "storage_pin",
    "version_of",
    "view_like",
    "when_storage_dies",
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


#: Namespaces of ops that compute their result from their operands alone.
_CLOSED = ("aten", "prims", "quantized_decomposed", "fxint4")


def custom_op(target: Any) -> str | None:
    """The name of an op that may read state outside of the graph; None for PyTorch's own."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace in _CLOSED:
        return None
    return target._schema.name.replace("::", ".")


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


def in_dispatch_mode() -> bool:
    """Whether a dispatch mode is active in this thread, such as that of fake tensors or tracing."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_disturbed() -> bool:
    """Whether something in this thread asks more of an op on plain tensors than to compute.

    That is a dispatch mode, `torch.jit.trace`, autocast, or forward-mode differentiation. A
    profiler, which does without an op that is not called, does not count.
    """
    return (
        in_dispatch_mode()
        or torch._C._is_any_autocast_enabled()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor, no subclass and not nested, is nothing but strided values in memory.

    A wrapper of torch.func is not, nor is a sparse tensor, one that is to be read negated, or zeros
    that have no memory.
    """
    return (
        tensor.layout is torch.strided
        and not tensor.is_neg()
        and not torch._is_zerotensor(tensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


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
    return storage_key(one) == storage_key(other)


def storage_key(tensor: Tensor) -> int:
    """A number of a tensor's storage, which no other storage has as long as this one lives."""
    return int(tensor.untyped_storage()._cdata)


def view_like(base: Tensor, view: Tensor) -> Tensor:
    """A view of `base` with the place, size and strides of `view`, which has the same storage.

    Unlike a view that is made within `__torch_dispatch__`, where autograd's bookkeeping is off, it
    shares the in-place version of its base: a write to one of them shows in both.
    """
    tracked = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False)
    with torch.inference_mode(False), torch.no_grad(), tracked:
        return base.as_strided(view.size(), view.stride(), view.storage_offset())


def when_storage_dies(tensor: Tensor, call: Callable[[Any], Any]) -> weakref.ref[Any]:
    """A weak reference to a tensor's storage, with a callback at the storage's end.

    A weak reference to the tensor itself would forbid `torch.utils.swap_tensors`.
    """
    return weakref.ref(tensor.untyped_storage(), call)


def storage_pin(tensor: Tensor) -> Any:
    """What keeps the number of a tensor's storage from being used again, but not its memory."""
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def version_of(tensor: Tensor) -> int:
    """The in-place version of a tensor; 0 for inference tensors, which have none."""
    return 0 if tensor.is_inference() else tensor._version


def holds_own_values(tensor: Tensor) -> bool:
    """Whether a tensor's values are in its own storage.

    They are in a plain tensor, a parameter, and a subclass that only adds attributes and methods.
    They are not in a subclass that makes its values of other tensors.
    """
    dispatch = type(tensor).__torch_dispatch__
    return dispatch is Tensor.__torch_dispatch__ and not isinstance(tensor, FakeTensor)


class Geometry:
    """Dtypes, shapes and strides of some tensors, to be compared in few microseconds.

    `x.data = x.data.t()` changes strides, and nothing else that a tensor shows cheaply.

    Args:
        tensors: The tensors.
    """

    __slots__ = ("_guards", "_known")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Record the geometry of the tensors."""
        self._known = _geometry_of(tensors)
        self._guards = self._guards_of(tensors)

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors have the same geometry."""
        if self._guards is not None and self._guards.check(*tensors):
            return True
        # Dynamo's guards look at more: requires_grad, and inference mode.
        if self._known != _geometry_of(tensors):
            return False
        self._guards = self._guards_of(tensors)
        return True

    def _guards_of(self, tensors: Sequence[Tensor]) -> Any:
        from torch._C._dynamo.guards import TensorGuards

        _, sizes, strides = self._known
        if not tensors:
            return None
        return TensorGuards(
            *tensors,
            dynamic_dims_sizes=cast("Any", [list(size) for size in sizes]),
            dynamic_dims_strides=cast("Any", [list(stride) for stride in strides]),
        )


def _geometry_of(tensors: Sequence[Tensor]) -> tuple[list[Any], list[Any], list[Any]]:
    return (
        [tensor.dtype for tensor in tensors],
        [tensor.shape for tensor in tensors],
        [tensor.stride() for tensor in tensors],
    )
