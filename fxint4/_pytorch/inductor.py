"""PyTorch's private API for lowerings: Inductor's last stage, and pieces of its IR.

All of it was run on torch 2.11, 2.13 and 2.15. Here a *value* is one of Inductor's TensorBoxes, and
a *size* is an int or a sympy expression. Functions that take or return values can only be called
while Inductor lowers a graph.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from inspect import signature
from pathlib import Path
from typing import Any, cast

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
    "int4pack_mm_for_cpu",
    "is_aot",
    "is_graph_input",
    "launch_triton",
    "matmul_into",
    "our_compile",
    "persistent_zeros",
    "register_lowerings",
    "static",
    "to_dtype",
    "uses_cuda_graphs",
]


def compile_fx_inner(
    gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any
) -> Callable[[list[Any]], Sequence[Any]]:
    """Inductor's last stage: compile an aten graph.

    Args:
        gm: The graph.
        example_inputs: Its inputs.
        **kwargs: Further arguments of Inductor's function.

    Returns:
        A function of a list of the inputs, which it empties.
    """
    from torch._inductor.compile_fx import compile_fx_inner as inductor_compile_fx_inner

    compiled = inductor_compile_fx_inner(gm, example_inputs, **kwargs)
    return cast("Callable[[list[Any]], Sequence[Any]]", compiled)


@contextlib.contextmanager
def our_compile(version: str) -> Iterator[None]:
    """A context for compiles of graphs that hold ops of ours.

    Args:
        version: Identifies our code in Inductor's caches, whose own keys do not cover it.
    """
    import torch.compiler.config as compiler_config

    tag = f"{compiler_config.cache_key_tag}fxint4 {version}"
    with (
        compiler_config.patch(cache_key_tag=tag),  # type: ignore[attr-defined]
        warnings.catch_warnings(),
    ):
        # Kernels that cast an fp16 activation to bf16 are intended.
        warnings.filterwarnings("ignore", "bf16 and fp16 are mixed in the scheduler node")
        yield


def register_lowerings(lowerings: Mapping[Any, Callable[..., Any]]) -> None:
    """Give ops of ours their lowerings, for the life of the process.

    Inductor has one table of lowerings for all compiles of a process, those of other threads and of
    other backends included. So no entry of another library's op is ever added or changed. An op
    that has a lowering keeps it.

    Args:
        lowerings: The lowering of each op, called like the op.
    """
    from torch._inductor import lowering

    with _registering:
        for op, function in lowerings.items():
            if op not in lowering.lowerings:
                lowering.register_lowering(op, type_promotion_kind=None)(function)


_registering = threading.Lock()


def uses_cuda_graphs() -> bool:
    """Whether Inductor is configured to replay its kernels from CUDA graphs."""
    from torch._inductor import config

    return bool(config.triton.cudagraphs)


def autotunes() -> bool:
    """Whether Inductor is configured to autotune matmuls."""
    from torch._inductor import config

    return bool(config.max_autotune or config.max_autotune_gemm)


def cache_folder() -> Path:
    """The folder of Inductor's caches."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def static(size: Any) -> int | None:
    """A size as an int; None if it is dynamic."""
    return int(size) if isinstance(size, int) or size.is_Integer else None


def is_graph_input(value: Any) -> bool:
    """Whether a value is in the memory of a graph input that the graph has not written so far."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    while isinstance(value, (ir.MutableBox, ir.BaseView)):
        value = value.data
    return isinstance(value, ir.InputBuffer) and value.get_name() not in V.graph.mutated_buffers


def is_aot() -> bool:
    """Whether the graph is compiled for AOTInductor, to run without Python."""
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
    """A size that is 1 if `size` >= 0 is in first..last (None: no upper bound), else 0."""
    from torch.utils._sympy import functions

    least, most = cast("Any", functions.Min), cast("Any", functions.Max)
    from_first = least(1, most(0, size - first + 1))
    return from_first if last is None else from_first * least(1, most(0, last + 1 - size))


def call(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Call Inductor's lowering of an op, which Inductor may fuse with its neighbors."""
    from torch._inductor import lowering

    return lowering.lowerings[op](*args, **kwargs)


