"""Rewrite the sites of a graph into int4 matmuls, and clean up what that leaves."""

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
from fxint4.quant.recipe import Recipe
from fxint4.quant.tile_layout import TileShape
from fxint4.weights.expression import Weight
from fxint4.weights.formats import Dense, Format, aten_op, format_specs

__all__ = ["Rewritten", "Slot", "rewrite"]


@dataclass(frozen=True)
class Slot:
    """The inputs of a rewritten graph that hold one format of one packed weight.

    Attributes:
        weight: the computation behind the weight, with the placeholders of the graph as captured.
        shape: the packed shape.
        format: which format the inputs hold; a `Dense` takes one input, the others two, and one
            more for the pre-scale of the activation where the shape says so.
        config: what the user asked for the weight.
        recipe: how its codes are chosen.
        name: full name of the parameter that the weight is made of, the largest where of several.
    """

    weight: Weight
    shape: TileShape
    format: Format
    config: Int4Config
    recipe: Recipe
    name: str


@dataclass(frozen=True)
class Rewritten:
    """A graph whose sites read packed weights.

    Attributes:
        gm: the graph. Its placeholders are `kept_inputs`, then those of each slot in order.
        kept_inputs: which placeholders of the captured graph it still has, by position.
        slots: where its other inputs come from.
        labels: what to call these inputs, such as "fc.weight.tiles", by node name.
        alike: slots whose pre-scales must be equal, as one of them serves all that share a matmul.
        copies: for each node of the captured graph what stands for it now; some are in no graph any
            more.
    """

    gm: fx.GraphModule
    kept_inputs: tuple[int, ...]
    slots: tuple[Slot, ...]
    labels: Mapping[str, str]
    alike: tuple[tuple[Slot, ...], ...]
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
        captured: the graph as captured; not changed.
        sites: its matmuls that can be packed.
        formats: for each of them the format to read; None leaves the matmul as it is.
        config: what the user asked for.
        droppable: placeholders that go where nothing reads them any more.
        fake_mode: the FakeTensorMode of the graph's values.
    """
    gm, copies = copy_graph(captured)
    inputs = _PackedInputs(gm.graph, fake_mode)
    group_of = {i: group for group in matmuls(sites, formats, config) for i in group}
    made: dict[tuple[int, ...], _Int4Matmul] = {}
    for position, (site, format) in enumerate(zip(sites, formats, strict=True)):
        if format is None:
            continue
        group = group_of.get(position)  # None of a dense copy
        if group and group not in made:
            made[group] = _Int4Matmul([sites[i] for i in group], format, inputs)
        matmul = made[group] if group else None
        _rewrite_site(site, format, matmul, copies, inputs, fake_mode)
    gm.graph.eliminate_dead_code()
    kept = _drop_unread(captured, copies, droppable)
    gm.graph.lint()
    gm.recompile()
    alike = tuple(
        tuple(inputs.slot(sites[i], formats[i]) for i in group)
        for group in made
        if len(group) > 1 and sites[group[0]].shape.pre_scaled
    )
    return Rewritten(gm, kept, tuple(inputs.nodes), inputs.labels, alike, copies)


class _PackedInputs:
    """Placeholders for packed weights, one set for all sites that share a weight and a format."""

    def __init__(self, graph: fx.Graph, fake_mode: Any) -> None:
        self._graph = graph
        self._fake_mode = fake_mode
        self._last: fx.Node = [node for node in graph.nodes if node.op == "placeholder"][-1]
        self._by_key: dict[tuple[object, ...], tuple[fx.Node, ...]] = {}
        self.nodes: dict[Slot, tuple[fx.Node, ...]] = {}
        self.labels: dict[str, str] = {}
        self._made_of = Counter[str]()

    def of(self, site: Site, format: Format) -> tuple[fx.Node, ...]:
        """The placeholders that hold one format of a site's weight."""
        device = value_of(site.match.weight).device
        key = (site.weight.roots, site.weight.signature, site.shape, format)
        if key not in self._by_key:
            name = site.record.parameters[0]
            slot = Slot(site.weight, site.shape, format, site.config, site.recipe, name)
            number, again = len(self._by_key), self._made_of[slot.name]
            self._made_of[slot.name] += 1
            nodes = tuple(
                self._placeholder(
                    f"{part}_{number}",
                    f"{slot.name}.{part}" + f"_{again}" * bool(again),
                    *spec,
                    device,
                )
                for part, spec in zip(_parts(format), format_specs(site.shape, format))  # noqa: B905
            )
            self._by_key[key] = self.nodes[slot] = nodes
        return self._by_key[key]

    def slot(self, site: Site, format: Format | None) -> Slot:
        """The slot of a site's weight, which has been asked for."""
        same = (site.weight.roots, site.weight.signature, site.shape, format)
        return next(
            slot
            for slot in self.nodes
            if (slot.weight.roots, slot.weight.signature, slot.shape, slot.format) == same
        )

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
    """What the tensors of a format are called."""
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
    node = copies[site.node]
    build = Build(node, fake_mode)
    packed = inputs.of(site, format)
    match = site.match.on(copies)
    if matmul is None:
        _put_dense(node, match, packed[0], build)
        return

    def multiply(x: fx.Node, *, offs: fx.Node | None = None, ids: fx.Node | None = None) -> fx.Node:
        if site.shape.batch:
            return _experts(x, site.shape, packed, offs, ids, build)
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
        sites: the sites.
        format: what all of them read.
        inputs: of the graph.
    """

    def __init__(self, sites: Sequence[Site], format: Format, inputs: _PackedInputs) -> None:
        self._format = format
        self._dtype = sites[0].activation_dtype
        self._shapes = {inputs.of(site, format): site.shape for site in sites}
        self._product: fx.Node | None = None

    def columns(self, packed: tuple[fx.Node, ...], x: fx.Node, build: Build) -> fx.Node:
        """Y[M, N] = X[M, K] @ W^T for one of the weights, in X's dtype.

        Args:
            packed: the inputs that hold the weight.
            x: the same rows whichever site asks; the first to do so has them multiplied by all.
            build: makes nodes in front of the site's node.
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
        """X times all weights, side by side."""
        op = aten_op(self._format, self._dtype, len(self._shapes))
        x = build.contiguous(_pre_scaled(x, next(iter(self._shapes)), build))
        if value_of(x).dtype is not self._dtype:
            x = build(_CAST, x, self._dtype)
        tiles, scale_and_zero, *_ = (list(part) for part in zip(*self._shapes, strict=True))
        shape, *_ = self._shapes.values()
        if op is None:
            op, n = torch.ops.fxint4.linears.default, [shape.n for shape in self._shapes.values()]
            return build(op, x, tiles, scale_and_zero, shape.group_size, n)
        missing = shape.k_padded - value_of(x).shape[-1]
        if missing:
            x = build(aten.constant_pad_nd.default, x, [0, missing], 0.0)
        return build(op, x, tiles[0], shape.group_size, scale_and_zero[0])


