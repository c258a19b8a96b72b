"""Every way in with every kind of weight: what comes out, what is said, what is left alone.

`Reference` runs a model in float64, op by op, and knows nothing of graphs: it follows what is
computed from parameters alone, and quantizes it where it meets an activation in a matmul.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import dequantized, relative_error
from support import BF16, assert_nearer, module, slow_path
from torch import Tensor, nn
from torch.export import export
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxint4
from fxint4 import Int4TileTensor, Report
from fxint4.report import Record

K = N = GROUP = 64
OPTIONS = {"group_size": GROUP}
aten = torch.ops.aten


# --- kinds ---------------------------------------------------------------------------------------


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, K)
        self.head = nn.Linear(K, 96, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).tanh())


class Functional(nn.Module):
    """A module that runs with the parameters of another."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterDict({"weight": torch.randn(N, K) / 8, "bias": torch.randn(N)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(LINEAR[0], dict(self.parts.items()), (x,))


#: In a list, so that no module holds it.
LINEAR = [nn.Linear(K, N)]


def two_literals(m: Any, x: Tensor) -> Tensor:
    one, two = torch.tensor([0.5, 3.0] * (K // 2)), torch.tensor([-2.0, 1.0] * (K // 2))
    return x @ (m.w * one).t() + x.tanh() @ (m.w * two).t()


#: For each kind a function that makes the model, and its inputs.
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "decoder": (
        lambda: nn.TransformerDecoderLayer(K, 4, 2 * K, batch_first=True),
        lambda: (torch.randn(2, 40, K), torch.randn(2, 48, K)),
    ),
    "attention": (
        lambda: module(lambda m, x, y: m.a(x, y, y)[0], a=nn.MultiheadAttention(K, 4)),
        lambda: (torch.randn(40, 2, K), torch.randn(48, 2, K)),
    ),
    "tied": (TiedHead, lambda: (torch.randint(0, 96, (2, 40)),)),
    "weight_norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(K, N))),
        lambda: (torch.randn(80, K),),
    ),
    "adapter": (
        lambda: module(lambda m, x: F.linear(x, m.w + m.b @ m.a), w=(N, K), b=(N, 4), a=(4, K)),
        lambda: (torch.randn(80, K),),
    ),
    "conv1x1": (
        lambda: nn.Sequential(nn.Conv2d(K, N, 1)),
        lambda: (torch.randn(2, K, 7, 8),),
    ),
    "experts": (
        lambda: module(lambda m, x: x @ m.w, w=(3, K, N)),
        lambda: (torch.randn(3, 80, K),),
    ),
    "functional": (Functional, lambda: (torch.randn(80, K),)),
    "literals": (lambda: module(two_literals, w=(N, K)), lambda: (torch.randn(80, K),)),
    "halves": (
        lambda: module(
            lambda m, x: F.linear(x, m.w[:N]) - F.linear(x.tanh(), m.w[N:]), w=(2 * N, K)
        ),
        lambda: (torch.randn(80, K),),
    ),
}
#: Those whose weight `pack_` leaves alone, with and without example arguments, and why.
COMPUTED = "read by (add.Tensor|mul.Tensor|mm), which packed weights don't support"
KEPT_BY_PACK: dict[str, dict[bool, str]] = {
    "tied": dict.fromkeys([True, False], "also read by an embedding"),
    "adapter": {True: COMPUTED, False: "is no kind of module that pack_ knows"},
    "literals": {True: COMPUTED, False: "is no kind of module that pack_ knows"},
    "experts": {False: "is no kind of module that pack_ knows"},
    "functional": {False: "is no kind of module that pack_ knows"},
    "halves": {False: "is no kind of module that pack_ knows"},
}
BY_KIND = pytest.mark.parametrize("kind", KINDS)


def made(kind: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    make, inputs = KINDS[kind]
    return make().eval(), inputs()


# --- the reference -------------------------------------------------------------------------------


@dataclass
class Weight:
    """A matrix that is multiplied by activations.

    Attributes:
        names: Of the parameters it is computed from.
        value: The matrix before it is quantized, ``[..., N, K]``.
        rows: The activations, ``[..., M, K]``.
    """

    names: frozenset[str]
    value: Tensor
    rows: Tensor


def plain(name: str) -> str:
    """The name that a parametrized weight has without its parametrization."""
    return re.sub(r"parametrizations\.(\w+)\.\w+", r"\1", name)


#: The positions of the two factors among the arguments of an op.
FACTORS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.convolution.default: (0, 1),
}


