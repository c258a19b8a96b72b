"""Which matmuls share an activation, and whether an activation can be scaled at no cost."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import fx

from fxint4._pytorch.tensors import aten, is_elementwise, is_pure
from fxint4.passes.site import Site

__all__ = ["activation_of", "same_activation", "scales_freely", "value_numbers"]


def same_activation(sites: Sequence[Site]) -> list[Hashable]:
    """A key for each site of one graph; sites with equal keys multiply the same rows."""
    values = value_numbers(sites[0].node.graph) if sites else {}
    return [activation_of(site, values) for site in sites]


def scales_freely(site: Site) -> bool:
    """Whether an elementwise op computes the site's activation, so that scaling it costs nothing.

    Inductor fuses the scaling into the kernel of that op. The result of a matmul or of attention,
    or an input of the graph, would need a kernel of its own.
    """
    node = site.match.x
    while node.op == "call_function":
        if is_elementwise(node.target):
            return True
        is_view = getattr(node.target, "is_view", False) or node.target in _COPIES
        if not (is_view and isinstance(node.args[0], fx.Node)):
            return False
        node = node.args[0]
    return False


_COPIES = (
    aten.clone.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    torch.ops.prims.convert_element_type.default,
)


def activation_of(site: Site, values: dict[fx.Node, int]) -> Hashable:
    """A key for what a site multiplies by its weight.

    Args:
        site: The site.
        values: `value_numbers` of its graph.
    """
    match = site.match
    # On the other side of the matmul a pattern transposes its operand.
    place = len(site.node.args) - site.node.args.index(match.x) if match.ids is None else 0
    operands = (match.x, match.offs, match.ids)
    return (type(site.pattern), place, *(node and values[node] for node in operands))


def value_numbers(graph: fx.Graph) -> dict[fx.Node, int]:
    """A number for each node; nodes that compute the same value have the same number.

    Each linear layer, for example, makes its own view of one x.
    """
    numbers: dict[fx.Node, int] = {}
    known: dict[Hashable, int] = {}
    for node in graph.nodes:
        key: Hashable = node
        if node.op == "call_function" and is_pure(node.target):
            # Text, because the numbers 1 and 1.0 are equal.
            key = str(fx.map_arg((node.args, node.kwargs), lambda arg: f"%{numbers[arg]}"))
            key = (node.target, key)
        numbers[node] = known.setdefault(key, len(known))
    return numbers
