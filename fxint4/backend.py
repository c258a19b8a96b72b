"""The `torch.compile` backend "int4tile"."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxint4 import _torch
from fxint4.calibrate import settled
from fxint4.capture import Analysis, compiled_anew, inputs_of
from fxint4.config import Int4Config, split_options
from fxint4.errors import OptionError, TrainingError
from fxint4.kernel_choice import Policy
from fxint4.lowering import compile_graph
from fxint4.measure import Errors, measure
from fxint4.names import (
    Inputs,
    layer_name,
    names_in_call,
    outermost_in_call,
    parameters_in_call,
)
from fxint4.packing import Owners, from_modules, replace_parameters
from fxint4.passes import DECOMPOSITIONS, Site, fold, folded_record, with_matmuls
from fxint4.report import GraphReport, Report, graph_text
from fxint4.runtime import Int4Graph, Meeting, expected_rows
from fxint4.tensor import Int4TileTensor
from fxint4.trials import Trials

__all__ = ["explain", "int4tile", "last_report", "remember"]

logger = logging.getLogger("fxint4")

_reports: list[tuple[weakref.ref[object], Report]] = []
_newest: Report | None = None


def int4tile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one graph that Dynamo captured; what `torch.compile(..., backend="int4tile")` calls.

    Args:
        gm: the graph, parameters among its inputs.
        example_inputs: its inputs.
        mode: as for `torch.compile`.
        options: fields of `Int4Config` and, beside them, options of Inductor.

    Raises:
        OptionError: an option or mode that is not known.
        TrainingError: a module in training mode, or an input that requires grad.
        FoldError: a weight could not be folded.
    """
    config, patches = split_options(mode, options)
    if config.measure:
        raise OptionError(
            "measure is for fxint4.explain, pack_, rewrite and package: a backend has no inputs to "
            "run the model on"
        )
    config.check_settled()
    return _compile_graph(gm, example_inputs, config, patches, _report_of_caller(config, patches))


def last_report() -> Report | None:
    """The newest report, or None.

    Of the `torch.compile(..., backend="int4tile")` that compiled last, of `rewrite` or `package`.
    """
    return _newest


def remember(report: Report) -> None:
    """Make a report the one that `last_report` returns."""
    global _newest
    _newest = report


