"""The last pass: ops of our own take the place of ATen's that Inductor can't lower as we need.

They have lowerings of ours in Inductor's table, where ATen's ops keep theirs. All that decides how
an op is lowered is among its arguments, and so in the keys of Inductor's caches. It runs when the
report has its text of the graph, which shows ATen's ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxint4._pytorch.tensors import aten
from fxint4.graph.build import Build
from fxint4.graph.symbolic import value_of
from fxint4.kernels.policy import Policy
from fxint4.lowering.all_reduce import use_one_shot

__all__ = ["use_own_ops"]


def use_own_ops(gm: fx.GraphModule, policy: Policy) -> None:
    """Replace the int4 ops of a graph, and of the graphs it calls, in place; sums, if asked to.

    Args:
        gm: An aten graph whose nodes have fake values.
        policy: How to choose kernels.
    """
    ours = torch.ops.fxint4
    replacements: Mapping[Any, Callable[[fx.Node, Policy], None]] = {
        aten._weight_int4pack_mm.default: _int4pack_mm,
        aten._weight_int4pack_mm_for_cpu.default: _with(ours.linear.for_cpu),
        ours.linears.default: _linears,
    }
    if policy.package:
        replacements = {
            **replacements,
            ours.bmm.default: _with(ours.bmm.packaged),
            ours.grouped_mm.default: _with(ours.grouped_mm.packaged),
            ours.indexed_mm.default: _with(ours.indexed_mm.packaged),
        }
    else:
        # Inductor decomposes them for other backends, and so has no lowering for them.
        replacements = {**replacements, aten.mv.default: _mv, aten.addmv.default: _addmv}
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        if policy.one_shot_all_reduce:
            use_one_shot(module)
        nodes = [node for node in module.graph.nodes if node.target in replacements]
        for node in nodes:
            replacements[node.target](node, policy)
        if nodes:
            module.recompile()


def _with(op: Any) -> Callable[[fx.Node, Policy], None]:
    """Replaces a node's op by one that takes the same arguments, but for activations."""

    def replace(node: fx.Node, policy: Policy) -> None:
        node.target, node.kwargs = op, {}

    return replace


def _int4pack_mm(node: fx.Node, policy: Policy) -> None:
    x, tiles, group_size, scale_and_zero = node.args
    _by_policy(node, policy, (x, [tiles], [scale_and_zero], group_size, [value_of(node).shape[1]]))


def _linears(node: fx.Node, policy: Policy) -> None:
    # The rest tells how to choose a kernel, which the policy does here, but for activations.
    weights, rest = node.args[:5], node.args[5:]
    activations = rest[4] if len(rest) > 4 else node.kwargs.get("activations")
    _by_policy(node, policy, weights, activations)


def _by_policy(
    node: fx.Node, policy: Policy, args: tuple[Any, ...], activations: Any = None
) -> None:
    node.target = torch.ops.fxint4.linears.by_policy
    node.args = (*args, *policy.on(value_of(node).device).of_matmuls, activations)
    node.kwargs = {}


def _mv(node: fx.Node, policy: Policy) -> None:
    matrix, vector = node.args
    build = _build(node)
    product = build(aten.mm.default, matrix, build(aten.unsqueeze.default, vector, 1))
    _replace(node, build(aten.squeeze.dim, product, 1))


def _addmv(node: fx.Node, policy: Policy) -> None:
    bias, matrix, vector = node.args
    build = _build(node)
    if value_of(bias).ndim == 1:  # type: ignore[arg-type]
        bias = build(aten.unsqueeze.default, bias, 1)
    column = build(aten.unsqueeze.default, vector, 1)
    product = build(aten.addmm.default, bias, matrix, column, **node.kwargs)
    _replace(node, build(aten.squeeze.dim, product, 1))


def _build(node: fx.Node) -> Build:
    value: Any = value_of(node)
    return Build(node, value.fake_mode)


def _replace(node: fx.Node, replacement: fx.Node) -> None:
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)
