"""Compiled graphs look their weights up: what they see, and what a look-up costs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_within, dequantized, rounding_bound
from torch import Tensor, nn

import fxint4
from fxint4.lowering.graph import Int4Graph
from fxint4.weights import cache as cache_module
from fxint4.weights.formats import most_int4_rows
from fxint4.weights.identity import WeightIdentity

pytestmark = [pytest.mark.compiles, pytest.mark.by_aten]

K = N = 64


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(K, N, bias=False).to(dtype).eval().requires_grad_(False)


def int4(model: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="int4tile", **kwargs)


def assert_product(y: Tensor, x: Tensor, weight: Tensor) -> None:
    w = dequantized(weight, K, torch.float64)
    assert_within(y, x.double() @ w.T, rounding_bound(x, w))


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[None]:
    """A list that grows with each call of a function."""
    calls: list[None] = []
    function = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, noted)
    return calls


# --- the same memory, seen in another way --------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.t(),
        lambda data: data[:1].expand(N, K),
        lambda data: data[:, :1].expand(N, K),
        lambda data: data.view(torch.float16),
        lambda data: data.flip(0),
        lambda data: torch.as_strided(data, (N, K), (1, 1)),
    ],
    ids=["t", "row", "column", "dtype", "flip", "overlapping"],
)
@pytest.mark.parametrize("guarded", [True, False])
def test_memory_that_is_seen_in_another_way(
    change: Callable[[Tensor], Tensor], guarded: bool
) -> None:
    """Dynamo may compile anew for other strides, or run the code that it has."""
    model = linear(torch.bfloat16)
    unsafe = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    compiled = int4(model, options={} if guarded else unsafe)
    x = torch.randn(4, K).bfloat16()
    with torch.no_grad():
        original = model.weight.data
        for weight in (original, change(original), original, change(original)):
            model.weight.data = weight
            own = x.to(weight.dtype)
            for _ in range(2):
                assert_product(compiled(own), own, model.weight)


@pytest.mark.parametrize("packed", [False, True])
def test_memory_that_is_allocated_again_elsewhere_is_the_same_weight(packed: bool) -> None:
    """`fully_shard` frees what it gathers after each call, and fills it again before the next."""
    model, x = linear(), torch.randn(2, K)
    weight = model.weight.detach().clone()
    options = {"group_size": K}
    if packed:
        fxint4.pack_(model, options=options)
    compiled = int4(model, options=options)
    owner = model.weight
    tensors = [owner.tiles, owner.scale_and_zero] if packed else [owner.data]
    with torch.no_grad():
        assert_product(compiled(x), x, weight)
        report = fxint4.last_report()
        for _ in range(3):
            for tensor in tensors:
                before, storage = tensor.data_ptr(), tensor.untyped_storage()
                storage.resize_(2 * storage.nbytes())  # copies the values into other memory
                assert tensor.data_ptr() != before
            assert_product(compiled(x), x, weight)
    assert len(report.records) == 1


def test_parameters_that_are_swapped_when_a_module_is_converted() -> None:
    model = nn.Sequential(linear())
    compiled = int4(model)
    x = torch.randn(4, K)
    with torch.no_grad():
        compiled(x)
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            weight = model[0].weight
            model.bfloat16()
            assert model[0].weight is weight
            assert_product(compiled(x.bfloat16()), x.bfloat16(), weight)
            model.load_state_dict({"0.weight": torch.randn(N, K).bfloat16()})
            assert model[0].weight is weight
            assert_product(compiled(x.bfloat16()), x.bfloat16(), weight)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)


class Tagged(nn.Parameter):
    """As vLLM's parameters: a subclass whose values are its own."""

    tag = "a"


def test_a_subclass_of_parameter_is_a_weight() -> None:
    model = nn.Sequential(linear())
    model[0].weight = Tagged(model[0].weight.detach(), requires_grad=False)
    x = torch.randn(4, K)
    with torch.no_grad():
        assert_product(int4(model)(x), x, model[0].weight.detach().as_subclass(Tensor))
    report = fxint4.last_report()
    assert [(record.name, record.action) for record in report.records] == [("0", "packed")]
    for args in ((), (x,)):
        other = nn.Sequential(linear())
        other[0].weight = Tagged(other[0].weight.detach(), requires_grad=False)
        values = other[0].weight.detach().as_subclass(Tensor).clone()
        fxint4.pack_(other, args)
        assert isinstance(other[0].weight, fxint4.Int4TileTensor)
        assert_product(other(x), x, values)


# --- ops that read more than their operands ------------------------------------------------------

FACTOR = [1.0]


@torch.library.custom_op("fxint4_tests::scaled", mutates_args=())
def scaled(w: Tensor) -> Tensor:
    return w * FACTOR[0]


@scaled.register_fake
def _(w: Tensor) -> Tensor:
    return torch.empty_like(w)


@pytest.mark.parametrize("inner", [False, True])
def test_a_weight_that_a_custom_op_computes_is_kept(inner: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(N, K), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            w = torch.ops.fxint4_tests.scaled(self.w)
            return x @ (w + 1 if inner else w).t()

    model = Model().eval()
    compiled = int4(model)
    x = torch.randn(4, K)
    for factor in (1.0, 2.0):
        FACTOR[0] = factor
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))
    report = fxint4.last_report()
    (record,) = report.records
    assert (record.name, record.action) == ("w", "kept")
    assert record.reason == (
        "computed by fxint4_tests.scaled, a custom op, which may read more than its operands"
    )


