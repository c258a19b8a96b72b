"""Find every matmul with a constant weight, and what is planned for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from fxint4.config.int4_config import Int4Config
from fxint4.graph.constants import Constants
from fxint4.graph.names import Origin, layer_name, source_line
from fxint4.graph.symbolic import value_of
from fxint4.passes.adapters import Found, adapters_of
from fxint4.passes.pattern import Match, Pattern, PrepackedMatch, Unmatched
from fxint4.passes.plan import Plans
from fxint4.passes.site import Site
from fxint4.quant.tile_layout import choose_shape
from fxint4.report import Record
from fxint4.weights.expression import AXES, Weight
from fxint4.weights.formats import (
    UNBOUNDED,
    Dense,
    Format,
    int4_format,
    most_int4_rows,
)
from fxint4.weights.identity import WeightIdentity

__all__ = ["find"]


def find(
    gm: fx.GraphModule,
    patterns: Sequence[Pattern],
    constants: Constants,
    tensors: Mapping[fx.Node, Tensor],
    names: Mapping[fx.Node, str],
    plans: Plans,
    origins: Mapping[int, Origin],
) -> list[Site | Record]:
    """Find every matmul with a constant weight.

    Args:
        gm: The graph.
        patterns: What to look for.
        constants: The role of each node.
        tensors: The real tensor of each constant placeholder.
        names: Full name of the parameter of each constant placeholder.
        plans: Decides about each weight.
        origins: Where the real tensors are in the model, by `id`, as far as that is known.

    Returns:
        For each matmul, in the order they run, a site with its plan; or the record of a matmul that
        stays as it is with any weight of this shape.
    """
    by_op = {op: pattern for pattern in patterns for op in pattern.ops}
    matmuls: list[Found] = []
    for node in gm.graph.nodes:
        pattern = by_op.get(node.target) if node.op == "call_function" else None
        if pattern is None:
            continue
        outcome = pattern.match(node, constants) or _not_constant(node, constants)
        if outcome is None:
            continue
        if isinstance(outcome, Unmatched):
            weight = constants.weight(outcome.weight, "NK")
        else:
            weight = outcome.constant(constants)
        matmuls.append(Found(node, outcome, weight, _record(node, outcome, weight, tensors, names)))
    adapters = adapters_of(gm.graph, matmuls, constants)
    found: list[Site | Record] = []
    for each in matmuls:
        if isinstance(each.outcome, Unmatched):
            found.append(replace(each.record, reason=each.outcome.reason))
            continue
        roots = [tensors[root] for root in each.weight.roots]
        site = _site(each.node, by_op[each.node.target], each.outcome, each.weight, each.record)
        site = replace(site, adapter=adapters.get(each.node))
        site = plans.captured(site, roots, origins)
        found.append(replace(site.record, reason=site.kept) if site.alike else site)
    return found


def _not_constant(node: fx.Node, constants: Constants) -> Unmatched | None:
    """`Unmatched` if an operand is computed from weights alone, but by an op that is not folded."""
    for operand in node.all_input_nodes:
        op = constants.custom_op_of(operand)
        if op is not None and value_of(operand).ndim > 1:
            *batch, rows, columns = map(int, value_of(operand).shape)
            reason = f"computed by {op}, a custom op, which may read more than its operands"
            return Unmatched(operand, reason, rows, columns, math.prod(batch))
    return None


def _record(
    node: fx.Node,
    outcome: Match | Unmatched,
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
        batch = outcome.batch if isinstance(outcome, Unmatched) else math.prod(outcome.batch)
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
        weight_key=WeightIdentity([tensors[root] for root in weight.roots], weight.signature),
    )


def _op_name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    name: str = target.name() if schema is None else schema.name
    return name.removeprefix("aten::").replace("::", ".")


def _strides(weight: Tensor, axes: str) -> tuple[int, ...]:
    """Strides for a copy of a weight: its own, or contiguous ones if its rows share memory.

    Args:
        weight: The weight as the matmul reads it.
        axes: The order of its axes, a key of `fxint4.weights.expression.AXES`.
    """
    matrix = AXES[axes](weight)
    if all(stride or size == 1 for size, stride in zip(matrix.shape, matrix.stride(), strict=True)):
        return weight.stride()
    expanded = weight.ndim - matrix.ndim if axes.startswith("*") else 0
    shape = weight.shape[expanded:]
    return (*[0] * expanded, *(math.prod(shape[axis + 1 :]) for axis in range(len(shape))))


#: Stands for the packed shape of a site until that is planned.
_UNPLANNED = choose_shape(1, 1)


def _site(node: fx.Node, pattern: Pattern, match: Match, weight: Weight, record: Record) -> Site:
    """A site without a plan."""
    value = value_of(match.weight)
    int4 = int4_format(value.device)
    prepacked = isinstance(match, PrepackedMatch)
    fallback: Format | None
    if value.device.type == "cuda" or (prepacked and match.batch):
        fallback = int4  # its op takes any number of rows
    elif prepacked:
        fallback = None
    else:
        fallback = Dense(value.dtype, tuple(value.shape), _strides(value, match.axes), match.axes)
    most_rows = UNBOUNDED if prepacked else most_int4_rows(value.device, value.dtype)
    return Site(
        node=node,
        pattern=pattern,
        match=match,
        weight=weight,
        n=match.n,
        k=match.k,
        batch=match.batch,
        m=match.m,
        dtype=value.dtype,
        device=value.device,
        int4=int4,
        fallback=fallback,
        most_rows=most_rows,
        record=record,
        shape=_UNPLANNED,
        config=Int4Config(),
        x_dtype=value_of(match.x).dtype,
        stored=match.stored if isinstance(match, PrepackedMatch) else None,
    )
