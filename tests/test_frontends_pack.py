"""`fxint4.pack_`: packed weights in the place of a model's parameters."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from reference import dequantized
from support import assert_within, module, rounding_bound
from torch import Tensor, nn
from torch.nn import functional as F

import fxint4
from fxint4 import FoldError, Int4TileTensor, OptionError, Report, dequantize_, pack_
from fxint4.quant.statistics import Statistics

K, N = 100, 72  # K is padded


def packed_names(model: nn.Module) -> set[str]:
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if isinstance(parameter, Int4TileTensor)}


def reasons(report: Report) -> dict[str, str]:
    return {
        record.parameters[0]: record.reason for record in report.records if record.action == "kept"
    }


# --- by module -----------------------------------------------------------------------------------


@pytest.mark.compiles
@pytest.mark.by_aten
def test_linear_layers_are_packed_and_give_what_int4_leaves() -> None:
    torch.manual_seed(0)
    model = nn.Linear(K, N, dtype=torch.bfloat16).eval()
    exact = dequantized(model.weight, 32, torch.float64)
    [record] = pack_(model, options={"group_size": 32}).records
    assert (record.name, record.action, record.n, record.k) == ("weight", "packed", N, K)
    assert (record.bytes_before, record.held_bytes) == (2 * N * K, 0)
    assert isinstance(model.weight, Int4TileTensor)
    assert isinstance(model.weight, nn.Parameter)
    assert record.bytes_after == model.weight.packed_bytes
    assert torch.equal(model.weight.dequantize(torch.float64), exact)
    x = torch.randn(5, K, dtype=torch.bfloat16)
    expected = x.double() @ exact.T + model.bias.double()
    for backend in (None, "int4tile", "inductor", "aot_eager", "eager"):
        run = model if backend is None else torch.compile(model, backend=backend)
        with torch.no_grad():
            assert_within(run(x), expected, rounding_bound(x, exact, model.bias))
        torch._dynamo.reset()


@pytest.mark.parametrize("example_args", [(), (torch.randn(2, 64),)], ids=["modules", "graphs"])
def test_the_original_is_freed_before_the_next_is_packed(
    example_args: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3))).eval()
    originals = [weakref.ref(layer.weight) for layer in model]
    alive = []
    quantized = Int4TileTensor.quantized.__func__  # type: ignore[attr-defined]

    def counting(cls: Any, *args: Any) -> Any:
        gc.collect()
        alive.append(sum(ref() is not None for ref in originals))
        return quantized(cls, *args)

    monkeypatch.setattr(Int4TileTensor, "quantized", classmethod(counting))
    pack_(model, example_args)
    assert alive == [3, 2, 1]
    gc.collect()
    assert [ref() for ref in originals] == [None] * 3


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_pointwise_convolutions_are_packed(layer: Callable[..., nn.Module]) -> None:
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[layer]  # type: ignore[index]
    model = layer(K, N, 1).eval()
    exact = dequantized(model.weight.flatten(1), 128, torch.float64)  # type: ignore[operator]
    [record] = pack_(model).records
    assert record.action == "packed"
    x = torch.randn(2, K, *[3] * dims)
    with torch.no_grad():
        y = model(x)
    rows = x.movedim(1, -1)
    expected = rows.double() @ exact.T + model.bias.double()  # type: ignore[union-attr]
    assert_within(y.movedim(1, -1), expected, rounding_bound(rows, exact, model.bias))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "model",
    [
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 1, stride=2),
        nn.Conv2d(64, 64, 1, padding=1),
        nn.Conv2d(64, 64, 1, groups=2),
        nn.ConvTranspose2d(64, 64, 1),
        nn.Embedding(64, 64),
        nn.LSTM(64, 64),
        nn.Bilinear(64, 64, 64),
        nn.LayerNorm((64, 64)),
        module(lambda m, x: x @ m.w, w=(64, 64)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_modules_whose_use_of_a_parameter_is_not_known_are_left_alone(model: nn.Module) -> None:
    assert pack_(model).records == []
    assert not packed_names(model)


def test_attention_and_the_ops_of_its_fast_path() -> None:
    """PyTorch takes the fast path for plain tensors alone; code that calls its ops finds them."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval()
    x = torch.randn(2, 5, 64)
    packed = {"self_attn.in_proj_weight", "self_attn.out_proj.weight"}
    packed |= {"linear1.weight", "linear2.weight"}
    reference = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval()
    reference.load_state_dict(model.state_dict())
    pack_(model)
    assert packed_names(model) == packed
    with torch.no_grad():
        for name in packed:
            value = model.get_parameter(name).dequantize()  # type: ignore[operator]
            reference.get_parameter(name).copy_(value)
        exact = reference.double()(x.double())
        attention, norms = model.self_attn, (model.norm1, model.norm2)
        fused = torch.ops.aten._transformer_encoder_layer_fwd(
            *(x, 64, 4, attention.in_proj_weight, attention.in_proj_bias),
            *(attention.out_proj.weight, attention.out_proj.bias, False, False, norms[0].eps),
            *(part for norm in norms for part in (norm.weight, norm.bias)),
            *(model.linear1.weight, model.linear1.bias, model.linear2.weight, model.linear2.bias),
        )
        # x, y and what is between them are rounded to bf16 a few times; int4 moved far more.
        for y in (model(x), fused):
            assert (y - exact).norm() / exact.norm() < 2.0**-6
        wanted = reference.self_attn(x.double(), x.double(), x.double())
        for have, want in zip(attention(x, x, x), wanted, strict=True):
            assert (have - want).norm() / want.norm() < 2.0**-6


