"""What tests of the patterns share: derived bounds, one form for cases, counting ops and bytes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from reference import dequantized
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import fxint4
from fxint4 import Int4Config, Record, Report
from fxint4.graph.constants import Constants, Role
from fxint4.passes.find import find
from fxint4.passes.patterns import PATTERNS
from fxint4.passes.rewrite import Rewritten, rewrite
from fxint4.passes.site import Site
from fxint4.weights.cache import weight_cache
from fxint4.weights.expression import AXES
from fxint4.weights.formats import Format

__all__ = [
    "Captured",
    "Case",
    "assert_nearer",
    "assert_rounded",
    "assert_within",
    "check_exact",
    "check_rewritten",
    "compile_and_report",
    "dequantized",
    "int4_matmuls",
    "kept",
    "kept_record",
    "make_exact",
    "module",
    "ops_gone",
    "peak_bytes",
    "propagated",
    "record",
    "reference_model",
    "rounding",
    "rounding_bound",
]

BF16 = 2.0**-8
"""Unit roundoff of bf16: half the distance from 1 to the next number."""
FP32 = 2.0**-24
FP16_HALF_DENORMAL = 2.0**-25


# --- bounds --------------------------------------------------------------------------------------


def rounding(k: int, roundings: int = 4) -> float:
    """Most that roundings move a sum of k products, as a share of the sum of their magnitudes.

    The int4 op rounds x to bf16 (where it is not already), may round each dequantized w to bf16,
    multiplies exactly or with one fp32 rounding, adds in fp32 and rounds y to bf16; adding a bias
    rounds a fourth time. Each rounding multiplies a term by some 1 + d: |d| <= 2^-8 for bf16 (fp16
    and fp32 round less), |d| <= 2^-24 for each of the k fp32 additions, the product, and the two
    steps from code to w. So every term of the sum is off by at most

        (1 + 2^-8)^roundings * (1 + 2^-24)^(k + 3) - 1

    of its magnitude, whatever the order of the sum.

    Args:
        k: Terms.
        roundings: To bf16, one after another: 3 for x, w and y, one more for each sum or factor
            that follows.
    """
    return float((1 + BF16) ** roundings * (1 + FP32) ** (k + 3) - 1)


def rounding_bound(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Bound on |y - (x @ w.T + bias)| for the y that int4 gives, by element; see `rounding`.

    Args:
        x: [..., K].
        w: The dequantized weight [N, K].
        bias: Broadcast against [..., N].

    Returns:
        float64 [..., N].
    """
    magnitude = x.double().abs() @ w.double().abs().T
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    return rounding(w.shape[1]) * magnitude + _denormal(x.dtype, x.double().abs().sum(-1, True))


def _denormal(dtype: torch.dtype, x_sum: Tensor | float) -> Tensor | float:
    """What fp16 adds where w or y is so small that its roundings are absolute ones."""
    return FP16_HALF_DENORMAL * (x_sum + 2) if dtype is torch.float16 else 0.0


