"""Which matmuls are those of adapters (LoRA and its kin), which are left alone by default.

A graph shows it by structure: y = base(x) + s * B(A(x)), where base, A and B are matmuls with
constant weights, and B has few in features: the rank. Where the base is no such matmul (an
embedding, or a layer that another library quantized), the names that PEFT gives tell.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxint4._pytorch.tensors import aten
from fxint4.config.layer_patterns import first_match
from fxint4.graph.constants import Constants
from fxint4.graph.symbolic import known, value_of
from fxint4.passes.activations import value_numbers
from fxint4.passes.pattern import Match, Unmatched
from fxint4.passes.site import Adapter
from fxint4.report import Record
from fxint4.weights.expression import Weight

__all__ = ["Found", "adapter_below", "adapter_by_name", "adapters_of", "is_named"]

#: Parts of the names of adapters: those of PEFT's (its `adapter_layer_names`; as of 0.21), and
#: those that other libraries give the parts of LoRA.
_NAME = re.compile(
    r"(poly_)?lora_([abe]|down|up|embedding_[ab]|magnitude_vector)"
    r"|hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2)"
    r"|(p?vera|randlora)_([ab]|lambda(_[bd])?|gamma)|vblora_(logits_[ab]|vector_bank)"
    r"|hira_(embedding_)?[ab]|gralora_[ab](_general)?"
    r"|oft_(embedding_)?r|boft_[rs]|ia3_l|fourierft_spectrum",
    re.IGNORECASE,
)

_PEFTS_BASE = "base_layer"


def adapter_by_name(name: str, parameters: Iterable[str]) -> Adapter | None:
    """The adapter that a weight is by its names, or None.

    A weight that is made of other parameters, too, such as W + B @ A, is none.

    Args:
        name: Full name of the layer.
        parameters: Full names of all parameters that the weight is made of.
    """
    marks = [_mark(parameter) for parameter in parameters]
    if not marks or None in marks:
        return None
    parts = name.split(".")
    own = next((len(parts) - at for at, part in enumerate(parts) if _NAME.fullmatch(part)), 1)
    return Adapter(f"an adapter, by its name {marks[0]}", _PEFTS_BASE, own)


def _mark(parameter: str) -> str | None:
    return next((part for part in parameter.split(".") if _NAME.fullmatch(part)), None)


def adapter_below(name: str, owner: str) -> Adapter:
    """The adapter that a weight is because it lies inside one of PEFT's layers.

    Args:
        name: Full name of the weight's layer.
        owner: Full name of PEFT's layer; empty where it is the model itself.
    """
    own = name.removeprefix(f"{owner}.").split(".")
    return Adapter(f"an adapter, {own[0]}, beside {_PEFTS_BASE}", _PEFTS_BASE, len(own))


def is_named(
    adapter: Adapter, name: str, parameters: Sequence[str], patterns: Sequence[str]
) -> bool:
    """Whether a pattern matches an adapter and not, like "*", the layer beside it, too.

    Args:
        adapter: What is known of it.
        name: Full name of its layer.
        parameters: Full names of its parameters.
        patterns: Patterns of layer names.
    """
    base = ".".join([*name.split(".")[: -adapter.own], *filter(None, [adapter.base])])
    return any(
        first_match(name, parameters, [pattern]) is not None
        and first_match(base, [f"{base}.weight"], [pattern]) is None
        for pattern in patterns
    )


@dataclass(frozen=True)
class Found:
    """A matmul of a graph by a constant weight.

    Attributes:
        node: The matmul.
        outcome: What its pattern made of it.
        weight: The computation behind the weight.
        record: Its record.
    """

    node: fx.Node
    outcome: Match | Unmatched
    weight: Weight
    record: Record

    @property
    def x(self) -> fx.Node | None:
        """The other operand, where it is known."""
        if isinstance(self.outcome, Match):
            return self.outcome.x
        operand = self.node.args[0] if self.node.target is aten.convolution.default else None
        return operand if isinstance(operand, fx.Node) else None


def adapters_of(
    graph: fx.Graph, found: Sequence[Found], constants: Constants
) -> Mapping[fx.Node, Adapter]:
    """The adapters of a graph, by the nodes of their matmuls, as far as its structure shows them.

    Args:
        graph: The graph.
        found: Its matmuls with constant weights.
        constants: The role of each node.
    """
    by_node = {each.node: each for each in found}
    down_of: dict[fx.Node, Found] = {}  # A of each B that the structure allows
    for each in found:
        source = None if each.x is None else by_node.get(_source(each.x, constants))
        if source is not None and _is_low_rank(source, each):
            down_of[each.node] = source
    if not down_of:
        return {}
    bases = _bases(graph, by_node, down_of, constants)
    adapters: dict[fx.Node, Adapter] = {}
    roots: dict[fx.Node, Adapter] = {}
    for up, base in bases.items():
        for part in (down_of[up], by_node[up]):
            adapter = _beside(part.record.name, base.record.name, by_node[up].record.k)
            adapters[part.node] = adapter
            if _is_whole(part.weight):  # else the parameter may hold other weights, too
                roots[part.weight.roots[0]] = adapter
    for each in found:  # such as B @ A, for a norm
        made_of = each.weight.roots
        if made_of and roots.keys() >= set(made_of):
            adapters.setdefault(each.node, roots[made_of[0]])
    return adapters


def _is_whole(weight: Weight) -> bool:
    """Whether a weight is all that one parameter holds."""
    sizes = [value_of(node).numel() for node in (weight.node, *weight.roots)]
    return len(sizes) == 2 and sizes[0] == sizes[1]


def _is_low_rank(down: Found, up: Found) -> bool:
    """Whether the rank of B(A(x)) is at most half of what a matrix of its shape can have."""
    return 2 * up.record.k <= min(up.record.n, down.record.k)


def _beside(name: str, base: str, rank: int) -> Adapter:
    own, of_base = name.split("."), base.split(".")
    shared = 0
    while shared < min(len(own) - 1, len(of_base)) and own[shared] == of_base[shared]:
        shared += 1
    what = f"an adapter of rank {rank} beside {of_base[-1]}"
    return Adapter(what, ".".join(of_base[shared:]), len(own) - shared)


def _bases(
    graph: fx.Graph,
    by_node: Mapping[fx.Node, Found],
    down_of: Mapping[fx.Node, Found],
    constants: Constants,
) -> Mapping[fx.Node, Found]:
    """For each B whose product is added to that of a base, the base.

    Args:
        graph: The graph.
        by_node: Its matmuls with constant weights.
        down_of: The A of each B that may be one.
        constants: The role of each node.
    """
    values = value_numbers(graph)
    read: dict[fx.Node, Any] = {node: _read(each, values) for node, each in by_node.items()}
    bases: dict[fx.Node, Found] = {}

    def pair(ups: frozenset[fx.Node], others: frozenset[fx.Node]) -> None:
        for up in ups & waiting:
            x = read[down_of[up].node]
            for other in others & readers[x]:
                bases.setdefault(up, by_node[other])

    readers: dict[Any, frozenset[fx.Node]] = {}
    for node, x in read.items():
        readers[x] = readers.get(x, frozenset()) | {node}
    waiting = frozenset(down_of)
    #: The matmuls whose products are summands of each node.
    summands: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        own = frozenset([node]) if node in by_node else frozenset[fx.Node]()
        parts = [
            own,
            *(summands.get(each, frozenset()) for each in _terms(node, by_node, constants)),
        ]
        if node.target is not aten.cat.default:
            for index, part in enumerate(parts):
                for other in parts[:index]:
                    pair(part, other)
                    pair(other, part)
        summed = frozenset[fx.Node]().union(*parts)
        if summed:
            summands[node] = summed
    return bases


def _read(found: Found, values: Mapping[fx.Node, int]) -> Any:
    """A key of what a matmul reads: equal for casts and other shapes of one value."""
    node = found.x
    if node is None:
        return found.node
    while node.target in _SAME:
        node = node.args[0]  # type: ignore[assignment]
        assert isinstance(node, fx.Node)
    outcome = found.outcome
    picks = (outcome.offs, outcome.ids) if isinstance(outcome, Match) else (None, None)
    return (values[node], found.record.k, *(pick and values[pick] for pick in picks))


#: Ops that give the same values, in any order of the axes.
_SAME = frozenset(
    (
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.squeeze.dim,
        aten.unsqueeze.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.clone.default,
        aten.detach.default,
        aten.alias.default,
        aten._to_copy.default,
        torch.ops.prims.convert_element_type.default,
    )
)

#: Ops besides views that pick, copy or move values of their first operand.
_MOVES = _SAME | {
    operator.getitem,
    aten.neg.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.constant_pad_nd.default,
    aten.split_with_sizes.default,
}

#: Ops whose result is made of several operands' values, summed or side by side.
_SUMS = frozenset(
    (
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.cat.default,
        aten.slice_scatter.default,
        aten.select_scatter.default,
        aten.index_put.default,
        aten.index_add.default,
        aten.scatter_add.default,
    )
)


def _source(node: fx.Node, constants: Constants) -> fx.Node:
    """What a node is, but for its place, dtype and factors."""
    while (operand := _unscaled(node, constants)) is not None:
        node = operand
    return node


def _terms(
    node: fx.Node, by_node: Mapping[fx.Node, Found], constants: Constants
) -> Iterator[fx.Node]:
    """The operands that a node sums up, each perhaps scaled."""
    if node in by_node:
        outcome = by_node[node].outcome
        if isinstance(outcome, Match) and outcome.bias is not None:
            yield outcome.bias
    elif node.target in _SUMS:
        for argument in node.args:
            operands = argument if isinstance(argument, (list, tuple)) else [argument]
            yield from (each for each in operands if isinstance(each, fx.Node))
    elif (operand := _unscaled(node, constants)) is not None:
        yield operand


def _unscaled(node: fx.Node, constants: Constants) -> fx.Node | None:
    """The operand that a node only moves, casts or scales; None for any other node."""
    target: Any = node.target
    if node.op != "call_function":
        return None
    if target in _MOVES or getattr(target, "is_view", False):
        operand = node.args[0]
        return operand if isinstance(operand, fx.Node) else None
    if target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        left, right = node.args[:2]
        if isinstance(left, fx.Node) and _is_factor(right, constants):
            return left
        if isinstance(right, fx.Node) and target is aten.mul.Tensor and _is_factor(left, constants):
            return right
    return None


def _is_factor(value: Any, constants: Constants) -> bool:
    """Whether a value scales: a number, a constant, or one number for all features of a row."""
    if not isinstance(value, fx.Node):
        return True
    if constants.is_constant(value):
        return True
    shape = value.meta["val"].shape if hasattr(value.meta.get("val"), "shape") else ()
    return not shape or known(shape[-1] == 1)
