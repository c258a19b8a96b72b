"""Which nodes of a graph are constant, and how they are computed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fxint4.graph.constants import Constants, Role
from fxint4.graph.placeholders import role_of
from fxint4.weights.expression import AXES, Weight

aten = torch.ops.aten

VARIES, HELPER, WEIGHT = Role.VARIES, Role.HELPER, Role.WEIGHT
N, K = 6, 4


def capture(function: Callable[..., Any], *examples: Any, mode: str = "real") -> fx.GraphModule:
    return make_fx(function, tracing_mode=mode)(*examples)


def judged(gm: fx.GraphModule, *roles: Role) -> tuple[Constants, fx.Node]:
    """The constants of a graph whose placeholders have these roles, and its result."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    [result] = gm.graph.output_node().all_input_nodes
    return Constants(gm, dict(zip(placeholders, roles, strict=True))), result


def role(function: Callable[..., Any], *inputs: tuple[Any, Role]) -> Role:
    """The role of a result whose inputs have these roles."""
    examples, roles = zip(*inputs, strict=True)
    constants, result = judged(capture(function, *examples), *roles)
    return constants._role[result]


def weight_of(function: Callable[..., Tensor], *examples: Tensor, axes: str = "NK") -> Weight:
    gm = capture(function, *examples)
    constants, result = judged(gm, *[WEIGHT] * len(examples))
    assert constants.is_weight(result)
    return constants.weight(result, axes)


@pytest.fixture
def w() -> tuple[Tensor, Role]:
    return torch.randn(N, K), WEIGHT


@pytest.fixture
def b() -> tuple[Tensor, Role]:
    return torch.randn(N, K), HELPER


@pytest.fixture
def x() -> tuple[Tensor, Role]:
    return torch.randn(N, K), VARIES


# --- what a node's value depends on --------------------------------------------------------------


def test_parameters_alone_make_a_weight(w: Any) -> None:
    assert role(lambda w: w.t().to(torch.bfloat16)[1:3], w) is WEIGHT
    assert role(lambda w, v: torch.cat([w, 2 * v]), w, w) is WEIGHT
    assert role(lambda w, v: w + v @ w.t() @ v, w, w) is WEIGHT


def test_buffers_alone_make_no_weight_but_help_to_make_one(w: Any, b: Any) -> None:
    assert role(lambda b: 2 * b, b) is HELPER
    assert role(lambda w, b: w * b, w, b) is WEIGHT
    assert role(lambda b, w: b - w, b, w) is WEIGHT


def test_activations_make_neither(w: Any, b: Any, x: Any) -> None:
    assert role(lambda x: 2 * x, x) is VARIES
    assert role(lambda w, x: w * x, w, x) is VARIES
    assert role(lambda w, b, x: w * b * x, w, b, x) is VARIES


def test_what_is_made_from_numbers_helps(w: Any) -> None:
    assert role(lambda w: torch.full((N, K), 2.0), w) is HELPER
    assert role(lambda w: torch.arange(K), w) is HELPER
    assert role(lambda w: w * torch.arange(K), w) is WEIGHT


def test_a_placeholder_that_is_not_named_varies() -> None:
    gm = capture(lambda w: w.t(), torch.randn(N, K))
    constants = Constants(gm, {})
    assert not any(constants.is_weight(node) for node in gm.graph.nodes)


@pytest.mark.parametrize("value", [None, 3, "w", 1.5])
def test_what_is_no_node_is_no_weight(value: object) -> None:
    assert not Constants(capture(lambda w: w.t(), torch.randn(N, K)), {}).is_weight(value)


MATMULS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "mm": (torch.mm, ((N, K), (K, N))),
    "addmm": (torch.addmm, ((N, N), (N, K), (K, N))),
    "bmm": (torch.bmm, ((2, N, K), (2, K, N))),
    "baddbmm": (torch.baddbmm, ((2, N, N), (2, N, K), (2, K, N))),
}


