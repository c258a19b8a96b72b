"""Rewrite the sites of a graph into int4 matmuls, and remove what is no longer read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxint4._pytorch.tensors import aten
from fxint4.config.int4_config import Int4Config
from fxint4.graph.build import Build, copy_graph
from fxint4.graph.symbolic import in_order, is_aligned, same_strides, value_of
from fxint4.passes.fuse import matmuls
from fxint4.passes.pattern import Match
from fxint4.passes.site import Site
from fxint4.quant.tile_layout import TileShape
from fxint4.weights.expression import Weight
from fxint4.weights.formats import Dense, Format, aten_op, format_specs

__all__ = ["Rewritten", "Slot", "rewrite"]


@dataclass(frozen=True)
class Slot:
    """The inputs of a rewritten graph that hold one format of one packed weight.

    Attributes:
        weight: The computation behind the weight, in terms of the captured graph's placeholders.
        shape: The packed shape.
        format: The format that the inputs hold. `Dense` has one input, the others have tiles and
            scale_and_zero, and with `shape.pre_scaled` the pre-scale of the activation ``[K]``.
        name: Full name of the largest parameter that the weight is computed from.
    """

    weight: Weight
    shape: TileShape
    format: Format
    name: str


@dataclass(frozen=True)
class Rewritten:
    """A graph whose sites read packed weights.

    Attributes:
        gm: The graph. Its placeholders are `kept_inputs`, then those of each slot in order.
        kept_inputs: Positions of the captured graph's placeholders that it still has.
        slots: The slots that its other placeholders belong to.
        labels: What to call these placeholders, such as "fc.weight.tiles", by node name.
        copies: For each node of the captured graph its copy or replacement, which may have been
            erased.
    """

    gm: fx.GraphModule
    kept_inputs: tuple[int, ...]
    slots: tuple[Slot, ...]
    labels: Mapping[str, str]
    copies: Mapping[fx.Node, fx.Node]


def rewrite(
    captured: fx.GraphModule,
    sites: Sequence[Site],
    formats: Sequence[Format | None],
    config: Int4Config,
    droppable: Sequence[fx.Node],
    fake_mode: Any,
) -> Rewritten:
    """Make a rewritten copy of a graph.

    Args:
        captured: The graph as captured; not changed.
        sites: Its matmuls that can be packed.
        formats: The format that each of them reads; None leaves the matmul as it is.
        config: What the user asked for.
        droppable: Placeholders to remove if nothing reads them after the rewrite.
        fake_mode: The FakeTensorMode of the graph's values.
    """
    gm, copies = copy_graph(captured)
    inputs = _PackedInputs(gm.graph, fake_mode)
    group_of = {i: group for group in matmuls(sites, formats, config) for i in group}
    made: dict[tuple[int, ...], _Int4Matmul] = {}
    for position, (site, format) in enumerate(zip(sites, formats, strict=True)):
        if format is None:
            continue
        group = group_of.get(position)  # None for a dense copy
        if group and group not in made:
            made[group] = _Int4Matmul([sites[i] for i in group], format, inputs)
        matmul = made[group] if group else None
        _rewrite_site(site, format, matmul, copies, inputs, fake_mode)
    gm.graph.eliminate_dead_code()
    kept = _drop_unread(captured, copies, droppable)
    gm.recompile()
    return Rewritten(gm, kept, tuple(inputs.nodes), inputs.labels, copies)


class _PackedInputs:
    """Placeholders for packed weights; sites of one weight and format share them.

    Attributes:
        nodes: The placeholders of each slot.
        labels: See `Rewritten`.
    """

    def __init__(self, graph: fx.Graph, fake_mode: Any) -> None:
        self._graph = graph
        self._fake_mode = fake_mode
        self._last: fx.Node = [node for node in graph.nodes if node.op == "placeholder"][-1]
        self._slots: dict[tuple[object, ...], Slot] = {}
        self.nodes: dict[Slot, tuple[fx.Node, ...]] = {}
        self.labels: dict[str, str] = {}
        self._slots_named = Counter[str]()

    def of(self, site: Site, format: Format) -> tuple[fx.Node, ...]:
        """The placeholders that hold one format of a site's weight."""
        return self.nodes[self.slot(site, format)]

    def slot(self, site: Site, format: Format) -> Slot:
        """The slot of one format of a site's weight; the first site to ask adds placeholders."""
        key = (site.weight, site.shape, format)
        if key not in self._slots:
            name, device = site.record.parameters[0], site.device
            slot = Slot(site.weight, site.shape, format, name)
            number, again = len(self._slots), self._slots_named[name]
            self._slots_named[name] += 1
            self.nodes[slot] = tuple(
                self._placeholder(
                    f"{part}_{number}",
                    f"{name}.{part}" + f"_{again}" * bool(again),
                    *spec,
                    device,
                )
                for part, spec in zip(_parts(format), format_specs(site.shape, format))  # noqa: B905
            )
            self._slots[key] = slot
        return self._slots[key]

    def _placeholder(
        self,
        name: str,
        label: str,
        size: tuple[int, ...],
        stride: tuple[int, ...] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> fx.Node:
        with self._graph.inserting_after(self._last):
            self._last = self._graph.placeholder(name)
        self.labels[self._last.name] = label
        with self._fake_mode:
            if stride is None:
                value = torch.empty(size, dtype=dtype, device=device)
            else:
                value = torch.empty_strided(size, stride, dtype=dtype, device=device)
        self._last.meta["val"] = value
        return self._last


def _parts(format: Format) -> tuple[str, ...]:
    """Names for the tensors of a format."""
    if isinstance(format, Dense):
        return ("dequantized",)
    return ("cpu_tiles" if format == "cpu" else "tiles", "scale_and_zero", "pre_scale")


def _rewrite_site(
    site: Site,
    format: Format,
    matmul: _Int4Matmul | None,
    copies: dict[fx.Node, fx.Node],
    inputs: _PackedInputs,
    fake_mode: Any,
) -> None:
    """Replace the copy of a site's node; `matmul` is None for a dense copy."""
    node = copies[site.node]
    build = Build(node, fake_mode)
    packed = inputs.of(site, format)
    match = site.match.on(copies)
    if matmul is None:
        copies[site.node] = _put_dense(node, match, packed[0], build)
        return

    def multiply(x: fx.Node, *, offs: fx.Node | None = None, ids: fx.Node | None = None) -> fx.Node:
        if site.shape.batch:
            return _experts(x, site, packed, offs, ids, build)
        return matmul.columns(packed, x, build)

    replacement = site.pattern.rewrite(node, match, multiply, build)
    views = _views_of(node, value_of(replacement), fake_mode)
    if views is None:
        replacement = build.like(replacement, node)
    node.replace_all_uses_with(replacement)
    for view, value in (views or {}).items():
        view.meta["val"] = value
    node.graph.erase_node(node)
    copies[site.node] = replacement  # later sites may read it


class _Int4Matmul:
    """One int4 matmul by the weights of one or several sites that share X.

    Args:
        sites: The sites.
        format: The format that all of them read.
        inputs: The placeholders of the graph's packed weights.
    """

    def __init__(self, sites: Sequence[Site], format: Format, inputs: _PackedInputs) -> None:
        self._format = format
        self._dtype = sites[0].activation_dtype
        self._activations = sites[0].activations
        slots = [inputs.slot(site, format) for site in sites]
        self._shapes = {inputs.nodes[slot]: slot.shape for slot in slots}
        self._product: fx.Node | None = None

    def columns(self, packed: tuple[fx.Node, ...], x: fx.Node, build: Build) -> fx.Node:
        """Y ``[M, N]`` = X ``[M, K]`` @ W^T for one of the weights, in X's dtype.

        Args:
            packed: The placeholders of the weight.
            x: X, which is the same for each site. The first call multiplies it by all weights.
            build: Inserts nodes before the site's node.
        """
        if self._product is None:
            self._product = self._multiply(x, build)
        y = self._product
        shapes = list(self._shapes.values())
        position = list(self._shapes).index(packed)
        start, n = sum(shape.n for shape in shapes[:position]), shapes[position].n
        if value_of(y).shape[1] != n:
            y = build(aten.slice.Tensor, y, 1, start, start + n)
        dtype = value_of(x).dtype
        return y if value_of(y).dtype is dtype else build(_CAST, y, dtype)

    def _multiply(self, x: fx.Node, build: Build) -> fx.Node:
        """X times all weights, ``[M, sum of N]``."""
        fp8 = self._activations is not None
        op = None if fp8 else aten_op(self._format, self._dtype, len(self._shapes))
        x = build.contiguous(_pre_scaled(x, next(iter(self._shapes)), build))
        if value_of(x).dtype is not self._dtype:
            x = build(_CAST, x, self._dtype)
        tiles, scale_and_zero, *_ = (list(part) for part in zip(*self._shapes, strict=True))
        shape, *_ = self._shapes.values()
        if op is None:
            op, n = torch.ops.fxint4.linears.default, [shape.n for shape in self._shapes.values()]
            named = {"activations": self._activations} if fp8 else {}
            return build(op, x, tiles, scale_and_zero, shape.group_size, n, **named)
        missing = shape.k_padded - value_of(x).shape[-1]
        if missing:
            x = build(aten.constant_pad_nd.default, x, [0, missing], 0.0)
        return build(op, x, tiles[0], shape.group_size, scale_and_zero[0])


_CAST = torch.ops.prims.convert_element_type.default


def _pre_scaled(x: fx.Node, packed: Sequence[fx.Node], build: Build) -> fx.Node:
    """X times the pre-scale of a packed weight, in fp32; X itself if the weight has none."""
    return build(aten.mul.Tensor, x, packed[2]) if len(packed) > 2 else x


def _views_of(node: fx.Node, value: Tensor, fake_mode: Any) -> dict[fx.Node, Tensor] | None:
    """New values for the views of a node that becomes a slice of a wider tensor's columns.

    Args:
        node: The node.
        value: Its new value, which differs from the old one in strides only.
        fake_mode: The FakeTensorMode of the graph's values.

    Returns:
        The value of each view. None if one of them is impossible, or if a user may depend on the
        strides: an output of the graph, an op that is not ATen's, or a kernel that loads 16 bytes
        at a time (attention).
    """
    if same_strides(value, value_of(node)):
        return {}
    if not (in_order(value) and in_order(value_of(node)) and is_aligned(value)):
        return None
    values = {node: value}
    pending = list(node.users)
    for user in pending:
        target: Any = user.target
        if getattr(target, "namespace", None) not in ("aten", "prims"):
            return None
        if target is aten.as_strided.default:
            return None
        if not target.is_view and target is not aten._unsafe_view.default:
            continue
        args, kwargs = fx.map_arg(
            (user.args, user.kwargs), lambda arg: values.get(arg, arg.meta["val"])
        )
        try:
            with fake_mode:
                values[user] = target(*args, **kwargs)
        except (RuntimeError, ValueError):  # such as a view that merges rows and columns
            return None
        if not isinstance(values[user], Tensor):
            return None
        pending += user.users
    del values[node]
    return values


def _experts(
    x: fx.Node,
    site: Site,
    packed: Sequence[fx.Node],
    offs: fx.Node | None,
    ids: fx.Node | None,
    build: Build,
) -> fx.Node:
    """Multiply by E packed weights; for x, offs and ids see `Multiply`."""
    ours, dtype, shape = torch.ops.fxint4, value_of(x).dtype, site.shape
    scaled = _pre_scaled(x, packed, build)
    x = scaled if scaled is x else build(_CAST, scaled, dtype)
    packed, sizes = packed[:2], (shape.group_size, shape.n)
    named = {} if site.activations is None else {"activations": site.activations}
    if offs is not None:
        return build(ours.grouped_mm.default, x, *packed, offs, *sizes, **named)
    if ids is not None:
        return build(ours.indexed_mm.default, x, *packed, ids, *sizes, **named)
    return build(ours.bmm.default, x, *packed, *sizes)


def _put_dense(node: fx.Node, match: Match, dense: fx.Node, build: Build) -> fx.Node:
    """Make a matmul read the dequantized copy in place of the weight; returns what it becomes.

    A plain matmul may have a copy of another dtype: its operands are then cast to that one, and
    the product back.
    """
    if match.weight in node.all_input_nodes:
        own, dtype = value_of(match.weight).dtype, value_of(dense).dtype
        node.replace_input_with(match.weight, dense)
        return node if own is dtype else _computed_in(dtype, node, own, build)
    weight_on_right = node.args[-2] is match.x
    position = len(node.args) - (1 if weight_on_right else 2)
    if match.ids is not None:
        operand = build(aten.index.Tensor, dense, [match.ids])
        if match.axes.endswith("KN") != weight_on_right:
            operand = build(aten.permute.default, operand, [0, 2, 1])
        if value_of(node.args[position]).ndim == 2:  # type: ignore[arg-type]
            operand = build(aten.squeeze.dim, operand, 0)
    else:  # the weight is expanded over the batch
        operand = build(aten.view.default, dense, list(value_of(dense).shape[-2:]))
        operand = build(aten.expand.default, operand, [build.size(match.x, 0), -1, -1])
    node.update_arg(position, operand)
    return node


def _computed_in(dtype: torch.dtype, node: fx.Node, own: torch.dtype, build: Build) -> fx.Node:
    """Replace mm or addmm by the same in another dtype; the result is cast back to its own."""
    operands = [
        build(_CAST, arg, dtype) if value_of(arg).dtype is own else arg  # type: ignore[arg-type]
        for arg in node.args
    ]
    product = build(_CAST, build(node.target, *operands, **node.kwargs), own)
    product = build.like(product, node)
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)
    return product


def _drop_unread(
    captured: fx.GraphModule, copies: Mapping[fx.Node, fx.Node], droppable: Sequence[fx.Node]
) -> tuple[int, ...]:
    """Erase the droppable placeholders that nothing reads; return the positions of the others."""
    kept = []
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
    for index, placeholder in enumerate(placeholders):
        if placeholder in droppable and not copies[placeholder].users:
            copies[placeholder].graph.erase_node(copies[placeholder])
        else:
            kept.append(index)
    return tuple(kept)
