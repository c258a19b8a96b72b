"""Recipes: the codes that a method chooses, whatever the process has set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fxint4 import Calibration, Int4TileTensor, calibrate, pack_
from fxint4.quant.methods import METHODS
from fxint4.quant.methods.awq import awq_scale
from fxint4.quant.recipe import Recipe
from fxint4.quant.statistics import Statistics
from fxint4.quant.tile_layout import choose_shape

DTYPES = (torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=DTYPES, ids=str)
def another_default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """A default dtype to set, which is float32 again after the test."""
    assert torch.get_default_dtype() is torch.float32
    yield request.param
    torch.set_default_dtype(torch.float32)


def statistics() -> Statistics:
    x = torch.randn(200, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    x[:, ::7] *= 20
    h, magnitudes = x.T @ x, x.abs().mean(0)
    w = torch.randn(40, 96, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    scale = awq_scale([w], h, magnitudes, 32).reciprocal()
    assert scale.dtype is torch.float32
    return Statistics(h, magnitudes, torch.tensor(200), scale)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("experts", [False, True])
def test_codes_do_not_depend_on_the_default_dtype(
    experts: bool, method: str, another_default: torch.dtype
) -> None:
    w = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)).expand(2, 40, 96)
    w = w if experts else w[0]
    shape = choose_shape(40, 96, 32, batch=(2,) if experts else ())
    made = []
    for default in (torch.float32, another_default):
        torch.set_default_dtype(default)
        sums = None
        if method in METHODS[3:]:
            sums = statistics()
            if experts:
                sums = Statistics(
                    sums.second_moments.expand(2, -1, -1),
                    sums.magnitudes.expand(2, -1),
                    sums.rows.expand(2),
                    sums.pre_scale,
                )
        packed, sqnr_db = Int4TileTensor.quantized(w, shape, Recipe(method, sums))
        packed.check()
        made.append((*packed.buffers.values(), torch.tensor(sqnr_db, dtype=torch.float64)))
    for one, other in zip(*made, strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["gptq", "gptq+awq"])
def test_a_model_under_another_default_dtype(method: str, another_default: torch.dtype) -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        layers = torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)
        return torch.nn.Sequential(*layers).eval().to(torch.float32)

    x = torch.randn(80, 64, generator=torch.Generator().manual_seed(0))
    options = {"method": method, "group_size": 32}
    models, calibrations = [], list[Calibration]()
    kept = model().state_dict()
    for default in (torch.float32, another_default):
        torch.set_default_dtype(default)
        models.append(model())
        models[-1].load_state_dict(kept)
        calibrations.append(calibrate(models[-1], [x], options))
        pack_(models[-1], options={**options, "calibration": calibrations[-1]})
    for key in calibrations[0]:
        for part in ("second_moments", "magnitudes", "rows", "pre_scale"):
            one, other = (getattr(calibration[key], part) for calibration in calibrations)
            assert (one is None) == (other is None)
            assert one is None or (one.dtype is other.dtype and torch.equal(one, other)), part
    for name in ("0.weight", "2.weight"):
        one, other = (each.get_parameter(name) for each in models)
        assert isinstance(one, Int4TileTensor)
        for part, buffer in one.buffers.items():
            assert torch.equal(buffer, other.buffers[part])