@pytest.mark.parametrize("op", MATMULS)
def test_a_float_buffer_that_meets_a_parameter_in_a_matmul_is_an_activation(op: str) -> None:
    function, shapes = MATMULS[op]
    gm = capture(function, *(torch.randn(shape) for shape in shapes))
    assert [node.target for node in gm.graph.nodes if node.op == "call_function"] == [
        getattr(aten, op).default
    ]

    def outcome(*roles: Role) -> Role:
        constants, result = judged(gm, *roles)
        return constants._role[result]

    count = len(shapes)
    assert outcome(*[WEIGHT] * count) is WEIGHT
    assert outcome(*[HELPER] * count) is VARIES
    for position in range(count):
        for other in (HELPER, VARIES):
            mixed = [other if place == position else WEIGHT for place in range(count)]
            assert outcome(*mixed) is VARIES


@pytest.mark.parametrize("vector", [WEIGHT, HELPER, VARIES])
def test_a_weight_may_be_scaled_by_what_it_makes_of_a_vector(vector: Role, w: Any) -> None:
    def normed(w: Tensor, v: Tensor) -> Tensor:
        return w / torch.mv(w, v).norm()

    expected = VARIES if vector is VARIES else WEIGHT
    assert role(normed, w, (torch.randn(K), vector)) is expected


RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "rand_like": torch.rand_like,
    "bernoulli": lambda w: torch.bernoulli(w.sigmoid()),
    "dropout": lambda w: nn.functional.dropout(w, 0.5, training=True),
    "multinomial": lambda w: torch.multinomial(w.abs(), 2),
    "randn": lambda w: w + torch.randn(K),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_vary(name: str, w: Any) -> None:
    assert role(RANDOM[name], w) is VARIES


def test_an_op_that_writes_varies(w: Any) -> None:
    assert role(lambda w: w.clone().mul_(2), w) is VARIES
    assert role(lambda w: torch.relu_(w.clone()), w) is VARIES


def test_a_slice_by_the_size_of_an_activation_varies() -> None:
    gm = capture(
        lambda x, w: w[: x.shape[0]], torch.randn(3, K), torch.randn(N, K), mode="symbolic"
    )
    assert aten.sym_size.int in {node.target for node in gm.graph.nodes}
    constants, result = judged(gm, VARIES, WEIGHT)
    assert constants._role[result] is VARIES


def test_calls_of_methods_and_modules_vary() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
            return self.act(w), w.t()

    gm = fx.symbolic_trace(Model())
    [w] = [node for node in gm.graph.nodes if node.op == "placeholder"]
    constants = Constants(gm, {w: WEIGHT})
    called = [node for node in gm.graph.nodes if node.op in ("call_module", "call_method")]
    assert [node.op for node in called] == ["call_module", "call_method"]
    assert not any(constants.is_weight(node) for node in called)


def test_a_tensor_of_the_graph_helps_and_a_module_of_it_varies() -> None:
    graph = fx.Graph()
    literal, body = graph.get_attr("literal"), graph.get_attr("body")
    graph.output((literal, body))
    constants = Constants(fx.GraphModule({"literal": torch.ones(K), "body": nn.ReLU()}, graph), {})
    assert (constants._role[literal], constants._role[body]) == (HELPER, VARIES)


@pytest.mark.parametrize(
    ("value", "is_buffer", "expected"),
    [
        (nn.Parameter(torch.randn(N, K)), False, WEIGHT),
        (torch.randn(N, K), True, HELPER),  # a cache, perhaps
        (torch.randn(N, K), False, VARIES),
        (torch.ones(N, K, dtype=torch.int8), True, WEIGHT),
        (torch.ones(N, K, dtype=torch.uint8), True, WEIGHT),
        (torch.ones(N, K, dtype=torch.int32), True, WEIGHT),
        (torch.ones(N, K, dtype=torch.int8), False, VARIES),
        (torch.ones(N, K, dtype=torch.int64), True, HELPER),  # positions, not codes
        (torch.ones(N, K, dtype=torch.bool), True, HELPER),
        (nn.Parameter(torch.randn(N, K).to_sparse(), False), False, VARIES),
        (nn.parameter.Buffer(torch.randn(N, K)), True, HELPER),
        (7, False, VARIES),
    ],
)
def test_the_role_of_an_input(value: object, is_buffer: bool, expected: Role) -> None:
    assert role_of(value, is_buffer) is expected


# --- the computation behind a weight -------------------------------------------------------------

