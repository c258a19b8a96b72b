"""The kernel that is chosen for each M, and the ranges of M that have the same choice."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxint4.kernels.select import (
    Choice,
    Gpu,
    Launcher,
    MatmulShape,
    by_m,
    choose,
    choose_blocks,
    choose_few_rows,
    choose_many_rows,
    gpu_of,
    range_text,
    select_kernel,
)
from fxint4.kernels.triton_common import Blocks
from fxint4.weights.ops import _choice


def test_one_choice_is_one_range() -> None:
    assert by_m(lambda m: "aten") == [(1, None, "aten")]


@pytest.mark.parametrize(
    "firsts",
    [
        (2,),
        (2, 3, 4),
        (17, 33, 65, 129, 2048),
        (4095, 4096, 4097),
        (4097, 8192, 8193),
        (5000, 16385, 40000, 2**20 + 1, 2**39),
    ],
    ids=str,
)
def test_every_change_is_found(firsts: tuple[int, ...]) -> None:
    ranges = by_m(lambda m: sum(m >= first for first in firsts))
    starts = [1, *firsts]
    ends = [first - 1 for first in firsts]
    assert ranges == list(zip(starts, [*ends, None], range(len(starts)), strict=True))


def test_a_choice_that_comes_back_is_a_range_of_its_own() -> None:
    ranges = by_m(lambda m: "odd" if m <= 3 and m % 2 else "even")
    assert ranges == [(1, 1, "odd"), (2, 2, "even"), (3, 3, "odd"), (4, None, "even")]


@pytest.fixture
def _with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices are made without it, but not where it is missing."""
    monkeypatch.setattr("fxint4.kernels.select.triton", object())


GRAPHS = {"in_cuda": True, "replayed": True}
AMPERE = {"gpu": Gpu(multiprocessors=108, wgmma=False)}
MANY = "dequantize"


@pytest.mark.usefixtures("_with_triton")
@pytest.mark.parametrize(
    ("n", "k", "options", "ranges"),
    [
        # The table of docs/gpu.md: under CUDA graphs, on Hopper and before, and without CUDA C++.
        (4096, 4096, GRAPHS, [(1, "cuda"), (9, "triton"), (33, "cuda"), (2049, MANY)]),
        (28672, 4096, GRAPHS, [(1, "cuda"), (9, "triton"), (33, "cuda"), (2049, MANY)]),
        (4096, 4096, GRAPHS | AMPERE, [(1, "cuda"), (9, "triton"), (129, MANY)]),
        (4096, 4096, {}, [(1, "triton"), (1025, MANY)]),
        (4096, 4096, AMPERE, [(1, "triton"), (129, MANY)]),
        # W is written out sooner where programs of 128 rows by 128 features wait for others.
        (28672, 4096, {}, [(1, "triton"), (897, MANY)]),
        # Launched from Python a CUDA kernel has to have 2^35 products to do: M >= 2^35 / (N K).
        (28672, 4096, {"in_cuda": True}, [(1, "triton"), (293, "cuda"), (2049, MANY)]),
        # K of no multiple of 8 elements, which is 16 bytes, is not theirs.
        (4096, 4092, GRAPHS, [(1, "triton"), (1025, MANY)]),
    ],
)
def test_which_kernel_serves_which_rows(
    n: int, k: int, options: dict[str, Any], ranges: list[tuple[int, str]]
) -> None:
    found = by_m(lambda m: choose(MatmulShape(m, n, k), **options).kernel)
    assert [(first, kernel) for first, _, kernel in found] == ranges
    assert found[-1][1] is None


@pytest.mark.usefixtures("_with_triton")
@pytest.mark.parametrize(
    ("n", "k", "ranges"),
    [
        # ATen's op reads W once for 16 rows: up to 80 million elements, and 8 rows in any case.
        (4096, 4096, [(1, "aten"), (65, "triton"), (1025, MANY)]),
        (28672, 4096, [(1, "aten"), (9, "triton"), (897, MANY)]),
        (64, 65536, [(1, "aten"), (305, "triton"), (1025, MANY)]),
    ],
)
def test_which_op_serves_which_rows_where_python_launches_it(
    n: int, k: int, ranges: list[tuple[int, str]]
) -> None:
    cpu = torch.device("cpu")
    found = by_m(lambda m: select_kernel(MatmulShape(m, n, k), cpu, "python").kernel)
    assert [(first, kernel) for first, _, kernel in found] == ranges


