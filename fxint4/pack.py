"""`fxint4.pack_`: a model whose weights are packed in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxint4.capture import candidates_of
from fxint4.config import split_options
from fxint4.errors import OptionError
from fxint4.names import parameters_of
from fxint4.packing import Owners, from_modules, replace_parameters, settle_parametrized
from fxint4.report import GraphReport, Record, Report
from fxint4.tensor import Int4TileTensor

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

    With example arguments the model is run once, and every parameter that its graphs multiply by
    is packed, however it is used. Without them the modules are: `nn.Linear`, 1x1 convolutions,
    `nn.MultiheadAttention`, and transformers' Conv1D and experts. Afterwards the model runs in
    eager, with any backend, and fastest with `torch.compile(model, backend="int4tile")`.

    A weight that a parametrisation makes (weight_norm, say) is computed once and for all. A
    parameter that an embedding reads too, or that goes into an operator which packed weights don't
    support, stays as it is; the report says why.

    Args:
        model: changed in place.
        example_args: arguments of the model.
        options: fields of `Int4Config`.
        example_kwargs: keyword arguments of the model.
        device: where the model goes, weight by weight, so that one which fits there only packed
            needs no more memory than that; weights may be memory-mapped. Where it is, if None.

    Returns:
        The report.

    Raises:
        OptionError: an option that `Int4Config` does not have.
        ReportError: the report can't be written.
        FoldError: a weight could not be packed (out of memory, say). It names the layer; what was
            packed before it stays packed, and calling again goes on.
    """
    config, patches = split_options(None, options)
    if patches:
        raise OptionError(f"pack_ compiles nothing and takes no option {sorted(patches)[0]!r}")
    report = Report(config)
    settle_parametrized(model, config)
    owners = Owners([("", model)])
    kept: list[Record] = []
    if example_args or example_kwargs:
        found, kept = candidates_of(model, example_args, example_kwargs or {}, config)
        candidates = [each for each in found if id(each.parameter) in owners.parameters]
        del found
    else:
        candidates = from_modules(owners)
    target = None if device is None else torch.device(device)
    records = replace_parameters(candidates, owners, config, target)
    if target is not None:
        _move_rest(model, target)
    report.put("pack_", GraphReport((*records, *kept), parameters_of(model), "", ""))
    return report


def _move_rest(model: nn.Module, device: torch.device) -> None:
    for parameter in model.parameters():
        if not isinstance(parameter, Int4TileTensor):
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
