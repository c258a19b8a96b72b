"""Eager `nn.Linear` over packed weights: the prepared way gives what the ordinary one gives."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from support import assert_within, rounding_bound
from torch import Tensor, nn
from torch.nn import functional as F

from fxint4 import Int4Config, Int4TileTensor
from fxint4.tensor.core import _QUICK

N, K = 192, 1024
ROWS = [1, 5, 16, 100, 513, 2048]


def weight(dtype: torch.dtype, device: str = "cuda", n: int = N, k: int = K) -> Int4TileTensor:
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * k**-0.5
    return Int4TileTensor.from_float(values.to(device, dtype), Int4Config(group_size=64))


def rows(m: int, dtype: torch.dtype, device: str = "cuda", k: int = K) -> Tensor:
    values = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    return values.to(device, dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each product was made in the prepared way."""
    made: list[bool] = []
    for op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        quick = _QUICK[op]

        def recorded(*args: object, quick: object = quick) -> object:
            result = quick(*args)  # type: ignore[operator]
            made.append(result is not NotImplemented)
            return result

        monkeypatch.setitem(_QUICK, op, recorded)
    return made


def check(x: Tensor, w: Int4TileTensor, bias: Tensor | None = None) -> None:
    """Twice, because what the first call prepares the second one uses."""
    dense = w.dequantize(torch.float32)
    wide = None if bias is None else bias.float()
    bound = rounding_bound(x.float(), dense, wide)
    with torch.no_grad():
        for _ in range(2):
            y = F.linear(x, w, bias)
            assert y.dtype is x.dtype
            assert_within(
                y,
                F.linear(x.double(), dense.double(), None if wide is None else wide.double()),
                bound,
            )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("biased", [False, True])
def test_the_product(m: int, dtype: torch.dtype, biased: bool, calls: list[bool]) -> None:
    w = weight(dtype)
    bias = torch.randn(N, device="cuda", dtype=dtype) if biased else None
    x = rows(m, dtype)
    with torch.no_grad():
        for given in (x, x.view(1, m, K)):
            products = [F.linear(given, w, bias) for _ in range(2)]
            op = torch.ops.fxint4.linear(given, w.tiles, w.scale_and_zero, w.group_size, N)
            expected = op if bias is None else op + bias
            for y in products:
                assert torch.equal(y, expected)
    assert calls == [True] * 4
    dense = w.dequantize(torch.float64)
    wide = F.linear(x.double(), dense, None if bias is None else bias.double())
    scale = (x.double().abs() @ dense.abs().T).max().item()
    # One rounding of each weight to 16 bits, one of the product and one of the sum.
    assert (products[-1].view(m, N) - wide).abs().max().item() < 2**-7 * scale


@pytest.mark.gpu
def test_what_is_left_to_the_ordinary_way(calls: list[bool]) -> None:
    w, x = weight(torch.bfloat16), rows(4, torch.bfloat16)
    scaled = w.like(pre_scale=torch.rand(K, device="cuda") + 0.5)
    padded = weight(torch.bfloat16, k=1000)
    with torch.no_grad():
        for product in (
            lambda: x @ scaled.t(),
            lambda: rows(4, torch.bfloat16, k=1000) @ padded.t(),
            lambda: rows(K, torch.bfloat16, k=4).t() @ w.t(),  # x is not contiguous
            lambda: x @ w[:64].t(),
        ):
            assert product().isfinite().all()
        with pytest.raises(ValueError, match=r"x is torch\.float16 and the packed weight stands"):
            x.half() @ w.t()
        with pytest.raises(ValueError, match="cannot multiply"):
            x[:, :512].contiguous() @ w.t()
    assert not any(calls[:3])


@pytest.mark.gpu
def test_weights_that_change() -> None:
    x = rows(16, torch.bfloat16)
    layer = nn.Linear(K, N, bias=False, device="cuda", dtype=torch.bfloat16)
    layer.weight = nn.Parameter(weight(torch.bfloat16), requires_grad=False)

    def product() -> Tensor:
        with torch.no_grad():
            y = layer(x)
            dense = F.linear(x.double(), layer.weight.dequantize(torch.float64))
        assert (y - dense).abs().max() < 0.05
        return y

    first = product()
    with torch.no_grad():
        layer.weight.copy_(-layer.weight.dequantize())
    assert not torch.equal(product(), first)
    other = weight(torch.bfloat16)
    other.scale_and_zero.mul_(2)
    layer.weight.data = other
    assert not torch.equal(product(), first)
    layer.weight.scale_and_zero = layer.weight.scale_and_zero / 2
    torch.testing.assert_close(product(), first)
    copied = copy.deepcopy(layer)
    copied.weight.scale_and_zero.zero_()
    torch.testing.assert_close(product(), first)


@pytest.mark.gpu
def test_memory_goes_with_the_weight() -> None:
    x = rows(16, torch.bfloat16)
    with torch.no_grad():
        x @ weight(torch.bfloat16).t()
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        w = weight(torch.bfloat16)
        with torch.no_grad():
            x @ w.t()
        del w
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


@pytest.mark.gpu
def test_gradients_and_other_modes() -> None:
    w, x = weight(torch.bfloat16), rows(16, torch.bfloat16).requires_grad_()
    F.linear(x, w).float().sum().backward()
    assert x.grad is not None
    dense = w.dequantize(torch.float64).sum(0)
    assert (x.grad - dense).abs().max() < 2**-7 * w.dequantize().abs().sum(0).max()
    plain = x.detach()
    with torch.no_grad():
        expected = F.linear(plain, w)
    with torch.inference_mode():
        assert torch.equal(F.linear(plain, w), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            y = F.linear(plain, w)
        graph.replay()
        assert torch.equal(y, expected)


def test_on_the_cpu_nothing_is_prepared(calls: list[bool]) -> None:
    w, x = weight(torch.bfloat16, "cpu"), rows(3, torch.bfloat16, "cpu")
    check(x, w)
    check(x, w, torch.ones(N, dtype=torch.bfloat16))
    assert calls == [False] * 4
