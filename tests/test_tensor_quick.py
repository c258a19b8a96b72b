"""Eager `nn.Linear` over packed weights: the prepared way gives what the ordinary one gives."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_within, rounding_bound
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxint4 import Int4Config, Int4TileTensor
from fxint4._pytorch.tensors import is_disturbed, is_plain
from fxint4.tensor import core
from fxint4.tensor import quick as quick_calls
from fxint4.tensor.core import _QUICK

N, K = 192, 1024
ROWS = [1, 5, 16, 100, 513, 2048]

#: PyTorch's own, when forward-mode differentiation is first used.
of_forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU; or the CPU, where a stand-in for launches reads memory past all that PyTorch knows."""
    if request.param == "cuda":
        return "cuda"

    def prepared(rows: Any, k: int, n: int, tiles: Any, group_size: int, *_: Any) -> Any:
        def product(x: Tensor, tiles: Tensor, scale_and_zero: Tensor) -> Tensor:
            # NumPy takes none but plain tensors, and forgets what autograd knows of them.
            values = torch.from_numpy(x.detach().float().numpy().copy()).to(x.dtype)
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                return torch.ops.fxint4.linear(values, tiles, scale_and_zero, group_size, n)

        return product

    monkeypatch.setattr(quick_calls, "prepared", prepared)
    monkeypatch.setattr(quick_calls, "_waits_for_host", lambda tiles: True)
    return "cpu"


def weight(dtype: torch.dtype, device: str = "cuda", n: int = N, k: int = K) -> Int4TileTensor:
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * k**-0.5
    return Int4TileTensor.from_float(values.to(device, dtype), Int4Config(group_size=64))


