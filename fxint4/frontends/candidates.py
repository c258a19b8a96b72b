"""Which parameters of a model could be packed in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from fxint4._pytorch.aot import example_size
from fxint4._pytorch.distributed import local_of, shard_text, shards_of
from fxint4._pytorch.tensors import aten, holds_own_values, real_tensors
from fxint4.config.int4_config import Int4Config
from fxint4.graph.names import layer_name, plain_name
from fxint4.passes.adapters import adapter_below
from fxint4.passes.pipeline import Analysis
from fxint4.passes.site import Adapter
from fxint4.quant.tile_layout import choose_shape
from fxint4.report import Record
from fxint4.report.graph_text import graph_text, readers
from fxint4.runs.state_guard import StateGuard
from fxint4.runs.tracing import GraphRunner, traced
from fxint4.tensor import Int4TileTensor
from fxint4.tensor.core import NEW_AXIS, without_dense_copies

__all__ = [
    "Candidate",
    "Owners",
    "candidates_of_graph",
    "candidates_of_model",
    "candidates_of_modules",
    "candidates_that_run",
    "is_pointwise",
    "use_of",
]


class Owners:
    """The modules that own each parameter; a shared parameter has several.

    Args:
        modules: The outermost modules, each with a prefix for the names of its parameters.

    Attributes:
        parameters: All parameters, by id.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._places: dict[int, list[tuple[nn.Module, str, str]]] = {}
        self.parameters: dict[int, nn.Parameter] = {}
        #: For each name of PEFT's parts of a layer the name of the layer.
        self._adapted: dict[str, str] = {}
        #: Names of PEFT's layers with an adapter that reads the weight of the layer.
        self._normed: set[str] = set()
        for prefix, outer in modules:
            for path, module in outer.named_modules(prefix=prefix):
                for name in _adapter_names(module):
                    self._adapted[_below(path, name)] = plain_name(path)
                    if name == "lora_magnitude_vector" and getattr(module, name):
                        self._normed.add(plain_name(path))
                for name, parameter in module.named_parameters(recurse=False):
                    full = _below(path, name)
                    places = self._places.setdefault(id(parameter), [])
                    if not any(owner is module and own == name for owner, own, _ in places):
                        places.append((module, name, full))
                    self.parameters[id(parameter)] = parameter

    def of(self, parameter: nn.Parameter) -> list[nn.Module]:
        """The modules that hold a parameter."""
        return [module for module, _, _ in self._places.get(id(parameter), [])]

    def name(self, parameter: nn.Parameter) -> str:
        """Full name of a parameter; the layer's, where a layer and an embedding share it."""
        return self.names(parameter)[0]

    def names(self, parameter: nn.Parameter) -> list[str]:
        """All full names of a parameter; several where modules share it, those of layers first."""
        places = self._places[id(parameter)]
        places = sorted(places, key=lambda place: isinstance(place[0], nn.Embedding))
        return [name for _, _, name in places]

    def adapter(self, parameter: nn.Parameter) -> Adapter | None:
        """The adapter of PEFT's that a parameter is a part of, or None."""
        for name in self.names(parameter) if self._adapted else ():
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                layer = self._adapted.get(".".join(parts[:end]))
                if layer is not None:
                    return adapter_below(layer_name(self.name(parameter)), layer)
        return None

    def is_normed(self, parameter: nn.Parameter) -> bool:
        """Whether an adapter of PEFT's scales the rows of a weight by their norms (DoRA)."""
        bases = (layer_name(name).rpartition(".") for name in self.names(parameter))
        return any(last == "base_layer" and layer in self._normed for layer, _, last in bases)

    def replace(self, parameter: nn.Parameter, new: nn.Parameter) -> None:
        """Put `new` in the place of a parameter in all modules, and forget the parameter."""
        for module, name, _ in self._places.pop(id(parameter)):
            setattr(module, name, new)
        del self.parameters[id(parameter)]


def _below(path: str, name: str) -> str:
    return plain_name(f"{path}.{name}" if path else name)


def _adapter_names(module: nn.Module) -> Sequence[str]:
    """Names of the members that hold the adapters, if a module is a layer of PEFT's around another.

    PEFT's wrappers of whole layers (`modules_to_save`) have no `base_layer`: what they hold takes
    the place of a layer, and is packed as one.
    """
    names = getattr(module, "adapter_layer_names", ())
    return names if isinstance(names, tuple) and hasattr(module, "base_layer") else ()


