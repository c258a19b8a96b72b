from __future__ import annotations

import math

import pytest
import torch
from test_quant_primitives import make
from torch import Tensor

from fxint4.quant.methods.awq import awq_scale
from fxint4.quant.methods.mse import mse_parameters
from fxint4.quant.metrics import output_error
from fxint4.quant.primitives import GroupParameters, dequantize, nearest_parameters, quantize

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def outliers(rows: int, k: int, seed: int = 0) -> Tensor:
    """Inputs a few of whose channels are many times larger than the others, fp64 [rows, K]."""
    x = make("gaussian", rows, k, seed)
    return x * torch.where(torch.arange(k) % 16 == 3, 30.0, 1.0)


def scaled(
    weight: Tensor, s: Tensor, group: int, parameters: GroupParameters, sizes: Tensor | None = None
) -> Tensor:
    """The weight multiplied by s, quantized, and divided by s; sizes are H's diagonal."""
    importance = None if sizes is None else (sizes / s.square()).float()
    q = quantize(weight.float() * s, group, None, parameters, importance)
    return dequantize(q.codes, q.scale, q.zero, group, torch.float32, weight.shape[1]) / s


def total_error(x: Tensor, weights: list[Tensor], s: Tensor, group: int) -> float:
    """Squared error of all outputs in fp64, computed from the inputs."""
    made = (scaled(weight, s, group, nearest_parameters) for weight in weights)
    return sum(
        float((x @ (new.double() - old.double()).T).square().sum())
        for new, old in zip(made, weights, strict=True)
    )


@pytest.mark.parametrize("group", [32, 128])
def test_outliers_are_scaled_and_the_output_is_nearer(group: int) -> None:
    x = outliers(600, 256)
    weights = [make("gaussian", n, 256, n).bfloat16() for n in (40, 24)]
    seen, unseen = x[:400], x[400:]
    s = awq_scale(weights, seen.T @ seen, seen.abs().mean(0), group, nearest_parameters)
    assert s.dtype == torch.float32
    assert s[3::16].min() > 1.5 * s[4::16].max()
    ones = torch.ones(256)
    assert total_error(unseen, weights, s, group) < 0.6 * total_error(unseen, weights, ones, group)


def test_the_exponent_is_the_best_of_the_grid() -> None:
    x = outliers(300, 96)
    x *= torch.rand(96, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    weights = [make("heavy-tailed", n, 96, n).float() for n in (30, 5)]
    magnitudes = x.abs().mean(0)
    candidates = []
    for step in range(20):
        s = magnitudes ** (step / 20)
        candidates.append((s / (s.max() * s.min()).sqrt()).float())
    errors = [total_error(x, weights, s, 32) for s in candidates]
    best = min(range(20), key=errors.__getitem__)
    assert best > 0
    s = awq_scale(weights, x.T @ x, magnitudes, 32, nearest_parameters)
    assert torch.allclose(s, candidates[best], rtol=1e-6)


@pytest.mark.parametrize("rows", [7, 3000])  # of the many, only some are looked at while searching
@pytest.mark.parametrize("parameters", [mse_parameters, nearest_parameters])
def test_it_is_never_worse_than_ones(rows: int, parameters: GroupParameters) -> None:
    weight = make("uniform", rows, 48).float()
    for seed in range(3):
        x = make("heavy-tailed", 30, 48, seed)
        h = x.T @ x
        s = awq_scale([weight], h, x.abs().mean(0), 32, parameters)
        errors = [
            output_error(weight, scaled(weight, factors, 32, parameters, h.diagonal()), h)
            for factors in (s, torch.ones(48))
        ]
        assert errors[0] <= errors[1]


def test_importance_is_what_an_error_in_a_scaled_weight_costs() -> None:
    x = outliers(200, 64)
    h = x.T @ x
    seen = []

    def watch(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert importance is not None
        seen.append((w.flatten(1).clone(), importance.flatten().clone()))
        return nearest_parameters(w)

    weight = make("gaussian", 3, 64).float()
    awq_scale([weight], h, x.abs().mean(0), 32, watch)
    scales = {tuple((w / weight)[0].tolist()) for w, _ in seen}
    assert len(scales) == 20
    for w, importance in seen:
        s = (w / weight)[0]
        assert torch.allclose(importance * s.square(), h.diagonal().float(), rtol=1e-5)


@pytest.mark.parametrize(
    "magnitudes",
    [
        torch.zeros(64),
        torch.ones(64),
        torch.full((64,), 1e-45),
        torch.full((64,), 1e38),
        torch.logspace(-44, 38, 64),
        torch.where(torch.arange(64) < 9, 0.0, 5.0),
        torch.full((64,), math.nan),
        torch.full((64,), math.inf),
    ],
)
def test_any_magnitudes_give_finite_factors(magnitudes: Tensor) -> None:
    x = outliers(100, 64)
    weight = make("gaussian", 10, 64).float()
    s = awq_scale([weight], x.T @ x, magnitudes, 32)
    assert s.isfinite().all()
    assert (s > 0).all()
    assert (s[magnitudes == 0] == 1).all()
    if magnitudes.unique().numel() == 1:
        assert torch.allclose(s, torch.ones(64))


def test_no_weights_and_no_rows_give_ones() -> None:
    h, magnitudes = torch.eye(32), torch.arange(32.0)
    for weights in ([], [torch.zeros(0, 32)]):
        assert torch.equal(awq_scale(weights, h, magnitudes, 32), torch.ones(32))


@pytest.mark.parametrize(
    ("weight", "h", "magnitudes", "message"),
    [
        ((4, 32), (32, 32), (31,), r"magnitudes \(31,\)"),
        ((4, 32), (32, 33), (32,), r"moments are \(32, 33\)"),
        ((4, 33), (32, 32), (32,), r"a weight is \(4, 33\), its inputs have 32 channels"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    weight: tuple[int, ...], h: tuple[int, ...], magnitudes: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        awq_scale([torch.ones(weight)], torch.ones(h), torch.ones(magnitudes), 32)


@pytest.mark.gpu
@gpu_only
def test_the_gpu_finds_the_same() -> None:
    x = outliers(300, 200)
    weight, h, magnitudes = make("gaussian", 50, 200).bfloat16(), x.T @ x, x.abs().mean(0)
    s = awq_scale([weight.cuda()], h.cuda(), magnitudes.cuda(), 64)
    assert torch.allclose(s.cpu(), awq_scale([weight], h, magnitudes, 64), rtol=1e-5)