def explain(
    model: Callable[..., Any],
    *args: Any,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Compile `model` with backend "int4tile", run it on the arguments, return the report.

    The model is compiled anew, whatever was compiled before, and is not changed. Unless the option
    `measure` is False it also runs once with its own weights and once with the quantised ones, node
    by node, which tells what that does to the output of every matmul and of the model. All runs
    begin with the same random state, and leave it, the arguments, and buffers that the model writes
    to, as they were.

    Args:
        model: a module in eval mode, or a function.
        *args: its arguments.
        mode: as for `torch.compile`.
        options: as for `torch.compile(..., backend="int4tile")`.
        **kwargs: its keyword arguments.

    Raises:
        OptionError: an option or mode that is not known.
        TrainingError: a module in training mode.
        FoldError: a weight could not be folded.
    """
    config, patches = split_options(mode, options)
    config = settled(config, model, args, kwargs)
    report = Report(config, patches)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return _compile_graph(gm, example_inputs, config, patches, report)

    compiled = compiled_anew(model, backend)
    if config.measure is False:
        compiled(args, kwargs)
        return report
    trials = Trials(model)
    try:
        errors = _measured(model, args, kwargs, config, trials)
        with trials.run(args, kwargs) as (own_args, own_kwargs):
            compiled(own_args, own_kwargs)
    finally:
        trials.forget()
    if errors is not None:
        report.measured(errors.output, errors.of_weights)
    return report


def _measured(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    config: Int4Config,
    trials: Trials,
) -> Errors | None:
    """The errors of a model; None, and a warning in the log, where it does not run node by node."""
    try:
        return measure(model, args, kwargs, config, trials)
    except Exception as error:
        if config.measure:
            raise
        logger.warning("errors could not be measured: %s: %s", type(error).__name__, error)
        return None


def _compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Int4Config,
    patches: Mapping[str, Any],
    report: Report,
) -> Callable[..., Any]:
    """Compile one captured graph and add it to a report; see `int4tile`.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        config: what to pack.
        patches: of Inductor's config.
        report: grows by this graph.
    """
    _torch.warn_if_untested()
    inputs = inputs_of(gm, example_inputs)
    _refuse_training(inputs, example_inputs)
    graph_break = _torch.graph_break_reason(gm)

    def inner_compile(
        captured: fx.GraphModule, fake_inputs: Sequence[Any], **kwargs: Any
    ) -> Callable[..., Any]:
        state = _torch.CompileState(patches)
        analysis = Analysis(captured, gm, inputs, example_inputs, config, state)
        if config.free_weights and _free(analysis, inputs, config):
            _torch.restart_trace()
        weights = analysis.weights
        sites, records = fold(analysis.found, weights.tensors, expected_rows, config)
        key = (_torch.frame_id(), *sorted(weights.parameters))
        names, labels = weights.labels, dict[str, str]()
        policy = Policy.now(config)
        before = after = graph_text(captured, names, labels)
        if sites:
            met = _Meetings(report, key, sites, config, policy)
            graph = Int4Graph(
                captured, fake_inputs, sites, weights.tensors, config, policy, state, kwargs, met
            )
            after = graph.compile_first(
                lambda made: graph_text(made.gm, {**names, **made.labels}, labels)
            )
            packed = [record for record in records if record.action == "packed"]
            packed = with_matmuls(packed, sites, graph.expected_forms, config, policy)
            records = [packed.pop(0) if record.action == "packed" else record for record in records]
        parameters = {**weights.parameters, **parameters_in_call(weights.tensors.values())}
        report.put(key, GraphReport(tuple(records), parameters, before, after, graph_break))
        remember(report)
        return graph if sites else compile_graph(captured, fake_inputs, policy, **kwargs)

    return _torch.compile_fx(
        gm, example_inputs, inner_compile, patches, DECOMPOSITIONS, Int4TileTensor
    )


def _free(analysis: Analysis, inputs: Inputs, config: Int4Config) -> bool:
    """Pack what this graph and its modules multiply by; whether there was any."""
    owners = Owners(_sharing_code(inputs.outermost_modules))
    found = {id(candidate.parameter): candidate for candidate in from_modules(owners)}
    for candidate in analysis.candidates():
        if id(candidate.parameter) in owners.parameters:
            found[id(candidate.parameter)] = candidate
    free = [candidate for candidate in found.values() if not candidate.fault]
    with _torch.real_tensors():
        records = replace_parameters(free, owners, config)
    return any(record.action == "packed" for record in records)


def _sharing_code(compiled: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """The modules being compiled, and those of their kind around them, with their full names.

    Equal layers that are compiled one by one share compiled code, which fits packed weights or
    others but not both: so all of them are packed at once. Other modules of the model are not
    ours to change.
    """
    kinds = {type(module) for module in compiled.values()}
    kinds -= {kind for kind in kinds if kind.__module__.startswith("torch.")}
    prefixes = {id(module): name for name, module in compiled.items()}
    found = []
    for outer in outermost_in_call(compiled.values()):
        prefix = prefixes.get(id(outer), "")
        for name, module in outer.named_modules(prefix=prefix):
            if type(module) in kinds or any(module is one for one in compiled.values()):
                found.append((name, module))
    return found


class _Meetings:
    """Adds to a report the weights that a graph meets only when it runs.

    Code that was compiled for one of twelve equal layers serves the other eleven.

    Args:
        report: the report.
        key: of the graph in it.
        sites: of the graph.
        config: what the user asked for.
        policy: which kernels the graph's compile chooses.
    """

    def __init__(
        self,
        report: Report,
        key: Hashable,
        sites: Sequence[Site],
        config: Int4Config,
        policy: Policy,
    ) -> None:
        self._report = report
        self._key = key
        self._sites = sites
        self._config = config
        self._policy = policy
        self._known = {site.record.weight_key for site in sites}

    def __call__(self, meeting: Meeting) -> None:
        """Record every matmul of the graph whose weight is met and not known yet."""
        roots = [[meeting.tensors[root] for root in site.weight.roots] for site in self._sites]
        keys = [
            (*map(id, of_site), site.weight.signature)
            for site, of_site in zip(self._sites, roots, strict=True)
        ]
        if self._known.issuperset(keys):
            return
        by_identity = names_in_call(root for of_site in roots for root in of_site)
        records, new = [], []
        for position, (site, form) in enumerate(zip(self._sites, meeting.forms, strict=True)):
            packed = meeting.packed.get((site.weight.roots, site.weight.signature))
            record = folded_record(site, packed, form) if packed else site.record
            if packed and keys[position] not in self._known:
                new.append(position)
            known = record.parameters  # one name for all buffers of a packed weight
            largest_first = sorted(roots[position], key=lambda root: -root.numel())
            names = tuple(
                dict.fromkeys(
                    by_identity.get(id(root), known[min(index, len(known) - 1)])
                    for index, root in enumerate(largest_first)
                )
            )
            records.append(
                dataclasses.replace(
                    record, name=layer_name(names[0]), parameters=names, weight_key=keys[position]
                )
            )
        records = with_matmuls(records, self._sites, meeting.forms, self._config, self._policy)
        self._known.update(keys[position] for position in new)
        met = [root for position in new for root in roots[position]]
        met_names = names_in_call(met)
        parameters = parameters_in_call(met) or {
            id(root): (met_names.get(id(root), ""), root.numel()) for root in met
        }
        self._report.add(self._key, [records[position] for position in new], parameters)


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
    # An input that eager code computed from parameters requires grad, too, but is no leaf.
    if not isinstance(value, Tensor) or not torch.is_grad_enabled():
        return False
    return value.requires_grad and value.is_leaf


def _report_of_caller(config: Int4Config, patches: Mapping[str, Any]) -> Report:
    """The report of the torch.compile call that asks; a new one for a new call."""
    request = _torch.compile_request(depth=3)
    _reports[:] = [(ref, report) for ref, report in _reports if ref() is not None]
    for ref, report in _reports:
        if request is not None and ref() is request:
            return report
    report = Report(config, patches)
    if request is not None:
        _reports.append((weakref.ref(request), report))
    return report