def call_fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an op itself, without a lowering."""
    from torch._inductor import lowering

    handler = lowering.fallback_handler(op, add_to_fallback_set=False)  # type: ignore[no-untyped-call]
    return handler(*args, **kwargs)


def to_dtype(dtype: torch.dtype, value: Any) -> Any:
    """A value cast to a dtype."""
    if value.get_dtype() is dtype:
        return value
    return call(torch.ops.prims.convert_element_type.default, value, dtype)


def contiguous(value: Any) -> Any:
    """A value in contiguous memory, copied if necessary."""
    from torch._inductor import ir

    return ir.ExternKernel.require_contiguous(value)


def empty(size: Sequence[Any], like: Any, dtype: torch.dtype) -> Any:
    """Allocate memory of a size on the device of `like`, without running a kernel."""
    device = like.get_device()
    return call(aten.empty_strided.default, list(size), None, dtype=dtype, device=device)


def persistent_zeros(count: Any, like: Any) -> Any:
    """Zeros, int32 ``[count or more]``, on the device of `like`.

    For kernels that restore the zeros. If the count is static, all such kernels of a graph share
    one buffer.
    """
    known = static(count)
    if known is None:
        return _full([count], 0, torch.int32, like.get_device())
    enough = 1 << max(10, (known - 1).bit_length())
    return _full_once([enough], 0, torch.int32, like.get_device())


def int4pack_mm_for_cpu(x: Any, tiles: Any, group_size: int, scale_and_zero: Any) -> Any:
    """ATen's int4 matmul on the CPU, in a package.

    AOTInductor has a C function for it that takes the group size as a tensor. Inductor's own
    lowering makes this tensor a constant of the package, one without a name that the program
    knows; here the code of the package fills it.

    Args:
        x: bf16 ``[M, K]``, contiguous.
        tiles: uint8 ``[N, K/2]``, contiguous.
        group_size: Neighbouring k that share a scale and a zero.
        scale_and_zero: bf16 ``[K/group_size, N, 2]``, contiguous.
    """
    from torch._inductor import ir, mkldnn_ir

    size = _full_once([], group_size, torch.int64, x.get_device())
    product = mkldnn_ir.WeightInt4PackMatmul.create(x, tiles, size, scale_and_zero)
    return ir.TensorBox.create(product)


def _full_once(size: Sequence[int], fill: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A buffer as `_full` makes it, one for the whole graph."""
    from torch._inductor.virtualized import V

    of_graph = _filled.setdefault(V.graph, {})
    key = (tuple(size), fill, dtype, device)
    if key not in of_graph:
        of_graph[key] = _full(size, fill, dtype, device)
    return of_graph[key]


_filled: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _full(size: Sequence[Any], fill: int, dtype: torch.dtype, device: torch.device) -> Any:
    value = call(aten.full.default, list(size), fill, dtype=dtype, device=device)
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
    """Launch a Triton kernel from the wrapper code that Inductor generates.

    Args:
        kernel: The result of `triton.jit`.
        programs: Size of the one-dimensional grid; 0 launches nothing.
        tensors: The kernel's tensor arguments by name. They are contiguous, and those that the
            kernel writes come from `empty` or `persistent_zeros`.
        arguments: The other arguments by name: ints, sizes, floats, bools.
        written: Names of the tensors that the kernel writes.
        warps: Triton's num_warps.
        stages: Triton's num_stages.
    """
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._inductor import ir

    asked = signature(ir.UserDefinedTritonKernel).parameters
    further = {"launch_kwargs": ()} if "launch_kwargs" in asked else {}  # torch 2.15
    with _mutated_arguments(written):
        ir.UserDefinedTritonKernel(
            kernel_idx=kernel_side_table.add_kernel(_with_config(kernel, warps, stages)),
            grid=[(programs, 1, 1)],
            tma_descriptor_metadata={},
            kernel_args={**tensors, **arguments},
            **further,
        )


def matmul_into(
    y: Any, x: Any, w: Any, active: Any, scales: tuple[Any, Any] | tuple[()] = ()
) -> None:
    """Write x @ w into y if `active` is 1; do nothing if it is 0.

    Operands that are not read may have any shape.

    Args:
        y: ``[M, N]`` in any float dtype, made by `empty`; in bf16 with scales.
        x: ``[M, K]`` in y's dtype; in e4m3 with scales.
        w: ``[K, N]`` in x's dtype.
        active: A size, 0 or 1.
        scales: Fp32 ``[M, 1]`` and ``[1, N]``, to multiply x's rows and w's columns by.
    """
    _matmul_into()(y, x, w, active, scales)


