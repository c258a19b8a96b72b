"""Lowers int4 matmuls to Inductor's code.

On the CPU the code calls ATen's op. The rest is about GPUs.

If the number of rows M is known, the kernel is chosen while the graph is compiled. Inductor
launches Triton kernels and cuBLAS itself. If the sum over K is split among programs, they leave
partial sums, and Inductor adds these in one kernel with the bias, the activation, the residual or
the norm that follows. `fxint4.linears` launches CUDA C++ kernels, whose sizes the code passes.

If M varies, the same op chooses at run time: one compiled graph serves every M, and a CUDA graph
holds the kernel of the M that it was captured with. A package, which runs without Python, contains
the kernels of every M, also dequantizing with cuBLAS and fp8: each run launches the kernels of
other M with no programs, and takes no memory for W.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxint4._pytorch import inductor
from fxint4._pytorch.tensors import aten
from fxint4.kernels import triton_common, triton_fp8, triton_linear
from fxint4.kernels.cuda import CudaBlocks
from fxint4.kernels.policy import Policy
from fxint4.kernels.select import Choice, MatmulShape, by_m
from fxint4.kernels.source_version import source_version
from fxint4.kernels.triton_common import Blocks, Launch
from fxint4.lowering import experts
from fxint4.lowering.own_ops import use_own_ops
from fxint4.passes.pipeline import PassRunner

__all__ = ["compile_graph", "our_compile"]


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    policy: Policy,
    run_pass: PassRunner,
    **kwargs: Any,
) -> Callable[[list[Any]], Sequence[Any]]:
    """Compile an aten graph with Inductor.

    Args:
        gm: The graph, which Inductor and `fxint4.lowering.own_ops` change.
        example_inputs: Its inputs.
        policy: How to choose kernels.
        run_pass: Runs the passes of this graph.
        **kwargs: For Inductor's compile_fx_inner.

    Returns:
        The compiled graph, which takes its inputs as a list and empties that list.
    """
    run_pass("own ops", gm, use_own_ops, gm, policy)
    with our_compile():
        return inductor.compile_fx_inner(gm, example_inputs, **kwargs)


@contextlib.contextmanager
def our_compile() -> Iterator[None]:
    """A context in which Inductor compiles graphs with ops of `fxint4.lowering.own_ops`."""
    inductor.register_lowerings(
        {
            torch.ops.fxint4.linears.by_policy: _linears,
            torch.ops.fxint4.linear.for_cpu: _for_cpu,
            **experts.lowerings(),
        }
    )
    # These packages hold all code that decides how a graph is lowered.
    version = source_version("fxint4.kernels", "fxint4.lowering", "fxint4._pytorch")
    with inductor.our_compile(version):
        yield


def _linears(
    x: Any,
    tiles: Sequence[Any],
    scale_and_zero: Sequence[Any],
    group_size: int,
    n: Sequence[int],
    kernel: str | None,
    cuda_graphs: bool,
    measured: bool,
    package: bool,
    in_cuda: bool,
    activations: str | None = None,
) -> Any:
    policy = Policy(kernel, cuda_graphs, measured, package, in_cuda)
    return _Matmul(x, tiles, scale_and_zero, group_size, n, activations).lower(policy)


def _for_cpu(x: Any, tiles: Any, group_size: int, scale_and_zero: Any) -> Any:
    """The CPU's int4 matmul, whose operands must be contiguous."""
    x, tiles, scale_and_zero = map(inductor.contiguous, (x, tiles, scale_and_zero))
    if inductor.is_aot():
        return inductor.int4pack_mm_for_cpu(x, tiles, group_size, scale_and_zero)
    # With max-autotune Inductor measures a template in C++ against ATen's kernel.
    multiply = inductor.call if inductor.autotunes() else inductor.call_fallback
    op = aten._weight_int4pack_mm_for_cpu.default
    return multiply(op, x, tiles, group_size, scale_and_zero)


