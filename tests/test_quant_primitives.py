from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxint4.quant import chunks as module
from fxint4.quant.metrics import nonfinite_count
from fxint4.quant.primitives import Quantized, dequantize, quantize

BF16_MAX = torch.finfo(torch.bfloat16).max
FP32_MAX = torch.finfo(torch.float32).max
LARGEST = 252 / 256 * 2.0**128  # weights beyond it count as it
BF16_ROUNDOFF = 2.0**-8  # half the distance from 1 to the next bf16
FP32_ROUNDOFF = 2.0**-24
BF16_HALF_DENORMAL = 2.0**-134

KINDS = ["gaussian", "heavy-tailed", "uniform", "outliers", "shifted", "narrow"]

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def make(kind: str, n: int, k: int, seed: int = 0) -> Tensor:
    """An fp64 weight of one kind."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(n, k, dtype=torch.float64, generator=generator)
    uniform = torch.rand(n, k, dtype=torch.float64, generator=generator)
    if kind == "gaussian":
        return gaussian
    if kind == "heavy-tailed":  # Student's t with 3 degrees of freedom
        squares = torch.randn(3, n, k, dtype=torch.float64, generator=generator).square()
        return gaussian / (squares.sum(0) / 3).sqrt()
    if kind == "uniform":
        return 2 * uniform - 1
    if kind == "outliers":  # one weight in 200 is twenty times larger
        return torch.where(uniform < 0.005, 20 * gaussian, gaussian)
    if kind == "shifted":
        return gaussian + 5 * torch.randn(n, 1, dtype=torch.float64, generator=generator)
    if kind == "narrow":  # so far from zero that bf16 cannot tell the weights apart
        return 1 + 1e-3 * uniform
    raise AssertionError(kind)


def exactly(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """The dequantized weight in fp64."""
    scale = scale.double().repeat_interleave(group, 1)
    zero = zero.double().repeat_interleave(group, 1)
    return (codes.double() - 8) * scale + zero


def check_form(q: Quantized, n: int, k: int, k_padded: int, group: int) -> None:
    assert q.codes.shape == (n, k_padded)
    assert q.codes.dtype == torch.uint8
    assert q.codes.is_contiguous()
    assert (q.codes <= 15).all()
    assert (q.codes[:, k:] == 8).all()
    for parameter in (q.scale, q.zero):
        assert parameter.shape == (n, k_padded // group)
        assert parameter.dtype == torch.bfloat16
        assert parameter.is_contiguous()
        assert parameter.isfinite().all()
        assert not parameter[:, -(-k // group) :].any()


# --- the error bound -----------------------------------------------------------------------------


def error_bound(weight: Tensor, group: int) -> Tensor:
    """The largest error that each weight may have, fp64 [N, K].

    Let step and zero be what exact arithmetic gives: w = zero + u * step with u in -8..7. The code
    nearest to u is at most half a step off; with the stored scale and zero in place of the exact
    ones, that same code is off by at most 8 * |scale - step| + |stored zero - zero| more, and the
    code that was chosen is nearest in the stored grid, so no worse. Choosing it in fp32 costs two
    roundings of |w - zero|, each of which can move a tie by that much on either side. A group
    whose zero moved by more than a step gets the step r that reaches all its weights; it is at
    most step + |stored zero - zero| / 7, and half of it, rounded, lies within the same bound.
    """
    bounds = []
    for start in range(0, weight.shape[1], group):
        w = weight[:, start : start + group].double()
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
        step = (high - low) / 15
        zero = low + 8 * step
        stored_zero = zero.bfloat16().double()
        moved_step = (step.bfloat16().double() - step).abs()
        moved_zero = (stored_zero - zero).abs()
        fp32 = 4 * FP32_ROUNDOFF * (w - stored_zero).abs()
        bounds.append(step / 2 + 8 * moved_step + moved_zero + fp32)
    return torch.cat(bounds, 1)


@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    n=st.integers(1, 5),
    k=st.integers(1, 300),
    group=st.sampled_from([32, 64, 128, 256]),
    extra_groups=st.integers(0, 2),
    exponent=st.integers(-100, 100),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=150)
def test_the_error_is_within_the_bound(
    kind: str,
    dtype: torch.dtype,
    n: int,
    k: int,
    group: int,
    extra_groups: int,
    exponent: int,
    transposed: bool,
    seed: int,
) -> None:
    exponent = max(-10, min(exponent, 5)) if dtype == torch.float16 else exponent
    weight = (make(kind, n, k, seed) * 2.0**exponent).to(dtype)
    if transposed:
        weight = weight.T.contiguous().T
    seen = weight.float().double()  # fp64 weights are read as fp32
    k_padded = (-(-k // group) + extra_groups) * group

    q = quantize(weight, group, k_padded)
    check_form(q, n, k, k_padded, group)
    back = exactly(q.codes, q.scale, q.zero, group)[:, :k]
    assert ((back - seen).abs() <= error_bound(seen, group)).all()

    # What dequantize gives differs by its one inexact fp32 operation ...
    fp32 = dequantize(q.codes, q.scale, q.zero, group, torch.float32, k)
    assert ((fp32.double() - back).abs() <= FP32_ROUNDOFF * back.abs()).all()
    # ... and signal and noise are sums over just that.
    assert q.signal == pytest.approx(seen.square().sum().item(), rel=1e-12)
    noise = (seen - fp32.double()).square().sum().item()
    assert q.noise == pytest.approx(noise, rel=1e-6, abs=1e-12 * q.signal)


def test_the_codes_are_the_nearest_in_the_stored_grid() -> None:
    weight = make("gaussian", 64, 256).float()
    q = quantize(weight, 64)
    error = (exactly(q.codes, q.scale, q.zero, 64) - weight).abs()
    for code in range(16):
        other = exactly(torch.full_like(q.codes, code), q.scale, q.zero, 64)
        slack = 4 * FP32_ROUNDOFF * (weight - other).abs()
        assert (error <= (other - weight).abs() + slack).all()


def test_scale_and_zero_are_the_range_rounded() -> None:
    weight = make("gaussian", 16, 128).float()
    q = quantize(weight, 32)
    groups = weight.double().view(16, 4, 32)
    low, high = groups.amin(-1), groups.amax(-1)
    step = (high - low) / 15
    assert torch.equal(q.scale, step.bfloat16())
    assert torch.equal(q.zero, (low + 8 * step).bfloat16())


# --- special weights -----------------------------------------------------------------------------


@given(
    value=st.floats(-LARGEST, LARGEST, width=32, allow_subnormal=False),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    k=st.integers(1, 70),
)
@settings(deadline=None, max_examples=100)
def test_a_constant_comes_back_as_two_bf16_numbers_can(
    value: float, dtype: torch.dtype, k: int
) -> None:
    weight = torch.full((2, k), value).to(dtype).clamp(-LARGEST, LARGEST)
    constant = weight[0, 0].double()
    q = quantize(weight, 32)
    zero = constant.bfloat16()
    scale = (constant - zero.double()).bfloat16()
    assert (q.zero == zero).all()
    assert (q.scale == scale).all()
    back = exactly(q.codes, q.scale, q.zero, 32)[:, :k]
    expected = zero.double() + scale.double()
    assert (back == expected).all()
    assert (back - constant).abs().max() <= BF16_ROUNDOFF**2 * abs(constant) + BF16_HALF_DENORMAL
    if dtype == torch.bfloat16:
        assert q.noise == 0
        assert q.sqnr_db == math.inf


def test_an_fp16_constant_is_exact() -> None:
    every = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]  # every positive fp16 number, a group each
    q = quantize(every[:, None].expand(-1, 32), 32)
    assert q.noise == 0
    back = dequantize(q.codes, q.scale, q.zero, 32, torch.float16, 1)
    assert torch.equal(back[:, 0], every)


def test_zeros_come_back_as_exact_zeros() -> None:
    q = quantize(torch.zeros(3, 100), 32)
    assert not q.scale.any()
    assert not q.zero.any()
    assert (q.codes == 8).all()
    assert (q.signal, q.noise, q.sqnr_db) == (0.0, 0.0, math.inf)
    assert not dequantize(q.codes, q.scale, q.zero, 32, torch.bfloat16).any()


@pytest.mark.parametrize("middle", [1001.6, 1002.4])  # rounded down to 1000, up to 1004
def test_a_narrow_group_far_from_zero_keeps_its_weights(middle: float) -> None:
    # bf16 has 1000 and 1004 and nothing between: without a wider step these would be lost.
    weight = torch.linspace(middle - 0.1, middle + 0.1, 64)[None]
    q = quantize(weight, 64)
    back = dequantize(q.codes, q.scale, q.zero, 64, torch.float32)
    reach = 1.7 / (7 if middle < 1002 else 8)
    assert (back - weight).abs().max() <= reach / 2 + 8 * BF16_ROUNDOFF * reach


@pytest.mark.parametrize("largest", [2.0**-149, 1e-44, 1e-40, 2e-39, 2.0**-126])
def test_denormals_are_finite_and_close(largest: float) -> None:
    weight = (torch.linspace(-1, 1, 64, dtype=torch.float64) * largest).float()[None]
    weight = torch.cat([weight, weight.abs(), weight.abs().amax().expand(1, 64)])
    q = quantize(weight, 32)
    back = dequantize(q.codes, q.scale, q.zero, 32, torch.float32)
    # The bound of error_bound, where scale and zero are rounded to multiples of a denormal; a
    # scale can be rounded twice (to reach everything, to bf16), and code and weight once in fp32.
    step = 2 * largest / 15
    rounding = BF16_HALF_DENORMAL + BF16_ROUNDOFF * largest
    assert ((back - weight).abs() <= step / 2 + (8 + 8 + 1) * rounding).all()
    assert back.abs().max() <= 2 * largest + 9 * rounding
    assert math.isfinite(q.sqnr_db) or q.noise == 0


@pytest.mark.parametrize("largest", [FP32_MAX, BF16_MAX, LARGEST, FP32_MAX / 2, 1e30])
@pytest.mark.parametrize("low", [-1.0, -0.5, 0.0, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("group", [64, 128])
def test_huge_weights_stay_finite(largest: float, low: float, sign: int, group: int) -> None:
    relative = sign * torch.linspace(low, 1, 128, dtype=torch.float64)
    weight = (relative * largest).float()[None]
    assert weight.isfinite().all()
    q = quantize(weight, group)
    assert q.scale.isfinite().all()
    assert q.zero.isfinite().all()
    assert math.isfinite(q.noise)
    for dtype in (torch.float32, torch.bfloat16):
        assert dequantize(q.codes, q.scale, q.zero, group, dtype).isfinite().all()
    # Weights are cut at LARGEST, and the scale so that 8 of it fit bf16: two ends to fall short of.
    cut = max(0.0, largest - LARGEST) + max(0.0, 2 * largest - 15 / 8 * BF16_MAX)
    back = exactly(q.codes, q.scale, q.zero, group)
    inside = weight.double().clamp(-LARGEST, LARGEST)
    assert ((back - weight).abs() <= error_bound(inside, group) + cut).all()


def test_all_of_fp16_survives() -> None:
    weight = torch.linspace(-65504, 65504, 128).half()[None]
    q = quantize(weight, 32)
    back = dequantize(q.codes, q.scale, q.zero, 32, torch.float16)
    assert back.isfinite().all()
    assert ((back.double() - weight).abs() <= error_bound(weight, 32) + 2.0**-11 * 65504).all()


# --- other parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "columns"), [(40, [32, 8]), (64, [32]), (20, [20])])
def test_parameters_and_importance_come_by_group_without_padding(
    k: int, columns: list[int]
) -> None:
    weight = make("gaussian", 3, k).float()
    importance = torch.arange(k, dtype=torch.float32)
    seen = []

    def halves_and_threes(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert importance is not None
        seen.append((w.clone(), importance.clone()))
        half = torch.full(w.shape[:2], 0.5, dtype=torch.bfloat16)
        return half, 6 * half

    q = quantize(weight, 32, 96, halves_and_threes, importance)
    groups = -(-k // 32)
    assert (q.scale[:, :groups] == 0.5).all()
    assert (q.zero[:, :groups] == 3).all()
    check_form(q, 3, k, 96, 32)
    assert [w.shape[-1] for w, _ in seen] == columns
    assert torch.equal(torch.cat([w.flatten(1) for w, _ in seen], 1), weight)
    assert torch.equal(torch.cat([part.flatten() for _, part in seen]), importance)
    expected = ((weight - 3) / 0.5).round().clamp(-8, 7) * 0.5 + 3
    assert torch.equal(exactly(q.codes, q.scale, q.zero, 32)[:, :k], expected.double())


def test_importance_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"importance is \(64,\), it must be \[40\]"):
        quantize(torch.zeros(2, 40), 32, importance=torch.ones(64))


# --- inf and NaN ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_inf_and_nan_are_refused_and_counted(dtype: torch.dtype, bad: float) -> None:
    weight = make("gaussian", 8, 100).to(dtype)
    assert nonfinite_count(weight) == 0
    weight[3, 99] = weight[5, 1] = weight[5, 2] = bad
    assert nonfinite_count(weight) == 3
    with pytest.raises(ValueError, match="inf or NaN in 3 of its 800 values"):
        quantize(weight, 32)
    with pytest.raises(ValueError, match="in 32 of its 32 values"):
        quantize(torch.full((1, 32), bad, dtype=dtype), 32)


def test_what_fp32_cannot_hold_is_refused() -> None:
    weight = torch.tensor([[1.0, 1e300]], dtype=torch.float64)
    assert nonfinite_count(weight) == 1
    with pytest.raises(ValueError, match="in 1 of its 2 values"):
        quantize(weight, 32)


def test_nonfinite_count_takes_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_CHUNK", 100)
    weight = torch.zeros(5, 7, 11, 2)
    weight[1:3, 2, :, 1] = math.nan
    assert nonfinite_count(weight) == 22
    assert nonfinite_count(weight.permute(3, 1, 0, 2)) == 22
    assert nonfinite_count(torch.zeros(0, 4)) == 0
    assert nonfinite_count(torch.zeros(4, 0)) == 0


@pytest.mark.parametrize(
    ("weight", "group", "k_padded", "message"),
    [
        (torch.zeros(2, 3, 4), 32, None, r"\(2, 3, 4\)"),
        (torch.zeros(2, 3, dtype=torch.int8), 32, None, "torch.int8"),
        (torch.zeros(2, 0), 32, None, "at least one column"),
        (torch.zeros(2, 64), 0, None, "group_size is 0"),
        (torch.zeros(2, 64), 32, 80, "k_padded is 80"),
        (torch.zeros(2, 64), 32, 32, "at least the weight's 64 columns"),
    ],
)
def test_quantize_refuses(weight: Tensor, group: int, k_padded: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight, group, k_padded)


@pytest.mark.parametrize(
    ("group", "scale_shape", "zero_shape", "k", "message"),
    [
        (32, (2, 3), (2, 3), None, r"scale is \(2, 3\)"),
        (48, (2, 1), (2, 1), None, "group_size=48"),
        (32, (2, 2), (2, 1), None, r"zero \(2, 1\)"),
        (32, (2, 2), (2, 2), 65, r"k is 65, it must be in 0..64"),
    ],
)
def test_dequantize_refuses(
    group: int,
    scale_shape: tuple[int, int],
    zero_shape: tuple[int, int],
    k: int | None,
    message: str,
) -> None:
    codes = torch.zeros(2, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        dequantize(codes, torch.ones(scale_shape), torch.ones(zero_shape), group, torch.float32, k)


# --- form ----------------------------------------------------------------------------------------


def test_parameters_and_views_are_read_and_left_alone() -> None:
    weight = torch.nn.Parameter(make("gaussian", 40, 96).bfloat16())
    before = weight.detach().clone()
    q = quantize(weight, 32)
    assert not q.scale.requires_grad
    assert torch.equal(weight, before)
    with torch.inference_mode():
        again = quantize(weight.detach()[::2, ::3], 32)
    assert torch.equal(again.codes, quantize(before[::2, ::3].contiguous(), 32).codes)


def test_an_empty_weight_is_fine() -> None:
    q = quantize(torch.zeros(0, 64), 32)
    check_form(q, 0, 64, 64, 32)
    assert q.sqnr_db == math.inf
    assert dequantize(q.codes, q.scale, q.zero, 32, torch.bfloat16, 60).shape == (0, 60)


@pytest.mark.parametrize("chunk", [1, 200, 1000, 2**22])
def test_chunks_do_not_show(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make("heavy-tailed", 37, 150).bfloat16()
    whole = quantize(weight, 64)
    back = dequantize(whole.codes, whole.scale, whole.zero, 64, torch.bfloat16, 150)
    monkeypatch.setattr(module, "CPU_CHUNK", chunk)
    q = quantize(weight, 64)
    assert torch.equal(q.codes, whole.codes)
    assert torch.equal(q.scale, whole.scale)
    assert torch.equal(q.zero, whole.zero)
    # fp64 sums in another order
    assert q.signal == pytest.approx(whole.signal, rel=1e-12)
    assert q.noise == pytest.approx(whole.noise, rel=1e-12)
    assert torch.equal(dequantize(q.codes, q.scale, q.zero, 64, torch.bfloat16, 150), back)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dequantize_rounds_once(dtype: torch.dtype) -> None:
    q = quantize(make("gaussian", 20, 128).float(), 32)
    fp32 = (q.codes.float() - 8) * q.scale.float().repeat_interleave(32, 1)
    fp32 += q.zero.float().repeat_interleave(32, 1)
    strided = q.codes.T.contiguous().T
    back = dequantize(strided, q.scale, q.zero, 32, dtype, 100)
    assert back.is_contiguous()
    assert back.dtype == dtype
    assert torch.equal(back, fp32[:, :100].to(dtype))


def test_sqnr_of_gaussian_weights() -> None:
    # Uniform rounding noise step^2 / 12 with step = range / 15; the mean range of 128 gaussian
    # numbers is 5.2 deviations and varies little: 10 * log10(12 * 15^2 / 5.2^2) = 20 dB.
    q = quantize(make("gaussian", 256, 1024).float(), 128)
    assert q.sqnr_db == pytest.approx(20.0, abs=0.3)


# --- against torchao's formula -------------------------------------------------------------------


def torchao_error(weight: Tensor, group: int) -> float:
    """Mean squared error of torchao's int4 tinygemm parameters and codes, by its own steps.

    All of it happens in the weight's dtype: the scale, at least the smallest normal number; the
    zero; and the codes, counted from zero - 8 * scale. The op then reads scale and zero as bf16.
    """
    groups = weight.view(weight.shape[0], -1, group)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=torch.finfo(weight.dtype).smallest_normal)
    zero = low + scale * 8
    origin = (zero - scale * 8).unsqueeze(-1)
    codes = ((groups - origin) / scale.unsqueeze(-1)).round().clamp(0, 15)
    back = exactly(codes.view_as(weight), scale.bfloat16(), zero.bfloat16(), group)
    return float((back - weight.double()).square().mean())


def our_error(weight: Tensor, group: int) -> float:
    q = quantize(weight, group)
    back = exactly(q.codes, q.scale, q.zero, group)
    return float((back - weight.double()).square().mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [32, 128])
def test_at_least_as_accurate_as_the_formula_of_torchao(
    kind: str, dtype: torch.dtype, group: int
) -> None:
    for magnitude in (1.0, 0.02):
        weight = (make(kind, 256, 1024) * magnitude).to(dtype)
        assert our_error(weight, group) <= torchao_error(weight, group)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 128])
def test_at_least_as_accurate_as_torchao_itself(kind: str, group: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its warnings are its own
        primitives = pytest.importorskip("torchao.quantization.quant_primitives")
        weight = (make(kind, 256, 1024) * 0.02).bfloat16()
        block = (1, group)
        scale, zero = primitives._choose_qparams_affine_tinygemm(
            weight,
            primitives.MappingType.ASYMMETRIC,
            block,
            torch.int32,
            0,
            15,
            scale_dtype=torch.bfloat16,
            zero_point_dtype=torch.bfloat16,
        )
        codes = primitives._quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, 0, 15)
    back = exactly(codes, scale.view(256, -1), zero.view(256, -1), group)
    theirs = float((back - weight.double()).square().mean())
    assert theirs == pytest.approx(torchao_error(weight, group), rel=1e-9)
    assert our_error(weight, group) <= theirs


# --- on the GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gpu_gives_the_same(kind: str, dtype: torch.dtype) -> None:
    weight = make(kind, 130, 1000).to(dtype)
    cpu, gpu = quantize(weight, 128), quantize(weight.cuda(), 128)
    assert torch.equal(gpu.codes.cpu(), cpu.codes)
    assert torch.equal(gpu.scale.cpu(), cpu.scale)
    assert torch.equal(gpu.zero.cpu(), cpu.zero)
    assert gpu.signal == pytest.approx(cpu.signal, rel=1e-12)
    assert gpu.noise == pytest.approx(cpu.noise, rel=1e-12)
    assert nonfinite_count(weight.cuda()) == 0


@pytest.mark.gpu
@gpu_only
def test_chunks_do_not_wait_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make("gaussian", 64, 256).bfloat16().cuda()

    def waits(chunk: int) -> int:
        monkeypatch.setattr(module, "GPU_CHUNK", chunk)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                quantize(weight, 64)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(w.message) for w in seen)

    assert waits(256) == waits(2**24) <= 1


@pytest.mark.gpu
@gpu_only
def test_scratch_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 2**20
    monkeypatch.setattr(module, "GPU_CHUNK", chunk)
    weight = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
    quantize(weight[:64], 128)  # makes what is made once

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    q = quantize(weight, 128)
    result = q.codes.nbytes + q.scale.nbytes + q.zero.nbytes
    peak = torch.cuda.max_memory_allocated() - before - result
    # weight and codes in fp32, one of them in fp64, and a dozen fp64 numbers a group
    assert peak <= chunk * (4 + 4 + 8 + 12 * 8 / 128) + 2**20

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    back = dequantize(q.codes, q.scale, q.zero, 128, torch.bfloat16)
    assert torch.cuda.max_memory_allocated() - before - back.nbytes <= 5 * chunk + 2**20
