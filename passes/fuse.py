"""Fused projections: weights that multiply the same activation (q, k, v), in one matmul."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import fx

from fxint4._torch import is_pure
from fxint4.config import Int4Config
from fxint4.forms import fuses
from fxint4.passes.find import Site
from fxint4.passes.pattern import value_of
from fxint4.store import Dense, Form

__all__ = ["matmuls"]

#: Weights that one launch of the kernel takes.
_MOST_WEIGHTS = 4


def matmuls(
    sites: Sequence[Site], forms: Sequence[Form | None], config: Int4Config
) -> list[tuple[int, ...]]:
    """Which sites of a graph become one int4 matmul together.

    Args:
        sites: of one graph, in the order they run.
        forms: for each of them the form it reads.
        config: what the user asked for.

    Returns:
        Positions in `sites`: each one that reads a packed form is in one group, alone where it
        shares its activation with no other.
    """
    values = _values(sites[0].node.graph) if sites else {}
    groups: dict[Hashable, list[int]] = {}
    for position, (site, form) in enumerate(zip(sites, forms, strict=True)):
        if form is None or isinstance(form, Dense):
            continue
        fused = config.fuse_projections and not site.shape.batch
        fused = fused and fuses(value_of(site.match.weight).device)
        key = _shared(site, form, values) if fused else position
        groups.setdefault(key, []).append(position)
    return [
        tuple(group[start : start + _MOST_WEIGHTS])
        for group in groups.values()
        for start in range(0, len(group), _MOST_WEIGHTS)
    ]


def _shared(site: Site, form: Form, values: dict[fx.Node, int]) -> Hashable:
    """Equal for sites whose weights one matmul can multiply.

    A pattern makes the same rows of the same operand where that stands in the same place.
    """
    shape, x = site.shape, site.match.x
    place = len(site.node.args) - site.node.args.index(x)
    layout = (form, shape.k, shape.k_padded, shape.group_size, shape.inner_k_tiles)
    return (type(site.pattern), place, values[x], *layout)


def _values(graph: fx.Graph) -> dict[fx.Node, int]:
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
