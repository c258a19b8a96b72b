"""Which matmuls multiply the same activation, and whether scaling it costs nothing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import fx

from fxint4._pytorch.tensors import aten, is_elementwise, is_pure
from fxint4.passes.site import Site

__all__ = ["activation_of", "same_activation", "scales_freely", "value_numbers"]


def same_activation(sites: Sequence[Site]) -> list[Hashable]:
    """Equal values for sites of a graph whose weights multiply the same rows."""
    values = value_numbers(sites[0].node.graph) if sites else {}
    return [activation_of(site, values) for site in sites]


def scales_freely(site: Site) -> bool:
    """Whether its activation is computed element by element, so that one more factor costs nothing.

    Inductor fuses the multiplication into the kernel that makes the activation. What comes out of
    a matmul, of attention or of the caller's hands would take a kernel of its own.
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
    """What a site multiplies by its weight.

    A pattern makes the same rows of the same operand where that stands in the same place.
    """
    match = site.match
    place = len(site.node.args) - site.node.args.index(match.x) if match.ids is None else 0
    operands = (match.x, match.offs, match.ids)
    return (type(site.pattern), place, *(node and values[node] for node in operands))


def value_numbers(graph: fx.Graph) -> dict[fx.Node, int]:
    """Equal numbers for nodes of equal values, such as the view that each linear makes of its x."""
    numbers: dict[fx.Node, int] = {}
    known: dict[Hashable, int] = {}
    for node in graph.nodes:
        key: Hashable = node
        if node.op == "call_function" and is_pure(node.target):
            # As text: as numbers, 1 and 1.0 would be equal.
            key = str(fx.map_arg((node.args, node.kwargs), lambda arg: f"%{numbers[arg]}"))
            key = (node.target, key)
        numbers[node] = known.setdefault(key, len(known))
    return numbers
