from __future__ import annotations

import logging
import math

import pytest
import torch
from test_quant_primitives import check_form, make
from torch import Tensor

from fxint4.quant.methods.gptq import Gptq
from fxint4.quant.metrics import output_error
from fxint4.quant.primitives import Quantized, dequantize, nearest_parameters, quantize

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def inputs(rows: int, k: int, seed: int = 0) -> Tensor:
    """Correlated inputs of uneven size, fp64 [rows, K]: a few directions carry most of them."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, k // 4, dtype=torch.float64, generator=generator) @ torch.randn(
        k // 4, k, dtype=torch.float64, generator=generator
    )
    noise = torch.randn(rows, k, dtype=torch.float64, generator=generator)
    return (mixed + noise) * torch.randn(k, dtype=torch.float64, generator=generator).exp()


def moments(rows: int, k: int, seed: int = 0) -> Tensor:
    x = inputs(rows, k, seed)
    return (x.T @ x).float()


def values(q: Quantized, k: int) -> Tensor:
    group = q.codes.shape[1] // q.scale.shape[1]
    return dequantize(q.codes, q.scale, q.zero, group, torch.float32, k)


# --- against the textbook ------------------------------------------------------------------------


def textbook(weight: Tensor, h: Tensor, group: int, damping: float, by_size: bool) -> Tensor:
    """Codes by optimal brain quantization in a fixed order, fp64, one column at a time.

    The inverse of the damped H is explicit; once a column is done, it is eliminated from it.
    """
    w, h = weight.double().clone(), h.double()
    k = w.shape[1]
    h = h + damping * h.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    order = h.diagonal().argsort(descending=True, stable=True).tolist() if by_size else range(k)
    codes = torch.zeros_like(w)
    parameters = {}

    def choose(first: int) -> None:
        scale, zero = nearest_parameters(w[:, None, first : first + group].float())
        parameters[first // group] = (scale[:, 0].double(), zero[:, 0].double())

    if by_size:
        for first in range(0, k, group):
            choose(first)
    for j in order:
        if not by_size and j % group == 0:
            choose(j)
        scale, zero = parameters[j // group]
        codes[:, j] = ((w[:, j] - zero) / scale).round().clamp(-8, 7)
        error = (w[:, j] - codes[:, j] * scale - zero) / inverse[j, j]
        w -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, [j]] * inverse[[j]] / inverse[j, j]
    return (codes + 8).to(torch.uint8)


@pytest.mark.parametrize("by_size", [False, True])
@pytest.mark.parametrize(
    ("k", "group", "rows"), [(40, 32, 16), (300, 32, 8), (384, 128, 8), (600, 256, 3), (20, 64, 1)]
)
def test_the_codes_are_those_of_the_textbook(k: int, group: int, rows: int, by_size: bool) -> None:
    weight, h = make("gaussian", rows, k).float(), moments(2 * k, k)
    q = Gptq(h, group, None, nearest_parameters, activation_order=by_size)(weight)
    assert torch.equal(q.codes[:, :k], textbook(weight, h, group, 0.01, by_size))
    check_form(q, rows, k, -(-k // group) * group, group)
    back = values(q, k).double()
    assert q.signal == pytest.approx(float(weight.double().square().sum()), rel=1e-12)
    assert q.noise == pytest.approx(float((back - weight.double()).square().sum()), rel=1e-6)


@pytest.mark.parametrize("by_size", [False, True])
def test_without_correlation_it_is_plain_rounding(by_size: bool) -> None:
    weight = make("heavy-tailed", 20, 200).bfloat16()
    q = Gptq(3 * torch.eye(200), 64, 320, nearest_parameters, activation_order=by_size)(weight)
    expected = quantize(weight, 64, 320)
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(q, name), getattr(expected, name))
    assert q.noise == pytest.approx(expected.noise, rel=1e-12)


# --- what it is for ------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("by_size", [False, True])
def test_the_output_is_much_nearer(group: int, by_size: bool) -> None:
    x, weight = inputs(1000, 256), make("gaussian", 64, 256).float()
    seen, unseen = x[:700], x[700:]
    h = (seen.T @ seen).float()

    def error(made: Tensor) -> float:
        exact = unseen @ weight.double().T
        return float((unseen @ made.double().T - exact).norm() / exact.norm())

    usual = error(values(quantize(weight, group), 256))
    plain = error(values(Gptq(h, group, None, nearest_parameters, 0.01, by_size)(weight), 256))
    best = error(values(Gptq(h, group, activation_order=by_size)(weight), 256))
    assert plain < 0.7 * usual
    assert best < 0.95 * plain


def test_output_error_is_that_of_the_output() -> None:
    x, weight = inputs(500, 96), make("gaussian", 30, 96)
    other = weight + 0.1 * make("uniform", 30, 96)
    exact = x @ weight.T
    expected = float((x @ other.T - exact).norm() / exact.norm())
    assert output_error(weight, other, x.T @ x) == pytest.approx(expected, rel=1e-9)
    assert output_error(weight, other, (x.T @ x / 500).float()) == pytest.approx(expected, rel=1e-4)
    assert output_error(weight, weight, x.T @ x) == 0
    nothing = torch.zeros(96, 96)
    assert output_error(weight, other, nothing) == 0
    assert output_error(torch.zeros(30, 96), other, x.T @ x) == math.inf


# --- what parameters are asked -------------------------------------------------------------------


@pytest.mark.parametrize("by_size", [False, True])
def test_parameters_see_whole_groups_and_their_importance(by_size: bool) -> None:
    h = moments(200, 80)
    seen = {}

    def watch(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert importance is not None
        assert importance.shape == w.shape[1:]
        for values, counts in zip(w.unbind(1), importance, strict=True):
            seen[len(seen)] = (values.clone(), counts.clone())
        return nearest_parameters(w)

    weight = make("gaussian", 6, 80).float()
    Gptq(h, 32, None, watch, activation_order=by_size)(weight)
    diagonal = h.diagonal() / h.diagonal().mean() + 0.01
    assert torch.allclose(torch.cat([counts for _, counts in seen.values()]), diagonal, rtol=1e-5)
    first = 0
    for values, _ in seen.values():
        original = weight[:, first : first + values.shape[1]]
        assert torch.equal(values, original) == (by_size or first == 0)
        first += values.shape[1]
    assert first == 80


# --- dead channels, singular moments -------------------------------------------------------------


@pytest.mark.parametrize("by_size", [False, True])
def test_dead_channels_are_rounded_and_change_nothing_else(by_size: bool) -> None:
    k = 160
    weight, h = make("gaussian", 12, k).float(), moments(400, k)
    dead = torch.rand(k, generator=torch.Generator().manual_seed(1)) < 0.3
    dead[32:64] = True  # a whole group
    h[dead] = 0
    h[:, dead] = 0
    # One scale for all, so that the others can be compared with a weight that lacks the dead.
    scale, zero = 0.3, 0.0

    def fixed(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        made = w.new_full(w.shape[:2], scale, dtype=torch.bfloat16)
        return made, torch.full_like(made, zero)

    q = Gptq(h, 32, None, fixed, activation_order=by_size)(weight)
    plain = quantize(weight, 32, None, fixed)
    assert torch.equal(q.codes[:, dead], plain.codes[:, dead])
    alive = ~dead
    less = Gptq(h[alive][:, alive], 32, None, fixed, activation_order=by_size)
    # Dead channels count as average, so they leave the mean of the diagonal as it is.
    assert torch.equal(q.codes[:, alive], less(weight[:, alive]).codes[:, : int(alive.sum())])
    assert not torch.equal(q.codes[:, alive], plain.codes[:, alive])
    assert output_error(weight, values(q, k), h) < 0.8 * output_error(weight, values(plain, k), h)


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_too_few_inputs_are_enough(rows: int) -> None:
    weight, h = make("gaussian", 16, 128).float(), moments(rows, 128)
    gptq = Gptq(h, 32)
    assert (gptq.damping, gptq.fallback) == (0.01, None)
    assert output_error(weight, values(gptq(weight), 128), h) < 0.3 * output_error(
        weight, values(quantize(weight, 32), 128), h
    )


def test_damping_is_raised_until_the_moments_are_positive(
    caplog: pytest.LogCaptureFixture,
) -> None:
    weight, h = make("gaussian", 16, 64).float(), moments(200, 64)
    h -= 0.3 * h.diagonal().mean() * torch.eye(64)  # eigenvalues a little below 0
    gptq = Gptq(h, 32)
    assert gptq.damping in (0.1, 1.0)
    assert gptq.fallback is None
    assert not caplog.records
    gptq(weight)
    undamped = Gptq(torch.ones(64, 64), 32, damping=0.0)
    assert undamped.damping > 0
    assert undamped.fallback is None


@pytest.mark.parametrize(
    ("h", "reason"),
    [
        (torch.zeros(64, 64), "all 0"),
        (-torch.eye(64), "not positive"),
        (torch.eye(64) - 1e4 * (1 - torch.eye(64)), "not positive"),
        (torch.eye(64).index_fill(0, torch.tensor(3), math.inf), "inf or NaN"),
        (torch.eye(64).index_fill(0, torch.tensor(3), math.nan), "inf or NaN"),
    ],
)
def test_moments_of_no_use_mean_plain_quantization(
    h: Tensor, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    weight = make("gaussian", 5, 64).float()
    with caplog.at_level(logging.WARNING, "fxint4"):
        gptq = Gptq(h, 32, 96, nearest_parameters)
    assert gptq.fallback is not None
    assert reason in gptq.fallback
    assert reason in caplog.text
    made, expected = gptq(weight), quantize(weight, 32, 96)
    assert torch.equal(made.codes, expected.codes)
    assert made.noise == expected.noise


# --- form ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("by_size", [False, True])
def test_rows_dtypes_and_strides_do_not_matter(
    dtype: torch.dtype, by_size: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = make("gaussian", 40, 33).to(dtype).T  # [33, 40]
    h = moments(100, 40)
    before = weight.clone(), h.clone()
    gptq = Gptq(h, 32, 96, activation_order=by_size)
    whole = gptq(weight)
    check_form(whole, 33, 40, 96, 32)
    assert torch.equal(gptq(weight).codes, whole.codes)
    assert torch.equal(gptq(weight.float().contiguous()).codes, whole.codes)
    parts = [gptq(weight[:1]), gptq(weight[1:20]), gptq(weight[20:])]
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
    assert torch.equal(torch.cat([part.scale for part in parts]), whole.scale)
    assert sum(part.noise for part in parts) == pytest.approx(whole.noise, rel=1e-12)
    monkeypatch.setattr("fxint4.quant.chunks.CPU_CHUNK", 100)
    assert torch.equal(gptq(weight).codes, whole.codes)
    assert torch.equal(weight, before[0])
    assert torch.equal(h, before[1])
    assert gptq(weight[:0]).codes.shape == (0, 96)


def test_the_moments_scale_and_dtype_do_not_matter() -> None:
    weight, h = make("gaussian", 16, 96).float(), moments(300, 96)
    codes = Gptq(h, 32)(weight).codes
    assert torch.equal(Gptq(h * 2.0**-30, 32)(weight).codes, codes)
    assert torch.equal(Gptq(h.double() * 2.0**300, 32)(weight).codes, codes)


@pytest.mark.parametrize(
    ("h", "k_padded", "message"),
    [
        (torch.zeros(3, 4), None, r"\(3, 4\), they must be \[K, K\]"),
        (torch.eye(64), 80, "k_padded is 80"),
    ],
)
def test_it_refuses(h: Tensor, k_padded: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gptq(h, 32, k_padded)


def test_it_refuses_weights_that_do_not_fit() -> None:
    gptq = Gptq(torch.eye(64), 32)
    with pytest.raises(ValueError, match=r"\(2, 32\), its second moments are of 64 channels"):
        gptq(torch.zeros(2, 32))
    with pytest.raises(ValueError, match="inf or NaN in 1 of its 128 values"):
        gptq(
            torch.zeros(2, 64).index_put((torch.tensor(1), torch.tensor(5)), torch.tensor(math.nan))
        )


# --- on the GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("by_size", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
def test_the_gpu_is_as_good(by_size: bool, tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    weight, h = make("gaussian", 100, 500).bfloat16(), moments(1000, 500)
    cpu = Gptq(h, 128, activation_order=by_size)(weight)
    gptq = Gptq(h.cuda(), 128, activation_order=by_size)
    gpu = gptq(weight.cuda())
    assert torch.equal(gptq(weight.cuda()).codes, gpu.codes)
    # A code that is nearly a tie can go the other way, and its row then goes its own way.
    assert (gpu.codes.cpu() == cpu.codes).all(1).float().mean() > 0.9
    errors = [output_error(weight, made, h) for made in (values(cpu, 500), values(gpu, 500).cpu())]
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)
