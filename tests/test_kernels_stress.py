"""The kernels under stress on a GPU: many repeats, streams, graphs, faults, random shapes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import (
    compiled_only,
    make_experts,
    needs_triton,
    quiet_triton,
    rows,
)
from support import FP32, assert_within
from torch import Tensor

from fxint4.kernels import triton_linear as kernels
from fxint4.kernels.select import Choice, configurations
from fxint4.kernels.triton_common import Blocks
from fxint4.kernels.triton_experts import shared_of
from fxint4.kernels.triton_linear import linears

pytestmark = [pytest.mark.gpu, needs_triton, compiled_only, quiet_triton]

BF16, FP16 = torch.bfloat16, torch.float16


def assert_right(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Checks that y is x @ weight.T up to fp32 sums and the rounding of y.

    Tensor cores cut off where fp32 additions round, so each of these counts four times.

    weight: float64 [N, K], rounded to the dtype of x, which is what the kernels multiply by.
    """
    k = x.shape[1]
    step = torch.finfo(x.dtype).eps / 2
    share = (1 + step) * (1 + FP32) ** (4 * k + 3) - 1
    least = torch.finfo(x.dtype).smallest_normal * step  # half a step between denormals
    x = x.double()
    assert_within(y, x @ weight.T, share * (x.abs() @ weight.abs().T) + least)


@dataclass(frozen=True)
class Weights:
    """Packed weights of the same K, and their float64 values, one below the other."""

    packed: list[tuple[Tensor, Tensor]]
    ns: list[int]
    group: int
    weight: Tensor

    def times(self, x: Tensor, choice: Choice | None = None) -> Tensor:
        return linears(x, self.packed, self.group, self.ns, choice)

    def check(self, y: Tensor, x: Tensor) -> None:
        assert_right(y, x, self.weight.to(x.dtype).double())


def make(ns: list[int], k: int, group: int, inner: int) -> Weights:
    made = [make_experts(1, n, k, group, inner, "cuda") for n in ns]
    return Weights(
        [(m.tiles[0], m.scale_and_zero[0]) for m in made],
        ns,
        made[0].shape.group_size,
        torch.cat([m.weight[0] for m in made]),
    )


SHAPES: list[tuple[list[int], int, int, int, torch.dtype]] = [  # n, k, group, inner_k_tiles, dtype
    ([1024], 4096, 128, 8, BF16),
    ([1024, 256, 256], 2048, 64, 4, FP16),
    ([1000, 72], 1096, 32, 2, BF16),
    ([1111], 2880, 256, 8, FP16),
    ([200, 300, 8, 500], 1001, 32, 8, BF16),
    ([512, 512], 3072, 256, 2, FP16),
    ([904], 1536, 64, 8, BF16),
    ([640, 136], 2000, 128, 4, FP16),
]


def has_room(blocks: Blocks) -> bool:
    """Whether this GPU has the shared memory for a program.

    Where it is less than an A100's, `choose` takes none of those that need more than there is.
    """
    small = blocks.features == 64 or (blocks.rows < 128 and blocks.step == 128)
    return small or shared_of(torch.device("cuda", 0)) >= 163 * 2**10