@dataclass(frozen=True)
class _Matmul:
    """x ``[M, K]`` times weights of the same K, side by side: ``[M, sum(n)]``.

    Tensors here are values of Inductor's IR.

    Attributes:
        x: bf16 or fp16 ``[M, K]``.
        tiles: int32 ``[Np/8, Kp/(16*inner_k_tiles), 32, inner_k_tiles/2]`` of each weight.
        scale_and_zero: bf16 ``[Kp/group_size, Np, 2]`` of each weight.
        group_size: Neighbouring k that share a scale and a zero.
        n: Out features of each weight, at most its Np.
        activations: See `Int4Config.activations`.
    """

    x: Any
    tiles: Sequence[Any]
    scale_and_zero: Sequence[Any]
    group_size: int
    n: Sequence[int]
    activations: str | None = None

    @property
    def k(self) -> int:
        """In features."""
        return int(self.x.get_size()[1])

    def lower(self, policy: Policy) -> Any:
        """The product by the kernel that the policy chooses."""
        m = inductor.static(self.x.get_size()[0])
        if triton_common.triton is None or self.x.get_device().type != "cuda" or m == 0:
            return self.chosen_at_run_time(policy.cuda_graphs, policy.kernel)
        kernel, blocks = policy.kernel, None
        if m is not None:
            choice = self.choice(m, policy)
            kernel, blocks = choice.kernel, choice.blocks
        if isinstance(blocks, CudaBlocks):
            return self.chosen_at_run_time(policy.cuda_graphs, blocks.name, blocks.sizes)
        if kernel == "dequantize":
            return self.dequantized()
        if kernel == "fp8":
            return self.in_fp8()
        if blocks is not None:
            return self.multiplied(blocks)
        if not inductor.is_aot():
            return self.chosen_at_run_time(policy.cuda_graphs, kernel)
        return self.by_aten() if kernel == "aten" else self.multiplied_for_any_m(policy)

    def choice(self, m: int, policy: Policy) -> Choice:
        """The policy's choice for m rows."""
        _, _, half_inner = self._sizes
        of = (self.group_size, 2 * half_inner, self.x.get_dtype(), self.activations)
        shape = MatmulShape(m, sum(self.n), self.k, *of)
        return policy.choose(shape, self.x.get_device())

    def chosen_at_run_time(
        self, replayed: bool, kernel: str | None, sizes: Sequence[int] = ()
    ) -> Any:
        """The product by `fxint4.linears`, which chooses when it is called.

        Args:
            replayed: Whether kernels are replayed from a CUDA graph.
            kernel: The user's option; with sizes, the name of a CUDA kernel.
            sizes: Those of its blocks, see `fxint4.kernels.cuda.CudaBlocks.of`.
        """
        lasting = all(map(inductor.is_graph_input, (*self.tiles, *self.scale_and_zero)))
        return inductor.call_fallback(
            torch.ops.fxint4.linears.default,
            self.x,
            self.tiles,
            self.scale_and_zero,
            self.group_size,
            self.n,
            replayed,
            kernel,
            list(sizes),
            replayed and lasting,
            self.activations,
        )

    def by_aten(self) -> Any:
        """The product by ATen's op, one call for each weight; it counts elements in 32 bits."""
        weights, k_padded, _ = self._sizes
        x = inductor.to_dtype(torch.bfloat16, self.x)
        if k_padded > self.k:
            x = inductor.call(aten.constant_pad_nd.default, x, [0, k_padded - self.k], 0.0)
        x, op = inductor.contiguous(x), aten._weight_int4pack_mm.default
        products = []
        for (n, _), tiles, parameters in zip(weights, self.tiles, self.scale_and_zero, strict=True):
            y = inductor.call_fallback(op, x, tiles, self.group_size, parameters)
            products.append(inductor.call(aten.slice.Tensor, y, 1, 0, n))
        y = products[0] if len(products) == 1 else inductor.call(aten.cat.default, products, 1)
        return inductor.to_dtype(self.x.get_dtype(), y)

    def dequantized(self) -> Any:
        """The product by Inductor's matmul, after W is written out."""
        w = inductor.call(aten.permute.default, self._written_out(), [1, 0])
        return inductor.call(aten.mm.default, self.x, w)

    def in_fp8(self) -> Any:
        """The product in fp8, see `fxint4.kernels.triton_fp8`.

        x is quantized by Inductor's own operations, so that it fuses them with what makes x.
        """
        x = inductor.to_dtype(torch.float32, self.x)
        largest = inductor.call(aten.amax.default, inductor.call(aten.abs.default, x), [1], True)
        scale_x = inductor.call(aten.mul.Tensor, largest, 1 / triton_fp8.LARGEST)
        scale_x = inductor.call(aten.clamp_min.default, scale_x, triton_fp8.LEAST_SCALE)
        x8 = inductor.call(aten.div.Tensor, x, scale_x)
        # Else it would have the strides of what x is a copy of.
        x8 = inductor.contiguous(inductor.to_dtype(triton_fp8.E4M3, x8))
        w, scale_w = self._written_out_in_fp8()
        scaled = (x8, w, scale_x, scale_w, None, None, torch.bfloat16, True)
        return inductor.call_fallback(aten._scaled_mm.default, *scaled)

    def multiplied(self, blocks: Blocks) -> Any:
        """The product by the Triton kernel, plus the sum of its splits, for an M that is known."""
        x, n, splits = inductor.contiguous(self.x), sum(self.n), blocks.splits
        m = int(x.get_size()[0])
        if splits == 1:
            y = inductor.empty([m, n], x, x.get_dtype())
            self._launch_into(y, x, self._launch_of(m, blocks, reduce=True))
            return y
        partial = inductor.empty([splits, m, n], x, torch.float32)
        self._launch(self._launch_of(m, blocks, reduce=False), {"x": x, "partial": partial})
        # Additions, because Inductor would not fuse the operations that follow with a reduction.
        y = inductor.call(aten.select.int, partial, 0, 0)
        for split in range(1, splits):
            part = inductor.call(aten.select.int, partial, 0, split)
            y = inductor.call(aten.add.Tensor, y, part)
        return inductor.to_dtype(x.get_dtype(), y)

    def multiplied_for_any_m(self, policy: Policy) -> Any:
        """The product in a package, by the kernel that is chosen for the M of each run.

        The generated code has no branches, but it skips a launch whose grid is empty. So every run
        reaches the launches for all ranges of M, and their grids are multiplied by `active`: 1 in
        the range that M is in, 0 in all others. The Triton kernel itself adds its splits, because
        every range has to end with y.
        """
        x, n = inductor.contiguous(self.x), sum(self.n)
        rows = x.get_size()[0]
        y = inductor.empty([rows, n], x, x.get_dtype())
        for first, last, choice in by_m(lambda m: self.choice(m, policy)):
            active, blocks = inductor.indicator(rows, first, last), choice.blocks
            if choice.kernel == "fp8":
                w, scale_w = self._written_out_in_fp8(active)
                # A kernel of its own: what makes x is for all ranges.
                x8 = inductor.empty([active * rows, self.k], x, triton_fp8.E4M3)
                scale_x = inductor.empty([active * rows, 1], x, torch.float32)
                launch = triton_fp8.rows_launch_of(active * rows, self.k)
                self._launch(launch, {"x": x, "y": x8, "scales": scale_x})
                inductor.matmul_into(y, x8, w, active, (scale_x, scale_w))
            elif not isinstance(blocks, Blocks):
                w = inductor.call(aten.permute.default, self._written_out(active), [1, 0])
                inductor.matmul_into(y, x, w, active)
            else:
                # The most split blocks: those of a partial wave, or all blocks of the last M.
                split = blocks.at_once or (last and self._count(last, blocks))
                self._launch_into(y, x, self._launch_of_rows(rows, active, blocks), split)
        return y

    def _count(self, m: int, blocks: Blocks) -> int:
        """Blocks of y for m rows."""
        return -(-m // blocks.rows) * sum(-(-n // blocks.features) for n in self.n)

    def _launch_of_rows(self, rows: Any, active: Any, blocks: Blocks) -> Launch:
        """The launch for a number of rows that varies; no programs where `active` is 0."""
        launch = self._launch_of(1, blocks, reduce=True)
        row_blocks = inductor.ceil_div(rows, blocks.rows)
        count, whole = active * row_blocks * self._count(1, blocks), 0
        if blocks.rest_splits > 1:
            whole = blocks.at_once * inductor.floor_div(count, blocks.at_once)
        return replace(
            launch,
            programs=whole + (count - whole) * launch.arguments["SPLITS"],
            arguments={**launch.arguments, "M": rows, "row_blocks": row_blocks, "whole": whole},
        )

    def _written_out(self, active: Any = 1, scales: Any = None) -> Any:
        """W in x's dtype, ``[active * sum(n), K]``: no rows where `active` is 0.

        Args:
            active: A size, 0 or 1.
            scales: Fp32 ``[1, sum(n)]``: W is then in e4m3, each row over its scale.
        """
        weights, k_padded, half_inner = self._sizes
        dtype = self.x.get_dtype() if scales is None else triton_fp8.E4M3
        w = inductor.empty([active * sum(self.n), self.k], self.x, dtype)
        launch = triton_linear.dequantize_launch_of(
            self.k, weights, k_padded, self.group_size, half_inner, dtype
        )
        read = {} if scales is None else {"scales": scales}
        self._launch(replace(launch, programs=active * launch.programs), {"w": w}, read)
        return w

    def _written_out_in_fp8(self, active: Any = 1) -> tuple[Any, Any]:
        """W in e4m3, ``[K, active * sum(n)]``, and its scales ``[1, active * sum(n)]``."""
        weights, _, _ = self._sizes
        scales = inductor.empty([1, active * sum(self.n)], self.x, torch.float32)
        launch = triton_fp8.row_scales_launch_of(self.k, weights, self.group_size)
        launch = replace(launch, programs=active * launch.programs)
        self._launch(launch, {"scales": scales})
        w = self._written_out(active, scales)
        return inductor.call(aten.permute.default, w, [1, 0]), scales

    def _launch_of(self, m: int, blocks: Blocks, reduce: bool) -> Launch:
        weights, k_padded, half_inner = self._sizes
        return triton_linear.launch_of(
            m,
            self.k,
            weights,
            k_padded,
            self.group_size,
            half_inner,
            self.x.get_dtype(),
            blocks,
            reduce,
        )

    def _launch_into(self, y: Any, x: Any, launch: Launch, split: int | None = None) -> None:
        """Launches the Triton kernel so that it writes y.

        Args:
            y: ``[M, sum(n)]``.
            x: ``[M, K]``, contiguous.
            launch: The launch, with reduce.
            split: The most blocks that are split; None if `launch` tells their number.
        """
        tensors = {"x": x, "y": y}
        shared = triton_linear.shared_programs(launch)
        if shared != 0:
            block = launch.arguments["BM"] * launch.arguments["BN"]
            tensors["partial"] = inductor.empty([shared, block], x, torch.float32)
            if split is None:
                split = inductor.floor_div(shared, int(launch.arguments["SPLITS"]))
            tensors["counters"] = inductor.persistent_zeros(split, x)
        self._launch(launch, tensors)

    @property
    def _sizes(self) -> tuple[list[tuple[int, int]], int, int]:
        """The n and n_padded of each weight, k_padded and half_inner."""
        return triton_linear.sizes_of([list(map(int, t.get_size())) for t in self.tiles], self.n)

    def _launch(
        self, launch: Launch, tensors: Mapping[str, Any], read: Mapping[str, Any] | None = None
    ) -> None:
        """Launches any of the kernels.

        Args:
            launch: Kernel, grid and arguments.
            tensors: x and the tensors that the kernel writes, by the names of its arguments without
                "_ptr". Tensors that it does not use may be missing.
            read: Further tensors that it reads.
        """
        named = {f"{name}_ptr": value for name, value in tensors.items()}
        others = {f"{name}_ptr": value for name, value in (read or {}).items()}
        buffers = triton_linear.buffers_of(list(zip(self.tiles, self.scale_and_zero, strict=True)))
        unused = dict.fromkeys(launch.tensor_names(), self.scale_and_zero[0])
        buffers = {name: buffer for name, buffer in buffers.items() if name in unused}
        inductor.launch_triton(
            launch.kernel,
            launch.programs,
            {**unused, **buffers, **others, **named},
            launch.arguments,
            named.keys() - {"x_ptr"},
            launch.warps,
            launch.stages,
        )
