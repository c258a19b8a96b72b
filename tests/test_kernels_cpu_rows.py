"""Measuring up to how many rows the CPU's int4 op is the fastest."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from fxint4.kernels import cpu_rows
from fxint4.kernels.cpu_rows import RowRule, measure, measured_rule, rule_of

BF16, FP32 = torch.bfloat16, torch.float32
UNBOUNDED = 2**62

Clock = Callable[[int, Sequence[str]], dict[str, float]]


def clock(**seconds: Callable[[int], float]) -> tuple[Clock, list[tuple[int, list[str]]]]:
    """A machine that takes these times for M rows; and what it was asked."""
    asked: list[tuple[int, list[str]]] = []

    def time_of(m: int, forms: Sequence[str]) -> dict[str, float]:
        asked.append((m, list(forms)))
        return {form: seconds[form](m) for form in forms}

    return time_of, asked


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rows, "_known", {})
    monkeypatch.setattr(cpu_rows, "_seconds_left", cpu_rows.MOST_SECONDS)
    monkeypatch.setattr(cpu_rows, "_machine", lambda: "cpu")


# --- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("crossing", [0, 1, 2, 4, 8, 16, 32, 64, 128])
def test_the_last_row_at_which_int4_wins_is_found(crossing: int) -> None:
    time_of, asked = clock(
        int4=lambda m: 1.0 if m <= crossing else 9.0, bfloat16=lambda m: 2.0, float32=lambda m: 3.0
    )
    times = measure(BF16, time_of)
    assert rule_of(times, BF16).most_rows == crossing
    assert [each["m"] for each in times] == sorted({m for m, _ in asked})
    assert len(asked) <= 7


def test_int4_may_be_the_fastest_for_all_rows() -> None:
    time_of, asked = clock(int4=lambda m: m, float32=lambda m: 2 * m)
    assert rule_of(measure(FP32, time_of), FP32) == RowRule(1, UNBOUNDED, FP32)
    assert [m for m, _ in asked] == list(cpu_rows.ROWS)


def test_one_row_may_be_an_exception() -> None:
    time_of, _ = clock(int4=lambda m: 4 if m < 3 or m > 20 else 1, float32=lambda m: 2)
    assert rule_of(measure(FP32, time_of), FP32) == RowRule(4, 16, FP32)


def test_more_bytes_have_to_be_worth_it() -> None:
    about_equal, _ = clock(int4=lambda m: 1.09, bfloat16=lambda m: 1.0, float32=lambda m: 1.0)
    assert rule_of(measure(BF16, about_equal), BF16).most_rows == UNBOUNDED
    slower, _ = clock(int4=lambda m: 2.0, bfloat16=lambda m: 1.0, float32=lambda m: 0.95)
    assert rule_of(measure(BF16, slower), BF16) == RowRule(1, 0, BF16)


def test_a_copy_in_fp32_is_slower_nowhere() -> None:
    fast = {"int4": lambda m: 1.0 if m <= 8 else 50.0, "bfloat16": lambda m: 10.0}
    always, _ = clock(**fast, float32=lambda m: 5.0)
    assert rule_of(measure(BF16, always), BF16) == RowRule(1, 8, FP32)
    not_for_many, _ = clock(**fast, float32=lambda m: 5.0 if m < 256 else 20.0)
    assert rule_of(measure(BF16, not_for_many), BF16) == RowRule(1, 8, BF16)


# --- the file ------------------------------------------------------------------------------------


def test_a_class_of_sizes_is_measured_once_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    time_of, _ = clock(int4=lambda m: m, bfloat16=lambda m: 16, float32=lambda m: 8)
    made = []

    class Fake:
        def __init__(self, *of: object) -> None:
            made.append(of)
            self.time = time_of

    monkeypatch.setattr(cpu_rows, "_Forms", Fake)
    rule = RowRule(1, 8, FP32)
    for n in (384, 400, 496):  # of one class
        assert measured_rule(tmp_path, BF16, n, 1024, 128) == rule
    assert made == [(BF16, 384, 1024, 128)]
    monkeypatch.setattr(cpu_rows, "_known", {})  # another process
    assert measured_rule(tmp_path, BF16, 384, 1024, 128) == rule
    assert len(made) == 1
    assert measured_rule(tmp_path, BF16, 384, 1024, 64) == rule
    assert measured_rule(tmp_path, BF16, 512, 1024, 128) == rule
    assert len(made) == 3

    [file] = tmp_path.glob("fxint4-cpu-rows-*.json")
    known = json.loads(file.read_text())
    for entries in known.values():
        entries[0]["int4"] = 1e6  # it can be edited
        entries[1]["int4"] = 1e6
    file.write_text(json.dumps(known))
    assert measured_rule(tmp_path, BF16, 384, 1024, 128) == rule  # alike in one process
    monkeypatch.setattr(cpu_rows, "_known", {})
    assert measured_rule(tmp_path, BF16, 384, 1024, 128) != rule


def test_a_process_measures_for_a_bounded_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu_rows, "_seconds_left", 0.0)
    monkeypatch.setattr(cpu_rows, "_Forms", lambda *_: pytest.fail("measured"))
    assert measured_rule(tmp_path, BF16, 512, 1024, 128) is None
    assert not [*tmp_path.iterdir()]  # the next process measures
    monkeypatch.setattr(cpu_rows, "_seconds_left", 1.0)
    assert measured_rule(tmp_path, BF16, 512, 1024, 128) is None  # alike in one process


def test_a_busy_machine_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waited = iter(range(10**6))
    monkeypatch.setattr(cpu_rows, "_waited", lambda: next(waited))
    assert measured_rule(tmp_path, FP32, 64, 64, 64) is None
    assert not [*tmp_path.iterdir()]
    assert cpu_rows._seconds_left <= 0


def test_a_folder_that_cannot_be_written_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu_rows, "_in_time", lambda *_: [{"m": 1, "int4": 1, "float32": 2}])
    (tmp_path / "file").write_text("")
    rule = measured_rule(tmp_path / "file", FP32, 64, 64, 64)
    assert rule == RowRule(1, UNBOUNDED, FP32)


# --- what is timed -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_form_runs(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu_rows, "ROWS", (1, 2))
    monkeypatch.setattr(cpu_rows, "_waited", lambda: 0.0)
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert measured_rule(tmp_path, dtype, 80, 100 // 32 * 32, 32) is not None
    assert torch.equal(torch.get_rng_state(), state)
    [file] = tmp_path.iterdir()
    [(name, times)] = json.loads(file.read_text()).items()
    assert name == f"dtype={str(dtype)[6:]} n=64 k=96 group_size=32"
    assert all(us > 0 for each in times for us in each.values())
    assert times[0].keys() == {"m", "int4", str(dtype)[6:], "float32"}


def test_weights_are_of_bounded_size_and_hold_ordinary_numbers() -> None:
    forms = cpu_rows._Forms(BF16, 2**14, 2**14, 128)
    assert forms._ring.nbytes <= 2 * cpu_rows._RING_BYTES
    for m in (1, 256):
        for form in ("int4", "bfloat16", "float32"):
            weight, *parameters = forms._weight(form, forms._rows(m))
            assert weight.numel() <= cpu_rows._MOST_ELEMENTS
            for part in (weight, *parameters):
                assert part.dtype is torch.uint8 or 0.9 < float(part.flatten()[0]) < 1.1


@pytest.mark.parametrize(
    ("size", "of"), [(16, 16), (32, 32), (48, 48), (64, 64), (80, 64), (112, 96), (11008, 8192)]
)
def test_classes_of_sizes(size: int, of: int) -> None:
    assert cpu_rows._class_of(size) == of