def test_an_encoder_with_padding() -> None:
    """PyTorch's fast path would nest the rows, which packed weights don't multiply."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    packed = nn.TransformerEncoder(layer, 2).eval()
    pack_(packed)
    plain = copy.deepcopy(packed)
    dequantize_(plain)
    plain.use_nested_tensor = False
    x, padding = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        y = packed(x, src_key_padding_mask=padding)[~padding]
        exact = plain.double()(x.double(), src_key_padding_mask=padding)[~padding]
    assert (y - exact).norm() / exact.norm() < 2.0**-6


def test_tied_layers_share_one_packed_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    report = pack_(model)
    assert len(report.records) == 1
    assert model[0].weight is model[1].weight
    assert isinstance(model[0].weight, Int4TileTensor)


@pytest.mark.parametrize(
    "way", ["modules", "graphs", pytest.param("compiled", marks=pytest.mark.compiles)]
)
@pytest.mark.by_aten
def test_options_hold_by_each_name_of_a_tied_weight(way: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    model[1].weight = model[0].weight
    for name in ("0", "1"):
        for options, method in (
            ({"overrides": {name: {"method": "mse"}}}, "mse"),
            ({"include": [f"{name}.weight"]}, "rtn"),
            ({"skip": [name]}, ""),
        ):
            x = torch.randn(2, 64)
            if way == "compiled":
                report = fxint4.explain(model, x, options={**options, "measure": False})
            else:
                report = pack_(copy.deepcopy(model), (x,) if way == "graphs" else (), options)
            assert {record.method for record in report.records} == {method}
            assert {(*r.parameters, *r.aliases) for r in report.records} == {
                ("0.weight", "1.weight")
            }
            assert report.unmatched_patterns == []


def test_a_weight_that_an_embedding_reads_too_is_kept() -> None:
    model = nn.Sequential(nn.Embedding(64, 96), nn.Linear(96, 64, bias=False)).eval()
    model[1].weight = model[0].weight
    why = "also read by an embedding, whose rows would become int4 too"
    assert reasons(pack_(model)) == {"1.weight": why}
    assert reasons(pack_(model, (torch.arange(3),))) == {"1.weight": why}
    assert not packed_names(model)


def test_transformers_conv1d() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.pytorch_utils.Conv1D(N, K)
    exact = dequantized(model.weight.t(), 128, torch.float64)
    [record] = pack_(model).records
    assert (record.n, record.k, model.weight.shape) == (N, K, (K, N))
    x = torch.randn(3, K)
    with torch.no_grad():
        expected = x.double() @ exact.T + model.bias.double()
        assert_within(model(x), expected, rounding_bound(x, exact, model.bias))


@pytest.mark.parametrize("example_args", [(), (torch.randn(2, K),)], ids=["modules", "graphs"])
def test_parametrized_weights_are_computed_and_packed(example_args: tuple[Tensor, ...]) -> None:
    normed = torch.nn.utils.parametrizations.weight_norm
    model = nn.Sequential(normed(nn.Linear(K, N)), normed(nn.Linear(N, 40))).eval()
    exact = dequantized(model[0].weight, 128, torch.float32)
    names = [f"1.parametrizations.weight.original{i}" for i in (0, 1)]
    pack_(model, example_args, {"skip": ["1"]})
    assert packed_names(model) == {"0.weight"}
    assert torch.equal(model[0].weight.dequantize(), exact)
    assert set(names) <= {name for name, _ in model.named_parameters()}  # skipped: as it was


def test_a_copy_of_a_parametrized_model_still_runs() -> None:
    """The two share a class, to which PyTorch adds the weight as a property."""
    normed = torch.nn.utils.parametrizations.weight_norm
    model = nn.Sequential(normed(nn.Linear(K, N)), normed(nn.Linear(N, N))).eval()
    other = copy.deepcopy(model)
    x = torch.randn(2, K)
    before = other(x)
    pack_(model, options={"skip": ["1"]})
    assert packed_names(model) == {"0.weight"}
    assert torch.equal(other(x), before)
    assert type(model[0]) is nn.Linear
    assert {type(layer).__name__ for layer in other} == {"ParametrizedLinear"}


def test_options_keep_weights_as_they_are() -> None:
    def model() -> nn.Module:
        made = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 16))
        made[1].weight.data[3, 5] = float("nan")
        return made

    made = model()
    assert reasons(pack_(made, options={"skip": ["0"]})) == {
        "0.weight": "skip='0'",
        "1.weight": "1 of the weight's 4096 values are inf or NaN",
        "2.weight": "16x64 is small: min_features is 32",
    }
    assert not packed_names(made)
    made = model()
    report = pack_(made, options={"include": ["2"], "min_features": 8, "min_sqnr_db": 60})
    assert reasons(report)["0.weight"] == "no pattern of include matches it"
    assert reasons(report)["2.weight"].endswith("dB is below min_sqnr_db=60")
    assert not packed_names(made)


def test_options_that_it_does_not_take() -> None:
    with pytest.raises(OptionError, match="group_sise"):
        pack_(nn.Linear(64, 64), options={"group_sise": 32})
    with pytest.raises(OptionError, match="compiles nothing and takes no option 'max_autotune'"):
        pack_(nn.Linear(64, 64), options={"max_autotune": True})


@pytest.mark.parametrize("device", ["nowhere", "meta", "cuda:99"])
def test_a_device_that_can_not_be_used_changes_nothing(device: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    with pytest.raises(OptionError, match=f"device .*'{device}'"):
        pack_(model, device=device)
    assert not packed_names(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_what_is_no_module_or_no_tuple_of_arguments() -> None:
    model, x = nn.Linear(64, 64), torch.randn(2, 64)
    with pytest.raises(TypeError, match=r"got a OrderedDict, need the nn\.Module"):
        pack_(model.state_dict())  # type: ignore[arg-type]
    for wrong, kind in ((x, "Tensor"), ("x", "str"), ({"group_size": 64}, "dict")):
        with pytest.raises(TypeError, match=f"example_args is a {kind}; .* in a tuple"):
            pack_(model, wrong)  # type: ignore[arg-type]
    lazy = nn.Sequential(model, nn.LazyLinear(64))
    with pytest.raises(FoldError, match=r"1\.weight of a lazy module .* call the model once"):
        pack_(lazy)
    assert not packed_names(lazy)


@pytest.mark.parametrize(
    ("shape", "device", "example", "reason"),
    [
        ((0, 64), "cpu", False, "the weight has no elements"),
        ((64, 0), "cpu", False, "the weight has no elements"),
        ((64, 0), "cpu", True, "the weight has no elements"),
        ((64, 64), "meta", False, "device meta has no int4 matmul"),
    ],
)
def test_weights_without_values_are_kept_and_the_report_says_why(
    shape: tuple[int, int], device: str, example: bool, reason: str
) -> None:
    layer = nn.Linear(64, 64, bias=False)
    layer.weight = nn.Parameter(torch.empty(shape, device=device))
    x = torch.empty(2, shape[1], device=device)
    report = pack_(layer.eval(), (x,) if example else (), {"min_features": 0})
    assert not packed_names(layer)
    assert reason in reasons(report)["weight"]


def test_a_compiled_model_is_named_as_the_model_in_it() -> None:
    report = pack_(torch.compile(nn.Sequential(nn.Linear(64, 64, bias=False)), backend="int4tile"))
    assert [record.parameters for record in report.records] == [("0.weight",)]
    assert not report.coverage["not_packed"]


def test_a_weight_that_cannot_be_packed_is_named_and_the_rest_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    quantized, calls = Int4TileTensor.quantized.__func__, []  # type: ignore[attr-defined]

    def second_fails(cls: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return quantized(cls, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Int4TileTensor, "quantized", classmethod(second_fails))
        with pytest.raises(FoldError, match=r"could not pack 1 \(64x64, 1\.weight\): .*no memory"):
            pack_(model)
    assert packed_names(model) == {"0.weight"}
    pack_(model)  # goes on
    assert packed_names(model) == {"0.weight", "1.weight", "2.weight"}


def test_packing_twice_changes_nothing() -> None:
    model = nn.Linear(64, 64)
    pack_(model)
    weight = model.weight
    assert pack_(model).records == []
    assert model.weight is weight


def test_dtypes_that_are_not_packed() -> None:
    model = nn.Linear(64, 64, dtype=torch.float64)
    assert "float64" in reasons(pack_(model))["weight"]


# --- by graph ------------------------------------------------------------------------------------


def shapes_of(**shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return shapes


GRAPHS: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]], tuple[int, ...]]] = {
    "linear": (lambda m, x: F.linear(x, m.w), shapes_of(w=(N, K)), (3, K)),
    "matmul": (lambda m, x: x @ m.w, shapes_of(w=(K, N)), (2, 3, K)),
    "left": (lambda m, x: m.w @ x, shapes_of(w=(N, K)), (K, 3)),
    "einsum": (lambda m, x: torch.einsum("bk,nk->bn", x, m.w), shapes_of(w=(N, K)), (3, K)),
    "einsum-kn": (lambda m, x: torch.einsum("bk,kn->nb", x, m.w), shapes_of(w=(K, N)), (3, K)),
    "cat-n": (
        lambda m, x: F.linear(x, torch.cat([m.w, m.v])),
        shapes_of(w=(N, K), v=(40, K)),
        (3, K),
    ),
    "cat-k": (
        lambda m, x: F.linear(x, torch.cat([m.w, m.v], 1)),
        shapes_of(w=(N, K), v=(N, 60)),
        (3, K + 60),
    ),
    "chunks": (
        lambda m, x: torch.cat([F.linear(x, part) for part in m.w.chunk(3)], -1),
        shapes_of(w=(3 * 44, K)),
        (3, K),
    ),
    "slice": (lambda m, x: F.linear(x, m.w[:, 7:71]), shapes_of(w=(N, K)), (3, 64)),
    "cast": (lambda m, x: F.linear(x.half(), m.w.half()).float(), shapes_of(w=(N, K)), (3, K)),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.compiles
@pytest.mark.by_aten
def test_every_use_that_packed_weights_support(name: str) -> None:
    """Eager and compiled outputs are those of the model with dequantized weights."""
    torch.manual_seed(0)
    function, shapes, inputs = GRAPHS[name]
    model = module(function, **shapes)
    x = torch.randn(inputs)
    report = pack_(model, (x,))
    assert packed_names(model) == set(shapes)
    assert {record.action for record in report.records} == {"packed"}
    exact = module(function, **shapes).double()
    magnitudes = module(function, **shapes).double()
    with torch.no_grad():
        for parameter in shapes:
            value = model.get_parameter(parameter).dequantize(torch.float64)  # type: ignore[call-arg, operator]
            exact.get_parameter(parameter).copy_(value)
            magnitudes.get_parameter(parameter).copy_(value.abs())
        # Three roundings to bf16 or to fp16, which is finer.
        bound = ((1 + 2.0**-8) ** 3 * (1 + 2.0**-24) ** 200 - 1) * magnitudes(x.double().abs())
        if name == "cast":  # what the model itself rounds to fp16
            expected = exact(x.half().double())
            bound += 2.0**-11 * expected.abs()
        else:
            expected = exact(x.double())
        assert_within(model(x), expected, bound)
        compiled = torch.compile(model, backend="int4tile")
        assert_within(compiled(x), expected, bound)


KEPT: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]], str]] = {
    "computed": (
        lambda m, x: F.linear(x, m.w * m.g),
        shapes_of(w=(N, K), g=(N, 1)),
        "read by mul.Tensor, which packed weights don't support",
    ),
    "merged": (
        lambda m, x: F.linear(x, m.w + m.b @ m.a),
        shapes_of(w=(N, K), b=(N, 4), a=(4, K)),
        "read by add.Tensor, which packed weights don't support",
    ),
    "used elsewhere": (
        lambda m, x: F.linear(x, m.w).sum() + m.w.norm(),
        shapes_of(w=(N, K)),
        "read by",
    ),
    "along both axes": (
        lambda m, x: F.linear(F.linear(x, m.w), m.w.t()),
        shapes_of(w=(N, K)),
        "read by",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_uses_that_packed_weights_do_not_support_keep_the_parameter(name: str) -> None:
    function, shapes, reason = KEPT[name]
    model = module(function, **shapes)
    x = torch.randn(3, K)
    before = model(x)
    report = pack_(model, (x,))
    assert not packed_names(model)
    assert reasons(report)["w"].startswith(reason)
    assert torch.equal(model(x), before)


def test_what_the_graph_does_not_read_is_left_alone() -> None:
    model = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    pack_(model, (torch.randn(2, 64),))
    assert packed_names(model) == {"0.weight"}


def test_graph_breaks_and_keyword_arguments() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor, *, twice: bool) -> Tensor:
            y = self.a(x)
            torch._dynamo.graph_break()
            return self.b(y) * (2 if twice else 1)

    model = Broken().eval()
    pack_(model, (torch.randn(2, 64),), example_kwargs={"twice": True})
    assert packed_names(model) == {"a.weight", "b.weight"}


def test_nothing_is_compiled_to_find_the_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiles(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr("fxint4._pytorch.inductor.compile_fx_inner", compiles)
    model = nn.Linear(64, 64).eval()
    pack_(model, (torch.randn(2, 64),))
    assert packed_names(model) == {"weight"}


# --- on first compile ----------------------------------------------------------------------------


class Remembering(nn.Module):
    """Writes its input to a cache, to an attribute, and to an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(64, 64)
        self.cache = nn.Buffer(torch.zeros(8, 64))
        self.last: Tensor | None = None

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        self.cache[: len(x)] += self.projection(x)
        seen += 1
        self.last = x
        return F.dropout(self.cache.sum(0))


