"""Shared by tests of the patterns: derived error bounds, `Case`, counts of ops and of bytes."""

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
from fxint4.passes.plan import Plans
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
"""Unit roundoff of fp32."""
FP16_HALF_DENORMAL = 2.0**-25
"""Half the smallest positive fp16 number: the largest error of rounding a small number."""


# --- bounds --------------------------------------------------------------------------------------


def rounding(k: int, roundings: int = 4) -> float:
    """Largest rounding error of a sum of k products, relative to the sum of their magnitudes.

    The int4 op rounds x to bf16 (unless it is bf16), may round each dequantized w to bf16,
    multiplies exactly or with one fp32 rounding, adds in fp32 and rounds y to bf16; adding a bias
    rounds a fourth time. Each rounding multiplies a term by some 1 + d. For bf16 |d| <= 2^-8 (fp16
    and fp32 round less); |d| <= 2^-24 for each of the k fp32 additions, the product, and the two
    steps from code to w. So the error of every term is at most

        (1 + 2^-8)^roundings * (1 + 2^-24)^(k + 3) - 1

    times its magnitude, for any order of the sum.

    Args:
        k: Number of terms.
        roundings: Number of successive roundings to bf16: 3 for x, w and y, and one for each later
            sum or factor.
    """
    return float((1 + BF16) ** roundings * (1 + FP32) ** (k + 3) - 1)