def rows(m: int, dtype: torch.dtype, device: str = "cuda", k: int = K) -> Tensor:
    values = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    return values.to(device, dtype)


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each product was made in the prepared way."""
    made: list[bool] = []

    def recorded(quick: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: object) -> object:
            result = quick(*args)
            made.append(result is not NotImplemented)
            return result

        return record

    for op in PRODUCTS:
        monkeypatch.setitem(_QUICK, op, recorded(_QUICK[op]))
    functions = [(asked, recorded(function)) for asked, function in core._QUICK_FUNCTIONS]
    monkeypatch.setattr(core, "_QUICK_FUNCTIONS", functions)
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
        products = [F.linear(given, w, bias) for given in (x, x.view(1, m, K)) for _ in range(2)]
    assert [y.shape for y in products] == [(m, N)] * 2 + [(1, m, N)] * 2
    assert all(torch.equal(y.view(m, N), products[0]) for y in products)
    assert calls == [True] * 4
    dense = w.dequantize(torch.float64)
    wide = F.linear(x.double(), dense, None if bias is None else bias.double())
    scale = (x.double().abs() @ dense.abs().T).max().item()
    # One rounding of each weight to 16 bits, one of the product and one of the sum.
    assert (products[-1].view(m, N) - wide).abs().max().item() < 2**-7 * scale


def test_what_is_left_to_the_ordinary_way(calls: list[bool], device: str) -> None:
    w, x = weight(torch.bfloat16, device), rows(4, torch.bfloat16, device)
    scaled = w.like(pre_scale=torch.rand(K, device=device) + 0.5)
    padded = weight(torch.bfloat16, device, k=1000)
    with torch.no_grad():
        for given, by in (
            (x, scaled),
            (rows(4, torch.bfloat16, device, k=1000), padded),
            (rows(K, torch.bfloat16, device, k=4).t(), w),  # x is not contiguous
            (x, w[:64]),
            (x[:0], w),
        ):
            assert torch.equal(given @ by.t(), F.linear(given, by))
        with pytest.raises(ValueError, match=r"x is torch\.float16 and the packed weight stands"):
            x.half() @ w.t()
        with pytest.raises(ValueError, match="cannot multiply"):
            x[:, :512].contiguous() @ w.t()
    assert calls == [False] * len(calls)


def test_weights_that_change(device: str) -> None:
    x = rows(16, torch.bfloat16, device)
    layer = nn.Linear(K, N, bias=False, device=device, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(weight(torch.bfloat16, device), requires_grad=False)

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
    other = weight(torch.bfloat16, device)
    other.scale_and_zero.mul_(2)
    layer.weight.data = other
    assert not torch.equal(product(), first)
    layer.weight.scale_and_zero = layer.weight.scale_and_zero / 2
    torch.testing.assert_close(product(), first)
    view = layer.weight.t()
    copied, copied_view = copy.deepcopy(layer), copy.deepcopy(view)
    copied.weight.scale_and_zero.zero_()
    torch.testing.assert_close(product(), first)
    with torch.no_grad():
        torch.testing.assert_close(x @ copied_view, first)
        view.data = weight(torch.bfloat16, device, n=64).t()
        assert (x @ view).shape == (16, 64)


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


def other_ways() -> dict[str, Callable[[Tensor, Int4TileTensor, Tensor], Tensor]]:
    """Calls that ask for more than a product, or give what is no plain tensor."""

    def in_forward_mode(x: Tensor, w: Int4TileTensor, bias: Tensor) -> Tensor:
        with forward_ad.dual_level():
            y = F.linear(forward_ad.make_dual(x, 2 * x), w, bias)
            return torch.stack(tuple(forward_ad.unpack_dual(y)))

    def with_gradients(x: Tensor, w: Int4TileTensor, bias: Tensor) -> Tensor:
        with torch.enable_grad():
            x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
            y = F.linear(x, w, bias)
            y.sum().backward()
        assert x.grad is not None
        assert bias.grad is not None
        return torch.cat([y.detach().flatten(), x.grad.flatten(), bias.grad])

    def with_a_gradient(x: Tensor, w: Int4TileTensor, bias: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            (F.linear(x, w, bias) + F.linear(x, w)).sum().backward()
        assert x.grad is not None
        return x.grad

    def under_autocast(x: Tensor, w: Int4TileTensor, bias: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.float16):
            return F.linear(x, w, bias)

    def fake(x: Tensor, w: Int4TileTensor, bias: Tensor) -> Tensor:
        with FakeTensorMode(allow_non_fake_inputs=True):
            y = F.linear(x, w, bias)
        assert isinstance(y, FakeTensor)
        return torch.tensor(y.shape)

    def of_mode(x: Tensor, w: Int4TileTensor, bias: Tensor) -> Tensor:
        with FlopCounterMode(display=False):
            return F.linear(x, w, bias)

    def by_ops(x: Tensor, w: Int4TileTensor, bias: Tensor) -> Tensor:
        aten = torch.ops.aten
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            y = aten.addmm.default(bias, x, aten.t.default(w)) + aten.mm.default(x, w.t())
            y.sum().backward()
        assert x.grad is not None
        return torch.cat([y.detach().flatten(), x.grad.flatten()])

    def by_name(x: Tensor, w: Int4TileTensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight=w, bias=bias)

    return {
        "forward mode": in_forward_mode,
        "gradients": with_gradients,
        "a gradient": with_a_gradient,
        "autocast": under_autocast,
        "fake": fake,
        "a dispatch mode": of_mode,
        "by ops": by_ops,
        "by name": by_name,
        "vmap": lambda x, w, bias: torch.vmap(lambda row: F.linear(row, w, bias))(x),
        "zeros without memory": lambda x, w, bias: F.linear(
            torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device), w, bias
        ),
        "negative": lambda x, w, bias: F.linear(torch._neg_view(x), w, bias),
        "transposed": lambda x, w, bias: F.linear(x.t().contiguous().t(), w, bias),
        "a view of a bias": lambda x, w, bias: F.linear(x, w, torch.cat([bias, bias])[::2]),
        "one bias": lambda x, w, bias: F.linear(x, w, bias[:1]),
        "a vector": lambda x, w, bias: F.linear(x[0], w, bias),
        "another dtype": lambda x, w, bias: F.linear(x, w, bias.float()),
    }


def outcome(way: str, x: Tensor, w: Int4TileTensor, bias: Tensor) -> Tensor | str:
    """What a call returns, or what it raises."""
    try:
        return other_ways()[way](x, w, bias)
    except (RuntimeError, ValueError) as error:
        return str(error)


@of_forward_mode
@pytest.mark.parametrize("way", list(other_ways()))
def test_more_than_a_product(way: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(torch.bfloat16, device), rows(4, torch.bfloat16, device)
    bias = torch.randn(N, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        F.linear(x, w, bias)  # now there is something prepared that would be wrong
        got = outcome(way, x, w, bias)
        for op in PRODUCTS:
            monkeypatch.delitem(_QUICK, op)
        monkeypatch.setattr(core, "_QUICK_FUNCTIONS", [])
        expected = outcome(way, x, w, bias)
    if isinstance(got, Tensor):
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)
    else:
        assert got == expected


class Named(Tensor):
    """A subclass that adds nothing."""


class Duck:
    """No tensor, which answers for itself."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls, func, types