def test_the_run_leaves_buffers_arguments_and_random_numbers_as_they_were() -> None:
    model = Remembering().eval()
    x, seen = torch.randn(4, 64), torch.zeros(())
    state = torch.random.get_rng_state()
    [record] = pack_(model, (x, seen)).records
    assert record.action == "packed"
    assert not model.cache.any()
    assert seen == 0
    assert model.last is None
    assert torch.equal(torch.random.get_rng_state(), state)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


class Layers(nn.Module):
    """Equal layers, and a weight of a module that is not known."""

    def __init__(self, count: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(count)])
        self.w = nn.Parameter(torch.randn(64, 48))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x @ self.w


def assert_near(y: Tensor, expected: Tensor) -> None:
    """Assert that outputs are equal but for roundings to bf16."""
    assert (y - expected).norm() / expected.norm() < 2.0**-6


@pytest.mark.compiles
@pytest.mark.by_aten
def test_by_default_the_report_says_what_is_held_and_how_to_free_it() -> None:
    model = nn.Linear(64, 64, bias=False).eval()
    with torch.no_grad():
        torch.compile(model, backend="int4tile")(torch.randn(2, 64))
    report = fxint4.last_report()
    assert report.totals["held_bytes"] == 4 * 64 * 64
    assert "16.4 kB stay in memory" in str(report)
    assert "fxint4.pack_(model)" in str(report)
    assert not packed_names(model)


