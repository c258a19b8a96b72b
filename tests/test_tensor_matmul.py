"""Operators that multiply by a packed weight, compared with the dequantized weight."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_within, rounding, rounding_bound
from torch import Tensor, nn
from torch.nn import functional as F

import fxint4
from fxint4 import Int4Config, Int4TileTensor, UnsupportedOpError
from fxint4.quant import tile_layout
from fxint4.quant.tile_layout import GROUP_SIZES
from fxint4.weights import cache as weights_cache
from fxint4.weights import ops

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OFFS = torch.tensor([2, 2, 5, 7], dtype=torch.int32)


def integers(
    *shape: int, dtype: torch.dtype = torch.float32, pre_scaled: bool = False
) -> Int4TileTensor:
    """A weight of integers in -16..17, each group with a scale and a zero of its own.

    pre_scaled: with a pre-scale of 1 and -1.
    """
    *lead, k = shape
    groups = -(-k // 32)
    return Int4TileTensor.from_plain(
        torch.randint(16, shape, dtype=torch.uint8),
        torch.randint(1, 3, (*lead, groups)).float(),
        torch.randint(0, 4, (*lead, groups)).float(),
        group_size=32,
        dtype=dtype,
        pre_scale=torch.randint(0, 2, (k,)) * 2.0 - 1 if pre_scaled else None,
    )


def signs(*shape: int, dtype: torch.dtype = torch.float32, along: int = -1) -> Tensor:
    """At most 8 numbers -1 or 1 along the axis that is summed, the rest 0."""
    x = torch.zeros(shape).movedim(along, -1).contiguous()
    for row in x.view(-1, x.shape[-1]):
        row[torch.randperm(len(row))[:8]] = torch.randint(0, 2, (min(len(row), 8),)) * 2.0 - 1
    return x.movedim(-1, along).contiguous().to(dtype)


#: What is multiplied: each of its products is at most 8 * 17, an integer that bf16 holds, and so
#: are sums with biases of at most 8. Computed in any order, in any of the dtypes, they are exact.
W, E = (20, 100), (4, 20, 100)
CASES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], int]] = {
    # name: function of (x, w, bias [20]), shape of w, shape of x, axis of x that is summed
    "linear-1d": (lambda x, w, b: F.linear(x, w), W, (100,), -1),
    "linear-2d": (lambda x, w, b: F.linear(x, w), W, (3, 100), -1),
    "linear-2d-bias": (lambda x, w, b: F.linear(x, w, b), W, (3, 100), -1),
    "linear-3d-bias": (lambda x, w, b: F.linear(x, w, b), W, (2, 3, 100), -1),
    "linear-4d": (lambda x, w, b: F.linear(x, w), W, (2, 2, 3, 100), -1),
    "linear-no-rows": (lambda x, w, b: F.linear(x, w, b), W, (0, 100), -1),
    "linear-strided": (lambda x, w, b: F.linear(x.t(), w, b), W, (100, 3), 0),
    "mm": (lambda x, w, b: torch.mm(x, w.t()), W, (3, 100), -1),
    "mm-left": (lambda x, w, b: torch.mm(w, x), W, (100, 3), 0),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w.t()), W, (3, 100), -1),
    "addmm-left": (lambda x, w, b: torch.addmm(b[:, None], w, x), W, (100, 3), 0),
    "addmm-scaled": (
        lambda x, w, b: torch.addmm(b, x, w.t(), beta=2, alpha=-1),
        W,
        (3, 100),
        -1,
    ),
    "addmm-no-beta": (
        lambda x, w, b: torch.addmm(b * torch.nan, x, w.t(), beta=0),
        W,
        (3, 100),
        -1,
    ),
    "mv": (lambda x, w, b: torch.mv(w, x), W, (100,), -1),
    "addmv": (lambda x, w, b: torch.addmv(b, w, x, beta=0.5, alpha=2), W, (100,), -1),
    "matmul-1d": (lambda x, w, b: x @ w.t(), W, (100,), -1),
    "matmul-2d": (lambda x, w, b: x @ w.t(), W, (3, 100), -1),
    "matmul-3d": (lambda x, w, b: x @ w.t(), W, (2, 3, 100), -1),
    "matmul-4d": (lambda x, w, b: x @ w.mT, W, (2, 2, 3, 100), -1),
    "matmul-left-1d": (lambda x, w, b: w @ x, W, (100,), -1),
    "matmul-left-2d": (lambda x, w, b: w @ x, W, (100, 3), 0),
    "matmul-left-3d": (lambda x, w, b: w @ x, W, (2, 100, 3), 1),
    "matmul-left-4d": (lambda x, w, b: w @ x, W, (2, 2, 100, 3), 2),
    "bmm": (lambda x, w, b: torch.bmm(x, w.mT), E, (4, 3, 100), -1),
    "bmm-left": (lambda x, w, b: torch.bmm(w, x), E, (4, 100, 3), 1),
    "bmm-no-rows": (lambda x, w, b: torch.bmm(x, w.mT), E, (4, 0, 100), -1),
    "baddbmm": (
        lambda x, w, b: torch.baddbmm(b, x, w.mT, beta=2, alpha=0.5),
        E,
        (4, 3, 100),
        -1,
    ),
    "bmm-one-weight": (lambda x, w, b: torch.bmm(x, w[None].mT), W, (1, 3, 100), -1),
    "bmm-expanded": (
        lambda x, w, b: torch.bmm(x, w.t().expand(4, -1, -1)),
        W,
        (4, 3, 100),
        -1,
    ),
    "experts-3d": (lambda x, w, b: x @ w.mT, E, (4, 3, 100), -1),
    "experts-broadcast": (lambda x, w, b: x @ w.mT, E, (1, 3, 100), -1),
    "experts-2d": (lambda x, w, b: x @ w.mT, E, (3, 100), -1),
    "experts-1d": (lambda x, w, b: x @ w.mT, E, (100,), -1),
    "experts-4d": (lambda x, w, b: x @ w.mT, E, (2, 4, 3, 100), -1),
    "experts-4d-broadcast": (lambda x, w, b: x @ w.mT, E, (2, 1, 3, 100), -1),
    "experts-left-3d": (lambda x, w, b: w @ x, E, (4, 100, 3), 1),
    "experts-left-2d": (lambda x, w, b: w @ x, E, (100, 3), 0),
    "experts-left-1d": (lambda x, w, b: w @ x, E, (100,), 0),
    "expert": (lambda x, w, b: F.linear(x, w[2], b), E, (3, 100), -1),
    "experts-1-weight": (lambda x, w, b: x @ w[1:2].mT, E, (4, 3, 100), -1),
    "tensordot": (lambda x, w, b: torch.tensordot(x, w, ([1], [1])), W, (3, 100), -1),
    "inner": (lambda x, w, b: torch.inner(x, w), W, (2, 3, 100), -1),
}
EINSUMS = {
    "mk,nk->mn": (W, (3, 100), -1),
    "mk,nk->nm": (W, (3, 100), -1),
    "km,nk->mn": (W, (100, 3), 0),
    "km,nk->nm": (W, (100, 3), 0),
    "bmk,nk->bmn": (W, (2, 3, 100), -1),
    "bkm,nk->nbm": (W, (2, 100, 3), 1),
    "k,nk->n": (W, (100,), -1),
    "emk,enk->emn": (E, (4, 3, 100), -1),
    "emk,enk->nme": (E, (4, 3, 100), -1),
    "mek,enk->men": (E, (3, 4, 100), -1),
    "kem,enk->mne": (E, (100, 4, 3), 0),
    "ek,enk->en": (E, (4, 100), -1),
    "mk,enk->emn": (E, (3, 100), -1),
    "mk,enk->men": (E, (3, 100), -1),
    "bmek,enk->bmen": (E, (2, 3, 4, 100), -1),
}


def both(function: Any, w: Int4TileTensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    bias = torch.arange(-4, 16).remainder(9).sub(4).to(dtype)
    return function(x, w, bias), function(x, w.dequantize(), bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pre_scaled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_integers_are_multiplied_exactly(case: str, pre_scaled: bool, dtype: torch.dtype) -> None:
    function, w_shape, x_shape, along = CASES[case]
    w = integers(*w_shape, dtype=dtype, pre_scaled=pre_scaled)
    x = signs(*x_shape, dtype=dtype, along=along)
    y, expected = both(function, w, x, dtype)
    with torch.inference_mode():  # where composite functions are not taken apart before
        again, _ = both(function, w, x, dtype)
    assert torch.equal(again, y)
    assert type(y) is type(again) is Tensor
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(y, expected)
    assert y.any() or not y.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pre_scaled", [False, True])
@pytest.mark.parametrize("case", [*CASES, "grouped", *EINSUMS])
def test_gradients_of_integers_are_exact(case: str, pre_scaled: bool, dtype: torch.dtype) -> None:
    if case in CASES:
        function, w_shape, x_shape, _ = CASES[case]
    elif case in EINSUMS:
        w_shape, x_shape, _ = EINSUMS[case]
        function = functools.partial(lambda letters, x, w, b: torch.einsum(letters, x, w), case)
    else:
        w_shape, x_shape = E, (9, 100)
        function = lambda x, w, b: F.grouped_mm(x, w.mT, offs=OFFS)  # noqa: E731
    w = integers(*w_shape, dtype=dtype, pre_scaled=pre_scaled)
    # Of both operands of sums: the product, and x where a bias may be multiplied, too.
    x = torch.randn(x_shape).to(dtype).requires_grad_()
    y, _ = both(function, w, x, dtype) if case != "grouped" else (function(x, w, None), None)
    grad = torch.zeros(y.numel(), dtype=dtype)
    grad[torch.randperm(y.numel())[:7]] = 1 - 2 * torch.randint(0, 2, (min(7, y.numel()),)).to(
        dtype
    )
    (y * grad.view(y.shape)).sum().backward()
    wide = x.detach().double().requires_grad_()
    if case == "grouped":
        spans = zip([0, *OFFS.tolist()], OFFS.tolist(), w.dequantize().double(), strict=False)
        expected = torch.cat([*(wide[a:b] @ part.T for a, b, part in spans), wide[7:, :20] * 0])
    else:
        expected = function(wide, w.dequantize().double(), torch.zeros(20).double())
    (expected * grad.double().view(y.shape)).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad.double(), wide.grad)


@pytest.mark.parametrize("letters", EINSUMS)
@pytest.mark.parametrize("swapped", [False, True])
def test_einsum(letters: str, swapped: bool) -> None:
    w_shape, x_shape, along = EINSUMS[letters]
    w, x = integers(*w_shape, pre_scaled=swapped), signs(*x_shape, along=along)
    dense = w.dequantize()
    if swapped:
        (left, right), out = letters.split("->")[0].split(","), letters.split("->")[1]
        y = torch.einsum(f"{right},{left}->{out}", w, x)
    else:
        y = torch.einsum(letters, x, w)
    expected = torch.einsum(letters, x, dense)
    assert torch.equal(y, expected)
    with torch.inference_mode():
        assert torch.equal(torch.einsum(letters, x, w), expected)
    assert y.any()


@pytest.mark.parametrize("letters", ["mk,kn->mn", "bmk,kn->nbm", "mk,kn->nm"])
def test_einsum_with_a_transposed_weight(letters: str) -> None:
    x_shape = (2, 3, 100) if letters.startswith("b") else (3, 100)
    w, x = integers(*W), signs(*x_shape)
    assert torch.equal(
        torch.einsum(letters, x, w.t()), torch.einsum(letters, x, w.dequantize().t())
    )


# --- rounding ------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 300),
    group_size=st.sampled_from(GROUP_SIZES),
    dtype=st.sampled_from(DTYPES),
    part=st.booleans(),
    pre_scaled=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_linear_rounds_no_more_than_it_says(
    n: int, k: int, group_size: int, dtype: torch.dtype, part: bool, pre_scaled: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    packed = Int4TileTensor.from_float(weight, Int4Config(group_size=group_size))
    if pre_scaled:
        factors = torch.rand(k, generator=generator) + 0.5
        packed = Int4TileTensor.from_plain(
            *packed.get_plain(), group_size=packed.group_size, dtype=dtype, pre_scale=factors
        )
    if part:
        packed = torch.cat([packed[:, k // 3 :], packed[:, : 1 + k // 2]], 1)
    x = torch.randn(3, packed.shape[1], generator=generator).to(dtype)
    # The rounding of x times its factors is counted in the place of the bias's.
    bias = torch.zeros(n) if pre_scaled else torch.randn(n, generator=generator)
    bias = bias.to(dtype)
    w = packed.dequantize(torch.float32)
    expected = x.double() @ w.double().T + bias.double()
    assert_within(F.linear(x, packed, bias), expected, rounding_bound(x, w, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["addmm-scaled", "baddbmm", "experts-4d", "matmul-left-3d"])
def test_other_operators_round_no_more_than_they_say(case: str, dtype: torch.dtype) -> None:
    function, w_shape, x_shape, _ = CASES[case]
    w = Int4TileTensor.from_float(torch.randn(w_shape).to(dtype))
    x, bias = torch.randn(x_shape).to(dtype), torch.randn(20).to(dtype)
    exact = w.dequantize(torch.float32).double()
    expected = function(x.double(), exact, bias.double())
    if case == "addmm-scaled":  # alpha is -1: what magnitudes need is 1
        magnitude = 2 * bias.double().abs() + x.double().abs() @ exact.abs().T
    else:
        magnitude = function(x.double().abs(), exact.abs(), bias.double().abs())
    # x, w and y; alpha times y; and the sum with the bias (beta times which is exact, a power of 2)
    assert_within(function(x, w, bias), expected, rounding(100, 5) * magnitude)


# --- experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped_mm", [F.grouped_mm, torch._grouped_mm])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offs", [[2, 2, 5, 7], [0, 0, 0, 7], [7, 7, 7, 7], [1, 2, 3, 4]])
@pytest.mark.parametrize("pre_scaled", [False, True])
def test_grouped_mm(grouped_mm: Any, dtype: torch.dtype, offs: list[int], pre_scaled: bool) -> None:
    w, x = integers(*E, dtype=dtype, pre_scaled=pre_scaled), signs(7, 100, dtype=dtype)
    dense = w.dequantize()
    y = grouped_mm(x, w.mT, offs=torch.tensor(offs, dtype=torch.int32))
    expected = torch.zeros(7, 20, dtype=dtype)
    for e, (start, stop) in enumerate(zip([0, *offs], offs, strict=False)):
        expected[start:stop] = x[start:stop] @ dense[e].T
    assert torch.equal(y, expected)  # rows behind the last group are 0


def test_grouped_mm_of_parts_and_joins() -> None:
    w, x = integers(*E, pre_scaled=True), signs(7, 100)
    fused = torch.cat([w, w[:, 3:11]], 1)
    dense = fused.dequantize()
    y = F.grouped_mm(x, fused.mT, offs=OFFS)
    assert torch.equal(y[2:5], x[2:5] @ dense[2].T)
    part, dense = fused[:, 5:26, 7:90], dense[:, 5:26, 7:90]
    y = F.grouped_mm(x[:, 7:90], part.mT, offs=OFFS)
    assert torch.equal(y[5:], x[5:, 7:90] @ dense[3].T)
    experts = w[torch.tensor([3, 1, 0, 0])]
    y = F.grouped_mm(x, experts.mT, offs=OFFS)
    assert torch.equal(y[:2], x[:2] @ w[3].dequantize().T)


def test_grouped_mm_of_two_batches_is_bmm() -> None:
    w, x = integers(*E), signs(4, 3, 100)
    assert torch.equal(F.grouped_mm(x, w.mT), torch.bmm(x, w.dequantize().mT))


def test_a_mixture_of_experts_by_index() -> None:
    w, x = integers(*E), signs(3, 100)
    dense = w.dequantize()
    chosen = torch.tensor([[0, 3], [3, 1], [2, 2]])
    y = torch.einsum("sk,stnk->stn", x, dense[chosen])
    picked = w[chosen.flatten()]
    made = torch.bmm(picked, x.repeat_interleave(2, 0).unsqueeze(-1)).view(3, 2, 20)
    assert torch.equal(made, y)


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre_scaled", [False, True])
def test_a_product_of_parts_is_the_part_of_the_product(pre_scaled: bool) -> None:
    w, x = integers(40, 300, pre_scaled=pre_scaled), signs(3, 300)
    dense = w.dequantize()
    for rows in (slice(0, 8), slice(3, 29), slice(39, 40), slice(None, None, 3)):
        for columns in (slice(0, 300), slice(0, 150), slice(150, 300), slice(7, 9)):
            y = F.linear(x[:, columns], w[rows, columns])
            assert torch.equal(y, x[:, columns] @ dense[rows, columns].T)


# --- modules, autocast, gradients ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_module(dtype: torch.dtype) -> None:
    module = nn.Linear(100, 20).to(dtype)
    w = integers(*W, dtype=dtype)
    module.weight = nn.Parameter(w, requires_grad=False)
    with torch.no_grad():
        module.bias.fill_(3)
        x = signs(2, 3, 100, dtype=dtype)
        assert torch.equal(module(x), F.linear(x, w.dequantize(), module.bias))


def test_autocast() -> None:
    w, x = integers(*W), signs(3, 100)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = F.linear(x, w)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.float(), F.linear(x, w.dequantize()))


def test_inference_mode() -> None:
    w, x = integers(*W), signs(3, 100)
    with torch.inference_mode():
        y = F.linear(x, w)
        z = F.linear(x, w[4:])
    assert torch.equal(y, F.linear(x, w.dequantize()))
    assert torch.equal(z, y[:, 4:])


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, w, e: F.linear(x[:, 1:], w), "99"),
        (lambda x, w, e: torch.mm(x, w), "100 columns and 20 rows"),
        (lambda x, w, e: torch.mm(x[:, :20].bfloat16(), w), "torch.bfloat16.*torch.float32"),
        (lambda x, w, e: torch.mm(x[None], w.t()), "2 axes"),
        (lambda x, w, e: torch.mm(w, x.t()[None]), "2 axes"),
        (lambda x, w, e: torch.mv(w, x.t()), "vector"),
        (lambda x, w, e: torch.bmm(x.expand(3, 3, 100), e.mT), "3 and 4 matrices"),
        (lambda x, w, e: torch.bmm(x.expand(5, 3, 100), e.mT), "5 and 4 matrices"),
        (lambda x, w, e: torch.bmm(x.expand(3, 3, 100), w[None].mT), "3 and 1 matrices"),
        (lambda x, w, e: torch.bmm(x, e.mT), "3 axes"),
        (lambda x, w, e: F.linear(x.bfloat16(), w), "torch.bfloat16.*torch.float32"),
        (lambda x, w, e: F.linear(x, w, torch.zeros(20).half()), "torch.float16"),
        (lambda x, w, e: torch.addmm(torch.zeros(2, 3, 20), x, w.t()), ""),
        (lambda x, w, e: torch.addmm(torch.zeros(21), x, w.t()), ""),
        (lambda x, w, e: F.grouped_mm(x, e.mT, offs=OFFS[:3]), "offs"),
        (lambda x, w, e: F.grouped_mm(x[:, 1:], e.mT, offs=OFFS), "99"),
    ],
)
def test_what_does_not_fit_is_an_error(wrong: Any, message: str) -> None:
    x, w, e = signs(3, 100), integers(*W), integers(*E)
    with pytest.raises((ValueError, RuntimeError), match=message or "expand"):
        wrong(x, w, e)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pre_scaled", [False, True])
@pytest.mark.parametrize(
    "product",
    [
        lambda x, w, e: x @ w,
        lambda x, w, e: torch.mm(w.t(), x.t()),
        lambda x, w, e: F.linear(x, w.t()),
        lambda x, w, e: torch.einsum("mn,nk->mk", x, w),
        lambda x, w, e: torch.mv(w.t(), x[0]),
        lambda x, w, e: torch.bmm(x[None], w[None]),
        lambda x, w, e: x @ e,
        lambda x, w, e: e.mT @ x.t(),
        lambda x, w, e: F.grouped_mm(x, e, offs=torch.tensor([0, 2, 2, 3], dtype=torch.int32)),
        lambda x, w, e: x[:, :13] @ w[:13],
        lambda x, w, e: x[:, 8:13] @ w[8:13],
        lambda x, w, e: x @ torch.cat([w[:, 7:9], w[:, 40:77]], 1),
    ],
)
def test_sums_over_n(product: Any, pre_scaled: bool, dtype: torch.dtype) -> None:
    w = integers(*W, dtype=dtype, pre_scaled=pre_scaled)
    e = integers(*E, dtype=dtype, pre_scaled=pre_scaled)
    x = signs(3, 20, dtype=dtype)
    y = product(x, w, e)
    with torch.inference_mode():
        assert torch.equal(product(x, w, e), y)
    assert (type(y), y.dtype) == (Tensor, dtype)
    if "grouped_mm" in product.__code__.co_names:
        expected = torch.cat([x[:2] @ e[1].dequantize(), x[2:] @ e[3].dequantize()])
    else:
        expected = product(x, w.dequantize(), e.dequantize())
    assert torch.equal(y, expected)


@pytest.mark.parametrize("columns", [32, 64, 96])
def test_sums_over_n_take_some_columns_at_a_time(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, e = integers(20, 300), integers(4, 20, 300)
    x = signs(3, 20)
    expected = [x @ w.dequantize(), x @ e.dequantize()]
    of_both = 16 * 4 * 24 * columns  # 24 rows of fp32
    for weight, bytes_, y in ((w, of_both, expected[0]), (e, 4 * of_both, expected[1])):
        monkeypatch.setattr(ops, "_MOST_COLUMNS_BYTES", bytes_)
        assert torch.equal(x @ weight, y)
        monkeypatch.setattr(ops, "_MOST_COLUMNS_BYTES", 1)
        assert torch.equal(x @ weight, y)


@pytest.mark.parametrize(
    "unsupported",
    [
        lambda w: w @ w.t(),
        lambda w: torch.bmm(w[None], w.t()[None]),
    ],
)
def test_two_packed_weights_are_not_multiplied(unsupported: Any) -> None:
    w = integers(*W)
    with pytest.raises(UnsupportedOpError, match=r"of two of them.*Supported: "):
        unsupported(w)
    with fxint4.dequantizing():
        assert torch.equal(unsupported(w), unsupported(w.dequantize()))


# --- the ops beneath -----------------------------------------------------------------------------

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [20, 16])
def test_opcheck(dtype: torch.dtype, n: int) -> None:
    w, e = integers(n, 100), integers(4, n, 100)
    one, all_ = (w.tiles, w.scale_and_zero), (e.tiles, e.scale_and_zero)
    ops: Any = torch.ops.fxint4
    x, xs = signs(7, 100, dtype=dtype), signs(4, 3, 100, dtype=dtype)
    z, zs = x[:, :n].contiguous(), xs[..., :n].contiguous()
    ids = torch.tensor([0, 3, 3, 1, -1, 2, 0])
    for op, arguments in (
        (ops.linear, (x, *one, 32, n)),
        (ops.linear, (xs, *one, 32, n)),
        (ops.linear, (x[0], *one, 32, n)),
        (ops.linear, (x[:0], *one, 32, n)),
        (ops.bmm, (xs, *all_, 32, n)),
        (ops.grouped_mm, (x, *all_, OFFS, 32, n)),
        (ops.indexed_mm, (x, *all_, ids, 32, n)),
        (ops.linear_t, (z, *one, 32, 100)),
        (ops.linear_t, (zs, *one, 32, 99)),
        (ops.linear_t, (z[0], *one, 32, 1)),
        (ops.linear_t, (z[:0], *one, 32, 100)),
        (ops.bmm_t, (zs, *all_, 32, 100)),
        (ops.grouped_mm_t, (z, *all_, OFFS, 32, 100)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=CHECKS)
        y = op(*arguments)
        assert y.is_contiguous()
        assert (y.shape, y.dtype) == ((*arguments[0].shape[:-1], arguments[-1]), dtype)


def test_indexed_mm() -> None:
    w, x = integers(*E), signs(6, 100)
    ids = torch.tensor([0, 3, 3, 1, -1, 2])
    y = torch.ops.fxint4.indexed_mm(x, w.tiles, w.scale_and_zero, ids, 32, 20)
    assert torch.equal(y, torch.einsum("sk,snk->sn", x, w.dequantize()[ids]))
    with pytest.raises(IndexError, match="4 weights"):
        torch.ops.fxint4.indexed_mm(x, w.tiles, w.scale_and_zero, ids + 1, 32, 20)


# --- views on the CPU, where the op reads another packing -----------------------------------------


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each packing for the CPU's op."""
    made: list[int] = []

    def pack_for_cpu(codes: Tensor) -> Tensor:
        made.append(codes.shape[-2])
        return tile_layout.pack_for_cpu(codes)

    monkeypatch.setattr(weights_cache, "pack_for_cpu", pack_for_cpu)
    return made


