"""The `torch.compile` backend "int4tile"."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxint4._pytorch.aot import (
    CompileState,
    compile_for_training,
    is_saving,
    warn_if_untested,
)
from fxint4._pytorch.dynamo import (
    frame_function,
    frame_id,
    graph_break_reason,
    without_guards_of_buffers,
)
from fxint4.config.int4_config import Int4Config
from fxint4.config.options import split_options
from fxint4.errors import OptionError, TrainingError
from fxint4.graph.names import (
    Inputs,
    KnownInputs,
    layer_name,
    model_around,
    modules_in_call,
    origins_in_call,
    parameters_around,
)
from fxint4.graph.placeholders import GraphWeights, inputs_of
from fxint4.kernels.policy import Policy
from fxint4.lowering.bound_records import BoundRecords
from fxint4.lowering.dense import compile_graph
from fxint4.lowering.graph import Binding, Int4Graph, expected_rows
from fxint4.passes.adapters import adapter_by_name
from fxint4.passes.capture import capture
from fxint4.passes.pipeline import Analysis, run_passes
from fxint4.passes.site import Site
from fxint4.report import GraphReport, Report
from fxint4.report.graph_text import graph_text
from fxint4.report.latest import remember, report_of_caller
from fxint4.tensor import Int4TileTensor, is_packed
from fxint4.weights.cache import WeightCache, weight_cache
from fxint4.weights.formats import Format

__all__ = ["compile_captured", "int4tile", "packed_guards"]

logger = logging.getLogger("fxint4")

#: For the option ``guard_filter_fn`` of torch.compile: leaves out guards that tell nothing new of
#: packed weights.
packed_guards = functools.partial(without_guards_of_buffers, Int4TileTensor)


def int4tile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one graph that Dynamo captured, for `torch.compile(..., backend="int4tile")`.

    Args:
        gm: The graph, parameters among its inputs.
        example_inputs: Its inputs.
        mode: As for `torch.compile`.
        options: Fields of `Int4Config` and, beside them, options of Inductor.

    Returns:
        The compiled graph, which takes its inputs.

    Raises:
        OptionError: An option or mode that is not known, or `measure`, or a budget without choices.
        TrainingError: A module in training mode, or an input that requires grad, and no weight of
            the model is packed. (If one is, the graph is compiled for training.)
        FoldError: A weight could not be folded.
    """
    config, patches = split_options(mode, options)
    if config.measure:
        raise OptionError(
            "measure is for fxint4.explain, pack_, rewrite and package: a backend has no inputs to "
            "run the model on"
        )
    config.require_choices()
    model = model_around()
    report = report_of_caller(config, patches, model)
    if model is not None:
        report.about(model)
    return compile_captured(gm, example_inputs, config, patches, report, trains=True)


def compile_captured(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Int4Config,
    patches: Mapping[str, Any],
    report: Report,
    cache: WeightCache = weight_cache,
    trains: bool = False,
) -> Callable[..., Any]:
    """Compile one captured graph and add it to a report; see `int4tile`.

    Args:
        gm: The graph, parameters among its inputs.
        example_inputs: Its inputs.
        config: What to pack.
        patches: Of Inductor's config.
        report: Gets this graph.
        cache: Holds the packed weights.
        trains: Whether the graph of a model with packed weights may be compiled for training.

    Raises:
        TrainingError: A module in training mode, or an input that requires grad, and the graph is
            not compiled for training.
        FoldError: A weight could not be folded.
    """
    warn_if_untested()
    inputs = inputs_of(gm, example_inputs)
    model = next(iter(inputs.outermost_modules.values()), frame_function())
    report.about(model, (value for value in example_inputs if isinstance(value, Tensor)))
    graph_break = graph_break_reason(gm)
    if _is_training(inputs, example_inputs, trains):
        report.put(*_trained(inputs, example_inputs, graph_break))
        remember(report)
        return compile_for_training(gm, example_inputs, patches)

    stage = _LastStage(gm, inputs, example_inputs, config, patches, report, cache, graph_break)
    resume = _Resume(inputs.names, inputs.buffers, config, patches)
    compiled = capture(gm, example_inputs, stage, patches, resume)
    return _for_inference_alone(compiled, inputs, len(example_inputs))