# --- what is not packed, and why -----------------------------------------------------------------


class Recurrent(nn.Module):
    """A model of whose code PyTorch captures no graph."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.fc, self.inner = nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 48))
        self.rnn = kind(64, 64, batch_first=True)
        self.words = nn.Embedding(1000, 64)

        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.unused = nn.Linear(64, 64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.rnn(self.fc(x) + self.words.weight[0])[0]
        return self.inner(self.attention(y, y, y)[0])


@pytest.mark.compiles
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_code_that_cannot_be_captured_is_packed_by_module(kind: Any) -> None:
    torch.manual_seed(0)
    model = Recurrent(kind).eval()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = model(x)
        report = pack_(model, (x,), {"group_size": 32})
        assert model.calls == 1
        attention = {"attention.in_proj_weight", "attention.out_proj.weight"}
        assert packed_names(model) == {"fc.weight", "inner.0.weight", *attention}
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert (model(x) - expected).norm() / expected.norm() < 0.2
    why = {each["name"]: each["reason"] for each in report.coverage["not_packed"]}
    assert why["rnn.weight_ih_l0"] == (
        f"multiplied inside {kind.__name__}, of which PyTorch captures no graph"
    )
    assert why["words.weight"] in (
        "in no graph that the example arguments led to, and its module was not called, or "
        "Embedding is no kind of module that pack_ knows",
        "read by aten.select.int, by no matmul that was found",  # torch 2.15 captures that much
    )


@pytest.mark.compiles
def test_a_weight_of_a_graph_is_judged_by_the_graph_alone() -> None:
    """A Linear whose rows are looked up stays as it is, though its class is known."""
    model = module(lambda m, x: m.other(F.embedding(x, m.fc.weight))).eval()
    model.fc, model.other = nn.Linear(64, 64), nn.Linear(64, 64)
    report = pack_(model, (torch.arange(3),))
    assert packed_names(model) == {"other.weight"}
    why = {each["name"]: each["reason"] for each in report.coverage["not_packed"]}
    assert why["fc.weight"] == "read by aten.embedding, by no matmul that was found"


@pytest.mark.compiles
@pytest.mark.parametrize("args", [(), (torch.zeros(2, 64),)], ids=["by module", "by graph"])
def test_packing_a_packed_model_says_so(args: tuple[Tensor, ...]) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    pack_(model, args)
    weight = model[0].weight
    model[1] = nn.Linear(64, 64)
    report = pack_(model, args)
    assert [record.name for record in report.records if record.action == "packed"] == ["1"]
    assert model[0].weight is weight
    assert "not packed: 0.weight, 49.2% of parameters: packed before" in str(report)


def test_a_module_of_no_known_kind_is_named() -> None:
    model = module(lambda m, x: x @ m.w, w=(64, 64)).eval()
    [entry] = pack_(model).coverage["not_packed"]
    assert entry["reason"] == (
        f"{type(model).__name__} is no kind of module that pack_ knows; with example arguments it "
        "looks at what the model multiplies by"
    )


# --- with a pre-scale ----------------------------------------------------------------------------


def awq(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Options with a calibration that has a pre-scale for weights of these shapes [..., K]."""
    generator = torch.Generator().manual_seed(0)
    statistics = {
        key: Statistics(
            torch.eye(k).expand(*batch, k, k),
            torch.ones(*batch, k),
            torch.full(batch, 9),
            torch.rand(k, generator=generator) + 0.5,
        )
        for key, (*batch, k) in shapes.items()
    }
    calibration = fxint4.Calibration(statistics)
    return {"method": "awq", "group_size": 32, "calibration": calibration}


