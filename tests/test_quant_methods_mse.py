from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quant_primitives import KINDS, make
from torch import Tensor

from fxint4.quant.methods.hqq import hqq_parameters
from fxint4.quant.methods.mse import mse_parameters
from fxint4.quant.metrics import better, squared_error
from fxint4.quant.primitives import GroupParameters, dequantize, nearest_parameters, quantize

METHODS = [mse_parameters, hqq_parameters]
LARGEST = 252 / 256 * 2.0**128

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def group_errors(
    weight: Tensor, group: int, parameters: GroupParameters, importance: Tensor | None = None
) -> Tensor:
    """Squared error of every dequantized group, fp64 [N, groups]; importance is [K]."""
    n, k = weight.shape
    q = quantize(weight, group, None, parameters, importance)
    back = dequantize(q.codes, q.scale, q.zero, group, torch.float32, k)
    errors = (back.double() - weight.float().double()).square()
    if importance is not None:
        errors *= importance.double()
    padded = torch.zeros(n, q.codes.shape[1], dtype=torch.float64)
    padded[:, :k] = errors
    return padded.view(n, -1, group).sum(-1)


def special(kind: str, n: int, k: int, seed: int) -> Tensor:
    """fp32 weights: those of make(), and some at the limits of fp32 and bf16."""
    if kind in KINDS:
        return make(kind, n, k, seed).float()
    random = make("gaussian", n, k, seed)
    row = random[:, :1]
    return {
        "constant": row.expand(n, k),
        "two values": torch.where(random > 0, row, -3 * row),
        "one outlier": torch.where(torch.arange(k) == k // 2, 1000.0, random),
        "denormal": random * 1e-40,
        "smallest": random.sign() * 2.0**-149,
        "huge": random.clamp(-1, 1) * LARGEST,
        "zeros": torch.zeros(n, k),
        "zeros and one": torch.where(torch.arange(k) == 0, 1.0, 0.0).expand(n, k),
        "far": 1e6 + random,
    }[kind].float()


ODD = ["constant", "two values", "one outlier", "denormal", "smallest", "huge", "zeros"]
ODD += ["zeros and one", "far"]


# --- never worse than nearest --------------------------------------------------------------------


@pytest.mark.parametrize("parameters", METHODS)
@given(
    kind=st.sampled_from(KINDS + ODD),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    n=st.integers(1, 4),
    k=st.integers(1, 200),
    group=st.sampled_from([32, 64, 128, 256]),
    exponent=st.integers(-60, 60),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=80)
def test_no_group_is_worse_than_nearest(
    parameters: GroupParameters,
    kind: str,
    dtype: torch.dtype,
    n: int,
    k: int,
    group: int,
    exponent: int,
    seed: int,
) -> None:
    weight = special(kind, n, k, seed)
    if kind in KINDS:
        weight = weight * 2.0**exponent
    weight = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    ours = group_errors(weight, group, parameters)
    assert (ours <= group_errors(weight, group, nearest_parameters)).all()


@given(
    kind=st.sampled_from(KINDS + ODD),
    k=st.integers(1, 200),
    exponent=st.integers(-30, 30),
    dead=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_no_group_is_worse_by_importance(
    kind: str, k: int, exponent: int, dead: float, seed: int
) -> None:
    weight = special(kind, 3, k, seed)
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(k, generator=generator).mul_(8).exp_() * 2.0**exponent
    importance[torch.rand(k, generator=generator) < dead] = 0
    ours = group_errors(weight, 32, mse_parameters, importance)
    usual = group_errors(weight, 32, nearest_parameters, importance)
    # One sum adds the products in fp64, the other rounds the importance first.
    assert (ours <= usual * (1 + 1e-6)).all()


@pytest.mark.parametrize("parameters", METHODS)
def test_weights_that_are_not_finite_are_refused_as_ever(parameters: GroupParameters) -> None:
    weight = make("gaussian", 4, 64).float()
    weight[1, 3], weight[2, 40] = math.nan, math.inf
    with pytest.raises(ValueError, match="inf or NaN in 2 of its 256 values"):
        quantize(weight, 32, None, parameters)


@pytest.mark.parametrize("parameters", METHODS)
def test_strides_and_chunks_do_not_show(
    parameters: GroupParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = make("heavy-tailed", 40, 21).bfloat16().T
    whole = quantize(weight.contiguous(), 32, None, parameters)
    monkeypatch.setattr("fxint4.quant.chunks.CPU_CHUNK", 100)
    assert torch.equal(quantize(weight, 32, None, parameters).codes, whole.codes)


# --- mse -----------------------------------------------------------------------------------------


def least_error(w: Tensor, importance: Tensor, cuts: int) -> Tensor:
    """Least squared error over a fine grid of both ends, by brute force in fp64.

    Of every row of w, which is one group: fp64 [rows].
    """
    w = w.double()
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    least = torch.full((len(w),), math.inf, dtype=torch.float64)
    for bottom, top in itertools.product(range(cuts), range(cuts)):
        first = low + (high - low) * bottom * 0.4 / cuts
        last = high - (high - low) * top * 0.4 / cuts
        scale = ((last - first) / 15).bfloat16().double()
        zero = (first + 8 * scale).bfloat16().double()
        codes = ((w - zero) / scale).round().clamp(-8, 7)
        error = (importance * (codes * scale + zero - w).square()).sum(1)
        least = torch.minimum(least, error)
    return least


@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed", "uniform", "shifted"])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("weighted", [False, True])
def test_mse_is_near_the_best_of_a_fine_grid(kind: str, group: int, weighted: bool) -> None:
    weight = make(kind, 12, group).float()
    generator = torch.Generator().manual_seed(1)
    importance = torch.rand(group, generator=generator).mul_(6).exp_() if weighted else None
    ours = group_errors(weight, group, mse_parameters, importance)[:, 0]
    counts = torch.ones(group) if importance is None else importance
    best = least_error(weight, counts.double(), 40)
    usual = group_errors(weight, group, nearest_parameters, importance)[:, 0]
    # Most of what a search of 1,600 pairs of ends gains over the range, our 40 gain too.
    assert (usual - ours).sum() >= 0.85 * (usual - best).sum()


def test_mse_finds_a_grid_that_holds_every_weight() -> None:
    # Ends at 3 and -5 steps: the range gives a step that is too small by 8/15, this grid none.
    scale, zero = 0.25, 1.5
    codes = torch.randint(-5, 4, (6, 64), generator=torch.Generator().manual_seed(0))
    codes[:, :2] = torch.tensor([-8, 7])
    weight = codes * scale + zero
    assert group_errors(weight, 64, mse_parameters).max() == 0


def test_mse_attends_to_what_is_important() -> None:
    weight = make("gaussian", 64, 128).float()
    importance = torch.where(torch.arange(128) < 8, 1000.0, 1.0)
    with_it = group_errors(weight, 128, mse_parameters, importance)
    q = quantize(weight, 128, None, mse_parameters)
    without = squared_error(weight.view(64, 1, 128), q.scale, q.zero, importance.view(1, 128))
    assert with_it.sum() < 0.7 * without.sum()


def test_better_takes_what_is_better_group_by_group() -> None:
    w = make("gaussian", 5, 64).float().view(5, 2, 32)
    good = nearest_parameters(w)
    bad = (good[0] * 2, good[1])
    broken = (torch.full_like(good[0], math.nan), good[1])
    even = torch.arange(10).view(5, 2) % 2 == 0
    mixed = tuple(torch.where(even, a, b) for a, b in zip(good, bad, strict=True))
    other = tuple(torch.where(even, b, a) for a, b in zip(good, bad, strict=True))
    for usual, candidate in ((mixed, other), (other, mixed), (good, bad), (good, broken)):
        made = better(w, usual, candidate)
        assert torch.equal(made[0], good[0])
        assert torch.equal(made[1], good[1])


# --- on the GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("parameters", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_is_as_good(parameters: GroupParameters, kind: str) -> None:
    weight = make(kind, 130, 1000).bfloat16()
    on_gpu = quantize(weight.cuda(), 128, None, parameters)
    usual = group_errors(weight, 128, nearest_parameters)
    back = dequantize(on_gpu.codes, on_gpu.scale, on_gpu.zero, 128, torch.float32, 1000).cpu()
    errors = torch.zeros(130, 1024, dtype=torch.float64)
    errors[:, :1000] = (back.double() - weight.double()).square()
    # The GPU multiplies and adds in one rounding.
    slack = 1e-6 * usual
    assert (errors.view(130, -1, 128).sum(-1) <= usual + slack).all()
    assert on_gpu.noise == pytest.approx(quantize(weight, 128, None, parameters).noise, rel=1e-3)
