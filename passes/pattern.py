"""What a pattern is, and the tools that its rewrite builds with."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fxint4._torch import aten, faking
from fxint4.config import Int4Config
from fxint4.constants import AXES, Constants, Given, Weight
from fxint4.tiles import TileShape, choose_shape

__all__ = [
    "Build",
    "GivenMatch",
    "Kept",
    "Match",
    "Multiply",
    "Pattern",
    "kept_pick",
    "same_strides",
    "stride_hint",
    "value_of",
]


@dataclass(frozen=True)
class Kept:
    """A matmul with a constant weight that a pattern leaves alone.

    Attributes:
        weight: the constant operand.
        reason: why, with the offending value.
        n: out features, 0 where the op has no such thing.
        k: in features, likewise.
        batch: how many matrices of n x k it holds.
    """

    weight: fx.Node
    reason: str
    n: int = 0
    k: int = 0
    batch: int = 1


@dataclass(frozen=True)
class Match:
    """A matmul that a pattern can rewrite: Y[M, N] = X[M, K] @ W[N, K]^T.

    Or one of E weights [E, N, K], with the rows of X told apart by `offs` or `ids`, or by a batch
    axis of X where both are None.

    Attributes:
        weight: the constant operand.
        axes: how its axes lie, a key of `fxint4.constants.AXES`.
        x: the other operand.
        bias: the node added to the product, or None.
        offs: where the rows of each weight end, [E].
        ids: which weight each row takes, [S].
    """

    weight: fx.Node
    axes: str
    x: fx.Node
    bias: fx.Node | None = None
    offs: fx.Node | None = None
    ids: fx.Node | None = None

    @property
    def n(self) -> int:
        """Out features."""
        return int(self._matrix.shape[-2])

    @property
    def k(self) -> int:
        """In features."""
        return int(self._matrix.shape[-1])

    @property
    def batch(self) -> tuple[int, ...]:
        """Axes of the weight in front of N and K: (E,) for experts."""
        return tuple(map(int, self._matrix.shape[:-2]))

    @property
    def m(self) -> int | torch.SymInt:
        """Rows of the activation; with several weights, how many each has on average."""
        count = self.batch[0] if self.batch else 1
        rows = value_of(self.x).numel() // self.k
        return (rows + count - 1) // count

    def constant(self, constants: Constants) -> Weight:
        """The computation behind the weight."""
        return constants.weight(self.weight, self.axes)

    def shape(self, config: Int4Config, rows_multiple: int) -> TileShape:
        """The packed shape; rows are padded to a multiple of `rows_multiple`."""
        return choose_shape(
            self.n, self.k, config.group_size, config.inner_k_tiles, rows_multiple, self.batch
        )

    def on(self, copies: Mapping[fx.Node, fx.Node]) -> Match:
        """The same match in a copy of the graph."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        nodes: dict[str, Any] = {
            name: copies[value] for name, value in values.items() if isinstance(value, fx.Node)
        }
        return dataclasses.replace(self, **nodes)

    @property
    def _matrix(self) -> Tensor:
        return AXES[self.axes](value_of(self.weight))


@dataclass(frozen=True)
class GivenMatch(Match):
    """A matmul by a weight that is packed already: `weight` is the node of its tiles.

    Attributes:
        scale_and_zero: the node of its scale_and_zero.
        given: what the two are.
    """

    scale_and_zero: fx.Node = field(kw_only=True)
    given: Given = field(kw_only=True)

    @property
    def n(self) -> int:
        """Out features."""
        return self.given.n

    @property
    def k(self) -> int:
        """In features: what x has, which may be fewer than are stored."""
        return int(value_of(self.x).shape[-1])

    @property
    def batch(self) -> tuple[int, ...]:
        """Axes of the weight in front of N and K: (E,) for experts."""
        return tuple(map(int, value_of(self.weight).shape[:-4]))

    def constant(self, constants: Constants) -> Weight:
        """The computation behind the buffers."""
        return constants.given_weight(self.weight, self.scale_and_zero, self.given)

    def shape(self, config: Int4Config, rows_multiple: int) -> TileShape:
        """The packed shape, whatever the config asks for."""
        buffers = (value_of(self.weight), value_of(self.scale_and_zero))
        return self.given.shape_of(buffers, rows_multiple)


class Multiply(Protocol):
    """Multiplies by the packed weight of a match."""

    def __call__(
        self, x: fx.Node, *, offs: fx.Node | None = None, ids: fx.Node | None = None
    ) -> fx.Node:
        """X [M, K] to Y [M, N], in X's dtype.

        With E weights X is [S, K] and comes with `offs` or `ids`, or is [E, M, K].
        """