@pytest.mark.parametrize("backend", [None, "int4tile", "inductor"])
@pytest.mark.compiles
@pytest.mark.by_aten
def test_awq_keeps_the_pre_scale_with_the_weight(backend: str | None) -> None:
    torch.manual_seed(0)
    model = module(
        lambda m, x: (F.linear(x, m.q), x @ m.out, torch.bmm(x.expand(3, 5, K), m.experts.mT)),
        q=(N, K),
        out=(K, 40),
        experts=(3, N, K),
    ).eval()
    originals = [model.q.detach(), model.out.detach().t(), model.experts.detach()]
    x = torch.randn(5, K)
    report = pack_(model, (x,), awq({"q": (K,), "out.T": (K,), "experts": (3, K)}))
    assert packed_names(model) == {"q", "out", "experts"}
    packed = [model.q, model.out.t(), model.experts]
    run = model if backend is None else torch.compile(model, backend=backend)
    with torch.no_grad():
        products = run(x)
    for record, weight, original, y in zip(
        report.records, packed, originals, products, strict=True
    ):
        assert (record.method, record.bytes_after) == ("awq", weight.packed_bytes)
        w = weight.dequantize(torch.float64)
        noise = (w - original).square().sum()
        assert record.sqnr_db == pytest.approx(
            float(10 * torch.log10(original.double().square().sum() / noise)), abs=1e-3
        )
        for have, matrix in zip(
            y.view(-1, 5, w.shape[-2]), w.view(-1, w.shape[-2], K), strict=True
        ):
            assert_within(have, x.double() @ matrix.T, rounding_bound(x, matrix))