@dataclass
class Candidate:
    """A parameter that may be packed.

    Attributes:
        parameter: The parameter.
        op: The op that multiplies by it, as in `Record.op`.
        k_axis: Its axis K: -1 for ``[..., N, K]``, -2 for ``[..., K, N]``, 1 for a convolution's
            ``[N, K, 1...]``.
        fault: Why it can't be packed; empty where it can.
        turned: Whether packing along its other axis was tried before, and failed.
        source: The line of the user's code that multiplies by it, where a graph tells.
        pre_scaled: Whether it gets a pre-scale, where a graph tells.
        adapter: The adapter that a graph shows it to be, or None.
    """

    parameter: nn.Parameter
    op: str
    k_axis: int
    fault: str = ""
    turned: bool = False
    source: str = ""
    pre_scaled: bool = False
    adapter: Adapter | None = None

    @property
    def as_stored(self) -> Tensor:
        """The parameter as ``[..., N, K]``; of a distributed one, this process's part."""
        values = local_of(self.parameter).detach()
        if self.k_axis == 1 and values.ndim > 2:
            return values.flatten(1)
        return values if self.k_axis == -1 else values.transpose(-1, -2)

    @property
    def shard(self) -> str:
        """Which part of the weight this process has, as in `Record.shard`."""
        ndim = self.parameter.ndim
        n_axis = 0 if self.k_axis == 1 else -3 - self.k_axis  # the other of the last two
        names = dict.fromkeys(range(ndim), "E") | {self.k_axis % ndim: "K", n_axis % ndim: "N"}
        return shard_text(shards_of(self.parameter), names)

    def logical(self, packed: Int4TileTensor) -> Int4TileTensor:
        """`packed`, which is ``[..., N, K]``, viewed with the axes of the parameter."""
        axes = list(range(packed.ndim))
        if self.k_axis == 1 and self.parameter.ndim > 2:
            axes += [NEW_AXIS] * (self.parameter.ndim - 2)
        elif self.k_axis == -2:
            axes[-2:] = axes[:-3:-1]
        return packed.like(axes=tuple(axes))


# --- by module -----------------------------------------------------------------------------------


def candidates_of_modules(owners: Owners) -> list[Candidate]:
    """Parameters of modules of known types: Linear, Conv1D, 1x1 Conv, attention, experts."""
    found = []
    for parameter in owners.parameters.values():
        if not _is_plain(parameter) or parameter.ndim < 2:
            continue
        candidate = _known_use(parameter, owners)
        if candidate is not None:
            found.append(candidate)
    return found


def _known_use(parameter: nn.Parameter, owners: Owners) -> Candidate | None:
    uses = [use_of(module, parameter) for module in owners.of(parameter)]
    known = [use for use in uses if use is not None]
    if not known:
        return None
    op, k_axis = known[0]
    fault = ""
    if any(isinstance(module, nn.Embedding) for module in owners.of(parameter)):
        fault = _EMBEDDED
    elif len(known) < len(uses) or any(use != known[0] for use in known):
        fault = "shared by modules that use it in different ways"
    elif owners.is_normed(parameter):
        fault = "its adapter (DoRA) computes a norm of it, which packed weights don't support"
    return Candidate(parameter, op, k_axis, fault)


_EMBEDDED = "also read by an embedding, whose rows would become int4 too"


def use_of(module: nn.Module, parameter: nn.Parameter) -> tuple[str, int] | None:
    """How a module multiplies by a parameter.

    Returns:
        The op and the axis K, as in `Candidate`; None for a module or parameter that is not known.
    """
    if isinstance(module, nn.Linear) and parameter is module.weight:
        return "linear", -1
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        ways_in = [getattr(module, name) for name in names]
        return ("linear", -1) if any(parameter is way for way in ways_in) else None
    if is_pointwise(module):
        return ("convolution", 1) if parameter is module.weight else None
    if parameter.ndim != 2:
        # Most of transformers' experts tell whether their weights are transposed.
        transposed = getattr(module, "is_transposed", _EXPERTS.get(type(module).__name__))
        if parameter.ndim == 3 and isinstance(transposed, bool):
            return "experts", -2 if transposed else -1
        return None
    if type(module).__name__ == "Conv1D":  # transformers': x @ weight
        return "addmm", -2
    return None