_CAST = torch.ops.prims.convert_element_type.default


def _pre_scaled(x: fx.Node, packed: Sequence[fx.Node], build: Build) -> fx.Node:
    """X times the pre-scale among the inputs of a weight, in fp32; X itself where there is none."""
    return build(aten.mul.Tensor, x, packed[2]) if len(packed) > 2 else x


def _views_of(node: fx.Node, value: Tensor, fake_mode: Any) -> dict[fx.Node, Tensor] | None:
    """What the views of a node become when it holds the columns of a wider tensor.

    Args:
        node: the node.
        value: what it will hold, like what it holds but for its strides.
        fake_mode: the FakeTensorMode of the graph's values.

    Returns:
        The value of each view; None where one of them can't be made, or where something may tell
        the difference: an output of the graph, an op that is not ATen's, or a kernel (attention)
        that loads 16 bytes at a time.
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
        except (RuntimeError, ValueError):  # a view of rows and columns as one
            return None
        if not isinstance(values[user], Tensor):
            return None
        pending += user.users
    del values[node]
    return values


def _experts(
    x: fx.Node,
    shape: TileShape,
    packed: Sequence[fx.Node],
    offs: fx.Node | None,
    ids: fx.Node | None,
    build: Build,
) -> fx.Node:
    """One of several weights for each row of X, or for each member of its batch; see `Multiply`."""
    ours, dtype = torch.ops.fxint4, value_of(x).dtype
    scaled = _pre_scaled(x, packed, build)
    x = scaled if scaled is x else build(_CAST, scaled, dtype)
    packed = packed[:2]
    if offs is not None:
        return build(ours.grouped_mm.default, x, *packed, offs, shape.group_size, shape.n)
    if ids is not None:
        return build(ours.indexed_mm.default, x, *packed, ids, shape.group_size, shape.n)
    return build(ours.bmm.default, x, *packed, shape.group_size, shape.n)


def _put_dense(node: fx.Node, match: Match, dense: fx.Node, build: Build) -> None:
    """Let a matmul read the dequantized copy where it read the weight."""
    if match.weight in node.all_input_nodes:
        node.replace_input_with(match.weight, dense)
        return
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


def _drop_unread(
    captured: fx.GraphModule, copies: Mapping[fx.Node, fx.Node], droppable: Sequence[fx.Node]
) -> tuple[int, ...]:
    kept = []
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
    for index, placeholder in enumerate(placeholders):
        if placeholder in droppable and not copies[placeholder].users:
            copies[placeholder].graph.erase_node(copies[placeholder])
        else:
            kept.append(index)
    return tuple(kept)
