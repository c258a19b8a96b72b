"""`fxint4.pack_`: pack the weights of a model in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxint4.config.int4_config import Int4Config
from fxint4.config.options import split_options
from fxint4.errors import FoldError, OptionError, first_line
from fxint4.frontends.candidates import (
    Candidate,
    Owners,
    candidates_of_model,
    candidates_of_modules,
    candidates_that_run,
)
from fxint4.frontends.in_place import check_replaceable, tell_followers
from fxint4.frontends.parameters import (
    materialize_parametrized,
    packed_candidate,
    replace_parameters,
)
from fxint4.graph.names import parameters_of
from fxint4.passes.site import Site
from fxint4.report import GraphReport, Parameter, Record, Report
from fxint4.runs.calibrate import with_budget_choices
from fxint4.runs.errors_of import measure
from fxint4.runs.state_guard import StateGuard
from fxint4.tensor import is_packed

__all__ = ["pack_"]


def pack_(
    model: nn.Module,
    example_args: Sequence[Any] = (),
    options: Mapping[str, Any] | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | int | None = None,
) -> Report:
    """Replace the weights of a model by packed ones, one at a time, and free the originals.

    With example arguments the model runs once, and all parameters that its graphs multiply by are
    packed; buffers are put back. Where modules are in no graph (around an nn.LSTM, say), it runs
    once more, and weights of known modules that are called are packed too. Without example
    arguments the weights of all known modules are packed: `nn.Linear`, 1x1 convolutions,
    `nn.MultiheadAttention`, and transformers' Conv1D and experts. Afterwards the
    model runs in eager mode and with any backend, fastest with
    `torch.compile(model, backend="int4tile")`.

    A parametrized weight (weight_norm, say) becomes a plain one. A parameter that an embedding also
    reads, or an op that packed weights don't support, stays as it is; the report says why.

    With the option `measure` the model runs twice more on the example arguments, before anything is
    replaced, to measure the errors of the output of every matmul and of the model.

    Args:
        model: Changed in place.
        example_args: Arguments of the model.
        options: Fields of `Int4Config`.
        example_kwargs: Keyword arguments of the model.
        device: Where the model goes, weight by weight, so that the device never holds more than the
            packed model and one weight; weights may be memory-mapped. None leaves the model where
            it is.

    Returns:
        The report.

    Raises:
        TypeError: Not a module, or example arguments that are not a tuple or list.
        OptionError: An option that `Int4Config` does not have, `measure` without example arguments,
            or a device that can't be used.
        ReportError: The report can't be written.
        FoldError: A weight could not be packed (out of memory, say). The error names the layer.
            The weights before it stay packed; another call packs the rest.
    """
    config, patches = split_options(None, options)
    if patches:
        raise OptionError(f"pack_ compiles nothing and takes no option {sorted(patches)[0]!r}")
    target = _checked_device(device)
    _check_model(model, example_args)
    examples = bool(example_args or example_kwargs)
    if config.measure and not examples:
        raise OptionError(
            f"measure={config.measure} needs example_args or example_kwargs to run the model on"
        )
    materialize_parametrized(model, config)
    if examples:
        config = with_budget_choices(config, model, example_args, example_kwargs or {})
    else:
        config.require_choices()
    report = Report(config)
    owners = Owners([("", model)])
    kept: list[Record] = []
    read: dict[int, list[str]] = {}
    candidates = candidates_of_modules(owners)
    if examples:
        run = model, example_args, example_kwargs or {}
        found, kept, read = candidates_of_model(*run, config)
        unread = [each for each in candidates if id(each.parameter) not in read]
        candidates = [each for each in found if id(each.parameter) in owners.parameters]
        candidates += candidates_that_run(unread, owners, *run)
        del found, unread
    for candidate in candidates:
        candidate.adapter = candidate.adapter or owners.adapter(candidate.parameter)
    of_parameters: dict[str, float] = {}
    if config.measure:
        report.output_error, of_parameters = _measured(
            model, example_args, example_kwargs or {}, config, candidates, owners
        )
    parameters = _with_reasons(parameters_of(model), read, examples)
    records = [
        dataclasses.replace(record, output_error=of_parameters.get(record.parameters[0]))
        if record.action == "packed"
        else record
        for record in replace_parameters(candidates, owners, config, target)
    ]
    if target is not None:
        _move_rest(model, target)
    tell_followers(model, config)
    report.about(model)
    report.put("pack_", GraphReport((*records, *kept), parameters, "", ""))
    return report


def _with_reasons(
    parameters: Mapping[int, Parameter], read: Mapping[int, Sequence[str]], examples: bool
) -> Mapping[int, Parameter]:
    """Say of each parameter what keeps it out of matmuls.

    Args:
        parameters: Of the model, before any is packed.
        read: Of those that captured graphs read, by id, the ops that do.
        examples: Whether the model was run on example arguments.
    """

    def reason(key: int, parameter: Parameter) -> str:
        if parameter.reason:
            return parameter.reason
        if key in read:
            return f"read by {', '.join(read[key]) or 'no op'}, by no matmul that was found"
        known = f"{parameter.owner} is no kind of module that pack_ knows"
        if examples:
            return (
                "in no graph that the example arguments led to, and its module was not called, or "
                f"{known}"
            )
        return f"{known}; with example arguments it looks at what the model multiplies by"

    return {
        key: parameter._replace(reason=reason(key, parameter))
        for key, parameter in parameters.items()
    }


def _checked_device(device: torch.device | str | int | None) -> torch.device | None:
    if device is None:
        return None
    try:
        target = torch.empty(0, device=device).device
    except Exception as error:  # an unknown name, or a device that this torch or machine lacks
        raise OptionError(f"device {device!r} can't be used: {first_line(error)}") from error
    if target.type == "meta":
        raise OptionError("device is 'meta', where weights have no values; nothing was packed")
    return target


def _check_model(model: object, example_args: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"got a {type(model).__name__}, need the nn.Module to pack")
    if not isinstance(example_args, (tuple, list)):
        raise TypeError(
            f"example_args is a {type(example_args).__name__}; it takes the model's arguments in a "
            "tuple, such as (x,); options have a name: options={'group_size': 64}"
        )
    check_replaceable(model)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise FoldError(
                f"{name} of a lazy module has no shape yet: call the model once, then pack it"
            )


def _measured(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    config: Int4Config,
    candidates: Sequence[Candidate],
    owners: Owners,
) -> tuple[float | None, dict[str, float]]:
    """Measure the errors of packing the candidates, on example arguments.

    Returns:
        The error of the model's output, and the error of the product by each parameter, by its full
        name: the largest one, where several weights are made of a parameter.
    """
    found = {id(candidate.parameter): candidate for candidate in candidates}
    parameters_of_weight: dict[Hashable, list[nn.Parameter]] = {}

    def quantized(root: Tensor) -> Tensor | None:
        candidate = found.get(id(root))
        if candidate is None:
            return None
        packed, _ = packed_candidate(candidate, owners.names(candidate.parameter), config)
        return None if packed is None else candidate.logical(packed).dequantize()

    def quantized_of(site: Site, roots: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
        made = [quantized(root) for root in roots]
        if all(root is None for root in made):
            return None
        parameters_of_weight[site.record.weight_key] = [
            found[id(root)].parameter for root in roots if id(root) in found
        ]
        both = zip(roots, made, strict=True)
        return site.weight.evaluate([old if new is None else new for old, new in both]).to(dtype)

    guard = StateGuard(model)
    try:
        errors = measure(model, args, kwargs, config, guard, quantized_of)
    finally:
        guard.forget()
    of_parameters: dict[str, float] = {}
    for identity, error in errors.of_weights.items():
        for parameter in parameters_of_weight.get(identity, ()):
            name = owners.name(parameter)
            of_parameters[name] = max(error, of_parameters.get(name, 0.0))
    return errors.output, of_parameters


def _move_rest(model: nn.Module, device: torch.device) -> None:
    for parameter in model.parameters():
        if not is_packed(parameter):
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