#: transformers' experts that don't tell whether their weights are transposed (as of 5.23), and
#: whether they are.
_EXPERTS = {
    "Llama4TextExperts": True,
    "JetMoeParallelExperts": False,
    "LongcatFlashExperts": False,
    "Step3p7Experts": False,
}


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a 1x1 convolution: one matrix times the channels of every position."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    plain = {*module.kernel_size, *module.stride} == {1} and module.groups == 1
    return plain and not any(module.padding)


def _is_plain(parameter: nn.Parameter) -> bool:
    return holds_own_values(local_of(parameter)) and not is_lazy(parameter)


# --- by graph ------------------------------------------------------------------------------------


def candidates_of_model(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], config: Int4Config
) -> tuple[list[Candidate], list[Record], dict[int, list[str]]]:
    """Parameters that a model's graphs multiply by, found by running it once, uncompiled.

    The run leaves the model as it was, see `fxint4.runs.state_guard.StateGuard`.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        config: What to pack.

    Returns:
        The parameters; records of the matmuls that stay as they are; and of all parameters that the
        graphs read, by id, the ops that do.
    """
    candidates: dict[int, Candidate] = {}
    kept: list[Record] = []
    read: dict[int, list[str]] = {}
    guard = StateGuard(model)

    def add(found: Iterable[Candidate]) -> None:
        for candidate in found:
            known = candidates.setdefault(id(candidate.parameter), candidate)
            known.adapter = known.adapter or candidate.adapter
            if known.k_axis != candidate.k_axis:
                known.fault = known.fault or "multiplied along different axes"
            known.fault = known.fault or candidate.fault

    def runner_of(analysis: Analysis) -> GraphRunner:
        kept.extend(entry for entry in analysis.found if isinstance(entry, Record))
        captured, weights = analysis.captured, analysis.weights
        text = graph_text(captured, weights.labels)
        placeholders = list(enumerate(captured.graph.find_nodes(op="placeholder")))
        readers_of = {
            position: readers(text, weights.labels.get(node.name, ""))
            for position, node in placeholders
        }
        constant = [(position, node) for position, node in placeholders if node in weights.tensors]
        met: set[tuple[int, ...]] = set()

        def run(arguments: list[Any]) -> Sequence[Any]:
            tensors = {node: arguments[position] for position, node in constant}
            identity = tuple(map(id, tensors.values()))
            if identity not in met:  # layers that share code have parameters of their own
                met.add(identity)
                add(candidates_of_graph(analysis, tensors))
                for position, ops in readers_of.items():
                    if isinstance(arguments[position], nn.Parameter):
                        known = read.get(id(arguments[position]), ())
                        read[id(arguments[position])] = list(dict.fromkeys([*known, *ops]))
            guard.keep(arguments[position] for position in weights.written)
            return cast("Sequence[Any]", captured(*arguments))

        return run

    with (
        traced(model, config, runner_of) as run_model,
        _unchanged_buffers(model),
        guard.run(args, kwargs) as own,
    ):
        run_model(*own)
    return list(candidates.values()), kept, read


@contextlib.contextmanager
def _unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Put back the buffers that code between two graphs writes to; a `StateGuard` sees graphs."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, held in before:
                if not torch.equal(buffer, held):
                    buffer.copy_(held)