CHAINS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "the parameter": (lambda w: w, ((N, K),)),
    "cast": (lambda w: w.to(torch.bfloat16), ((N, K),)),
    "slice": (lambda w: w[1:5], ((N, K),)),
    "cat": (lambda w, v: torch.cat([w, v]), ((N, K), (2, K))),
    "split": (lambda w: w.split([2, 1, 3])[2], ((N, K),)),
    "two outputs": (lambda w: (lambda high, low: high - low)(*w.chunk(2)), ((N, K),)),
    "max": (lambda w: w / w.max(dim=1, keepdim=True)[0], ((N, K),)),
    "W + B A": (lambda w, b, a: w + 0.5 * (b @ a), ((N, K), (N, 2), (2, K))),
    "weight norm": (lambda g, v: g * v / v.norm(dim=1, keepdim=True), ((N, 1), (N, K))),
    "a root twice": (lambda w: w * w.sum(), ((N, K),)),
    "a literal": (lambda w: w * torch.tensor([1.0, 2.0, 3.0, 4.0]), ((N, K),)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_evaluate_gives_what_the_computation_gives(name: str) -> None:
    function, shapes = CHAINS[name]
    gm = capture(function, *(torch.randn(shape) for shape in shapes))
    constants, result = judged(gm, *[WEIGHT] * len(shapes))
    weight = constants.weight(result, "NK")
    values = [torch.randn(shape) for shape in shapes]  # others than those that were captured
    expected, before = function(*values), [value.clone() for value in values]
    by_node = dict(zip(gm.graph.nodes, values, strict=False))  # placeholders come first
    evaluated = weight.evaluate([by_node[root] for root in weight.roots])
    assert torch.equal(evaluated, expected)
    assert all(torch.equal(new, old) for new, old in zip(values, before, strict=True))


def test_int8_weights_are_dequantized() -> None:
    codes, scale = torch.randint(-128, 128, (N, K), dtype=torch.int8), torch.rand(N, 1)
    gm = capture(lambda q, s: q.to(torch.float32) * s, codes, scale)
    constants, result = judged(gm, WEIGHT, HELPER)
    weight = constants.weight(result, "NK")
    assert torch.equal(weight.evaluate([codes, scale]), codes * scale)


def test_only_what_a_weight_needs_is_part_of_it() -> None:
    gm = capture(lambda w, v: [w.t(), torch.exp(v)][0], torch.randn(N, K), torch.randn(N, K))
    constants, result = judged(gm, WEIGHT, WEIGHT)
    weight = constants.weight(result, "KN")
    assert [root.name for root in weight.roots] == ["w_1"]
    assert aten.exp.default not in {step.target for step in weight.steps}


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ("NK", (N, K)),
        ("KN", (K, N)),
        ("*NK", (1, N, K)),
        ("*KN", (1, K, N)),
        ("NK1", (N, K, 1, 1)),
    ],
)
def test_every_kind_of_axes_is_a_view_as_n_by_k(axes: str, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape)
    evaluated = weight_of(lambda w: w, w, axes=axes).evaluate([w])
    assert evaluated.shape == (N, K)
    assert evaluated.data_ptr() == w.data_ptr()
    position = {"N": 2, "K": 3}  # of one element, to see that rows are rows
    index = tuple(position.get(axis, 0) for axis in axes.ljust(w.ndim, "1"))
    assert evaluated[2, 3] == w[index]


def test_the_table_of_axes_is_tested_in_full() -> None:
    assert set(AXES) == {"NK", "KN", "*NK", "*KN", "NK1", "ENK", "EKN"}


@pytest.mark.parametrize(("axes", "shape"), [("ENK", (5, N, K)), ("EKN", (5, K, N))])
def test_experts_are_viewed_as_e_by_n_by_k(axes: str, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape)
    evaluated = weight_of(lambda w: w, w, axes=axes).evaluate([w])
    assert evaluated.shape == (5, N, K)
    assert evaluated.data_ptr() == w.data_ptr()
    assert evaluated[4, 2, 3] == (w[4, 2, 3] if axes == "ENK" else w[4, 3, 2])


def test_an_evaluated_parameter_is_detached() -> None:
    w = nn.Parameter(torch.randn(N, K))
    assert not weight_of(lambda w: w, torch.randn(N, K)).evaluate([w]).requires_grad


# --- one computation, one signature --------------------------------------------------------------


def same(one: Weight, other: Weight) -> bool:
    return one.signature == other.signature