def test_classes_of_others_are_asked_as_ever() -> None:
    w = weight(torch.float32, "cpu")
    x = rows(3, torch.float32, "cpu")
    with torch.no_grad():
        expected = F.linear(x, w)
        named = x.as_subclass(Named)
        for y in (F.linear(named, w), named @ w.t(), (w @ named.t()).t()):
            assert type(y) is Named
            torch.testing.assert_close(y.as_subclass(Tensor), expected)
    assert F.linear(x, w, Duck()) == (Duck, F.linear, (Duck,))  # type: ignore[arg-type]
    assert torch.matmul(w, Duck()) == (Duck, torch.matmul, (Duck,))  # type: ignore[arg-type]
    layer = nn.Linear(K, N)
    layer.weight = nn.Parameter(w, requires_grad=False)
    layer.register_buffer("other", w)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.matmul(self.layer.other, x.t()).t()

    traced = torch.fx.symbolic_trace(Model())
    with torch.no_grad():
        torch.testing.assert_close(traced(x), 2 * expected + layer.bias)


def test_tensors_of_inference_mode(calls: list[bool], device: str) -> None:
    w, x = weight(torch.bfloat16, device), rows(4, torch.bfloat16, device)
    with torch.no_grad():
        expected = F.linear(x, w)
    with torch.inference_mode():
        inside = x.clone()
        assert torch.equal(F.linear(inside, w), expected)
    assert torch.equal(F.linear(inside, w), expected)
    assert calls == [True] * 3


def disturbances() -> dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]]:
    """Ways to call a function that have something look at its ops, or give it a wrapper."""

    def within(context: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        with context:
            function(x)

    return {
        "fake": lambda f, x: within(FakeTensorMode(allow_non_fake_inputs=True), f, x),
        "a dispatch mode": lambda f, x: within(FlopCounterMode(display=False), f, x),
        "autocast": lambda f, x: within(torch.autocast("cpu", torch.bfloat16), f, x),
        "forward mode": lambda f, x: within(forward_ad.dual_level(), f, x),
        "vmap": lambda f, x: torch.vmap(f)(x),
        "a gradient of functions": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
        "functionalize": lambda f, x: torch.func.functionalize(f)(x),
        "tracing": lambda f, x: make_fx(f)(x),
        "tracing symbols": lambda f, x: make_fx(f, tracing_mode="symbolic")(x),
        "torch.jit.trace": lambda f, x: torch.jit.trace(f, (x,), check_trace=False),
    }


@of_forward_mode
@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is (deprecated|not supported)")
@pytest.mark.parametrize("way", list(disturbances()))
def test_what_asks_for_more_is_noticed(way: str) -> None:
    said: list[bool] = []

    def look(x: Tensor) -> Tensor:
        said.append(type(x) is not Tensor or not is_plain(x) or is_disturbed())
        return x * 2

    x = torch.ones(2, 2)
    disturbances()[way](look, x)
    assert said == [True]
    look(x)
    assert said == [True, False]


def test_modes_of_autograd_ask_for_no_more() -> None:
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            assert not is_disturbed()


def test_plain_tensors() -> None:
    x = torch.ones(2, 2)
    with torch.inference_mode():
        of_inference = torch.ones(2)
    plain = (x, x.t(), x.clone().requires_grad_(), nn.Parameter(x), of_inference, x.long())
    assert all(map(is_plain, plain))
    special = (torch._neg_view(x), x.to_sparse(), x.to_mkldnn(), torch._efficientzerotensor(2))
    assert not any(map(is_plain, special))


def test_on_the_cpu_nothing_is_prepared(calls: list[bool]) -> None:
    w, x = weight(torch.bfloat16, "cpu"), rows(3, torch.bfloat16, "cpu")
    check(x, w)
    check(x, w, torch.ones(N, dtype=torch.bfloat16))
    assert calls == [False] * 8  # linear, then what it comes apart into
    assert w._made is None