@dataclass
class _LastStage:
    """What is done with a captured graph, in the place of Inductor's last stage.

    Attributes:
        gm: Dynamo's graph; None where that is not known any more.
        inputs: Names of its inputs.
        example_inputs: Its inputs.
        config: What to pack.
        patches: Of Inductor's config.
        report: Gets the graph.
        cache: Holds the packed weights.
        graph_break: The reason of the graph break at the end of the graph, if there is one.
    """

    gm: fx.GraphModule | None
    inputs: Inputs | KnownInputs
    example_inputs: Sequence[Any]
    config: Int4Config
    patches: Mapping[str, Any]
    report: Report
    cache: WeightCache
    graph_break: str | None

    def __call__(
        self, captured: fx.GraphModule, fake_inputs: Sequence[Any], **kwargs: Any
    ) -> Callable[..., Any]:
        """Rewrite and compile the captured graph, and add it to the report."""
        config, report, cache = self.config, self.report, self.cache
        state = CompileState(self.patches)
        weights = GraphWeights.of_dynamo(captured, self.gm, self.inputs, self.example_inputs)
        policy = Policy.now(config)
        key = (frame_id(), frozenset(map(weights.place, weights.tensors.values())))
        of_bindings = BoundRecords(report, key, config, policy)
        graph: Int4Graph | None = None
        binding: Binding | None = None

        def choose(analysis: Analysis) -> tuple[Sequence[Site], Sequence[Format | None]]:
            nonlocal graph, binding
            graph = Int4Graph(analysis, fake_inputs, cache, policy, state, kwargs, of_bindings)
            binding = graph.bind_first(weights.tensors)
            return binding.sites, binding.formats

        made = run_passes(
            captured,
            weights,
            config,
            state.fake_mode,
            last="rewrite",
            rows=expected_rows,
            cache=cache,
            choose=choose,
        )
        names, labels, records = weights.labels, dict[str, str](), made.records
        before = after = graph_text(captured, names, labels)
        if graph is not None and binding is not None:
            after = graph_text(made.rewritten.gm, {**names, **made.rewritten.labels}, labels)
            graph.compile_first(binding, made.rewritten)
            bound = iter(of_bindings.first(binding))
            records = [
                next(bound) if isinstance(entry, Site) else record
                for entry, record in zip(made.found, records, strict=True)
            ]
        parameters = {**weights.parameters, **parameters_around(weights.origins.values())}
        report.put(key, GraphReport(tuple(records), parameters, before, after, self.graph_break))
        remember(report)
        return graph or compile_graph(captured, fake_inputs, policy, made.run_pass, **kwargs)


@dataclass
class _Resume:
    """Goes on with a captured graph that was saved, where it is loaded.

    Attributes:
        names: Of the inputs of Dynamo's graph.
        buffers: The positions of those that are registered buffers.
        config: What to pack.
        patches: Of Inductor's config.
    """

    names: Sequence[str]
    buffers: frozenset[int]
    config: Int4Config
    patches: Mapping[str, Any]

    def __call__(self, args: Sequence[Any]) -> _LastStage:
        """The last stage for the inputs of a first call."""
        origins = origins_in_call(value for value in args if isinstance(value, Tensor))
        here = [origins.get(id(value)) for value in args]
        names = [
            origin.name if origin else name for origin, name in zip(here, self.names, strict=True)
        ]
        inputs = KnownInputs(names, self.buffers, origins)
        report = Report(self.config, self.patches, must_write=False)
        args_of_stage = (self.config, self.patches, report, weight_cache)
        return _LastStage(None, inputs, args, *args_of_stage, graph_break=None)


