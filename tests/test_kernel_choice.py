"""Ranges of M between the changes of a choice."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from fxint4.kernel_choice import at_run_time, by_m, range_text
from fxint4.kernels.choice import Choice, _gpu_of, choose, gpu_of
from fxint4.kernels.common import Blocks


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


def launched_by_the_host(m: int, n: int, k: int) -> Choice:
    return at_run_time(m, n, k, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("choice", [choose, launched_by_the_host])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (6144, 4096), (28672, 4096), (64, 65536)])
def test_the_ranges_say_what_the_kernels_say(
    choice: Callable[[int, int, int], object], n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxint4.kernels.choice.triton", object())  # choices are made without it
    ranges = by_m(lambda m: choice(m, n, k))
    assert (ranges[0][0], ranges[-1][1]) == (1, None)
    for (_, last, chosen), (first, _, following) in itertools.pairwise(ranges):
        assert last is not None
        assert first == last + 1
        assert chosen != following
    some = (*range(1, 9000), *(2**i + j for i in range(13, 31) for j in (-1, 0, 1, 777)))
    for m in some:
        [told] = [c for first, last, c in ranges if first <= m and (last is None or m <= last)]
        assert told == choice(m, n, k), m


def test_each_gpu_of_a_machine_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [(9, 114), (8, 142)]  # an H100 and an L40S
    properties = [SimpleNamespace(major=major, multi_processor_count=n) for major, n in gpus]
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda gpu: properties[gpu.index])
    _gpu_of.cache_clear()
    for current, expected in enumerate([(114, True), (142, False)]):
        monkeypatch.setattr("torch.cuda.current_device", lambda current=current: current)
        assert gpu_of(torch.device("cuda")) == gpu_of(torch.device("cuda", current)) == expected
    _gpu_of.cache_clear()
    assert gpu_of(torch.device("cpu")) == (132, True)


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


@pytest.mark.parametrize("replayed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_rows_go_to_atens_op_where_the_host_launches_and_the_dtype_is_its_own(
    dtype: torch.dtype, replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxint4.kernels.choice.triton", object())
    n, k = 28672, 4096
    few, many = (at_run_time(m, n, k, dtype, torch.device("cpu"), replayed) for m in (8, 100))
    host = dtype is torch.bfloat16 and not replayed
    assert few == (Choice("aten") if host else choose(8, n, k))
    assert many == choose(100, n, k)


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (Choice("aten"), "aten"),
        (Choice("dequantise"), "dequantise + cuBLAS"),
        (Choice("triton", Blocks(rows=16, features=64, splits=4)), "triton 16x64, 4 splits"),
        (Choice("triton", Blocks(rows=128, features=128)), "triton 128x128"),
    ],
)
def test_a_choice_as_text(choice: Choice, text: str) -> None:
    assert str(choice) == text
