"""Inline the bodies of nested_compile_region, so that the other passes see a flat graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxint4.graph.build import Build


def inline_regions(gm: fx.GraphModule, fake_mode: Any) -> None:
    """Replace each `invoke_subgraph` with a copy of the graph that it calls.

    Args:
        gm: The graph; changed in place.
        fake_mode: The FakeTensorMode of the graph's values.
    """
    region = torch.ops.higher_order.invoke_subgraph
    for call in [node for node in gm.graph.nodes if node.target is region]:
        body = getattr(gm, str(call.args[0].target))
        inline_regions(body, fake_mode)
        _inline(gm, call, body, fake_mode)
    gm.graph.eliminate_dead_code()


def _inline(gm: fx.GraphModule, call: fx.Node, body: fx.GraphModule, fake_mode: Any) -> None:
    arguments = iter(call.args[2:])
    copies: dict[fx.Node, Any] = {}
    outputs: Any = ()
    for node in body.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(arguments)
        elif node.op == "output":
            outputs = fx.map_arg(node.args[0], lambda inner: copies[inner])
        elif node.op == "get_attr":
            copies[node] = _adopt(gm, call, getattr(body, node.target), fake_mode)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda inner: copies[inner])
            copy = Build(call, fake_mode, like=node)(node.target, *args, **kwargs)
            copies[node] = copy
    for user in list(call.users):
        assert user.target is operator.getitem, user
        user.replace_all_uses_with(outputs[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)


def _adopt(gm: fx.GraphModule, call: fx.Node, value: Any, fake_mode: Any) -> fx.Node:
    """Make an attribute of the body an attribute of the outer graph, and a node that reads it."""
    name = f"_{call.name}_attr"
    while hasattr(gm, name):
        name += "_"
    if isinstance(value, torch.Tensor):
        gm.register_buffer(name, value)
    else:
        setattr(gm, name, value)
    with gm.graph.inserting_before(call):
        node = gm.graph.get_attr(name)
    if isinstance(value, torch.Tensor):
        node.meta["val"] = fake_mode.from_tensor(value)
    return node
