"""What Inductor makes of int4 matmuls on a GPU, in force only inside our compile.

A number of rows that is known decides the kernel while the graph is compiled, and Inductor launches
it like its own. Where the sum over K is split among programs, these leave partial sums, and adding
them is Inductor's: in one kernel with the bias, the activation, the residual or the norm that
follows. A number of rows that varies decides at run time, in `fxint4.linears`: one compiled graph
serves every M, and a CUDA graph holds the kernel of the M that it was captured with. A package,
which runs without Python, has the kernels of all M, of which those of other M are launched with no
programs.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxint4 import _inductor
from fxint4._torch import aten
from fxint4.kernel_ranges import by_m
from fxint4.kernels import common, linear
from fxint4.kernels.common import Blocks, Launch
from fxint4.kernels.linear import MOST_WEIGHTS, choose, choose_blocks

__all__ = ["compile_graph", "lowered", "lowerings"]

#: For Inductor's caches: another one whenever something else may be made of a graph.
_KEY = hashlib.sha256(
    "".join(map(inspect.getsource, (sys.modules[__name__], _inductor, common, linear))).encode()
).hexdigest()


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any
) -> Callable[[list[Any]], Sequence[Any]]:
    """Compile an aten graph with Inductor. The result takes a list that it empties.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        **kwargs: for Inductor.
    """
    return _inductor.compile_fx_inner(gm, example_inputs, lowerings, _KEY, **kwargs)


def lowered() -> AbstractContextManager[None]:
    """A while in which whatever Inductor compiles ahead of time is lowered as ours is."""
    return _inductor.in_force(lowerings(cuda_graphs=False), _KEY)


def lowerings(cuda_graphs: bool) -> Mapping[Any, Callable[..., Any]]:
    """For each op of ours the function that lowers it.

    Args:
        cuda_graphs: whether kernels are replayed from CUDA graphs, so that launching one from
            Python costs nothing.
    """

    def int4pack_mm(x: Any, tiles: Any, group_size: int, scale_and_zero: Any) -> Any:
        n = int(scale_and_zero.get_size()[1])
        return linears(x, [tiles], [scale_and_zero], group_size, [n])

    def linears(
        x: Any,
        tiles: Sequence[Any],
        scale_and_zero: Sequence[Any],
        group_size: int,
        n: Sequence[int],
    ) -> Any:
        matmul = _Matmul(x, tiles, scale_and_zero, group_size, n)
        m = _inductor.static(x.get_size()[0])
        if m is None and _inductor.for_another_process() and common.triton:
            return matmul.multiplied_for_any_m()
        choice = choose(m, sum(n), matmul.k) if m else None
        if choice is None or choice.kernel == "aten":
            return matmul.run_time_choice(cuda_graphs)
        if choice.blocks is None:
            return matmul.dequantised()
        return matmul.multiplied(choice.blocks)

    return {
        aten._weight_int4pack_mm.default: int4pack_mm,
        torch.ops.fxint4.linears.default: linears,
    }


@dataclass(frozen=True)
class _Matmul:
    """Rows x [M, K] times weights of the same K, side by side: [M, sum(n)].

    Attributes:
        x: bf16 or fp16, one of Inductor's values like all tensors here.
        tiles: of each weight.
        scale_and_zero: of each weight.
        group_size: of all weights.
        n: out features of each weight.
    """

    x: Any
    tiles: Sequence[Any]
    scale_and_zero: Sequence[Any]
    group_size: int
    n: Sequence[int]

    @property
    def k(self) -> int:
        """In features."""
        return int(self.x.get_size()[1])

    def run_time_choice(self, cuda_graphs: bool) -> Any:
        """The product by the op that chooses when it is called."""
        return _inductor.call_as_it_is(
            torch.ops.fxint4.linears.default,
            self.x,
            self.tiles,
            self.scale_and_zero,
            self.group_size,
            self.n,
            cuda_graphs,
        )

    def dequantised(self) -> Any:
        """The product by W written out, and Inductor's matmul."""
        w = _inductor.empty([sum(self.n), self.k], self.x, self.x.get_dtype())
        weights, k_padded, half_inner = self._sizes()
        launch = linear.dequantize_launch_of(
            self.k, weights, k_padded, self.group_size, half_inner, self.x.get_dtype()
        )
        self._launch(launch, {"w_ptr": w}, {"w_ptr"})
        return _inductor.call(
            aten.mm.default, self.x, _inductor.call(aten.permute.default, w, [1, 0])
        )

    def multiplied(self, blocks: Blocks) -> Any:
        """The product by the Triton kernel, and the sum of what its splits leave."""
        x = _inductor.contiguous(self.x)
        m, dtype, splits = int(x.get_size()[0]), x.get_dtype(), blocks.splits
        weights, k_padded, half_inner = self._sizes()
        launch = linear.launch_of(
            m, self.k, weights, k_padded, self.group_size, half_inner, dtype, blocks, reduce=False
        )
        size = [m, sum(self.n)]
        tensors = {"x_ptr": x, "y_ptr": x, "partial_ptr": x, "counters_ptr": x}
        if splits == 1:
            tensors["y_ptr"] = y = _inductor.empty(size, x, dtype)
            self._launch(launch, tensors, {"y_ptr"})
            return y
        tensors["partial_ptr"] = partial = _inductor.empty([splits, *size], x, torch.float32)
        self._launch(launch, tensors, {"partial_ptr"})
        # Not a reduction, which would keep what follows from being fused with it.
        y = _inductor.call(aten.select.int, partial, 0, 0)
        for split in range(1, splits):
            part = _inductor.call(aten.select.int, partial, 0, split)
            y = _inductor.call(aten.add.Tensor, y, part)
        return _inductor.call(torch.ops.prims.convert_element_type.default, y, dtype)

    def multiplied_for_any_m(self) -> Any:
        """The product by the Triton kernel, in the blocks that the M of each run asks for.

        Every run launches it in all blocks that there are, with no programs where M is another.
        """
        x = _inductor.contiguous(self.x)
        rows, dtype = x.get_size()[0], x.get_dtype()
        weights, k_padded, half_inner = self._sizes()
        n = sum(self.n)
        y = _inductor.empty([rows, n], x, dtype)
        for first, last, blocks in _blocks_by_m(n, self.k):
            there = _inductor.one_if_between(rows, first, last)
            row_blocks = _inductor.ceil_div(rows, blocks.rows)
            launch = linear.launch_of(
                1,
                self.k,
                weights,
                k_padded,
                self.group_size,
                half_inner,
                dtype,
                blocks,
                reduce=True,
            )
            tensors = {"x_ptr": x, "y_ptr": y, "partial_ptr": x, "counters_ptr": x}
            written = {"y_ptr"}
            if blocks.splits > 1:
                # The sum is the kernel's: it has to end in y whichever blocks are launched.
                programs = there * row_blocks * launch.programs
                size = [programs, blocks.rows * blocks.features]
                tensors["partial_ptr"] = _inductor.empty(size, x, torch.float32)
                count = there * row_blocks * (launch.programs // blocks.splits)
                tensors["counters_ptr"] = _inductor.zeros([count], x, torch.int32)
                written |= {"partial_ptr", "counters_ptr"}
            launch = replace(
                launch,
                programs=there * row_blocks * launch.programs,
                arguments={**launch.arguments, "M": rows, "row_blocks": row_blocks},
            )
            self._launch(launch, tensors, written)
        return y

    def _sizes(self) -> tuple[list[tuple[int, int]], int, int]:
        """Of each weight n and n_padded; what they share: k_padded and inner_k_tiles / 2."""
        _, k_tiles, _, half_inner = map(int, self.tiles[0].get_size())
        padded = [8 * int(tiles.get_size()[0]) for tiles in self.tiles]
        return list(zip(self.n, padded, strict=True)), 32 * k_tiles * half_inner, half_inner

    def _launch(self, launch: Launch, tensors: Mapping[str, Any], written: set[str]) -> None:
        buffers = {}
        for i in range(MOST_WEIGHTS):
            of = i if i < len(self.tiles) else 0
            buffers[f"tiles{i}_ptr"] = self.tiles[of]
            buffers[f"params{i}_ptr"] = self.scale_and_zero[of]
        _inductor.launch_triton(
            launch.kernel,
            launch.programs,
            {**buffers, **tensors},
            launch.arguments,
            written,
            launch.warps,
            launch.stages,
        )


def _blocks_by_m(n: int, k: int) -> list[tuple[int, int | None, Blocks]]:
    """First and last M, and the blocks of the Triton kernel for them; the last range has no end."""

    def blocks_of(m: int) -> Blocks:
        blocks = choose(m, n, k).blocks or choose_blocks(m, n, k)
        return replace(blocks, at_once=0, rest_splits=1)

    return by_m(blocks_of)
