"""Choosing kernels by measuring them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxint4._pytorch import inductor as _inductor
from fxint4.kernels import autotune as tuning
from fxint4.kernels.autotune import candidates, fastest
from fxint4.kernels.policy import Policy
from fxint4.kernels.select import Choice, MatmulShape
from fxint4.kernels.times import file_of
from fxint4.kernels.triton_common import Blocks

SHAPE = MatmulShape(16, 256, 512)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """Replaces measuring; the choices that were measured, of which the second is the fastest."""
    measured: list[Choice] = []

    def measure(*_: Any) -> list[dict[str, Any]]:
        found = [Choice("aten"), Choice("triton", Blocks(16, 64, splits=2)), Choice("dequantize")]
        measured.extend(found)
        return [tuning._entry(choice, us) for choice, us in zip(found, (3, 1, 2), strict=True)]

    monkeypatch.setattr(tuning, "_measured", measure)
    monkeypatch.setattr(tuning, "_machine", lambda: "gpu")
    return measured


def test_the_fastest_is_measured_once(timed: list[Choice], tmp_path: Path) -> None:
    for _ in range(2):
        assert fastest(SHAPE, tmp_path) == Choice("triton", Blocks(16, 64, splits=2))
    assert len(timed) == 3
    fastest(replace(SHAPE, m=17), tmp_path)  # another M is another question
    assert len(timed) == 6


@pytest.mark.parametrize("text", ["", "{", "[]", '{"m=16": 3}', "[" * 100_000])
def test_a_damaged_file_is_measured_anew(timed: list[Choice], text: str, tmp_path: Path) -> None:
    file_of(tmp_path, "kernels", "gpu").write_text(text)
    assert fastest(SHAPE, tmp_path).kernel == "triton"
    assert len(timed) == 3
    [file] = tmp_path.iterdir()
    assert json.loads(file.read_text())


def test_where_nothing_can_be_measured_the_rule_decides(
    timed: list[Choice], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    by_rule = [Choice("dequantize"), Choice("aten")]
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_measured", lambda *_: [])
        patch.setattr(tuning, "candidates", lambda *_: by_rule)
        assert fastest(SHAPE, tmp_path) == by_rule[0]
    assert not [*tmp_path.iterdir()]
    assert fastest(SHAPE, tmp_path).kernel == "triton"
    assert len(timed) == 3


def test_a_choice_can_be_edited(timed: list[Choice], tmp_path: Path) -> None:
    fastest(SHAPE, tmp_path)
    [file] = tmp_path.iterdir()
    known = json.loads(file.read_text())
    for entries in known.values():
        entries[0]["us"] = 0
    file.write_text(json.dumps(known))
    assert fastest(SHAPE, tmp_path) == Choice("aten")


@pytest.mark.parametrize("kernel", ["triton", "dequantize", "aten"])
def test_what_was_asked_for_is_not_chosen(kernel: str) -> None:
    device = torch.device("cpu")
    for policy in (Policy(kernel), Policy(kernel, cuda_graphs=True, measured=True)):
        for m in (1, 100, 5000):
            shape = replace(SHAPE, m=m)
            assert policy.choose(shape, device).kernel == kernel
            assert policy.choose_at_run_time(shape, device).kernel == kernel


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), [(1, 512, 1024), (512, 512, 1024)])
def test_every_candidate_runs_and_is_timed(m: int, n: int, k: int) -> None:
    shape = MatmulShape(m, n, k)
    measured = tuning._measured(shape)
    assert [tuning._choice(entry) for entry in measured] == candidates(shape)
    assert all(0 < entry["us"] < 10_000 for entry in measured)


@pytest.mark.gpu
# Inductor's CUDA graph trees reserve a memory pool in this way.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.own_cache
def test_max_autotune_measures_and_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def counting(*args: Any, original: Callable[..., Any] = tuning._measured) -> Any:
        nonlocal asked
        asked += 1
        return original(*args)

    monkeypatch.setattr(tuning, "_measured", counting)
    model = nn.Linear(512, 256, device="cuda", dtype=torch.bfloat16).eval()
    x = torch.randn(16, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(2):
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="int4tile", mode="max-autotune", dynamic=False)
            compiled(x)
    assert asked == 1
    assert list(_inductor.cache_folder().glob("fxint4-kernels-*.json"))