@pytest.mark.parametrize(
    ("function", "axes"),
    [
        (lambda w: w.t(), "KN"),
        (lambda w: w.permute(1, 0), "KN"),
        (lambda w: w.transpose(0, 1), "KN"),
        (lambda w: w.transpose(1, 0), "KN"),
        (lambda w: w.t().t(), "NK"),
        (lambda w: w.unsqueeze(0), "*NK"),
        (lambda w: w.t().unsqueeze(0), "*KN"),
    ],
)
def test_a_weight_reached_through_views_is_the_weight_itself(
    function: Callable[[Tensor], Tensor], axes: str
) -> None:
    w = torch.randn(N, K)
    plain, viewed = weight_of(lambda w: w, w), weight_of(function, w, axes=axes)
    assert (viewed.node.op, viewed.axes) == ("placeholder", "NK")
    assert same(plain, viewed)


def test_views_before_another_op_stay_where_they_are() -> None:
    w = torch.randn(N, K)
    weight = weight_of(lambda w: (2 * w.t()).t(), w)
    assert weight.axes == "KN"
    assert torch.equal(weight.evaluate([w]), 2 * w)


def test_equal_computations_captured_apart_have_equal_signatures() -> None:
    def merge(w: Tensor, b: Tensor, a: Tensor) -> Tensor:
        return w + 0.5 * (b @ a)

    shapes = ((N, K), (N, 2), (2, K))
    one, other = (weight_of(merge, *map(torch.randn, shapes)) for _ in range(2))
    assert one.node is not other.node
    assert same(one, other)


DIFFERENT: Sequence[tuple[Callable[..., Tensor], Callable[..., Tensor]]] = [
    (lambda w, v: w[:2], lambda w, v: w[2:4]),
    (lambda w, v: w + v, lambda w, v: w * v),
    (lambda w, v: w - v, lambda w, v: v - w),
    (lambda w, v: w + 2 * v, lambda w, v: w + 3 * v),
    (lambda w, v: torch.add(w, v, alpha=2), lambda w, v: torch.add(w, v, alpha=3)),
    (lambda w, v: w.to(torch.bfloat16), lambda w, v: w.to(torch.float16)),
    (lambda w, v: w.chunk(2)[0], lambda w, v: w.chunk(2)[1]),
    (lambda w, v: w * v * w, lambda w, v: w * v * v),
]


@pytest.mark.parametrize("pair", DIFFERENT)
def test_other_computations_have_other_identities(pair: tuple[Callable[..., Tensor], ...]) -> None:
    examples = {"w_1": torch.randn(N, N), "v_1": torch.randn(N, N)}
    one, other = (weight_of(function, *examples.values()) for function in pair)

    def identity(weight: Weight) -> tuple[object, ...]:
        return (*(root.name for root in weight.roots), weight.signature)

    assert identity(one) != identity(other)


def test_other_axes_have_other_signatures() -> None:
    square = torch.randn(N, N)
    assert not same(weight_of(lambda w: w, square), weight_of(lambda w: w, square, axes="KN"))


def test_the_order_of_roots_is_part_of_the_identity() -> None:
    w, v = torch.randn(N, K), torch.randn(N, K)
    one = weight_of(lambda w, v: torch.cat([w, v]), w, v)
    other = weight_of(lambda w, v: torch.cat([v, w]), w, v)
    assert same(one, other)
    assert [root.name for root in one.roots] == [root.name for root in reversed(other.roots)]


def test_a_literal_is_part_of_the_signature() -> None:
    first, second = torch.full((K,), 2.0), torch.full((K,), 3.0)

    def scaled(literal: Tensor) -> Weight:
        graph = fx.Graph()
        w = graph.placeholder("w")
        product = graph.call_function(aten.mul.Tensor, (w, graph.get_attr("literal")))
        graph.output(product)
        gm = fx.GraphModule({"literal": literal}, graph)
        return Constants(gm, {w: WEIGHT}).weight(product, "NK")

    assert same(scaled(first), scaled(first))
    assert not same(scaled(first), scaled(second))
    w = torch.randn(N, K)
    assert torch.equal(scaled(second).evaluate([w]), 3 * w)


def test_getitem_counts_as_pure() -> None:
    gm = capture(lambda w: w.split(2)[1], torch.randn(N, K))
    assert operator.getitem in {node.target for node in gm.graph.nodes}
    constants, result = judged(gm, WEIGHT)
    assert constants.is_weight(result)
