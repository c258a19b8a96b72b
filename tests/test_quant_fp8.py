"""What fp8 does to a product, against e4m3 computed in float64."""

from __future__ import annotations

import math

import pytest
import torch
from reference import in_e4m3
from torch import Tensor

from fxint4.kernels import triton_fp8
from fxint4.quant import fp8


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_to_e4m3(dtype: torch.dtype) -> None:
    rows = noise(64, 96).to(dtype)
    rows[1], rows[2, 5] = 0, 1e4
    made, wanted = fp8.rows_in_e4m3(rows).double(), in_e4m3(rows)
    near = torch.isclose(made, wanted, rtol=1e-6, atol=0)
    assert near.double().mean() > 0.999  # quotients in fp32 may fall on the other side of a half
    half = 2.0**-4 * wanted.abs().clamp(min=2.0**-6 * float(wanted.abs().max()) / 448)
    assert ((made - rows.double()).abs() <= 1.1 * half).all()
    assert torch.equal(made[1], torch.zeros(96, dtype=torch.float64))
    assert (made - rows.double())[3:].norm() > 0.01 * rows[3:].double().norm()


def test_what_is_not_finite_spoils_its_row_alone() -> None:
    rows = noise(3, 32)
    rows[1, 3] = math.nan
    made = fp8.rows_in_e4m3(rows)
    assert made[1].isnan().any()
    assert made[[0, 2]].isfinite().all()


def test_codes_are_exact_in_e4m3() -> None:
    codes = torch.arange(-8, 8).float()
    assert torch.equal(codes.to(fp8.E4M3).float(), codes)


@pytest.mark.parametrize("rounded", ["x", "x and w"])
def test_operands(rounded: fp8.Rounded) -> None:
    x, w, factors = noise(16, 64).bfloat16(), noise(32, 64, seed=1), noise(64, seed=2).abs() + 0.5
    x8, w8 = fp8.operands(x, w, factors, rounded)
    both = rounded == "x and w"
    scaled = (x.float() * factors).bfloat16()
    unscaled = w / factors
    assert torch.equal(x8, fp8.rows_in_e4m3(scaled))
    assert torch.equal(w8, fp8.rows_in_e4m3(unscaled) if both else unscaled)
    y = x.double() @ w.double().T
    off = float((x8.double() @ w8.double().T - y).norm() / y.norm())
    # Each operand is off by some 2.6 % (evenly spread mantissas, 3 bits).
    assert off == pytest.approx(0.026 * (math.sqrt(2) if both else 1), rel=0.25)


def test_the_numbers_are_those_of_the_kernels() -> None:
    ours = (fp8.E4M3, fp8.LARGEST, fp8.LEAST_SCALE)
    assert ours == (triton_fp8.E4M3, triton_fp8.LARGEST, triton_fp8.LEAST_SCALE)