class Pattern(ABC):
    """One form in which a matmul with a constant weight appears in a graph."""

    #: The ops a match starts from.
    ops: tuple[Any, ...]

    @abstractmethod
    def match(self, node: fx.Node, constants: Constants) -> Match | Kept | None:
        """Look at one node, changing nothing.

        Returns:
            A Match; or Kept, where the weight is constant but the form can't be rewritten; or
            None, where there is no constant weight.
        """

    @abstractmethod
    def rewrite(self, node: fx.Node, match: Match, multiply: Multiply, build: Build) -> fx.Node:
        """Build what replaces `node`.

        Args:
            node: the matched node; it still stands in the graph.
            match: what `match` returned, with nodes of this graph.
            multiply: takes X, returns Y; see `Multiply`.
            build: makes nodes.

        Returns:
            A node of the same shape and dtype as `node`.
        """


_PICKS = (
    aten.select.int,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.slice.Tensor,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.clone.default,
)


def kept_pick(operands: Iterable[Any], constants: Constants) -> Kept | None:
    """A constant weight of several matrices of which an operand is a part that varies."""
    for operand in operands:
        node = operand
        while isinstance(node, fx.Node) and node.target in _PICKS:
            node = node.args[0]
            if constants.is_weight(node) and value_of(node).ndim > 2:  # type: ignore[arg-type]
                *batch, rows, columns = value_of(node).shape  # type: ignore[arg-type]
                count = math.prod(map(int, batch))
                reason = f"picked out of {count} matrices in a form that is not packed"
                return Kept(node, reason, int(rows), int(columns), count)  # type: ignore[arg-type]
    return None


class Build:
    """Makes nodes in front of a node, each with the metadata and fake value Inductor needs.

    Args:
        node: the node in front of which the new ones stand.
        fake_mode: the FakeTensorMode of the graph's values.
        like: the node whose metadata the new ones copy; `node` unless given.
    """

    def __init__(self, node: fx.Node, fake_mode: Any, like: fx.Node | None = None) -> None:
        self._graph = node.graph
        self._node = node
        self._meta = {
            key: value for key, value in (like or node).meta.items() if key in _COPIED_META
        }
        self._fake_mode = fake_mode

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """One call of `op`; nodes among the arguments stand for their values."""
        with self._graph.inserting_before(self._node):
            node = self._graph.call_function(op, args, kwargs)
        node.meta = dict(self._meta)
        real_args, real_kwargs = fx.map_arg((args, kwargs), lambda arg: arg.meta["val"])
        with faking(self._fake_mode):
            node.meta["val"] = op(*real_args, **real_kwargs)
        return node

    def size(self, node: fx.Node, dim: int) -> int | fx.Node:
        """One dimension of a node: a number, or a node where it is dynamic."""
        size: int | torch.SymInt = value_of(node).shape[dim]
        if isinstance(size, torch.SymInt):
            return self(aten.sym_size.int, node, dim)
        return size

    def contiguous(self, node: fx.Node) -> fx.Node:
        """The node itself where it is known to be contiguous, a clone elsewhere."""
        if is_contiguous(value_of(node)):
            return node
        return self(aten.clone.default, node, memory_format=torch.contiguous_format)

    def rows(self, node: fx.Node) -> fx.Node:
        """[..., K] as [M, K]."""
        value = value_of(node)
        if value.ndim == 2:
            return node
        return self(aten.view.default, self.contiguous(node), [-1, value.shape[-1]])

    def for_each_row(self, ids: fx.Node, rows: int | fx.Node) -> fx.Node:
        """One index for each row of [B, rows, K], from one for each of B."""
        if rows == 1:
            return ids
        column = self(aten.unsqueeze.default, ids, 1)
        return self(aten.reshape.default, self(aten.expand.default, column, [-1, rows]), [-1])

    def like(self, node: fx.Node, original: fx.Node) -> fx.Node:
        """A node with the strides of `original`, on which views further down may rely."""
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
        """Sum of beta * bias and alpha * product, as addmm and baddbmm define it."""
        if alpha != 1:
            product = self(aten.mul.Tensor, product, alpha)
        if bias is None or beta == 0:  # by definition a bias that beta cancels is not read
            return product
        if beta != 1:
            bias = self(aten.mul.Tensor, bias, beta)
        return self(aten.add.Tensor, product, bias)


#: Of a replaced node's metadata what says where it came from; values and layouts are made anew.
_COPIED_META = (
    "stack_trace",
    "nn_module_stack",
    "source_fn_stack",
    "original_aten",
    "from_node",
    "seq_nr",
    "custom",
)


def value_of(node: fx.Node) -> Tensor:
    """The fake tensor that a node stands for."""
    value = node.meta["val"]
    assert isinstance(value, Tensor), node
    return value


def is_contiguous(value: Tensor) -> bool:
    """Whether a (possibly symbolic) tensor is known to be contiguous, without a guard."""
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if str(size) != "1" and str(stride) != str(expected):
            return False
        expected = expected * size
    return True


def same_strides(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape are known to have the same strides, without a guard."""
    return all(
        str(size) == "1" or str(a) == str(b)
        for size, a, b in zip(left.shape, left.stride(), right.stride(), strict=True)
    )


def stride_hint(value: Any) -> int:
    """An int, or the example value of a SymInt: enough to order strides."""
    return value if isinstance(value, int) else int(value.node.hint or 0)