def _is_training(inputs: Inputs, example_inputs: Sequence[Any], allowed: bool) -> bool:
    """Whether to compile a graph for training: adapters, say, over packed weights.

    A graph of a model that has packed weights is compiled for training if one of its modules is in
    training mode, or if one of its inputs other than parameters requires grad. Parameters that do
    tell nothing: all of them do unless somebody said otherwise.

    Args:
        inputs: The inputs of Dynamo's graph.
        example_inputs: The real ones.
        allowed: Whether it may be.

    Raises:
        TrainingError: A module in training mode, or a leaf that requires grad, in a graph of a
            model without packed weights, or where training is not allowed.
    """
    told, derived = "", False
    for index, value in enumerate(example_inputs):
        name = inputs.names[index]
        if isinstance(value, nn.Parameter):
            owner = inputs.owner(index)
            # PEFT adds adapters to a model in eval mode that are not in it; the layers tell.
            if adapter_by_name(layer_name(name), [name]) is not None:
                continue
            if owner is not None and owner.training:
                told = (
                    f"the {type(owner).__name__} that owns {name} {tuple(value.shape)} is in "
                    "training mode; backend 'int4tile' is for inference: call model.eval() first"
                )
                break
        elif isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            # An input that eager code computed from parameters requires grad, but is no leaf.
            derived = True
            if value.is_leaf:
                told = (
                    f"input {name} {tuple(value.shape)} requires grad; backend 'int4tile' is for "
                    "inference and computes none: pass it detached, or call under torch.no_grad()"
                )
                break
    if not (told or derived):
        return False
    packed = allowed and _is_packed(inputs, example_inputs)
    if told and not packed:
        raise TrainingError(
            f"{told}. Adapters are trained over weights that fxint4.pack_(model) has packed before"
        )
    return packed


def _is_packed(inputs: Inputs, example_inputs: Sequence[Any]) -> bool:
    """Whether the model that is being called has packed weights, in this graph or in others."""
    modules = [*inputs.outermost_modules.values(), *modules_in_call()]
    parameters = (parameter for module in modules for parameter in module.parameters())
    return any(map(is_packed, (*example_inputs, *parameters)))


def _trained(
    inputs: Inputs, example_inputs: Sequence[Any], graph_break: str | None
) -> tuple[Hashable, GraphReport]:
    """What a report says of a graph that is compiled for training, and the key of that."""
    reason = "compiled for training, which packs nothing"
    origins = inputs.origins
    parameters = {
        key: parameter._replace(reason=parameter.reason or reason)
        for key, parameter in parameters_around(origins.values()).items()
    }
    places = (origins.get(id(value)) for value in example_inputs)
    key = (frame_id(), frozenset(origin.place for origin in places if origin is not None))
    return key, GraphReport((), parameters, "", "", graph_break)


def _for_inference_alone(
    compiled: Callable[..., Any], inputs: Inputs, count: int
) -> Callable[..., Any]:
    """Wrap compiled code to refuse modules that have been put into training mode since.

    Dynamo does not compile again for that, and gradients would end here without a word. Within
    torch.no_grad() there are none, and Dynamo compiles for that anew.
    """
    if not torch.is_grad_enabled() or is_saving():
        return compiled
    owners = dict.fromkeys(map(inputs.owner, range(count)))
    refs = [weakref.ref(owner) for owner in owners if owner is not None]
    if not refs:
        return compiled

    def run(*args: Any) -> Any:
        for ref in refs:
            owner = ref()
            if owner is not None and owner.training:
                raise TrainingError(
                    f"a {type(owner).__name__} is in training mode, but this code was compiled "
                    "for inference, in evaluation mode with gradients enabled. Evaluate within "
                    "torch.no_grad(), whose code is compiled by itself; here, call "
                    "torch.compiler.reset() first"
                )
        return compiled(*args)

    return run
