"""PyTorch's private API for lowerings: Inductor's last stage, and pieces of its IR.

All of it was run on torch 2.11, 2.13 and 2.15. A value is one of Inductor's TensorBoxes, a size an
int or a sympy expression; what takes or returns values is called while Inductor lowers a graph.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import fx

from fxint4._pytorch.tensors import aten

__all__ = [
    "autotunes",
    "cache_folder",
    "call",
    "call_fallback",
    "ceil_div",
    "compile_fx_inner",
    "contiguous",
    "empty",
    "floor_div",
    "indicator",
    "is_aot",
    "is_graph_input",
    "launch_triton",
    "lowerings_overridden",
    "matmul_into",
    "persistent_zeros",
    "static",
    "to_dtype",
    "uses_cuda_graphs",
]


def compile_fx_inner(
    gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any
) -> Callable[[list[Any]], Sequence[Any]]:
    """Inductor's last stage: an aten graph to code. The result takes a list that it empties.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        **kwargs: for Inductor.
    """
    from torch._inductor.compile_fx import compile_fx_inner as inductor_compile_fx_inner

    compiled = inductor_compile_fx_inner(gm, example_inputs, **kwargs)
    return cast("Callable[[list[Any]], Sequence[Any]]", compiled)


@contextlib.contextmanager
def lowerings_overridden(lowerings: Mapping[Any, Callable[..., Any]], key: str) -> Iterator[None]:
    """Let Inductor lower some ops differently for a while.

    Args:
        lowerings: for each op what lowers it, called like the op.
        key: of the lowerings in Inductor's caches, whose own keys do not cover them.
    """
    import torch.compiler.config as compiler_config
    from torch._inductor import lowering

    # Inductor has no lowering of mv and addmv, which it usually takes apart.
    calls = {
        op: functools.partial(call_fallback, op) for op in (aten.mv.default, aten.addmv.default)
    }
    # The CPU's int4 op wants contiguous operands, and Inductor's lowering does not see to it.
    contiguous_operands = {
        aten._weight_int4pack_mm_for_cpu.default: lowering.require_contiguous,
    }
    tag = f"{compiler_config.cache_key_tag}fxint4 {key}"
    with (
        _overlaid(lowering.lowerings, {**calls, **lowerings}),
        _overlaid(lowering._maybe_layout_constraints, contiguous_operands),
        compiler_config.patch(cache_key_tag=tag),  # type: ignore[attr-defined]
        warnings.catch_warnings(),
    ):
        # A kernel that casts an fp16 activation to bf16 is what we want, and right.
        warnings.filterwarnings("ignore", "bf16 and fp16 are mixed in the scheduler node")
        yield


def uses_cuda_graphs() -> bool:
    """Whether Inductor, as it is configured now, replays its kernels from CUDA graphs."""
    from torch._inductor import config

    return bool(config.triton.cudagraphs)


def autotunes() -> bool:
    """Whether Inductor is asked to measure what it chooses among."""
    from torch._inductor import config

    return bool(config.max_autotune or config.max_autotune_gemm)


def cache_folder() -> Path:
    """Where Inductor keeps what it need not find out twice."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def static(size: Any) -> int | None:
    """A size as an int; None where it is known only when the graph runs."""
    return int(size) if isinstance(size, int) or size.is_Integer else None


def is_graph_input(value: Any) -> bool:
    """Whether a value lies in memory that the graph is given and, up to here, has not written."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    while isinstance(value, (ir.MutableBox, ir.BaseView)):
        value = value.data
    return isinstance(value, ir.InputBuffer) and value.get_name() not in V.graph.mutated_buffers


def is_aot() -> bool:
    """Whether the graph becomes a package, which runs without this process's Python."""
    from torch._inductor.virtualized import V

    return bool(V.graph.aot_mode)


def ceil_div(size: Any, divisor: int) -> Any:
    """A size divided by a number, rounded up."""
    return floor_div(size + divisor - 1, divisor)