def products(w: Int4TileTensor, x: Tensor) -> Tensor:
    x = x[:, : w.shape[-1]]
    return x.expand(*w.shape[:-2], *x.shape) @ w.mT if w.ndim > 2 else F.linear(x, w)


def exact(w: Int4TileTensor, x: Tensor) -> Tensor:
    return x[:, : w.shape[-1]] @ w.dequantize(torch.float32).mT


VIEWS: dict[str, tuple[tuple[int, ...], Callable[[Int4TileTensor], Int4TileTensor]]] = {
    "a matrix": ((4, 64, 128), lambda w: w[2]),
    "a matrix of some": ((4, 64, 128), lambda w: w[1:][1]),
    "an unbound matrix": ((4, 64, 128), lambda w: w.unbind()[3]),
    "some matrices": ((4, 64, 128), lambda w: w[1:3]),
    "all matrices": ((4, 64, 128), lambda w: w),
    "rows": ((64, 128), lambda w: w[16:48]),
    "rows of rows": ((64, 128), lambda w: w[8:][8:40]),
    "split rows": ((64, 128), lambda w: w.split(32)[1]),
    "columns": ((64, 384), lambda w: w[:, 128:]),
    "rows of a matrix": ((4, 64, 128), lambda w: w[2][16:48]),
    "itself": ((64, 128), lambda w: w.detach()),
    "data": ((64, 128), lambda w: w.data),
    "transposed twice": ((64, 128), lambda w: w.t().t()),
    "expanded": ((64, 128), lambda w: w.expand(3, 64, 128)),
    "with an axis more": ((4, 64, 128), lambda w: w.view(2, 2, 64, 128)[1, 0]),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_view_is_packed_for_the_cpu_once(name: str, mode: Any, packings: list[int]) -> None:
    shape, view = VIEWS[name]
    w = Int4TileTensor.from_float(torch.randn(shape))
    x = torch.randn(2, shape[-1])
    with mode():
        expected = products(view(w), x)
        first = len(packings)
        assert first > 0
        for _ in range(3):
            assert torch.equal(products(view(w), x), expected)
        assert len(packings) == first
        view(w)  # one that is not kept


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("write", ["copy", "copy into a part", "buffers", "buffers of a view"])
def test_what_is_written_shows_in_all_views(name: str, write: str) -> None:
    """A write to the weight, or to any view of it, is seen through all that were used before."""
    shape, view = VIEWS[name]
    w, x = integers(*shape), signs(2, shape[-1])
    part = w[..., :32, :]
    with torch.no_grad():
        used = [w, view(w), part, view(w)]
        for each in used:
            products(each, x)
        if write == "copy":
            w.copy_(integers(*shape))
        elif write == "copy into a part":
            part.copy_(integers(*part.shape))
        else:
            (w if write == "buffers" else part).scale_and_zero.neg_()
        for each in (*used, view(w)):
            assert torch.equal(products(each, x), exact(each, x))


def test_views_that_are_kept_are_bounded(packings: list[int]) -> None:
    w = Int4TileTensor.from_float(torch.randn(512, 128))
    x = torch.randn(2, 128)
    gc.collect()
    known = len(weights_cache.weight_cache)
    with torch.no_grad():
        for start in range(0, 504, 8):
            F.linear(x, w[start:])
    kept = w._views._last.values()
    assert 0 < sum(view.nbytes for view in kept) <= 2 * w.tiles.nbytes
    assert len(weights_cache.weight_cache) - known <= len(kept)
    del kept, w
    gc.collect()
    assert len(weights_cache.weight_cache) == known


def test_copies_have_views_of_their_own() -> None:
    w = Int4TileTensor.from_float(torch.randn(4, 64, 128))
    x = torch.randn(2, 128)
    with torch.no_grad():
        y = F.linear(x, w[1])
        for copied in (copy.deepcopy(w), w.clone(), copy.copy(w)):
            assert torch.equal(F.linear(x, copied[1]), y)
        copied = copy.deepcopy(w)
        copied.copy_(-w.dequantize())
        assert torch.equal(F.linear(x, w[1]), y)
        assert not torch.equal(F.linear(x, copied[1]), y)


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize("backend", ["int4tile", "inductor"])
def test_views_are_compiled(backend: str) -> None:
    w, x = integers(4, 64, 128), signs(2, 128)
    parameters = [nn.Parameter(part, requires_grad=False) for part in (w[1], w[2][16:48])]
    compiled = torch.compile(lambda x: [F.linear(x, part) for part in parameters], backend=backend)
    with torch.no_grad():
        for _ in range(2):
            w.copy_(integers(4, 64, 128))
            for y, part in zip(compiled(x), parameters, strict=True):
                assert torch.equal(y, exact(part, x))