# --- what a call costs ---------------------------------------------------------------------------


def test_values_are_judged_once_for_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(linear(), linear())
    compiled = int4(model)
    x = torch.randn(4, K)
    good = model[0].weight.clone()
    with torch.no_grad():
        compiled(x)
        judged = counted(monkeypatch, cache_module, "nonfinite_fault")
        for count, value in enumerate((torch.nan, torch.inf, torch.nan), 1):
            model[0].weight[0, 0] = value
            for _ in range(3):
                assert not compiled(x).isfinite().all()
            assert len(judged) == count
        model[0].weight.data = model[0].weight.data.clone()  # other memory, as bad
        for _ in range(3):
            assert not compiled(x).isfinite().all()
        assert len(judged) == 4
        model[0].weight.copy_(good)
        for _ in range(3):
            assert compiled(x).isfinite().all()
        assert len(judged) == 5


class Layer(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def test_many_layers_that_share_code_take_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer visits all modules of the model, nor the plans of all layers before it."""
    x = torch.randn(2, 32)
    gone = WeightIdentity.gone.fget
    asked: list[WeightIdentity] = []
    monkeypatch.setattr(
        WeightIdentity, "gone", property(lambda self: asked.append(self) or gone(self))
    )

    def visits(count: int) -> tuple[int, int]:
        torch._dynamo.reset()
        model = nn.Sequential(*(Layer(32, 32) for _ in range(count))).eval()
        for layer in model:
            layer.compile(backend="int4tile")
        with monkeypatch.context() as patch, torch.no_grad():
            model[0](x)
            visited = counted(patch, nn.Module, "named_modules")  # calls itself for each module
            asked.clear()
            model(x)
        report = fxint4.last_report()
        assert report.totals["packed"] == count
        return len(visited), len(asked)

    (few, _), (many, plans) = visits(16), visits(128)
    assert many <= 8 * few * 1.25, (few, many)
    assert plans <= 4 * 128


def test_a_call_in_another_mode_binds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear()
    compiled = int4(model)
    x = torch.randn(4, K)
    bound = counted(monkeypatch, Int4Graph, "_bind")
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            compiled(x)
    assert bound
    before = len(bound)
    for _ in range(3):
        for mode in (torch.no_grad, torch.inference_mode):
            for wanted in (True, False):
                model.weight.requires_grad_(wanted)
                with mode():
                    assert_product(compiled(x), x, model.weight)
    # Dynamo compiles once more for a weight that wants a gradient, in each mode at most.
    assert len(bound) <= before + 2
    before = len(bound)
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            compiled(x)
    assert len(bound) == before


@pytest.mark.parametrize("known", [True, False])
def test_the_first_rows_may_be_none(known: bool) -> None:
    """In one graph, whether a call tells how many rows it has, or only the graph itself."""
    model = linear()
    x = torch.randn(400, K)
    w = dequantized(model.weight, K, torch.float32)

    def chosen(x: Tensor, mask: Tensor) -> Tensor:
        return model(x if known else x[mask])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        compiled = int4(chosen, fullgraph=True)
        for count in (0, 4, 400, 1, 0):
            rows, mask = x[:count].clone(), torch.arange(400) < count
            if known:
                torch._dynamo.decorators.mark_unbacked(rows, 0)
            y = compiled(rows if known else x, mask)
            assert y.shape == (count, N)
            assert_product(y, rows, model.weight)
            if count > most_int4_rows(x.device, x.dtype):  # a dense copy, which rounds as fp32 does
                torch.testing.assert_close(y, rows @ w.T)
    report = fxint4.last_report()
    assert report.totals["graphs"] == 1


# --- a fork --------------------------------------------------------------------------------------

FORK = """
import os, signal, threading, torch, fxint4
from torch import nn
import torch._inductor.config
from fxint4.weights import cache
torch._inductor.config.fallback_by_default = True
torch.set_num_threads(1)
one, other = (nn.Linear(64, 64, bias=False).eval().requires_grad_(False) for _ in range(2))
x = torch.randn(4, 64)
f, g = (torch.compile(m, backend="int4tile") for m in (one, other))
with torch.no_grad():
    before = f(x)
    g(x)
folding, done, judge = threading.Event(), threading.Event(), cache.nonfinite_fault
def slow(weight):
    if threading.current_thread().name == "folds":
        folding.set()
        done.wait()
    return judge(weight)
cache.nonfinite_fault = slow
other.weight.mul_(2)
thread = threading.Thread(target=lambda: torch.no_grad()(g)(x), name="folds")
thread.start()
assert folding.wait(60)
child = os.fork()
if not child:
    signal.alarm(20)
    one.weight.mul_(-1)
    with torch.no_grad():
        near = (f(x) + before).norm() < 0.02 * before.norm()
    os._exit(0 if near else 1)
status = os.waitpid(child, 0)[1]
done.set()
thread.join(60)
assert not thread.is_alive()
assert status == 0, f"the child ended with {status}"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_another_thread_folds() -> None:
    """No thread lives in the child that could give back the lock."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