def assert_within(y: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """|y - expected| <= bound for every element; NaN is never within."""
    assert y.shape == expected.shape
    excess = (y.double() - expected).abs() - bound
    assert bool((excess <= 0).all()), f"beyond the bound by {float(excess.max()):g}"


def assert_nearer(y: Tensor, expected: Tensor, other: Tensor) -> None:
    """`y` is nearer to `expected` than to `other`.

    For models of several layers, whose worst-case bounds add up to more than int4 moves the result:
    bf16 rounds far more finely than int4, so the compiled model is nearer to the one
    with dequantized weights than to the original.
    """
    assert (y.double() - expected).norm() < (y.double() - other).norm()


# --- compiling -----------------------------------------------------------------------------------


def compile_and_report(
    fn: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, Report]:
    """What `fn`, compiled to int4, gives on the arguments, and the report."""
    with torch.no_grad():
        y = torch.compile(fn, backend="int4tile", options=options)(*args, **kwargs)
    report = fxint4.last_report()
    assert report is not None
    return y, report


_CALL = r" = aten\.(\w+)[.(]"


def int4_matmuls(report: Report) -> int:
    """Int4 matmuls in the rewritten graphs."""
    added = re.findall(rf"^\+%\w+{_CALL}", report.graph_diff, re.MULTILINE)
    return sum(op.startswith("_weight_int4pack_mm") for op in added)


def ops_gone(report: Report) -> list[str]:
    """Matmul-like ops of the captured graphs that the rewritten ones no longer have."""
    gone = re.findall(rf"^-%\w+{_CALL}", report.graph_diff, re.MULTILINE)
    return [op for op in gone if op in ("mm", "addmm", "bmm", "baddbmm", "convolution")]


# --- cases ---------------------------------------------------------------------------------------


class Calls(nn.Module):
    """A module whose forward is a function of itself and the inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def module(function: Callable[..., Any], **members: Any) -> nn.Module:
    """A module in eval mode with the given parameters, buffers and modules.

    Args:
        function: Its forward, which takes the module and the inputs.
        **members: A tuple is the shape of a random parameter; a tensor becomes a buffer.
    """
    made = Calls(function)
    for name, value in members.items():
        if isinstance(value, tuple):
            setattr(made, name, nn.Parameter(torch.randn(value)))
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            made.register_buffer(name, value)
        else:
            setattr(made, name, value)
    return made.eval()


def correlated(*shape: int, seed: int = 0) -> Tensor:
    """Activations with a few large channels, the rest of them correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(shape[-1] // 4, shape[-1], generator=torch.Generator().manual_seed(99))
    mix[:, ::16] *= 8
    x = torch.randn(*shape[:-1], shape[-1] // 4, generator=generator) @ mix
    return x / 4 + torch.randn(*shape, generator=generator) / 8


@dataclass(frozen=True)
class Case:
    """A model made of matmuls and sums alone, all of whose matmuls become int4 ones.

    Attributes:
        name: Also of its golden graph diff.
        model: Makes it, fp32 and in eval mode.
        inputs: Makes its inputs, fp32.
        weights: For each packed parameter how its axes lie, a key of `fxint4.graph.constants.AXES`.
        ops: The ops that go, in the order they run.
        roundings: See `rounding`.
        exact: Whether `check_exact` holds for it: no matmul reads another one's result.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    weights: Mapping[str, str] = field(default_factory=lambda: {"w": "NK"})
    ops: tuple[str, ...] = ("mm",)
    roundings: int = 4
    exact: bool = True

    def __str__(self) -> str:
        return self.name


def check_rewritten(case: Case, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Report:
    """Compile a case; hold its ops, records, numbers and strides to what they must be.

    Args:
        case: What to compile.
        dtype: Of model and inputs.
        **kwargs: For torch.compile.
    """
    torch.manual_seed(0)
    model = case.model().to(dtype)
    inputs = tuple(_keeping_strides(x, dtype) for x in case.inputs())
    compiled = torch.compile(model, backend="int4tile", **kwargs)
    with torch.no_grad():
        y, eager = compiled(*inputs), model(*inputs)
    report = fxint4.last_report()
    assert report is not None

    assert (y.shape, y.dtype, y.stride()) == (eager.shape, eager.dtype, eager.stride())
    assert [record.action for record in report.records] == ["packed"] * len(case.weights)
    assert {name for record in report.records for name in record.parameters} == set(case.weights)
    assert [record.op for record in report.records] == list(case.ops)
    assert ops_gone(report) == list(case.ops)
    assert int4_matmuls(report) == len(case.ops)
    assert_rounded(y, model, inputs, report, case.weights, case.roundings)
    if case.exact:
        check_exact(compiled, model, inputs, case.weights)
    return report


def assert_rounded(
    y: Tensor,
    model: nn.Module,
    inputs: Sequence[Tensor],
    report: Report,
    weights: Mapping[str, str],
    roundings: int = 4,
) -> None:
    """`y` is what the model gives in float64 with dequantized weights, but for rounding.

    A model of matmuls and sums alone, run on the magnitudes of its parameters and inputs, gives
    the sum of magnitudes that `rounding` asks for.
    """
    exact = reference_model(model, report, weights)
    wide = [x.double() for x in inputs]
    magnitudes = copy.deepcopy(exact)
    with torch.no_grad():
        for parameter in magnitudes.parameters():
            parameter.abs_()
        expected = exact(*wide)
        magnitude = magnitudes(*(x.abs() for x in wide))
    k = sum(record.k for record in report.records)
    most = max((float(x.abs().sum()) for x in wide if not x.isnan().any()), default=0.0)
    assert_within(y, expected, rounding(k, roundings) * magnitude + _denormal(y.dtype, most))


def reference_model(model: nn.Module, report: Report, weights: Mapping[str, str]) -> nn.Module:
    """The model in float64, its packed weights replaced by what int4 leaves of them."""
    made = copy.deepcopy(model).double()
    groups = {name: r.group_size for r in report.records for name in r.parameters}
    for name, axes in weights.items():
        group_size = groups[name]
        assert group_size is not None
        matrix = AXES[axes](model.get_parameter(name).detach())
        target = made.get_parameter(name).data
        target.copy_(_like(dequantized(matrix, group_size, torch.float64), target, axes))
    return made


def check_exact(
    compiled: Callable[..., Tensor],
    model: nn.Module,
    inputs: Sequence[Tensor],
    weights: Mapping[str, str],
) -> None:
    """On numbers that int4 and bf16 hold exactly, compiled and eager give the same bits.

    Parameters and inputs get new values in place, so nothing is compiled again.
    """
    make_exact(model, weights)
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.where(x.isnan(), x, _sparse_signs(x)))
        assert torch.equal(compiled(*inputs), model(*inputs))


def make_exact(model: nn.Module, weights: Mapping[str, str]) -> None:
    """Give the weights integers in -8..7, both ends in every group, and the rest small ones.

    The step of every group is then 1 and its zero 0, so that int4 loses nothing; and with inputs
    in -1..1, few of them not 0, no sum goes beyond the integers that bf16 holds (256).
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint_like(parameter, -8, 8))
        for name, axes in weights.items():
            matrix = AXES[axes](model.get_parameter(name).data)
            matrix = torch.randint_like(matrix, -8, 8)
            matrix[:, 0::8] = -8
            matrix[:, 1::8] = 7
            target = model.get_parameter(name)
            target.copy_(_like(matrix, target, axes))


def _sparse_signs(x: Tensor) -> Tensor:
    return torch.randint_like(x, -1, 2) * (torch.rand_like(x) < 0.05)


def _like(matrix: Tensor, target: Tensor, axes: str) -> Tensor:
    """[N, K] with the axes of `target`."""
    return (matrix.t() if axes.endswith("KN") else matrix).reshape(target.shape)


def _keeping_strides(x: Tensor, dtype: torch.dtype) -> Tensor:
    made = torch.empty_strided(x.shape, x.stride(), dtype=dtype)
    return made.copy_(x)


def kept(model: Callable[..., Any], *args: Tensor, **options: Any) -> list[tuple[str, str]]:
    """Layers and reasons of a model that is left as it is, and gives what it gives in eager."""
    y, report = compile_and_report(model, *args, options=options)
    torch.testing.assert_close(y, model(*args))
    assert report.graph_diff == ""
    assert {record.action for record in report.records} <= {"kept"}
    return [(record.name, record.reason) for record in report.records]


# --- records of matmuls that there are not -------------------------------------------------------


def record(name: str = "fc", **values: Any) -> Record:
    """A packed matmul, unless values say otherwise; a weight of its own unless given a key."""
    defaults: dict[str, Any] = {
        "op": "addmm",
        "n": 64,
        "k": 128,
        "group_size": 128,
        "action": "packed",
        "reason": "",
        "sqnr_db": 20.0,
        "bytes_before": 16384,
        "bytes_after": 4352,
        "held_bytes": 16384,
        "parameters": (f"{name}.weight",),
        "weight_key": name,
    }
    return Record(name, **{**defaults, **values})


def kept_record(
    name: str = "fc", reason: str = "8x128 is small: min_features is 32", **values: Any
) -> Record:
    """A matmul that stays as it is."""
    defaults = {"action": "kept", "group_size": None, "sqnr_db": None, "bytes_after": 16384}
    return record(name, reason=reason, **{**defaults, **values})


# --- graphs without a compiler ------------------------------------------------------------------


@dataclass(frozen=True)
class Captured:
    """A graph whose first placeholders are weights, and what is needed to rewrite it."""

    gm: fx.GraphModule
    weights: dict[fx.Node, Tensor]
    sites: list[Site]

    @staticmethod
    def of(
        function: Callable[..., object],
        weights: list[Tensor],
        *inputs: Tensor,
        tracing_mode: str = "fake",
    ) -> Captured:
        traced = make_fx(torch.func.functionalize(function), tracing_mode=tracing_mode)
        gm = traced(*weights, *inputs)
        nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
        tensors = dict(zip(nodes, weights, strict=False))
        constants = Constants(gm, dict.fromkeys(tensors, Role.WEIGHT))
        names = {node: f"w{number}" for number, node in enumerate(tensors)}
        found = find(gm, PATTERNS, constants, tensors, names, Int4Config())
        return Captured(gm, tensors, [site for site in found if isinstance(site, Site)])

    def rewrite(self, *formats: Format | None, config: Int4Config | None = None) -> Rewritten:
        value = next(iter(self.weights)).meta["val"]
        config = config or Int4Config()
        return rewrite(self.gm, self.sites, formats, config, list(self.weights), value.fake_mode)

    def run(self, rewritten: Rewritten, *inputs: Tensor) -> list[Tensor]:
        """Run a rewritten graph as the runtime does."""
        result = rewritten.gm(*self.arguments(rewritten, *inputs))
        return list(result) if isinstance(result, (list, tuple)) else [result]

    def arguments(self, rewritten: Rewritten, *inputs: Tensor) -> list[Tensor]:
        """What the runtime calls a rewritten graph with."""
        given = [*self.weights.values(), *inputs]
        arguments = [given[position] for position in rewritten.kept_inputs]
        for slot in rewritten.slots:
            roots = [self.weights[root] for root in slot.weight.roots]
            packed = weight_cache.find(slot.weight, roots, slot.shape)
            weight_cache.fold(packed, [slot.format], roots)
            arguments += packed.formats[slot.format]
        return arguments


# --- models that are more than matmuls and sums --------------------------------------------------


def propagated(
    model: nn.Module, inputs: Sequence[Tensor], monkeypatch: Any
) -> tuple[Tensor, Tensor]:
    """A float64 model's output, and how far rounding inside its linear layers may move it.

    Each F.linear gets an error term, 0 here, of which `rounding_bound` says how large it is at
    most. The output moves by the Jacobian towards these terms times their size, to first order in
    2^-8. Second-order terms are that much smaller again than a bound that already adds up the
    worst case of thousands of terms; one more 2^-8 of the bound stands for them, and for the fp32
    roundings of everything between the layers.

    Args:
        model: In float64, packed weights dequantized; its slow path is taken.
        inputs: In float64.
        monkeypatch: pytest's.
    """
    plain = F.linear
    bounds: list[Tensor] = []
    errors: list[Tensor] = []

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = plain(x, weight, bias)
        if len(bounds) < calls:
            bounds.append(rounding_bound(x.detach(), weight.detach(), bias))
            return y
        return y + next(remaining)

    remaining = iter(errors)
    with monkeypatch.context() as patch, slow_path():
        calls = 1 << 30
        patch.setattr(F, "linear", linear)
        with torch.no_grad():
            expected = model(*inputs)
        calls = 0

        def moved(*terms: Tensor) -> Tensor:
            nonlocal remaining
            remaining = iter(terms)
            return model(*inputs)

        errors = [torch.zeros_like(bound) for bound in bounds]
        jacobian = torch.autograd.functional.jacobian(moved, tuple(errors), vectorize=True)
    flat = sum(
        j.reshape(expected.numel(), -1).abs() @ bound.reshape(-1)
        for j, bound in zip(jacobian, bounds, strict=True)
    )
    return expected, (1 + BF16) * flat.view_as(expected)


class slow_path:
    """Keep nn.MultiheadAttention and nn.TransformerEncoderLayer off their fast paths."""

    def __enter__(self) -> None:
        self._enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.backends.mha.set_fastpath_enabled(self._enabled)


# --- memory --------------------------------------------------------------------------------------


def peak_bytes(run: Callable[[], Any]) -> tuple[int, int]:
    """Most bytes that `run` had from torch's CPU allocator at one time, and those it still has.

    What was allocated before and is freed meanwhile counts as negative.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        kept = run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return peak, live