@pytest.mark.usefixtures("_with_triton")
@pytest.mark.parametrize("m", [1, 8, 16, 17, 33, 64, 65, 128, 129, 500, 1000])
@pytest.mark.parametrize(("n", "k"), [(8, 32), (4096, 4096), (28672, 4096), (64, 65536)])
def test_blocks_of_triton_fit_the_rows_and_the_columns(m: int, n: int, k: int) -> None:
    blocks = choose_blocks(MatmulShape(m, n, k))
    assert blocks.rows >= min(m, 128) or (m > 64 and blocks.rows == 64)
    assert blocks.rows == 16 or blocks.rows < 2 * m  # 16 are the fewest of a tensor core
    assert blocks.splits == 1 or k >= 2 * blocks.splits * blocks.step  # two steps for each program


def test_the_rule_for_cuda_blocks_takes_what_was_measured_to_be_fastest() -> None:
    """The times of benchmarks/tune_cuda.py on an H200, which the rule was made from."""
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "tune_cuda_h200.json"
    rows = json.loads(results.read_text())["rows"]
    few, many = [], []
    for row in rows:
        m, n, k, times = row["m"], row["n"], row["k"], row["times_us"]
        taken = choose_few_rows(n) if m <= 8 else choose_many_rows(MatmulShape(m, n, k))
        kind = type(taken).__name__
        fastest = min(us for name, us in times.items() if name.startswith(kind))
        (few if m <= 8 else many).append(times[f"{kind}{taken.sizes}"] / fastest)
    assert few == [1.0] * 20
    assert len(many) == 55
    # What benchmarks/README.md says of them.
    assert statistics.mean(many) < 1.0055
    assert max(many) < 1.145


def test_each_gpu_of_a_machine_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [(9, 0, 114), (8, 9, 142), (8, 0, 108)]  # an H100, an L40S, an A100
    properties = [
        SimpleNamespace(major=major, minor=minor, multi_processor_count=n)
        for major, minor, n in gpus
    ]
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda gpu: properties[gpu.index])
    gpu_of.cache_clear()
    for current, expected in enumerate(
        [Gpu(114, True, True), Gpu(142, False, True), Gpu(108, False, False)]
    ):
        monkeypatch.setattr("torch.cuda.current_device", lambda current=current: current)
        assert gpu_of(torch.device("cuda")) == gpu_of(torch.device("cuda", current)) == expected
    gpu_of.cache_clear()
    assert gpu_of(torch.device("cpu")) == Gpu(132, True)


@pytest.mark.parametrize(
    ("first", "last", "text"),
    [
        (1, None, "every M"),
        (1, 1, "M=1"),
        (1, 16, "M<=16"),
        (17, 32, "M=17..32"),
        (9, 9, "M=9"),
        (2048, None, "M>=2048"),
    ],
)
def test_a_range_as_text(first: int, last: int | None, text: str) -> None:
    assert range_text(first, last) == text


@pytest.mark.usefixtures("_with_triton")
@pytest.mark.parametrize("launcher", ["python", "inductor", "cuda_graph", "package"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_rows_go_to_atens_op_where_the_host_launches_and_the_dtype_is_its_own(
    dtype: torch.dtype, launcher: Launcher
) -> None:
    n, k = 28672, 4096
    few, many = (
        select_kernel(MatmulShape(m, n, k, dtype=dtype), torch.device("cpu"), launcher)
        for m in (8, 100)
    )
    host = dtype is torch.bfloat16 and launcher == "python"
    assert str(few) == ("aten" if host else "triton 16x128")
    assert str(many) == "triton 128x128"


@pytest.mark.usefixtures("_with_triton")
@pytest.mark.parametrize("replayed", [True, False])
def test_the_op_asks_for_its_launcher(replayed: bool) -> None:
    cpu, sizes = torch.device("cpu"), (1, 4096, 14336, 64, 4)
    chosen = _choice.__wrapped__(*sizes, torch.bfloat16, cpu, replayed, None)
    launcher: Launcher = "cuda_graph" if replayed else "python"
    assert chosen == select_kernel(MatmulShape(*sizes), cpu, launcher)
    assert chosen.kernel == ("triton" if replayed else "aten")


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (Choice("aten"), "aten"),
        (Choice("dequantize"), "dequantize + cuBLAS"),
        (Choice("triton", Blocks(rows=16, features=64, splits=4)), "triton 16x64, 4 splits"),
        (Choice("triton", Blocks(rows=128, features=128)), "triton 128x128"),
    ],
)
def test_a_choice_as_text(choice: Choice, text: str) -> None:
    assert str(choice) == text