class Reference(TorchDispatchMode):
    """Runs a model with quantized weights.

    Args:
        model: In float64.
        inputs: Likewise.
        packed: The names of the parameters whose weights are quantized; None for all.

    Attributes:
        weights: What was multiplied by activations.
        y: The output.
    """

    def __init__(
        self, model: nn.Module, inputs: Sequence[Tensor], packed: frozenset[str] | None = None
    ) -> None:
        super().__init__()
        self.weights: list[Weight] = []
        self._packed = packed
        named = model.named_parameters(remove_duplicate=False)  # a tied head goes by its own name
        self._constant = {id(value): frozenset([plain(name)]) for name, value in named}
        self._varies = {id(value) for value in inputs}
        self._alive: list[Any] = []  # or another tensor would get the id of one
        with torch.no_grad(), slow_path(), self:
            self.y: Tensor = model(*inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in FACTORS:
            args = self._quantized(func, list(args))
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            self._alive.append(value)
            if any(id(operand) in self._varies for operand in operands):
                self._varies.add(id(value))
            elif id(value) not in self._constant:
                names = [self._constant.get(id(operand), frozenset()) for operand in operands]
                self._constant[id(value)] = frozenset().union(*names)
        self._alive += operands
        return result

    def _quantized(self, func: Any, args: list[Any]) -> list[Any]:
        for position, other in (FACTORS[func], FACTORS[func][::-1]):
            names = self._constant.get(id(args[position]), frozenset())
            if id(args[other]) not in self._varies or not names:
                continue
            turned = position > other and func is not aten.convolution.default
            value = args[position].mT if turned else args[position]
            if func is aten.convolution.default:
                matrix, rows = value.flatten(1), args[other].movedim(1, -1).flatten(0, -2)
            else:
                matrix, rows = value, args[other] if turned else args[other].mT
            if matrix.ndim > 2 and matrix.stride(0) == 0:
                matrix, rows = matrix[0], rows.flatten(0, 1)
            self.weights.append(Weight(names, matrix.clone(), rows.clone()))
            if self._packed is None or names <= self._packed:
                flat = matrix.reshape(-1, matrix.shape[-1])
                left = dequantized(flat, GROUP, torch.float64).view(matrix.shape)
                same = left.numel() == value.numel()
                left = left.reshape(value.shape) if same else left.expand(value.shape)
                args[position] = left.mT if turned else left
        return args


def wide(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[nn.Module, list[Tensor]]:
    return (
        copy.deepcopy(model).double(),
        [x.double() if x.is_floating_point() else x.clone() for x in inputs],
    )


def assert_near(
    y: Tensor, model: nn.Module, inputs: Sequence[Tensor], packed: frozenset[str] | None = None
) -> None:
    """Assert that y is the model's output with quantized weights, but for roundings to bf16.

    An int4 matmul rounds x, the dequantized weight and y. The roundings have no common sign, so
    each changes the norm of a product by at most about 2^-8 of it, and the products that follow
    one another are no more than there are weights. Besides, y is nearer to the output with
    quantized weights than to the one without.
    """
    reference = Reference(*wide(model, inputs), packed)
    steps = sum(packed is None or each.names <= packed for each in reference.weights)
    error = relative_error(y, reference.y)
    assert error < max(3 * BF16 * steps, 1e-5), error
    if steps:
        assert_nearer(y, reference.y, Reference(*wide(model, inputs), frozenset()).y)


# --- what is checked of a report, and of a model -------------------------------------------------


def names_of(record: Record) -> frozenset[str]:
    """The parameters of a weight; a program names its literals, too."""
    return frozenset(plain(name) for name in record.parameters if "lifted_tensor" not in name)


def packed_names(report: Report) -> frozenset[str]:
    found = [names_of(record) for record in report.records if record.action == "packed"]
    return frozenset().union(*found)


def reasons(report: Report) -> dict[str, str]:
    """Why parameters are not packed, by their names."""
    found = {plain(entry["name"]): entry["reason"] for entry in report.coverage["not_packed"]}
    for record in report.records:
        if record.action == "kept":
            found.update(dict.fromkeys(names_of(record), record.reason))
    return found


def assert_told(report: Report, model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Assert that each weight of a matmul has a record, or a reason why it has none."""
    said, why = [names_of(record) for record in report.records], reasons(report)
    for weight in Reference(*wide(model, inputs)).weights:
        told = weight.names in said or all(why.get(name) for name in weight.names)
        assert told, (weight.names, said, why)


def assert_all_packed(report: Report, model: nn.Module, inputs: Sequence[Tensor]) -> None:
    assert_told(report, model, inputs)
    assert {record.action for record in report.records} == {"packed"}
    assert {record.group_size for record in report.records} == {GROUP}
    weights = Reference(*wide(model, inputs)).weights
    assert packed_names(report) == frozenset().union(*(each.names for each in weights))
    assert len({record.weight_key for record in report.records}) == len(weights)


@pytest.fixture
def unchanged() -> Iterator[Callable[[nn.Module], None]]:
    """A function that takes a model which a test must not change."""
    held = []

    def watch(model: nn.Module) -> None:
        tensors = dict(model.state_dict(keep_vars=True))
        held.append((model, tensors, copy.deepcopy(tensors), [*map(type, model.modules())]))

    yield watch
    for model, tensors, values, types in held:
        now = model.state_dict(keep_vars=True)
        assert now.keys() == tensors.keys()
        for name, value in values.items():
            assert now[name] is tensors[name]
            assert type(now[name]) is type(value)
            assert torch.equal(now[name], value)
        assert [*map(type, model.modules())] == types


Unchanged = Callable[[nn.Module], None]


# --- the ways in ---------------------------------------------------------------------------------


@BY_KIND
@pytest.mark.compiles
@pytest.mark.by_aten
def test_compile(kind: str, unchanged: Unchanged) -> None:
    model, inputs = made(kind)
    unchanged(model)
    with torch.no_grad():
        y = torch.compile(model, backend="int4tile", options=OPTIONS)(*inputs)
    report = fxint4.last_report()
    assert_near(y, model, inputs)
    assert_all_packed(report, model, inputs)


@BY_KIND
@pytest.mark.compiles
@pytest.mark.by_aten
def test_explain(kind: str, unchanged: Unchanged) -> None:
    model, inputs = made(kind)
    unchanged(model)
    report = fxint4.explain(model, *inputs, options=OPTIONS)
    assert_all_packed(report, model, inputs)
    exact = Reference(*wide(model, inputs), frozenset()).y
    expected = relative_error(Reference(*wide(model, inputs)).y, exact)
    # Measured in fp32, by weights that are the same but for their last digit.
    assert report.output_error == pytest.approx(expected, rel=1e-3)


@BY_KIND
@pytest.mark.parametrize("examples", [True, False], ids=["examples", "modules"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_pack(kind: str, examples: bool) -> None:
    model, inputs = made(kind)
    original = copy.deepcopy(model)
    report = fxint4.pack_(model, inputs if examples else (), OPTIONS)
    packed = packed_names(report)
    assert_told(report, original, inputs)
    parameters = dict(model.named_parameters())
    held = {name for name, value in parameters.items() if isinstance(value, Int4TileTensor)}
    assert held == packed
    multiplied = {
        name for each in Reference(*wide(original, inputs)).weights for name in each.names
    }
    kept = KEPT_BY_PACK.get(kind, {}).get(examples)
    if kept is None:
        assert packed == multiplied
    else:
        assert not packed
        why = reasons(report)
        assert all(re.search(kept, why[name]) for name in multiplied if name in why), why
    with torch.no_grad(), slow_path():
        assert_near(model(*inputs), original, inputs, packed)


@BY_KIND
def test_calibrate(kind: str, unchanged: Unchanged) -> None:
    model, inputs = made(kind)
    unchanged(model)
    calibration = fxint4.calibrate(model, [inputs], {"method": "gptq"})
    weights = Reference(*wide(model, inputs), frozenset()).weights
    assert len(calibration) == len(weights)
    for weight in weights:
        moments = weight.rows.mT @ weight.rows
        near = []
        for key in calibration:
            found = calibration[key].second_moments.double()
            # fp32 sums, of activations that fp32 computes: a millionth and more for each layer.
            if found.shape == moments.shape and relative_error(found, moments) < 1e-4:
                near.append(key)
        assert near, weight.names
        assert all(key.split("#")[0].removesuffix(".T") for key in near)
        named = [key for key in near if any(name in plain(key) for name in weight.names)]
        assert named, (near, weight.names)


@BY_KIND
@pytest.mark.compiles
@pytest.mark.by_aten
def test_budget(kind: str, unchanged: Unchanged) -> None:
    model, inputs = made(kind)
    unchanged(model)
    report = fxint4.explain(model, *inputs, options={"target_error": 0.2})
    assert_told(report, model, inputs)
    # The least that any single weight of 4 bits costs is below the target, so some are packed.
    assert packed_names(report)
    assert report.output_error is not None
    assert 0 < report.output_error <= 0.2


@BY_KIND
def test_rewrite(kind: str, unchanged: Unchanged) -> None:
    model, inputs = made(kind)
    unchanged(model)
    with torch.no_grad(), slow_path():
        program = export(model, inputs)
        rewritten = fxint4.rewrite(program, OPTIONS)
        y = rewritten.module()(*inputs)
    report = fxint4.last_report()
    assert_told(report, model, inputs)
    assert_near(y, model, inputs, packed_names(report))
    multiplied = {name for each in Reference(*wide(model, inputs)).weights for name in each.names}
    assert packed_names(report) == multiplied


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in ("decoder", "literals") else pytest.mark.full)
        for kind in KINDS
    ],
)
@pytest.mark.compiles
def test_package(kind: str, tmp_path: Path, unchanged: Unchanged) -> None:
    model, inputs = made(kind)
    unchanged(model)
    with torch.no_grad(), slow_path():
        path = fxint4.package(export(model, inputs), tmp_path / "model.pt2", OPTIONS)
        y = torch._inductor.aoti_load_package(path)(*inputs)
    report = fxint4.last_report()
    assert_told(report, model, inputs)
    assert_near(y, model, inputs, packed_names(report))
    if kind != "experts":  # which a package for a CPU leaves as they are
        assert_all_packed(report, model, inputs)
