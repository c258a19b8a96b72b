"""Inductor's code for an H200, generated where there is none."""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.source import ConstantSource
from torch._inductor import config
from torch._inductor.codegen.cpp_wrapper_gpu import DeferredTritonCallWrapper
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.compile_fx import get_cpp_wrapper_config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fxint4.kernels.policy import Policy
from fxint4.lowering.dense import our_compile
from fxint4.lowering.own_ops import use_own_ops

_H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    gcnArchName="",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block_optin=232448,
    L2_cache_size=60 << 20,
    total_memory=141 << 30,
)


class _Driver:
    """The parts of a GPU's driver that Triton needs before it compiles anything."""

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda:0")


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """A context in which Inductor generates code as if there was an H200."""
    driver = importlib.import_module("triton.runtime").driver
    properties = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=_H200.multi_processor_count,
        cc=90,
        major=_H200.major,
        regs_per_multiprocessor=_H200.regs_per_multiprocessor,
        max_threads_per_multi_processor=_H200.max_threads_per_multi_processor,
        warp_size=_H200.warp_size,
    )
    with (
        mock.patch.object(DeviceProperties, "create", return_value=properties),
        mock.patch.object(CudaInterface.Worker, "get_device_properties", return_value=_H200),
        mock.patch("torch.cuda.get_device_properties", return_value=_H200),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.cuda.current_device", return_value=0),
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch._inductor.scheduler.has_triton", return_value=True),
        mock.patch.object(driver, "_active", _Driver()),
    ):
        yield


def generated(
    function: Callable[..., Any],
    specs: Sequence[tuple[Sequence[int], torch.dtype]],
    package: bool = False,
    kernel: str | None = None,
    cuda_graphs: bool = False,
) -> str:
    """The code that Inductor generates for a function with our lowerings.

    Args:
        function: A function of tensors on a GPU.
        specs: Size and dtype of each tensor.
        package: Whether the code is C++ for a package, for any number of rows of the first tensor.
        kernel: See `Int4Config.kernel`.
        cuda_graphs: Whether kernels are replayed from CUDA graphs.
    """
    env = ShapeEnv()
    fake = FakeTensorMode(shape_env=env)
    sizes = [list[Any](size) for size, _ in specs]
    if package:
        rows = sizes[0][0]
        symbol = env.create_symbol(rows, ConstantSource("rows"), dynamic_dim=DimDynamic.DYNAMIC)
        sizes[0][0] = env.create_symintnode(symbol, hint=rows)
    with fake:
        made = [
            torch.empty(*size, dtype=dtype, device="cuda:0")
            for size, (_, dtype) in zip(sizes, specs, strict=True)
        ]
        gm = make_fx(function, decomposition_table=select_decomp_table())(*made)
    with (
        pretended_gpu(),
        V.set_fake_mode(fake),
        V.set_debug_handler(DebugContext()),
        our_compile(),
        _without_compiled_kernels() if package else contextlib.nullcontext(),
    ):
        use_own_ops(gm, Policy(kernel, cuda_graphs, package=package))
        graph = GraphLowering(
            gm, example_inputs=made, shape_env=env, aot_mode=package, cpp_wrapper=package
        )
        with V.set_graph_handler(graph):
            graph.run(*made)
            code: Any = graph.codegen()[0]
    return str(getattr(code, "value", code))


@contextlib.contextmanager
def _without_compiled_kernels() -> Iterator[None]:
    """A context in which generated C++ calls kernels that are missing, as no GPU compiles them."""
    generate = "generate_and_run_autotune_block"
    with (
        config.patch({**get_cpp_wrapper_config(), "triton.autotune_at_compile_time": True}),
        mock.patch.object(PythonWrapperCodegen, generate),
        mock.patch.object(DeferredTritonCallWrapper, "generate"),
    ):
        yield


def packed_specs(n: int, k: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Sizes and dtypes of tiles and scale_and_zero of a weight ``[n, k]``, in groups of 128."""
    return [((n // 8, k // 128, 32, 4), torch.int32), ((k // 128, n, 2), torch.bfloat16)]


def int4pack_mm(x: Tensor, tiles: Tensor, scale_and_zero: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(x, tiles, 128, scale_and_zero)