def floor_div(size: Any, divisor: int) -> Any:
    """A size divided by a number, rounded down."""
    from torch.utils._sympy.functions import FloorDiv

    return FloorDiv(size, divisor)


def indicator(size: Any, first: int, last: int | None) -> Any:
    """1 where a size of at least 0 is in first..last (None: any from first on), else 0."""
    from torch.utils._sympy import functions

    least, most = cast("Any", functions.Min), cast("Any", functions.Max)
    from_first = least(1, most(0, size - first + 1))
    return from_first if last is None else from_first * least(1, most(0, last + 1 - size))


def call(op: Any, *args: Any, **kwargs: Any) -> Any:
    """What Inductor makes of an op, fused with its neighbours where Inductor does so."""
    from torch._inductor import lowering

    return lowering.lowerings[op](*args, **kwargs)


def call_fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of an op that Inductor knows nothing of."""
    from torch._inductor import lowering

    handler = lowering.fallback_handler(op, add_to_fallback_set=False)  # type: ignore[no-untyped-call]
    return handler(*args, **kwargs)


def to_dtype(dtype: torch.dtype, value: Any) -> Any:
    """The value in a dtype."""
    if value.get_dtype() is dtype:
        return value
    return call(torch.ops.prims.convert_element_type.default, value, dtype)


def contiguous(value: Any) -> Any:
    """The value in memory, row by row; a copy where it is not."""
    from torch._inductor import ir

    return ir.ExternKernel.require_contiguous(value)


def empty(size: Sequence[Any], like: Any, dtype: torch.dtype) -> Any:
    """Memory on the device of another value; nothing is run to make it."""
    device = like.get_device()
    return call(aten.empty_strided.default, list(size), None, dtype=dtype, device=device)


def persistent_zeros(count: Any, like: Any) -> Any:
    """int32 ``[at least count]`` of zeros on the device of another value.

    For kernels that leave zeros behind: where the count is known, all of a graph share them.
    """
    from torch._inductor.virtualized import V

    known = static(count)
    if known is None:
        return _zeros(count, like)
    of_graph = _counters.setdefault(V.graph, {})
    key = (like.get_device(), 1 << max(10, (known - 1).bit_length()))
    if key not in of_graph:
        of_graph[key] = _zeros(key[1], like)
    return of_graph[key]


_counters: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _zeros(count: Any, like: Any) -> Any:
    device = like.get_device()
    value = call(aten.full.default, [count], 0, dtype=torch.int32, device=device)
    value.realize()
    return value


def launch_triton(
    kernel: Any,
    programs: Any,
    tensors: Mapping[str, Any],
    arguments: Mapping[str, Any],
    written: Collection[str],
    warps: int,
    stages: int,
) -> None:
    """A launch of a Triton kernel, by the wrapper that Inductor generates.

    Args:
        kernel: what `triton.jit` returned.
        programs: the grid's size along its one axis; where it is 0, nothing is launched.
        tensors: by the names of the kernel's arguments; contiguous, those written made by `empty`
            or `persistent_zeros`.
        arguments: all others: ints, sizes, floats, bools.
        written: the names of the tensors that the kernel writes to.
        warps: Triton's num_warps.
        stages: its num_stages.
    """
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._inductor import ir

    asked = signature(ir.UserDefinedTritonKernel).parameters
    further = {"launch_kwargs": ()} if "launch_kwargs" in asked else {}  # torch 2.15
    with _knowing_what_is_written(written):
        ir.UserDefinedTritonKernel(
            kernel_idx=kernel_side_table.add_kernel(_with_config(kernel, warps, stages)),
            grid=[(programs, 1, 1)],
            tma_descriptor_metadata={},
            kernel_args={**tensors, **arguments},
            **further,
        )


def matmul_into(y: Any, x: Any, w: Any, active: Any) -> None:
    """Write x ``[M, K]`` times w ``[K, N]`` over y ``[M, N]``, or do nothing.

    Args:
        y: made by `empty`.
        x: of the dtype of y.
        w: likewise; of any size where it is not read.
        active: a size: where it is 1, y is written, where it is 0, not.
    """
    _matmul_into()(y, x, w, active)


@functools.cache
def _matmul_into() -> Callable[..., Any]:
    """The class of IR nodes behind `matmul_into`; to import what it is made of takes seconds."""
    from torch._inductor import ir
    from torch._inductor.codegen.wrapper import WrapperLine
    from torch._inductor.virtualized import V

    class MatmulInto(ir.ExternKernel):
        def __init__(self, y: Any, x: Any, w: Any, active: Any) -> None:
            inputs = self.unwrap_storage([self.realize_input(value) for value in (y, x, w)])
            super().__init__(
                None,
                ir.NoneLayout(device=y.get_device()),
                inputs,
                python_kernel_name="extern_kernels.mm",
                cpp_kernel_name="at::mm_out",
            )
            self.active = active
            V.graph.mark_buffer_mutated(self.input_name(0))
            self.name = V.graph.register_buffer(self)
            V.graph.register_operation(self)

        def should_allocate(self) -> bool:
            return False

        def get_mutation_names(self) -> Sequence[str]:
            return [self.input_name(0)]

        def codegen(self, wrapper: Any) -> None:
            wrapper.writeline(Line(self, wrapper))

    class Line(WrapperLine):
        def __init__(self, node: Any, wrapper: Any) -> None:
            self.node, self.wrapper = node, wrapper
            # The wrapper declares what views are made of where it first writes it, and goes by the
            # writer to know whether it has. What is declared inside the braces is nowhere else.
            self.body: list[str] = []
            self.writer = types.SimpleNamespace(writeline=self.body.append)

        def codegen(self, code: Any) -> None:
            node, wrapper = self.node, self.wrapper
            y, x, w = (value.codegen_reference(self.writer) for value in node.inputs)
            condition = wrapper.codegen_sizevar(node.active)
            device = node.get_device().type
            code.writeline(f"if ({condition}) {{" if V.graph.cpp_wrapper else f"if {condition}:")
            with code.indent():
                code.writelines(self.body)
                kernel = node.get_kernel_name()
                wrapper._generate_extern_kernel_out_helper(kernel, y, None, [x, w], device)
            if V.graph.cpp_wrapper:
                code.writeline("}")

    return MatmulInto


@functools.cache
def _with_config(kernel: Any, warps: int, stages: int) -> Any:
    """A kernel with its only choice of warps and stages, which is how Inductor takes them."""
    triton = importlib.import_module("triton")  # not everybody has it
    config = triton.Config({}, num_warps=warps, num_stages=stages)
    return triton.autotune(configs=[config], key=[])(kernel)


@contextlib.contextmanager
def _knowing_what_is_written(written: Collection[str]) -> Iterator[None]:
    """Tell Inductor which arguments a kernel writes to.

    Otherwise it compiles the kernel to find out, at each launch, and cannot tell the pointers
    apart that a program chooses among.
    """
    from torch._higher_order_ops import triton_kernel_wrap

    if hasattr(triton_kernel_wrap, "identify_mutated_tensors"):  # torch 2.11
        name = "identify_mutated_tensors"
        answer: Any = list(written)
    else:
        from torch._inductor.dependencies import ReadWrites, StarDep
        from torch.utils._ordered_set import OrderedSet

        writes: Any = OrderedSet(StarDep(argument) for argument in written)
        accesses = ReadWrites(OrderedSet(), writes, OrderedSet())
        name = "identify_accessed_tensors"
        answer = triton_kernel_wrap.TensorAccesses(accesses, can_fuse_epilogue=False)
    with mock.patch.object(triton_kernel_wrap, name, return_value=answer):
        yield


@contextlib.contextmanager
def _overlaid(table: dict[Any, Any], entries: Mapping[Any, Any]) -> Iterator[None]:
    """Put entries into a table for a while; the rest of it is never missing (mock.patch's is)."""
    before = {key: table[key] for key in entries if key in table}
    table.update(entries)
    try:
        yield
    finally:
        for key in entries:
            if key in before:
                table[key] = before[key]
            else:
                del table[key]