@functools.cache
def _matmul_into() -> Callable[..., Any]:
    """The IR node class of `matmul_into`, defined late because its imports take seconds."""
    from torch._inductor import ir
    from torch._inductor.codegen.wrapper import WrapperLine
    from torch._inductor.virtualized import V

    class MatmulInto(ir.ExternKernel):
        def __init__(self, y: Any, x: Any, w: Any, active: Any, scales: Sequence[Any]) -> None:
            given = (y, x, w, *scales)
            inputs = self.unwrap_storage([self.realize_input(value) for value in given])
            name = "_scaled_mm" if scales else "mm"
            super().__init__(
                None,
                ir.NoneLayout(device=y.get_device()),
                inputs,
                python_kernel_name=f"extern_kernels.{name}",
                cpp_kernel_name=f"at::{name}_out",
            )
            self.active = active
            self.scaled = bool(scales)
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
            # The wrapper declares a view at its first use, once for each writer. A declaration in
            # braces is not visible outside, so this line has a writer of its own.
            self.body: list[str] = []
            self.writer = types.SimpleNamespace(writeline=self.body.append)
            # bf16 sums with fast accumulation, see `_scaled_mm`.
            self.further: list[str] = []
            if node.scaled and V.graph.cpp_wrapper:
                bf16 = wrapper.codegen_dtype(torch.bfloat16)
                self.body.append(f"int32_t out_dtype = {bf16};")
                self.further = ["nullptr", "nullptr", "&out_dtype", "1"]
            elif node.scaled:
                self.further = ["out_dtype=torch.bfloat16", "use_fast_accum=True"]

        def codegen(self, code: Any) -> None:
            node, wrapper = self.node, self.wrapper
            y, *operands = (value.codegen_reference(self.writer) for value in node.inputs)
            condition = wrapper.codegen_sizevar(node.active)
            device = node.get_device().type
            code.writeline(f"if ({condition}) {{" if V.graph.cpp_wrapper else f"if {condition}:")
            with code.indent():
                code.writelines(self.body)
                kernel = node.get_kernel_name()
                operands += self.further
                wrapper._generate_extern_kernel_out_helper(kernel, y, None, operands, device)
            if V.graph.cpp_wrapper:
                code.writeline("}")

    return MatmulInto


@functools.cache
def _with_config(kernel: Any, warps: int, stages: int) -> Any:
    """A kernel with one config; Inductor takes warps and stages only as a config."""
    triton = importlib.import_module("triton")  # not everybody has it
    config = triton.Config({}, num_warps=warps, num_stages=stages)
    return triton.autotune(configs=[config], key=[])(kernel)


@contextlib.contextmanager
def _mutated_arguments(written: Collection[str]) -> Iterator[None]:
    """Tell Inductor which arguments a kernel writes, in this thread.

    Otherwise it compiles the kernel at each launch to find out, and fails to tell apart pointers
    that a program chooses among.
    """
    _tell_written()
    token = _written.set(tuple(written))
    try:
        yield
    finally:
        _written.reset(token)


#: The arguments that the kernel being launched writes; None for kernels of others.
_written: ContextVar[tuple[str, ...] | None] = ContextVar("fxint4 written arguments", default=None)


@functools.cache
def _tell_written() -> None:
    """Have Inductor's function that finds the arguments answer from `_written` where that is set.

    It is done once for the process: undone after each launch, it would be undone under another
    thread, too. For kernels of others Inductor's own function answers.
    """
    from torch._higher_order_ops import triton_kernel_wrap

    old = hasattr(triton_kernel_wrap, "identify_mutated_tensors")  # torch 2.11
    name = "identify_mutated_tensors" if old else "identify_accessed_tensors"
    theirs = getattr(triton_kernel_wrap, name)

    @functools.wraps(theirs)
    def told(*args: Any, **kwargs: Any) -> Any:
        written = _written.get()
        if written is None:
            return theirs(*args, **kwargs)
        if old:
            return list(written)
        from torch._inductor.dependencies import ReadWrites, StarDep
        from torch.utils._ordered_set import OrderedSet

        writes: Any = OrderedSet(StarDep(argument) for argument in written)
        accesses = ReadWrites(OrderedSet(), writes, OrderedSet())
        return triton_kernel_wrap.TensorAccesses(accesses, can_fuse_epilogue=False)

    setattr(triton_kernel_wrap, name, told)