def fitted(blocks: Blocks, m: int, ns: list[int]) -> Choice:
    """The choice of these blocks; if they split a partial wave, about half of all are in it."""
    count = -(-m // blocks.rows) * sum(-(-n // blocks.features) for n in ns)
    if blocks.rest_splits > 1:
        blocks = replace(blocks, at_once=count // 2 + 1)
    return Choice("triton", blocks)


def captured(count: int, call: Callable[[], Tensor], expected: Tensor) -> tuple[Any, Tensor]:
    """A CUDA graph of some calls, and how many of their results were not as expected, bit for bit.

    A call has to have been made before, since a capture must not compile.
    """
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            different += (call() != expected).any()
    return graph, different


@pytest.mark.parametrize("number", range(len(configurations())))
def test_thousands_of_repeats_are_identical(number: int) -> None:
    """Each configuration at an even shape and at one other, launched and replayed."""
    blocks = configurations()[number]
    if not has_room(blocks):
        pytest.skip(f"{blocks} is not for this GPU")
    for ns, k, group, inner, dtype in (SHAPES[0], SHAPES[1 + number % (len(SHAPES) - 1)]):
        made = make(ns, k, group, inner)
        m = 2 * blocks.rows - 3
        x = rows(m, k, "cuda", dtype)
        choice = fitted(blocks, m, ns)
        expected = made.times(x, choice)
        made.check(expected, x)
        different = sum((made.times(x, choice) != expected).any() for _ in range(200))
        graph, of_graph = captured(100, partial(made.times, x, choice), expected)
        for _ in range(30):
            graph.replay()
        assert int(different) == int(of_graph) == 0


@pytest.mark.parametrize("by_row", [False, True])
def test_thousands_of_repeats_of_experts_are_identical(by_row: bool) -> None:
    made = make_experts(16, 1000, 2048, 64, 8, "cuda")
    for count in (5, 100, 700) if not by_row else (1, 40):
        x = rows(count, 2048, "cuda")
        index = torch.arange(count, device="cuda") * 16 // count
        ends = torch.bincount(index, minlength=16).cumsum(0).int()
        call = partial(made.by_index, x, index) if by_row else partial(made.by_ends, x, ends)
        expected = call()
        for e in range(16):
            assert_right(expected[index == e], x[index == e], made.weight[e].bfloat16().double())
        graph, different = captured(100, call, expected)
        for _ in range(30):
            graph.replay()
        assert int(different) == 0


SPLIT = [
    Choice("triton", Blocks(rows=16, features=64, splits=8, step=256)),
    Choice("triton", Blocks(rows=64, features=64, splits=4, stages=4)),
    Choice("triton", Blocks(rows=32, features=64, splits=2)),
    Choice("triton", Blocks(rows=128, features=64, at_once=3, rest_splits=8)),
]


def test_streams_and_graphs_at_the_same_time() -> None:
    """Launches on four streams, replays on four others: no two use the same counters."""
    made = make([1024, 520], 4096, 128, 8)
    jobs: list[tuple[Callable[[], Tensor], Tensor]] = []
    for number, choice in enumerate(SPLIT):
        x = rows(16 + 50 * number, 4096, "cuda", (BF16, FP16)[number % 2], seed=number)
        call = partial(made.times, x, choice)
        expected = call()
        made.check(expected, x)
        jobs.append((call, expected))
    graphs = [captured(20, call, expected) for call, expected in jobs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(8)]
    different = []
    for turn in range(60):
        for (graph, _), stream in zip(graphs, streams[4:], strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        for at, stream in enumerate(streams[:4]):
            call, expected = jobs[(at + turn) % len(jobs)]
            with torch.cuda.stream(stream):
                different.append(sum((call() != expected).any() for _ in range(5)))
    torch.cuda.synchronize()
    assert sum(map(int, different)) == 0
    assert [int(of_graph) for _, of_graph in graphs] == [0] * len(graphs)


def test_after_a_launch_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters that were taken for it are zeros still, also those of a capture that failed."""
    made = make([1024], 4096, 128, 8)
    x = rows(5, 4096, "cuda")
    expected = made.times(x, SPLIT[0])

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "run", fail)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                made.times(x, SPLIT[0])
        with pytest.raises(KeyboardInterrupt), torch.cuda.graph(torch.cuda.CUDAGraph()):
            made.times(x + 1, SPLIT[0])
    assert torch.equal(made.times(x, SPLIT[0]), expected)
    graph, different = captured(10, partial(made.times, x, SPLIT[0]), expected)
    graph.replay()
    assert int(different) == 0


_FAULT = """
import torch
from fxint4.kernels.select import Choice
from fxint4.kernels.triton_common import Blocks
from fxint4.kernels.triton_linear import linear

tiles = torch.randint(-(2**31), 2**31 - 1, (512, 32, 32, 4), dtype=torch.int32, device="cuda")
parameters = torch.randn(32, 4096, 2, dtype=torch.bfloat16, device="cuda")
choice = Choice("triton", Blocks(rows=128, features=64, splits=8))
x = torch.randn(2048, 4096, dtype=torch.bfloat16, device="cuda")
call = lambda: linear(x, tiles, parameters, 128, 4096, choice)
expected = call()
torch.cuda.synchronize()
with torch.cuda.stream(torch.cuda.Stream()):
    wrong = torch.zeros(9, device="cuda")[torch.full((9,), 10, device="cuda")]
for _ in range(20):
    call()
try:
    torch.cuda.synchronize()
except RuntimeError:
    pass
try:
    call()
    torch.cuda.synchronize()
except RuntimeError:
    print("refused")
"""


def test_after_a_fault_on_the_gpu_nothing_runs() -> None:
    """A kernel that is killed leaves counters behind that are not 0; CUDA then runs no other."""
    made = subprocess.run(
        [sys.executable, "-c", _FAULT], capture_output=True, text=True, check=False
    )
    assert "refused" in made.stdout, made.stdout + made.stderr


# --- random shapes -------------------------------------------------------------------------------

some = settings(max_examples=40, deadline=None, derandomize=True)
groups = st.sampled_from([32, 64, 128, 256])
inners = st.sampled_from([2, 4, 8])
counts = st.one_of(st.integers(1, 70), st.integers(71, 1300))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@some
@given(
    m=counts,
    ns=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    k=st.integers(1, 3000),
    group=groups,
    inner=inners,
)
def test_random_shapes(
    dtype: torch.dtype, m: int, ns: list[int], k: int, group: int, inner: int
) -> None:
    made = make(ns, k, group, inner)
    x = rows(m, k, "cuda", dtype)
    made.check(made.times(x), x)
    made.check(made.times(x, Choice("dequantize")), x)


@some
@given(
    count=counts,
    number=st.integers(1, 9),
    n=st.integers(1, 700),
    k=st.integers(1, 3000),
    group=groups,
    inner=inners,
    seed=st.integers(0, 9),
)
def test_random_experts(
    count: int, number: int, n: int, k: int, group: int, inner: int, seed: int
) -> None:
    made = make_experts(number, n, k, group, inner, "cuda")
    weight = made.weight.bfloat16().double()
    x = rows(count, k, "cuda")
    generator = torch.Generator("cuda").manual_seed(seed)
    index = torch.randint(0, number, (count,), device="cuda", generator=generator).sort()[0]
    grouped = made.by_ends(x, torch.bincount(index, minlength=number).cumsum(0).int())
    indexed = made.by_index(x, index)
    for e in range(number):
        mine = index == e
        assert_right(grouped[mine], x[mine], weight[e])
        assert_right(indexed[mine], x[mine], weight[e])