@pytest.mark.compiles
@pytest.mark.by_aten
def test_equal_layers_some_with_a_pre_scale_share_no_code() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(K, N, bias=False) for _ in range(3))).eval()
    pack_(model, options=awq({"1.weight": (K,)}))
    assert [layer.weight.pre_scale is not None for layer in model] == [False, True, False]
    x = torch.randn(5, K)
    for layer in model:
        layer.compile(backend="int4tile")
        w = layer.weight.dequantize(torch.float64)
        with torch.no_grad():
            assert_within(layer(x), x.double() @ w.T, rounding_bound(x, w))


def test_weights_that_are_joined_and_would_get_pre_scales_of_their_own_are_kept() -> None:
    model = module(
        lambda m, x: F.linear(x, torch.cat([m.q, m.k])).sum() + F.linear(x, m.q).sum(),
        q=(N, K),
        k=(N, K),
    ).eval()
    x = torch.randn(5, K)
    with torch.no_grad():
        y = model(x)
        report = pack_(model, (x,), awq({"q": (K,)}))
        assert model(x) == y
    assert "which packed weights don't support" in reasons(report)["q"]


# --- a packed model goes on ----------------------------------------------------------------------


def compiled_results(model: nn.Module, xs: Sequence[Tensor]) -> list[Tensor]:
    compiled = torch.compile(model, backend="int4tile")
    with torch.no_grad():
        return [compiled(x) for x in xs]