def rounding_bound(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Bound on |y - (x @ w.T + bias)| for the y of an int4 matmul; see `rounding`.

    Args:
        x: The activation ``[..., K]``.
        w: The dequantized weight ``[N, K]``.
        bias: Broadcastable to ``[..., N]``.

    Returns:
        The bound for each element, float64 ``[..., N]``.
    """
    magnitude = x.double().abs() @ w.double().abs().T
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    return rounding(w.shape[1]) * magnitude + _denormal(x.dtype, x.double().abs().sum(-1, True))


def _denormal(dtype: torch.dtype, x_sum: Tensor | float) -> Tensor | float:
    """Absolute rounding error of fp16 for w or y too small for a relative bound; else 0."""
    return FP16_HALF_DENORMAL * (x_sum + 2) if dtype is torch.float16 else 0.0


def assert_within(y: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Assert |y - expected| <= bound for every element; fails for NaN."""
    assert y.shape == expected.shape
    excess = (y.double() - expected).abs() - bound
    assert bool((excess <= 0).all()), f"beyond the bound by {float(excess.max()):g}"


def assert_nearer(y: Tensor, expected: Tensor, other: Tensor) -> None:
    """Assert that `y` is nearer to `expected` than to `other`.

    For models of several layers, where the worst-case bounds exceed the effect of int4. bf16 rounds
    far more finely than int4, so the compiled model must be nearer to the model with dequantized
    weights than to the original.
    """
    assert (y.double() - expected).norm() < (y.double() - other).norm()


# --- compiling -----------------------------------------------------------------------------------


def compile_and_report(
    fn: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, Report]:
    """Compile `fn` with backend int4tile and call it; return the result and the report."""
    with torch.no_grad():
        y = torch.compile(fn, backend="int4tile", options=options)(*args, **kwargs)
    report = fxint4.last_report()
    return y, report


_CALL = r" = aten\.(\w+)[.(]"


def int4_matmuls(report: Report) -> int:
    """Number of int4 matmuls in the rewritten graphs."""
    added = re.findall(rf"^\+%\w+{_CALL}", report.graph_diff, re.MULTILINE)
    return sum(op.startswith("_weight_int4pack_mm") for op in added)


def ops_gone(report: Report) -> list[str]:
    """Matmuls and convolutions that the rewrite removed from the captured graphs, by name."""
    gone = re.findall(rf"^-%\w+{_CALL}", report.graph_diff, re.MULTILINE)
    return [op for op in gone if op in ("mm", "addmm", "bmm", "baddbmm", "convolution")]


# --- cases ---------------------------------------------------------------------------------------


class Calls(nn.Module):
    """A module whose forward calls a function of the module and the inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def module(function: Callable[..., Any], **members: Any) -> nn.Module:
    """Make a module in eval mode.

    Args:
        function: Its forward, a function of the module and the inputs.
        **members: Its members: a tuple makes a random parameter of that shape, a tensor a buffer;
            parameters and modules are taken as they are.
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
    """Correlated activations, a few channels of which are large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(shape[-1] // 4, shape[-1], generator=torch.Generator().manual_seed(99))
    mix[:, ::16] *= 8
    x = torch.randn(*shape[:-1], shape[-1] // 4, generator=generator) @ mix
    return x / 4 + torch.randn(*shape, generator=generator) / 8


@dataclass(frozen=True)
class Case:
    """A model of matmuls and sums only, all of whose matmuls become int4 matmuls.

    Attributes:
        name: Its name, also that of its golden graph diff.
        model: Makes the model, fp32 and in eval mode.
        inputs: Makes the inputs, fp32.
        weights: For each packed parameter the meaning of its axes, a key of
            `fxint4.weights.expression.AXES`.
        ops: The ops that are removed, in the order they run.
        roundings: See `rounding`.
        exact: Whether `check_exact` applies, which needs that no matmul reads another's result.
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
    """Compile a case and check its ops, records, numbers and strides.

    Args:
        case: The case.
        dtype: Dtype of model and inputs.
        **kwargs: Further arguments of torch.compile.
    """
    torch.manual_seed(0)
    model = case.model().to(dtype)
    inputs = tuple(_keeping_strides(x, dtype) for x in case.inputs())
    compiled = torch.compile(model, backend="int4tile", **kwargs)
    with torch.no_grad():
        y, eager = compiled(*inputs), model(*inputs)
    report = fxint4.last_report()

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
    """Assert that `y` is the float64 output with dequantized weights, up to rounding.

    The model has matmuls and sums only. Run on the magnitudes of its parameters and inputs it
    returns the sum of magnitudes that `rounding` is relative to.
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
    """The model in float64, with its packed weights quantized and dequantized."""
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
    """Assert equal bits, compiled and eager, for numbers that int4 and bf16 represent exactly.

    Parameters and inputs are changed in place, so nothing is recompiled.
    """
    make_exact(model, weights)
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.where(x.isnan(), x, _sparse_signs(x)))
        assert torch.equal(compiled(*inputs), model(*inputs))


def make_exact(model: nn.Module, weights: Mapping[str, str]) -> None:
    """Set all parameters to integers in -8..7; each group of a weight has both -8 and 7.

    Then every group has scale 1 and zero 0, so int4 is exact. With sparse inputs in -1..1 no sum
    exceeds 256, the largest of the consecutive integers that bf16 represents.
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
    """A matrix ``[N, K]`` with the axes and shape of `target`."""
    return (matrix.t() if axes.endswith("KN") else matrix).reshape(target.shape)


def _keeping_strides(x: Tensor, dtype: torch.dtype) -> Tensor:
    made = torch.empty_strided(x.shape, x.stride(), dtype=dtype)
    return made.copy_(x)


def kept(model: Callable[..., Any], *args: Tensor, **options: Any) -> list[tuple[str, str]]:
    """Assert that a model runs as in eager, nothing packed; return its layers and the reasons."""
    y, report = compile_and_report(model, *args, options=options)
    torch.testing.assert_close(y, model(*args))
    assert report.graph_diff == ""
    assert {record.action for record in report.records} <= {"kept"}
    return [(record.name, record.reason) for record in report.records]


# --- made-up records -----------------------------------------------------------------------------


def record(name: str = "fc", **values: Any) -> Record:
    """A record of a packed matmul; `values` override its fields."""
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
    """A record of a matmul that is not packed."""
    defaults = {"action": "kept", "group_size": None, "sqnr_db": None, "bytes_after": 16384}
    return record(name, reason=reason, **{**defaults, **values})


# --- graphs without a compiler ------------------------------------------------------------------


@dataclass(frozen=True)
class Captured:
    """A graph whose first placeholders are weights, and its sites."""

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
        found = find(gm, PATTERNS, constants, tensors, names, Plans(Int4Config()), {})
        return Captured(gm, tensors, [site for site in found if isinstance(site, Site)])

    def rewrite(self, *formats: Format | None, config: Int4Config | None = None) -> Rewritten:
        value = next(iter(self.weights)).meta["val"]
        config = config or Int4Config()
        return rewrite(self.gm, self.sites, formats, config, list(self.weights), value.fake_mode)

    def run(self, rewritten: Rewritten, *inputs: Tensor) -> list[Tensor]:
        """Run a rewritten graph."""
        result = rewritten.gm(*self.arguments(rewritten, *inputs))
        return list(result) if isinstance(result, (list, tuple)) else [result]

    def arguments(self, rewritten: Rewritten, *inputs: Tensor) -> list[Tensor]:
        """The inputs of a rewritten graph: those that it kept, then the packed weights."""
        originals = [*self.weights.values(), *inputs]
        arguments = [originals[position] for position in rewritten.kept_inputs]
        for slot in rewritten.slots:
            roots = [self.weights[root] for root in slot.weight.roots]
            packed = weight_cache.find(slot.weight, roots, slot.shape)
            weight_cache.fold(packed, [slot.format], roots)
            arguments += packed.formats[slot.format]
        return arguments


# --- models of other ops, too --------------------------------------------------------------------


def propagated(
    model: nn.Module, inputs: Sequence[Tensor], monkeypatch: Any
) -> tuple[Tensor, Tensor]:
    """A float64 model's output, and a bound on its change by rounding in the linear layers.

    Each F.linear gets an error term, 0 in this run and bounded by `rounding_bound`. To first order
    in 2^-8 the output changes by the Jacobian with respect to these terms times their size. The
    bound grows by 2^-8 of itself for second-order terms, and for fp32 rounding between the layers:
    it adds up the worst case of thousands of terms, and these are far smaller.

    Args:
        model: The model in float64, its packed weights dequantized; runs on its slow path.
        inputs: Its inputs in float64.
        monkeypatch: pytest's fixture.
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
    """Disable the fast paths of nn.MultiheadAttention and nn.TransformerEncoderLayer."""

    def __enter__(self) -> None:
        self._enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.backends.mha.set_fastpath_enabled(self._enabled)


# --- memory --------------------------------------------------------------------------------------


def peak_bytes(run: Callable[[], Any]) -> tuple[int, int]:
    """Peak bytes that `run` allocated with torch's CPU allocator, and those not freed at its end.

    Memory that was allocated before `run` and is freed in it counts as negative.
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