def candidates_that_run(
    candidates: Sequence[Candidate],
    owners: Owners,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> list[Candidate]:
    """Those of `candidates_of_modules` whose modules are called, found by running the model.

    For code that can't be captured: around an nn.LSTM, or where Dynamo is switched off. The model
    runs in eager mode; its buffers are put back.

    Args:
        candidates: The candidates.
        owners: The modules that own them.
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    if not candidates:
        return []
    called: set[nn.Module] = set()
    # Attention reads the weight of its output layer, and does not call that layer.
    callers: dict[nn.Module, nn.Module] = {
        module.out_proj: module
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    modules = {
        callers.get(module, module)
        for candidate in candidates
        for module in owners.of(candidate.parameter)
    }
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in modules
    ]
    guard = StateGuard(model)
    try:
        with torch.no_grad(), _unchanged_buffers(model), guard.run(args, kwargs) as own:
            own_args, own_kwargs = own
            model(*own_args, **own_kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        candidate
        for candidate in candidates
        if any(callers.get(each, each) in called for each in owners.of(candidate.parameter))
    ]


def candidates_of_graph(analysis: Analysis, tensors: Mapping[fx.Node, Tensor]) -> list[Candidate]:
    """Parameters that matmuls of a captured graph multiply by, and whether they may be packed.

    A parameter may be packed if all ops of the graph that read it work with a packed one. That is
    tried out on meta tensors, which have no data.

    Args:
        analysis: Of the graph.
        tensors: The real tensor of each constant placeholder in a call.
    """
    candidates: dict[fx.Node, Candidate] = {}
    for captured in analysis.sites:
        site = analysis.plans.of(captured, [tensors[root] for root in captured.weight.roots])
        for root in site.weight.roots:
            parameter = tensors[root]
            if isinstance(parameter, nn.Parameter) and _is_plain(parameter) and parameter.ndim > 1:
                direct = site.weight.node is root
                k_axis = _K_AXES.get(site.weight.axes, -1) if direct else -1
                record = site.record
                candidate = Candidate(parameter, record.op, k_axis, source=record.source)
                candidate = candidates.setdefault(root, candidate)
                candidate.pre_scaled |= direct and not site.kept and site.shape.pre_scaled
                candidate.adapter = candidate.adapter or site.adapter
    trying = dict(candidates)
    while trying:
        with real_tensors(), without_dense_copies():
            failed = _first_failure(analysis.captured, trying)
        if failed is None:
            break
        roots, reason = failed
        for root in roots:
            candidate = trying[root]
            if candidate.turned or candidate.k_axis == 1:
                candidate.fault = reason
                del trying[root]
            else:
                candidate.k_axis = -3 - candidate.k_axis  # -1 for -2, -2 for -1
                candidate.turned = True
    return list(candidates.values())


_K_AXES = {"KN": -2, "*KN": -2, "EKN": -2, "NK1": 1}


def _first_failure(
    gm: fx.GraphModule, candidates: Mapping[fx.Node, Candidate]
) -> tuple[set[fx.Node], str] | None:
    """Run the nodes that read the candidates, on packed tensors without data.

    Returns:
        The candidates that the first failing node depends on, and why it fails; None if all work.
    """
    packed: dict[fx.Node, Any] = {}
    origins: dict[fx.Node, set[fx.Node]] = {}
    for root, candidate in candidates.items():
        packed[root] = _without_data(candidate)
        origins[root] = {root}
    for node in gm.graph.nodes:
        reads = [operand for operand in node.all_input_nodes if operand in packed]
        if not reads or node in candidates:
            continue
        origin = set().union(*(origins[operand] for operand in reads))
        if node.op == "output":
            return origin, "the model returns it"
        if node.target is aten.embedding.default:
            return origin, _EMBEDDED
        try:
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs),
                lambda operand: packed[operand] if operand in packed else _meta(operand),
            )
            result = node.target(*args, **kwargs)
        except Exception as error:
            name = str(node.target).removeprefix("aten.").removesuffix(".default")
            detail = "" if isinstance(error, NotImplementedError) else f" ({error})"
            return origin, f"read by {name}, which packed weights don't support{detail}"
        parts = result if isinstance(result, (list, tuple)) else [result]
        if any(isinstance(part, Int4TileTensor) for part in parts):
            packed[node], origins[node] = result, origin
    return None


def _without_data(candidate: Candidate) -> Int4TileTensor:
    *batch, n, k = candidate.as_stored.shape
    shape = choose_shape(n, k, 32, 2, batch=tuple(batch))
    packed = Int4TileTensor.empty(shape, candidate.parameter.dtype, torch.device("meta"))
    if candidate.pre_scaled:
        packed = packed.like(
            pre_scale=torch.empty(shape.k_padded, dtype=torch.float32, device="meta")
        )
    return candidate.logical(packed)


def _meta(node: fx.Node) -> Any:
    """The value of a node as meta tensors; dynamic sizes are those of the example inputs."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            sizes = [example_size(size) or 1 for size in value.shape]
            return torch.empty(sizes, dtype=value.dtype, device="meta")
        if isinstance(value, torch.SymInt):
            return example_size(value) or 1
        return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value

    return plain(node.meta["val"])
