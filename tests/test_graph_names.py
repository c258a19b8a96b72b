"""Names of layers and inputs, from the sources that Dynamo really makes."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import fxint4
from fxint4.graph.names import (
    Inputs,
    layer_name,
    named_from,
    origins_in_call,
    parameters_around,
    source_line,
)

K = 4


def inputs_of(function: Callable[..., Any], *args: Any) -> list[tuple[Inputs, list[Any]]]:
    """The `Inputs` of each graph that Dynamo captures, and their values."""
    seen = []

    def backend(gm: fx.GraphModule, values: Sequence[Any]) -> Callable[..., Any]:
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        seen.append((Inputs(placeholders, values), list(values)))
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=backend)(*args)
    return seen


def names_of(function: Callable[..., Any], *args: Any) -> set[str]:
    """The names of the parameters and buffers of the one graph."""
    [(inputs, values)] = inputs_of(function, *args)
    outside = {id(arg) for arg in args}
    return {
        name for name, value in zip(inputs.names, values, strict=True) if id(value) not in outside
    }


def linear() -> nn.Linear:
    return nn.Linear(K, K)


def pair(name: str) -> set[str]:
    return {f"{name}.weight", f"{name}.bias"}


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.randn(K, K))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, K)


# --- the layer of a parameter --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("fc.weight", "fc"),
        ("model.layers.0.mlp.up.weight", "model.layers.0.mlp.up"),
        ("weight", "weight"),  # of the model itself
        ("fc.weight_v", "fc"),  # torch.nn.utils.weight_norm, deprecated
        ("fc.weight_orig", "fc"),  # pruned
        ("fc.parametrizations.weight.original", "fc"),
        ("fc.parametrizations.weight.original1", "fc"),
        ("a.b.parametrizations.weight.0.base", "a.b"),
        ("parametrizations.weight.original", "weight"),  # of the model itself
        ("attn.parametrizations.in_proj_weight.original0", "attn.in_proj_weight"),
        ("attn.in_proj_weight", "attn.in_proj_weight"),
        ("fc.bias", "fc.bias"),
        ("experts.0.w1", "experts.0.w1"),
        ("fc.myweight", "fc.myweight"),
        ("args.1", "args.1"),
        ("w", "w"),
    ],
)
def test_the_layer_of_a_parameter(name: str, layer: str) -> None:
    assert layer_name(name) == layer


def largest(module: nn.Module) -> str:
    return max(module.named_parameters(), key=lambda named: named[1].numel())[0]


def test_the_names_that_torch_gives_a_changed_weight_lead_to_its_layer() -> None:
    """The names above are those that torch uses."""

    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    model = nn.Sequential(linear(), linear(), linear())
    parametrizations.weight_norm(model[0])
    prune.random_unstructured(model[1], "weight", 0.5)
    parametrize.register_parametrization(model[2], "weight", Double())
    for name, child in model.named_children():
        assert largest(child) != "weight"
        assert layer_name(f"{name}.{largest(child)}") == name


# --- names of inputs -----------------------------------------------------------------------------


class Model(nn.Module):
    """A module with these members whose forward is a function of the module and the input."""

    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in members.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def test_nested_sequentials(x: Tensor) -> None:
    model = nn.Sequential(linear(), nn.Sequential(nn.ReLU(), linear()))
    assert names_of(model, x) == pair("0") | pair("1.1")


def test_containers_of_a_module(x: Tensor) -> None:
    model = Model(
        lambda self, x: self.by_name["up"](self.layers[1](self.layers[0](x))),
        layers=nn.ModuleList([linear(), nn.Sequential(linear())]),
        by_name=nn.ModuleDict({"up": linear()}),
    )
    assert names_of(model, x) == pair("layers.0") | pair("layers.1.0") | pair("by_name.up")


def test_containers_of_parameters(x: Tensor) -> None:
    model = Model(
        lambda self, x: x @ self.experts[1] @ self.factors["a"] @ self.w,
        experts=nn.ParameterList([parameter(), parameter()]),
        factors=nn.ParameterDict({"a": parameter()}),
        w=parameter(),
    )
    assert names_of(model, x) == {"experts.1", "factors.a", "w"}


def test_modules_and_parameters_in_plain_attributes(x: Tensor) -> None:
    model = Model(lambda self, x: self.plain[0](x) @ self.table["w"] @ self.own, own=parameter())
    model.plain, model.table = [linear()], {"w": parameter()}
    assert names_of(model, x) == pair("plain.0") | {"table.w", "own"}


def test_a_tied_parameter_has_the_first_of_its_names(x: Tensor) -> None:
    model = nn.Sequential(linear(), linear())
    model[1].weight = model[0].weight
    assert names_of(model, x) == pair("0") | {"1.bias"}


def test_a_parametrized_weight(x: Tensor) -> None:
    model = nn.Sequential(parametrizations.weight_norm(linear()))
    names = names_of(model, x)
    assert {layer_name(name) for name in names if "original" in name} == {"0"}
    assert "0.bias" in names


def test_a_closure_over_a_module_and_a_parameter(x: Tensor) -> None:
    model, w = nn.Sequential(linear()), parameter()
    assert names_of(lambda x: model(x) @ w, x) == pair("0") | {"w"}


A_GLOBAL_MODULE, A_GLOBAL_PARAMETER = linear(), parameter()


def test_globals(x: Tensor) -> None:
    def uses_globals(x: Tensor) -> Tensor:
        return A_GLOBAL_MODULE(x) @ A_GLOBAL_PARAMETER

    names = {name.rpartition("A_GLOBAL")[2] for name in names_of(uses_globals, x)}
    assert names == pair("_MODULE") | {"_PARAMETER"}


def test_a_module_as_an_argument_goes_without_saying(x: Tensor) -> None:
    def run(model: nn.Module, x: Tensor) -> Any:
        return model(x)

    assert names_of(run, nn.Sequential(linear()), x) == pair("0")


def test_a_method_of_torchs_own_goes_without_saying(x: Tensor) -> None:
    """Dynamo calls such a method from a function of its own, which holds it in a variable."""
    model = nn.Sequential(linear())
    assert names_of(model.forward, x) == pair("0")
    assert names_of(torch.compile(model, backend="eager"), x) == pair("0")


def test_two_modules_as_arguments_are_told_apart(x: Tensor) -> None:
    def run(encoder: nn.Module, head: nn.Module, x: Tensor) -> Any:
        return head(encoder(x))

    names = names_of(run, nn.Sequential(linear()), linear(), x)
    assert names == pair("encoder.0") | pair("head")


def test_one_module_as_two_arguments_is_one(x: Tensor) -> None:
    def run(first: nn.Module, second: nn.Module, x: Tensor) -> Any:
        return second(first(x))

    model = linear()
    assert names_of(run, model, model, x) == {"weight", "bias"}


def test_a_module_and_a_child_of_it_as_arguments(x: Tensor) -> None:
    def run(child: nn.Module, model: nn.Module, x: Tensor) -> Any:
        return model(child(x))

    model = nn.Sequential(linear(), linear())
    assert names_of(run, model[1], model, x) == pair("0") | pair("1")


def test_self_goes_without_saying_beside_another_module(x: Tensor) -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = linear()
            self.plain = [linear()]

        def forward(self, adapter: nn.Module, x: Tensor) -> Any:
            return self.plain[0](adapter(self.fc(x)))

    assert names_of(Takes(), linear(), x) == pair("fc") | pair("plain.0") | pair("adapter")


def test_modules_in_a_list(x: Tensor) -> None:
    def run(blocks: list[nn.Module], x: Tensor) -> Any:
        return blocks[1](blocks[0](x))

    assert names_of(run, [linear(), linear()], x) == pair("blocks.0") | pair("blocks.1")


def test_functional_code_gives_each_input_a_name_of_its_own(x: Tensor) -> None:
    def project(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    [(inputs, _)] = inputs_of(project, x, parameter())
    assert sorted(inputs.names) == ["w", "x"]


def test_graphs_after_a_break_in_a_child_have_full_names(x: Tensor) -> None:
    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = linear(), linear()

        def forward(self, x: Tensor) -> Any:
            x = self.one(x)
            torch._dynamo.graph_break()
            return self.two(x)

    seen = inputs_of(nn.Sequential(nn.Sequential(Child()), nn.ReLU()), x)
    names = {name for inputs, _ in seen for name in inputs.names if name.endswith("weight")}
    assert names == {"0.0.one.weight", "0.0.two.weight"}


def test_a_child_that_is_compiled_by_itself_has_its_full_name(x: Tensor) -> None:
    seen = []

    def backend(gm: fx.GraphModule, values: Sequence[Any]) -> Callable[..., Any]:
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        seen.extend(Inputs(placeholders, values).names)
        return gm.forward

    model = Model(lambda self, x: self.layers[0](x), layers=nn.ModuleList([linear()]))
    model.layers[0] = torch.compile(model.layers[0], backend=backend)  # type: ignore[assignment]
    with torch.no_grad():
        model(x)
    assert {name for name in seen if "layers" in name} == pair("layers.0")


# --- what owns an input --------------------------------------------------------------------------


def test_the_owner_of_a_parameter_is_its_module(x: Tensor) -> None:
    model = Model(
        lambda self, x: self.layers[0](x) @ self.w + self.scale,
        layers=nn.ModuleList([linear()]),
        w=parameter(),
        scale=nn.Buffer(torch.ones(K)),
    )
    [(inputs, _)] = inputs_of(model, x)
    owners = {name: inputs.owner(index) for index, name in enumerate(inputs.names)}
    assert owners == {
        "layers.0.weight": model.layers[0],
        "layers.0.bias": model.layers[0],
        "w": model,
        "scale": None,
        "x": None,
    }
    buffers = [inputs.names[i] for i in range(len(inputs.names)) if inputs.is_registered_buffer(i)]
    assert buffers == ["scale"]


def test_a_cache_in_a_list_is_no_registered_buffer(x: Tensor) -> None:
    def run(cache: list[Tensor], x: Tensor) -> Tensor:
        return cache[0] + x

    [(inputs, _)] = inputs_of(run, [torch.zeros(2, K)], x)
    assert [inputs.is_registered_buffer(index) for index in (0, 1)] == [False, False]


def test_an_owner_may_be_a_global_or_nobody(x: Tensor) -> None:
    def run(w: nn.Parameter, x: Tensor) -> Tensor:
        return A_GLOBAL_MODULE(x) @ w

    w = parameter()
    [(inputs, values)] = inputs_of(run, w, x)
    owners = {id(value): inputs.owner(index) for index, value in enumerate(values)}
    assert owners[id(w)] is None
    assert owners[id(A_GLOBAL_MODULE.weight)] is A_GLOBAL_MODULE


# --- the modules being called --------------------------------------------------------------------


def names_in_call(
    tensors: list[Tensor], candidates: Mapping[str, nn.Module] = MappingProxyType({})
) -> dict[int, str]:
    return {key: origin.name for key, origin in origins_in_call(tensors, candidates).items()}


class Looks(nn.Module):
    """Records the modules being called while it is called."""

    def __init__(self, look: Callable[[], Any]) -> None:
        super().__init__()
        self.fc = linear()
        self.look = look

    def forward(self) -> Any:
        return self.look()


class Calls(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child
        self.other = linear()
        self.scale = nn.Buffer(torch.ones(K))

    def forward(self) -> Any:
        return self.child()


def test_names_are_those_in_the_outermost_module_called() -> None:
    stranger = parameter()
    child = Looks(
        lambda: names_in_call([child.fc.weight, model.other.weight, model.scale, stranger])
    )
    model = Calls(child)
    assert model() == {
        id(child.fc.weight): "child.fc.weight",
        id(model.other.weight): "other.weight",
        id(model.scale): "scale",
    }
    # It keeps the name that it had in the larger model, as long as that lives.
    assert child() == {id(child.fc.weight): "child.fc.weight"}
    with named_from(child):
        assert child() == {id(child.fc.weight): "fc.weight"}
    assert names_in_call([child.fc.weight]) == {}


def test_a_name_in_a_larger_model_ends_with_that_model() -> None:
    child = Looks(lambda: names_in_call([child.fc.weight]))
    model = Calls(child)
    assert model() == child() == {id(child.fc.weight): "child.fc.weight"}
    del model
    gc.collect()
    assert child() == {id(child.fc.weight): "fc.weight"}


class AnotherName(nn.Module):
    """Its methods do not call it `self`."""

    def __init__(this, child: nn.Module) -> None:
        super().__init__()
        this.child = child

    def forward(this) -> Any:
        return this.child()


def holds_a_module(model: nn.Module) -> Any:
    return model.child()  # type: ignore[operator]


def test_modules_are_found_by_their_methods_not_by_a_variable_name() -> None:
    child = Looks(lambda: names_in_call([child.fc.weight]))
    model = AnotherName(AnotherName(child))
    assert holds_a_module(AnotherName(child)) == {id(child.fc.weight): "fc.weight"}
    assert model() == {id(child.fc.weight): "child.child.fc.weight"}


def test_candidates_are_asked_where_no_module_is_called() -> None:
    model = nn.Sequential(linear())
    weight = model[0].weight
    assert names_in_call([weight], {"": model}) == {id(weight): "0.weight"}
    assert names_in_call([weight], {"model": model}) == {id(weight): "model.0.weight"}


def test_all_parameters_of_the_modules_called_are_counted() -> None:
    child = Looks(lambda: parameters_around(origins_in_call([child.fc.weight]).values()))
    model = Calls(child)
    assert {key: value[:3] for key, value in model().items()} == {
        id(p): (name, p.numel(), "Linear") for name, p in model.named_parameters()
    }
    assert len({value.place for value in model().values()}) == len(list(model.parameters()))
    assert len(model()) == 4
    with named_from(child):
        assert {key: value[:2] for key, value in child().items()} == {
            id(p): (name, p.numel()) for name, p in child.named_parameters()
        }


def test_modules_without_a_part_in_it_are_not_counted() -> None:
    stranger = Looks(lambda: parameters_around(origins_in_call([parameter()]).values()))
    assert Calls(stranger)() == {}


# --- source lines --------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer of its own, and one of torch's that calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 64))
        self.w = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)  # first line
        return F.linear(y, self.w)  # second line


def lines_of(function: Callable[..., Any]) -> list[int]:
    source, first = inspect.getsourcelines(function)
    return [
        first + number for number, line in enumerate(source) if "line" in line.partition("#")[2]
    ]


@pytest.mark.compiles
@pytest.mark.by_aten
def test_a_matmul_has_the_innermost_line_that_is_not_of_torch() -> None:
    model = Twice().eval()
    x = torch.randn(2, 64)
    expected = [f"test_graph_names.py:{line} in forward" for line in lines_of(Twice.forward)]
    assert len(expected) == 2
    assert [record.source for record in fxint4.explain(model, x).records] == expected
    fxint4.rewrite(torch.export.export(model, (x,)))
    report = fxint4.last_report()
    assert [record.source for record in report.records] == expected
    assert {record.source for record in fxint4.pack_(model, (x,)).records} == set(expected)


@pytest.mark.compiles
@pytest.mark.by_aten
def test_a_matmul_of_torch_alone_has_no_line() -> None:
    [record] = fxint4.explain(nn.Linear(64, 64).eval(), torch.randn(2, 64)).records
    assert record.source == ""


@pytest.mark.parametrize(
    ("trace", "line"),
    [
        (None, ""),
        ("", ""),
        ('  File "/a/b/model.py", line 7, in forward\n    y = x @ w', "model.py:7 in forward"),
        (
            'File "/a/model.py", line 7, in forward\n    f()\nFile "<cell>", line 2, in <lambda>\n',
            "<cell>:2 in <lambda>",
        ),
        (f'File "{torch.__file__}", line 1, in mm', ""),
    ],
)
def test_a_stack_trace_is_read(trace: str | None, line: str) -> None:
    node = fx.Graph().placeholder("x")
    node.meta["stack_trace"] = trace
    assert source_line(node) == line