@pytest.mark.compiles
@pytest.mark.by_aten
def test_state_dicts_of_a_packed_model_load_into_compiled_code() -> None:
    """Compiled code sees weights that `load_state_dict` and `copy_` change in place."""
    torch.manual_seed(0)
    model, other = nn.Linear(64, 48).eval(), nn.Linear(64, 48).eval()
    floats = {name: value.clone() for name, value in other.state_dict().items()}
    x = torch.randn(3, 64)
    pack_(model)
    pack_(other)
    compiled = torch.compile(model, backend="int4tile")
    with torch.no_grad():
        before, wanted = compiled(x), torch.compile(other, backend="int4tile")(x)
        original = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(other.state_dict())
        assert torch.equal(compiled(x), wanted)
        model.load_state_dict(original)
        assert torch.equal(compiled(x), before)
        model.load_state_dict(floats)
        assert torch.equal(compiled(x), wanted)


@pytest.mark.compiles
@pytest.mark.by_aten
def test_rows_that_vary_run_through_one_compile() -> None:
    torch.manual_seed(0)
    model = nn.Linear(K, N, bias=False).eval()
    exact = dequantized(model.weight, 128, torch.float64)
    pack_(model)
    compiled = torch.compile(model, backend="int4tile", dynamic=True)
    with torch.no_grad():
        for rows in (2, 9, 300, 0, 1):
            x = torch.randn(rows, K)
            y = compiled(x)
            assert y.shape == (rows, N)
            assert_within(y, x.double() @ exact.T, rounding_bound(x, exact))


