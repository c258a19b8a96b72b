"""Find every matmul with a constant weight, and decide without its values whether to pack it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from fxint4._pytorch.tensors import real_tensors
from fxint4.config.int4_config import Int4Config
from fxint4.graph.constants import Constants
from fxint4.graph.names import layer_name, source_line
from fxint4.graph.symbolic import value_of
from fxint4.passes.pattern import Kept, Match, Pattern, PrepackedMatch
from fxint4.passes.plan import outgrown, recipe_of, refusal
from fxint4.passes.site import Site
from fxint4.quant.recipe import RTN
from fxint4.report import Record
from fxint4.weights.expression import Weight
from fxint4.weights.formats import (
    UNBOUNDED,
    Dense,
    Format,
    int4_format,
    most_int4_rows,
    rows_multiple,
)

__all__ = ["find"]


def find(
    gm: fx.GraphModule,
    patterns: Sequence[Pattern],
    constants: Constants,
    tensors: Mapping[fx.Node, Tensor],
    names: Mapping[fx.Node, str],
    config: Int4Config,
) -> list[Site | Record]:
    """Find every matmul with a constant weight.

    Args:
        gm: The graph.
        patterns: What to look for.
        constants: The role of each node.
        tensors: The real tensor of each constant placeholder.
        names: Full name of the parameter of each constant placeholder.
        config: What the user asked for.

    Returns:
        For each matmul, in the order they run, a site to pack, or the record of one that is kept.
    """
    by_op = {op: pattern for pattern in patterns for op in pattern.ops}
    found: list[Site | Record] = []
    for node in gm.graph.nodes:
        pattern = by_op.get(node.target) if node.op == "call_function" else None
        outcome = pattern.match(node, constants) if pattern else None
        if pattern is None or outcome is None:
            continue
        if isinstance(outcome, Kept):
            weight = constants.weight(outcome.weight, "NK")
            record = _record(node, outcome, weight, tensors, names)
            found.append(replace(record, reason=outcome.reason))
            continue
        weight = outcome.constant(constants)
        record = _record(node, outcome, weight, tensors, names)
        own, key, reason = config, "", None
        if not isinstance(outcome, PrepackedMatch):
            value = value_of(outcome.weight)
            key = weight.key(record.parameters, [tensors[root] for root in weight.roots])
            own = config.for_weight(record.name, record.parameters, key)
            reason = refusal(record, value.dtype, value.device, config)
            reason = reason or outgrown(record) or config.kept_by_budget(key)
        if reason:
            found.append(replace(record, reason=reason))
        else:
            found.append(_site(node, pattern, outcome, weight, record, own, key))
    return found


def _record(
    node: fx.Node,
    outcome: Match | Kept,
    weight: Weight,
    tensors: Mapping[fx.Node, Tensor],
    names: Mapping[fx.Node, str],
) -> Record:
    roots = sorted(weight.roots, key=lambda root: -value_of(root).numel())
    parameters = tuple(dict.fromkeys(names[root] for root in roots))
    held = sum(value_of(root).numel() * value_of(root).element_size() for root in roots)
    if isinstance(outcome, PrepackedMatch):
        batch = math.prod(outcome.batch)
        size = batch * outcome.n * outcome.k * value_of(outcome.x).element_size()
        held = 0
    else:
        value = value_of(outcome.weight)
        batch = outcome.batch if isinstance(outcome, Kept) else math.prod(outcome.batch)
        size = min(value.numel() * value.element_size(), held)
    return Record(
        name=layer_name(parameters[0]),
        op=_op_name(node.target),
        n=outcome.n,
        k=outcome.k,
        batch=batch,
        group_size=None,
        action="kept",
        reason="",
        sqnr_db=None,
        bytes_before=size,
        bytes_after=size,
        held_bytes=held,
        parameters=parameters,
        source=source_line(node),
        weight_key=(*(id(tensors[root]) for root in weight.roots), weight.signature),
    )


def _op_name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    name: str = target.name() if schema is None else schema.name
    return name.removeprefix("aten::").replace("::", ".")


def _site(
    node: fx.Node,
    pattern: Pattern,
    match: Match,
    weight: Weight,
    record: Record,
    config: Int4Config,
    key: str,
) -> Site:
    value = value_of(match.weight)
    shape = match.shape(config, rows_multiple(value.device))
    int4 = int4_format(value.device)
    on_gpu = value.device.type == "cuda"
    prepacked = isinstance(match, PrepackedMatch)
    recipe = RTN
    if not prepacked:
        with real_tensors():
            recipe = recipe_of(config, key, (*shape.batch, shape.n, shape.k))
        shape = replace(shape, pre_scaled=recipe.pre_scale is not None)
    fallback: Format | None
    if on_gpu or (prepacked and shape.batch):
        fallback = int4  # its op takes any number of rows
    elif prepacked:
        fallback = None
    else:
        fallback = Dense(value.dtype, tuple(value.shape), value.stride(), match.axes)
    most_rows = UNBOUNDED if prepacked else most_int4_rows(value.device, value.dtype)
    return Site(
        node, pattern, match, weight, shape, int4, fallback, most_rows, record, config, recipe
    )
