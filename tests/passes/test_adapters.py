"""Which matmuls of a graph are adapters, and what becomes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import fxint4
from fxint4 import Int4Config
from fxint4.graph.constants import Constants, Role
from fxint4.passes.adapters import adapter_by_name, is_named
from fxint4.passes.find import find
from fxint4.passes.patterns import PATTERNS
from fxint4.passes.plan import Plans
from fxint4.passes.site import Site

M, K, N, R = 6, 128, 160, 32


def planned(
    function: Callable[..., Any], shapes: dict[str, Sequence[int]], *inputs: Tensor, **options: Any
) -> dict[str, str]:
    """Why each weight of a function is kept, by name; "" where it is packed."""
    weights = {name: torch.randn(*shape) for name, shape in shapes.items()}
    return dict(find_all(function, weights, *inputs, **options))


def find_all(
    function: Callable[..., Any], named: dict[str, Tensor], *inputs: Tensor, **options: Any
) -> list[tuple[str, str]]:
    """The names of the parameters of each weight, and why it is kept."""
    weights = list(named.values())
    gm = make_fx(torch.func.functionalize(function), tracing_mode="fake")(*weights, *inputs)
    nodes = gm.graph.find_nodes(op="placeholder")
    tensors = dict(zip(nodes, weights, strict=False))
    names = dict(zip(nodes, named, strict=False))
    constants = Constants(gm, dict.fromkeys(tensors, Role.WEIGHT))
    found = find(gm, PATTERNS, constants, tensors, names, Plans(Int4Config(**options)), {})
    records = (
        (each.record, each.kept) if isinstance(each, Site) else (each, each.reason)
        for each in found
    )
    return [(".".join(record.parameters), reason) for record, reason in records]


X = torch.randn(M, K)
SHAPES: dict[str, Sequence[int]] = {"w": (N, K), "a": (R, K), "b": (N, R)}
REASON = f"an adapter of rank {R} beside w; to pack it, name it in include"
BESIDE_P = REASON.replace("beside w", "beside p")
ADAPTERS = {"w": "", "a": REASON, "b": REASON}
PACKED = dict.fromkeys(SHAPES, "")


def plain(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, w) + 0.5 * F.linear(F.linear(x, a), b)


# --- found by structure --------------------------------------------------------------------------


def in_other_dtype(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    y = F.linear(x.bfloat16(), w.bfloat16())
    return (y + F.linear(F.linear(x.bfloat16().float(), a), b) * 2).bfloat16()


def adapter_first(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    low = x @ a.t() @ b.t() / 4
    return low.add(x @ w.t(), alpha=2) + x.sum()


def subtracted(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("...k,nk->...n", x, w) - torch.einsum("...k,rk,nr->...n", x, a, b)


def added_by_the_matmul(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return torch.addmm(x @ w.t(), x @ a.t(), b.t(), alpha=0.5)


def added_by_the_base(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return torch.addmm(x @ a.t() @ b.t(), x, w.t())


def normalized(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    low = F.linear(x, a)
    return F.linear(x, w) + F.linear(low * low.square().mean(-1, True).rsqrt(), b)


def gated_by_rows(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, w) + x.sum(-1, True).sigmoid() * F.linear(F.linear(x, a), b)


def scaled_by_weights(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, w) + b[:, 0] * F.linear(F.linear(x, a) * a[:, 0], b)


def far_apart(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    y = x[:, :1] + F.linear(x, w)
    return (y.relu() + y) + F.linear(F.linear(x.view(2, -1, K), a), b).view(M, N)


@pytest.mark.parametrize(
    "function",
    [
        plain,
        in_other_dtype,
        adapter_first,
        subtracted,
        added_by_the_matmul,
        added_by_the_base,
        normalized,
        gated_by_rows,
        scaled_by_weights,
        far_apart,
    ],
)
def test_lora_is_found(function: Callable[..., Tensor]) -> None:
    assert planned(function, SHAPES, X) == ADAPTERS


@pytest.mark.parametrize("shape", [(1, K), (2, 3, K), (2, 1, 3, K)])
def test_activations_of_any_shape(shape: Sequence[int]) -> None:
    assert planned(plain, SHAPES, torch.randn(shape)) == ADAPTERS


def test_a_factor_that_is_an_input() -> None:
    found = planned(
        lambda w, a, b, x, s: F.linear(x, w) + s * F.linear(F.linear(x, a), b),
        SHAPES, X, torch.tensor(0.5),
    )  # fmt: skip
    assert found == ADAPTERS


def test_several_adapters_that_are_mixed() -> None:
    found = planned(
        lambda w, a, b, c, d, x: (
            x @ w.t() + 0.7 * (x @ a.t() @ b.t()) + 0.3 * (x @ c.t() @ d.t())
        ),
        {**SHAPES, "c": (64, K), "d": (N, 64)}, X,
    )  # fmt: skip
    more = "an adapter of rank 64 beside w; to pack it, name it in include"
    assert found == {**ADAPTERS, "c": more, "d": more}


def test_biases() -> None:
    found = planned(
        lambda w, a, b, v, u, x: F.linear(x, w, v) + F.linear(F.linear(x, a, u), b, v),
        {**SHAPES, "v": (N,), "u": (R,)}, X,
    )  # fmt: skip
    assert found == ADAPTERS


def of_parts(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> list[Tensor]:
    q, k, v = F.linear(x, w).chunk(3, -1)
    return [q + F.linear(F.linear(x, a), b), k, v]


def into_parts(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    y = F.linear(x, w)
    y[:, :N] += F.linear(F.linear(x, a), b)
    return y


def beside_zeros(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    low = F.linear(F.linear(x, a), b)
    return F.linear(x, w) + torch.cat([low, torch.zeros(M, N), low], -1)


@pytest.mark.parametrize("function", [of_parts, into_parts, beside_zeros])
def test_adapters_of_fused_projections(function: Callable[..., Any]) -> None:
    assert planned(function, {**SHAPES, "w": (3 * N, K)}, X) == ADAPTERS


def test_one_down_projection_of_several_up_projections() -> None:
    def fused(w: Tensor, a: Tensor, b: Tensor, c: Tensor, x: Tensor) -> Tensor:
        q, v = F.linear(x, a).chunk(2, -1)
        return F.linear(x, w) + torch.cat([F.linear(q, b), F.linear(v, c)], -1)

    shapes = {"w": (2 * N, K), "a": (2 * R, K), "b": (N, R), "c": (N, R)}
    assert planned(fused, shapes, X) == {**ADAPTERS, "c": REASON}


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions(kernel: int) -> None:
    """The base and A of a larger kernel are no 1x1 convolutions; B is one."""
    shapes = {"w": (N, K, kernel, kernel), "a": (R, K, kernel, kernel), "b": (N, R, 1, 1)}
    found = planned(
        lambda w, a, b, x: F.conv2d(x, w) + 2 * F.conv2d(F.conv2d(x, a), b),
        shapes, torch.randn(1, K, 5, 5),
    )  # fmt: skip
    if kernel == 1:
        assert found == ADAPTERS
    else:
        assert found["b"] == REASON
        assert found["a"].startswith("a convolution with kernel")


def test_experts() -> None:
    e = 4
    shapes = {"w": (e, K, N), "a": (e, K, R), "b": (e, R, N)}
    found = planned(lambda w, a, b, x: x @ w + x @ a @ b, shapes, torch.randn(e, M, K))
    assert found == ADAPTERS
    ids = torch.tensor([1, 0, 3, 1])
    found = planned(
        lambda w, a, b, x, ids: torch.bmm(x, w[ids]) + torch.bmm(torch.bmm(x, a[ids]), b[ids]),
        shapes, torch.randn(e, 1, K), ids,
    )  # fmt: skip
    assert found == ADAPTERS
    other = planned(
        lambda w, a, b, x, ids: (
            torch.bmm(x, w[ids]) + torch.bmm(torch.bmm(x, a[ids - 1]), b[ids - 1])
        ),
        shapes, torch.randn(e, 1, K), ids,
    )  # fmt: skip
    assert other == PACKED  # A multiplies other rows than the base


def test_the_product_of_both_alone() -> None:
    """For a norm, say: what is made of adapters alone is one, too."""
    found = planned(
        lambda w, a, b, x, z: (plain(w, a, b, x), z @ (b @ a).t()), SHAPES, X, torch.randn(M, K)
    )
    assert found == {**ADAPTERS, "b.a": REASON} or found == {**ADAPTERS, "a.b": REASON}


def test_a_parameter_that_holds_all_weights() -> None:
    """The base, and what else is a slice of it, is no adapter."""

    def sliced(p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        w, a, b = p[:N], p[N : N + R], p[N + R :].reshape(N, -1)[:, :R]
        return plain(w, a, b, x), x.relu() @ w.t()

    weight = torch.randn(N + R + N, K)
    found = find_all(sliced, {"p": weight}, X)
    assert [reason for _, reason in found] == ["", BESIDE_P, BESIDE_P, ""]


# --- not found, packed as ever -------------------------------------------------------------------


@pytest.mark.parametrize("rank", [32, 63, 64, 65, 80, 128])
def test_the_rank_is_at_most_half(rank: int) -> None:
    found = planned(plain, {"w": (N, K), "a": (rank, K), "b": (N, rank)}, X)
    kept = f"an adapter of rank {rank} beside w; to pack it, name it in include"
    assert found == ({"w": "", "a": kept, "b": kept} if 2 * rank <= K else PACKED)


def bottleneck(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, a), b) + F.linear(x.relu(), w)


def nonlinear(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, w) + F.linear(F.linear(x, a).relu(), b)


def skip_of_a_gated_mlp(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    low = F.linear(x, a)
    return F.linear(x, w) + F.linear(F.silu(low) * low, b)


def side_by_side(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return torch.cat([F.linear(x, w), F.linear(F.linear(x, a), b)])


def multiplied(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, w) * F.linear(F.linear(x, a), b)


def of_the_product(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, w).relu() + F.linear(F.linear(x, a), b)


def other_channels(w: Tensor, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    both = torch.cat([x, x.relu()], -1)
    return F.linear(both[:, :K], w) + F.linear(F.linear(both[:, K:], a), b)


@pytest.mark.parametrize("rows", [1, M])
@pytest.mark.parametrize(
    "function",
    [
        bottleneck,
        nonlinear,
        skip_of_a_gated_mlp,
        side_by_side,
        multiplied,
        of_the_product,
        other_channels,
    ],
)
def test_packed_as_ever(function: Callable[..., Tensor], rows: int) -> None:
    assert planned(function, SHAPES, torch.randn(rows, K)) == PACKED


def test_low_rank_layers_without_a_base_are_packed() -> None:
    """Of a layer compressed by its singular values, and of an adapter around the identity."""
    shapes = {"a": (R, K), "b": (K, R)}
    packed = dict.fromkeys(shapes, "")
    assert planned(lambda a, b, x: F.linear(F.linear(x, a), b), shapes, X) == packed
    assert planned(lambda a, b, x: x + F.linear(F.linear(x, a).relu(), b), shapes, X) == packed
    assert planned(lambda a, b, x: x + F.linear(F.linear(x, a), b), shapes, X) == packed
    two = {**shapes, "c": (R, K), "d": (K, R)}
    found = planned(lambda a, b, c, d, x: x @ a.t() @ b.t() + x @ c.t() @ d.t(), two, X)
    assert found == dict.fromkeys(two, "")


def test_a_merged_computation_is_packed() -> None:
    found = planned(lambda w, a, b, x: F.linear(x, w + 0.5 * (b @ a)), SHAPES, X)
    assert list(found.values()) == [""]


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "what"),
    [
        ("m.q.lora_A.default", ["m.q.lora_A.default.weight"], "by its name lora_A"),
        ("m.q.lora_B.x", ["m.q.lora_B.x.weight"], "by its name lora_B"),
        ("q.lora_embedding_B.x", ["q.lora_embedding_B.x"], "by its name lora_embedding_B"),
        ("q.lora_a", ["q.lora_a.weight"], "by its name lora_a"),
        ("q.lora_down", ["q.lora_down.weight"], "by its name lora_down"),
        ("q.hada_w1_b.x", ["q.hada_w1_b.x", "q.hada_w1_a.x", "q.hada_w2_a.x"], "hada_w1_b"),
        ("q.lokr_w2.x", ["q.lokr_w2.x", "q.lokr_w1.x"], "by its name lokr_w2"),
        ("oft_R.x", ["oft_R.x.weight", "oft_R.x.rows"], "by its name oft_R"),
        ("q.base_layer", ["q.base_layer.weight"], None),
        ("q", ["q.weight", "q.lora_A", "q.lora_B"], None),  # merged
        ("lora_linear.base", ["lora_linear.base.weight"], None),
        ("flora_B", ["flora_B.weight"], None),
        ("", [], None),
    ],
)
def test_names_of_adapters(name: str, parameters: list[str], what: str | None) -> None:
    found = adapter_by_name(name, parameters)
    assert (found is None) == (what is None)
    if found is not None and what is not None:
        assert found.what.endswith(what)


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("*", False),
        ("m", False),
        ("m.q", False),
        ("m.q.*", False),
        ("*q*", False),
        ("*.weight", False),
        ("re:.*", False),
        (r"re:m\.\w+\.\w+", False),
        ("m.q.lora_A", True),
        ("m.q.lora_A.*", True),
        ("m.q.lora_A.default", True),
        ("m.q.lora_A.default.weight", True),
        ("*lora_*", True),
        ("*.default", True),
        ("re:.*lora_[AB].*", True),
        ("m.k.lora_A", False),
    ],
)
def test_patterns_that_name_an_adapter(pattern: str, named: bool) -> None:
    name = "m.q.lora_A.default"
    adapter = adapter_by_name(name, [f"{name}.weight"])
    assert adapter is not None
    assert is_named(adapter, name, [f"{name}.weight"], [pattern]) == named


@pytest.mark.parametrize(
    ("include", "packed"),
    [
        ((), ["w"]),
        (["*"], ["w"]),
        (["a"], ["a"]),
        (["*", "[ab]"], ["w", "a", "b"]),
        (["w", "b"], ["w", "b"]),
    ],
)
def test_include_overrides_where_it_names_the_adapter(
    include: Sequence[str], packed: list[str]
) -> None:
    found = planned(plain, SHAPES, X, include=include)
    assert [name for name, reason in found.items() if not reason] == packed


def test_skip_is_stronger() -> None:
    found = planned(plain, SHAPES, X, include=["*", "a", "b"], skip=["a"])
    assert found == {"w": "", "a": "skip='a'", "b": ""}


def test_small_ones_say_both() -> None:
    found = planned(plain, {"w": (N, K), "a": (8, K), "b": (N, 8)}, X)
    assert found["a"] == "an adapter of rank 8 beside w; 8x128 is small: min_features is 32"
    found = planned(plain, {"w": (N, K), "a": (8, K), "b": (N, 8)}, X, min_features=1)
    assert found["a"] == "an adapter of rank 8 beside w; to pack it, name it in include"


# --- where it is decided -------------------------------------------------------------------------


class Lora(nn.Module):
    """LoRA as users write it, of names that tell nothing."""

    def __init__(self, rank: int = R) -> None:
        super().__init__()
        self.fc = nn.Linear(K, N)
        self.down = nn.Linear(K, rank, bias=False)
        self.up = nn.Linear(rank, N, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.5))
        with torch.no_grad():
            codes = torch.randint(-8, 8, (N, K))
            codes[:, 0::8], codes[:, 1::8] = -8, 7  # each group has scale 2^-6 and zero 0
            codes[:, 2].clamp_(min=-7)
            self.fc.weight.copy_(codes / 64)
            self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.scale * self.up(self.down(x))


def exact_rows() -> Tensor:
    """Activations ``[M, K]`` whose products with the weights of `Lora` bf16 holds exactly."""
    return torch.randint(-1, 2, (M, K)) * (torch.rand(M, K) < 0.1).float()


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Lora(), Lora()])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


BESIDE = f"an adapter of rank {R} beside fc; to pack it, name it in include"


@pytest.mark.compiles
@pytest.mark.by_aten
def test_layers_that_share_code_have_patterns_of_their_own() -> None:
    model = Both().eval()
    original = copy.deepcopy(model)
    options = {"include": ["*", "layers.1.up"]}
    for layer in model.layers:
        layer.compile(backend="int4tile", options=options)
    x = exact_rows()
    with torch.no_grad():
        (first, second), expected = model(x), original(x)
    torch.testing.assert_close(first, expected[0])
    assert 0 < (second - expected[1]).norm() < 0.1 * second.norm()
    report = fxint4.last_report()
    assert {record.name: record.reason for record in report.records if record.action == "kept"} == {
        "layers.0.down": BESIDE,
        "layers.0.up": BESIDE,
        "layers.1.down": BESIDE,
    }


@pytest.mark.parametrize("rank", [4, R, 64, 96])
def test_pack_with_examples_sees_the_structure(rank: int) -> None:
    model = Lora(rank).eval()
    original, x = copy.deepcopy(model), exact_rows()
    report = fxint4.pack_(model, (x,))
    packed = [record.name for record in report.records if record.action == "packed"]
    assert packed == (["fc", "down", "up"] if 2 * rank > K else ["fc"])
    if len(packed) == 1:
        torch.testing.assert_close(model(x), original(x))
    report = fxint4.pack_(original, (x,), {"include": ["*", "up"]})
    assert ("up" in [r.name for r in report.records if r.action == "packed"]) == (rank >= 32)


def test_a_factor_that_is_a_buffer() -> None:
    class Scaled(Lora):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gains", torch.randn(N))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.gains * self.up(self.down(x))

    report = fxint4.pack_(Scaled().eval(), (exact_rows(),))
    found = {record.name: record.reason for record in report.records}
    assert found == {"fc": "", "down": BESIDE, "up": BESIDE}


@pytest.mark.compiles
@pytest.mark.by_aten
def test_a_merged_weight_follows_its_adapter() -> None:
    """W + B @ A is packed as one weight, anew once an adapter is switched or loaded."""

    class Merged(Lora):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.fc.weight + self.scale * (self.up.weight @ self.down.weight))

    model, x = Merged().eval(), exact_rows()
    x[:, 2] = 1.0
    model.scale.data.fill_(1.0)
    model.up.weight.data.zero_()
    run = torch.compile(model, backend="int4tile")

    def others() -> tuple[nn.Parameter, nn.Parameter]:
        """The sum has the codes of W, those of one column with another sign."""
        down, up = torch.zeros(R, K), torch.zeros(N, R)
        down[0, 2], up[:, 0] = 1.0, -2 * model.fc.weight.detach()[:, 2]
        return nn.Parameter(down), nn.Parameter(up)

    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(run(x), before)
        model.down.weight, model.up.weight = others()
        torch.testing.assert_close(run(x), model(x))
        assert not torch.allclose(before, model(x), rtol=2**-2)  # not by roundings alone
        state = {name: -value for name, value in model.state_dict().items()}
        model.load_state_dict(state)
        torch.testing.assert_close(run(x), model(x))
    report = fxint4.last_report()
    assert {record.action for record in report.records} == {"packed"}