# --- on the GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_from_the_cpu_to_the_gpu_and_back(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.LayerNorm(N), nn.Linear(N, 40)).to(dtype).eval()
    model.register_buffer("b", torch.ones(3))
    twin = nn.Sequential(nn.Linear(K, N), nn.LayerNorm(N), nn.Linear(N, 40)).to(dtype).eval()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if k != "b"})
    pack_(model, device="cuda")
    pack_(twin)
    devices = {value.device.type for value in (*model.parameters(), *model.buffers())}
    assert devices == {"cuda"}
    for index in (0, 2):
        here, there = twin[index].weight, model[index].weight
        assert torch.equal(there.tiles.cpu(), here.tiles)
        assert torch.equal(there.cpu().dequantize(), here.dequantize())
        assert torch.equal(here.cuda().dequantize().cpu(), here.dequantize())
    x = torch.randn(4, K, dtype=dtype)
    with torch.no_grad():
        expected = twin(x)
        for run in (model, torch.compile(model, backend="int4tile")):
            y = run(x.cuda()).cpu()
            assert (y - expected).norm() / expected.norm() < 2.0**-5
        model.to("cpu")
        assert torch.equal(model(x), expected)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_cuda_graphs_read_the_packed_weights() -> None:
    torch.manual_seed(0)
    model = Layers().bfloat16().cuda().eval()
    x = torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        triton = {"kernel": "triton"}  # under CUDA graphs others might be taken, which round less
        plain = torch.compile(model, backend="int4tile", options=triton)(x).clone()
        pack_(model, (x,))
        assert len(packed_names(model)) == 13
        options = {**triton, "triton.cudagraphs": True}
        compiled = torch.compile(model, backend="int4tile", options=options)
        for _ in range(4):
            assert torch.equal(compiled(x), plain)


@pytest.mark.gpu
def test_peak_memory_of_packing_in_place() -> None:
    """The peak is at most the original and two of its largest weights; the end, the packed weights.

    The scratch memory is 0.3 GB however large a weight is: this is for models of some size.
    """
    model = nn.Sequential(*(nn.Linear(8192, 16384, bias=False, dtype=torch.bfloat16) for _ in "ab"))
    model.to("cuda").eval()
    pack_(nn.Linear(64, 64, device="cuda"))  # cuBLAS takes its workspace at the first product
    gc.collect()
    largest = model[0].weight.nbytes
    others = torch.cuda.memory_allocated() - 2 * largest
    torch.cuda.reset_peak_memory_stats()
    report = pack_(model)
    gc.collect()
    assert torch.cuda.max_memory_allocated() - others <= 4 * largest
    assert torch.cuda.memory_allocated() - others <= 1.05 * report.totals["bytes_after"]
