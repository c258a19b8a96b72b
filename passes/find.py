"""Find every matmul with a constant weight, and decide from its form alone whether to pack it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from fxint4.config import Int4Config, matches
from fxint4.constants import Constants, Weight
from fxint4.forms import DTYPES, device_fault, int4_form, most_int4_rows, rows_multiple
from fxint4.names import layer_name
from fxint4.passes.pattern import Kept, Match, Pattern, value_of
from fxint4.report import Record
from fxint4.store import Dense, Form
from fxint4.tiles import TileShape, choose_shape

__all__ = ["Site", "find"]


@dataclass(frozen=True)
class Site:
    """A matmul that can be packed.

    Attributes:
        node: the matmul.
        pattern: the pattern that matched it.
        match: what it matched.
        weight: the computation behind the weight.
        shape: the packed shape.
        int4: the packed form that the device's int4 op reads.
        dense: the dequantised copy, for numbers of rows that the int4 op does not serve.
        most_rows: the largest M for the int4 op.
        record: what the report says of it, before its weight was looked at.
    """

    node: fx.Node
    pattern: Pattern
    match: Match
    weight: Weight
    shape: TileShape
    int4: Form
    dense: Dense
    most_rows: int
    record: Record


def find(
    gm: fx.GraphModule,
    patterns: Sequence[Pattern],
    constants: Constants,
    tensors: Mapping[fx.Node, Tensor],
    names: Mapping[fx.Node, str],
    config: Int4Config,
) -> list[Site | Record]:
    """Every matmul with a constant weight: a site to pack, or the record of one that is kept.

    Args:
        gm: the graph.
        patterns: what to look for.
        constants: the standing of the graph's nodes.
        tensors: the real tensor behind each constant placeholder.
        names: full parameter names of those placeholders.
        config: what the user asked for.

    Returns:
        One entry a matmul, in the order they run.
    """
    by_op = {op: pattern for pattern in patterns for op in pattern.ops}
    found: list[Site | Record] = []
    for node in gm.graph.nodes:
        pattern = by_op.get(node.target) if node.op == "call_function" else None
        outcome = pattern.match(node, constants) if pattern else None
        if pattern is None or outcome is None:
            continue
        axes = outcome.axes if isinstance(outcome, Match) else "NK"
        weight = constants.weight(outcome.weight, axes)
        record = _record(node, outcome, weight, tensors, names)
        reason = outcome.reason if isinstance(outcome, Kept) else _refusal(outcome, record, config)
        if reason or isinstance(outcome, Kept):
            found.append(replace(record, reason=reason or ""))
        else:
            found.append(_site(node, pattern, outcome, weight, record, config))
    return found


def _record(
    node: fx.Node,
    outcome: Match | Kept,
    weight: Weight,
    tensors: Mapping[fx.Node, Tensor],
    names: Mapping[fx.Node, str],
) -> Record:
    roots = sorted(weight.roots, key=lambda root: -value_of(root).numel())
    value = value_of(outcome.weight)
    parameters = tuple(names[root] for root in roots)
    size = min(
        value.numel() * value.element_size(),
        sum(value_of(root).numel() * value_of(root).element_size() for root in roots),
    )
    return Record(
        name=layer_name(parameters[0]),
        op=_op_name(node.target),
        n=outcome.n,
        k=outcome.k,
        group_size=None,
        action="kept",
        reason="",
        sqnr_db=None,
        bytes_before=size,
        bytes_after=size,
        parameters=parameters,
        weight_key=(*(id(tensors[root]) for root in weight.roots), weight.signature),
    )


def _op_name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    name: str = target.name() if schema is None else schema.name
    return name.removeprefix("aten::")


def _refusal(match: Match, record: Record, config: Int4Config) -> str | None:
    """Why the config, the device or the dtype keeps this matmul as it is, or None."""
    weight = value_of(match.weight)
    skipped = matches(record.name, record.parameters, config.skip)
    if skipped is not None:
        return f"skip={skipped!r}"
    if config.include and matches(record.name, record.parameters, config.include) is None:
        return "no pattern of include matches it"
    fault = device_fault(weight.device)
    if fault:
        return fault
    if weight.dtype not in DTYPES:
        return f"weights of dtype {weight.dtype} (bfloat16, float16 and float32 are packed)"
    if min(record.n, record.k) < config.min_features:
        return f"{record.n}x{record.k} is small: min_features is {config.min_features}"
    return None


def _site(
    node: fx.Node,
    pattern: Pattern,
    match: Match,
    weight: Weight,
    record: Record,
    config: Int4Config,
) -> Site:
    value = value_of(match.weight)
    shape = choose_shape(
        record.n, record.k, config.group_size, config.inner_k_tiles, rows_multiple(value.device)
    )
    dense = Dense(value.dtype, tuple(value.shape), value.stride(), match.axes)
    most_rows = most_int4_rows(value.device, value.dtype, shape)
    return Site(
        node, pattern, match, weight, shape, int4_form(value.device), dense, most_rows, record
    )
