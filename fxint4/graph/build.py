"""Making nodes in an FX graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxint4._pytorch.export import faking
from fxint4._pytorch.tensors import aten
from fxint4.graph.symbolic import is_contiguous, same_strides, stride_hint, value_of

__all__ = ["Build", "copy_graph"]


class Build:
    """Inserts nodes before a node, each with the metadata and the fake value that Inductor needs.

    Args:
        node: The node before which the new ones are inserted.
        fake_mode: The FakeTensorMode of the graph's values.
        like: The node whose metadata the new ones copy. The default is `node`.
    """

    def __init__(self, node: fx.Node, fake_mode: Any, like: fx.Node | None = None) -> None:
        self._graph = node.graph
        self._node = node
        self._meta = {
            key: value for key, value in (like or node).meta.items() if key in _COPIED_META
        }
        self._fake_mode = fake_mode

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call of `op`, whose arguments may be nodes, and return its node."""
        with self._graph.inserting_before(self._node):
            node = self._graph.call_function(op, args, kwargs)
        node.meta = dict(self._meta)
        real_args, real_kwargs = fx.map_arg((args, kwargs), lambda arg: arg.meta["val"])
        with faking(self._fake_mode):
            node.meta["val"] = op(*real_args, **real_kwargs)
        return node

    def size(self, node: fx.Node, dim: int) -> int | fx.Node:
        """Size of one dimension of a node: an int, or a node if the size is dynamic."""
        size: int | torch.SymInt = value_of(node).shape[dim]
        if isinstance(size, torch.SymInt):
            return self(aten.sym_size.int, node, dim)
        return size

    def contiguous(self, node: fx.Node) -> fx.Node:
        """The node if its value is known to be contiguous, else a contiguous clone of it."""
        if is_contiguous(value_of(node)):
            return node
        return self(aten.clone.default, node, memory_format=torch.contiguous_format)

    def rows(self, node: fx.Node) -> fx.Node:
        """View a node ``[..., K]`` as ``[M, K]``, after a copy if it may not be contiguous."""
        value = value_of(node)
        if value.ndim == 2:
            return node
        return self(aten.view.default, self.contiguous(node), [-1, value.shape[-1]])

    def for_each_row(self, ids: fx.Node, rows: int | fx.Node) -> fx.Node:
        """Repeat ids ``[B]`` to ``[B * rows]``: one index for each row of a batch."""
        if rows == 1:
            return ids
        column = self(aten.unsqueeze.default, ids, 1)
        return self(aten.reshape.default, self(aten.expand.default, column, [-1, rows]), [-1])

    def like(self, node: fx.Node, original: fx.Node) -> fx.Node:
        """The values of `node` with the strides of `original`, on which later views may rely."""
        value, wanted = value_of(node), value_of(original)
        if same_strides(value, wanted):
            return node
        if is_contiguous(wanted):
            return self.contiguous(node)
        order = sorted(range(wanted.ndim), key=lambda dim: -stride_hint(wanted.stride(dim)))
        back = [order.index(dim) for dim in range(wanted.ndim)]
        dense = self.contiguous(self(aten.permute.default, node, order))
        return self(aten.permute.default, dense, back)

    def add_scaled(
        self, product: fx.Node, bias: fx.Node | None, beta: Any = 1, alpha: Any = 1
    ) -> fx.Node:
        """Return beta * bias + alpha * product, as addmm and baddbmm define it."""
        if alpha != 1:
            product = self(aten.mul.Tensor, product, alpha)
        if bias is None or beta == 0:  # addmm does not read the bias then
            return product
        if beta != 1:
            bias = self(aten.mul.Tensor, bias, beta)
        return self(aten.add.Tensor, product, bias)


#: Metadata that says where a node came from. Values and layouts are not copied.
_COPIED_META = (
    "stack_trace",
    "nn_module_stack",
    "source_fn_stack",
    "original_aten",
    "from_node",
    "seq_nr",
    "custom",
)


def copy_graph(captured: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """Copy a graph, sharing its tensors.

    Returns:
        The copy, and the copy of each node except the output.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    results = graph.graph_copy(captured.graph, copies)
    output = graph.output(results)
    output.meta = dict(captured.graph.output_node().meta)
    gm = fx.GraphModule(captured, graph)
    gm.meta.update(captured.meta)
    return gm, copies
