"""The `torch.compile` backend "int4tile"."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxint4._pytorch.aot import CompileState, compile_fx, warn_if_untested
from fxint4._pytorch.dynamo import frame_id, graph_break_reason
from fxint4.config.int4_config import Int4Config
from fxint4.config.options import split_options
from fxint4.errors import OptionError, TrainingError
from fxint4.graph.names import Inputs, model_around, parameters_around
from fxint4.graph.placeholders import GraphWeights, inputs_of
from fxint4.kernels.policy import Policy
from fxint4.lowering.bound_records import BoundRecords
from fxint4.lowering.dense import compile_graph
from fxint4.lowering.graph import Binding, Int4Graph, expected_rows
from fxint4.passes.encoder_layer import DECOMPOSITIONS
from fxint4.passes.pipeline import Analysis, run_passes
from fxint4.passes.site import Site
from fxint4.report import GraphReport, Report
from fxint4.report.graph_text import graph_text
from fxint4.report.latest import remember, report_of_caller
from fxint4.tensor import Int4TileTensor
from fxint4.weights.cache import WeightCache, weight_cache
from fxint4.weights.formats import Format

__all__ = ["compile_captured", "int4tile"]

logger = logging.getLogger("fxint4")


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
        TrainingError: A module in training mode, or an input that requires grad.
        FoldError: A weight could not be folded.
    """
    config, patches = split_options(mode, options)
    if config.measure:
        raise OptionError(
            "measure is for fxint4.explain, pack_, rewrite and package: a backend has no inputs to "
            "run the model on"
        )
    config.require_choices()
    report = report_of_caller(config, patches, model_around())
    return compile_captured(gm, example_inputs, config, patches, report)


def compile_captured(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Int4Config,
    patches: Mapping[str, Any],
    report: Report,
    cache: WeightCache = weight_cache,
) -> Callable[..., Any]:
    """Compile one captured graph and add it to a report; see `int4tile`.

    Args:
        gm: The graph, parameters among its inputs.
        example_inputs: Its inputs.
        config: What to pack.
        patches: Of Inductor's config.
        report: Gets this graph.
        cache: Holds the packed weights.

    Raises:
        TrainingError: A module in training mode, or an input that requires grad.
        FoldError: A weight could not be folded.
    """
    warn_if_untested()
    inputs = inputs_of(gm, example_inputs)
    _refuse_training(inputs, example_inputs)
    graph_break = graph_break_reason(gm)

    def inner_compile(
        captured: fx.GraphModule, fake_inputs: Sequence[Any], **kwargs: Any
    ) -> Callable[..., Any]:
        state = CompileState(patches)
        weights = GraphWeights.of_dynamo(captured, gm, inputs, example_inputs)
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
        report.put(key, GraphReport(tuple(records), parameters, before, after, graph_break))
        remember(report)
        return graph or compile_graph(captured, fake_inputs, policy, made.run_pass, **kwargs)

    return compile_fx(gm, example_inputs, inner_compile, patches, DECOMPOSITIONS, Int4TileTensor)


def _refuse_training(inputs: Inputs, example_inputs: Sequence[Any]) -> None:
    for index, value in enumerate(example_inputs):
        name = inputs.names[index]
        if isinstance(value, nn.Parameter):
            owner = inputs.owner(index)
            if owner is not None and owner.training:
                raise TrainingError(
                    f"the {type(owner).__name__} that owns {name} {tuple(value.shape)} is in "
                    "training mode; backend 'int4tile' is for inference: call model.eval() first"
                )
        elif _wants_gradient(value):
            raise TrainingError(
                f"input {name} {tuple(value.shape)} requires grad; backend 'int4tile' is for "
                "inference and computes none: pass it detached, or call under torch.no_grad()"
            )


def _wants_gradient(value: object) -> bool:
    # An input that eager code computed from parameters requires grad, too, but is not a leaf.
    if not isinstance(value, Tensor) or not torch.is_grad_enabled():
        return False
    return value.requires_grad and value.is_leaf
