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

from fxint4._pytorch.tensors import aten
from fxint4.config.int4_config import Int4Config
from fxint4.graph.build import Build
from fxint4.graph.constants import Constants
from fxint4.graph.symbolic import value_of
from fxint4.quant.tile_layout import TileShape, choose_shape
from fxint4.weights.expression import AXES, Prepacked, Weight

__all__ = ["Kept", "Match", "Multiply", "Pattern", "PrepackedMatch", "kept_pick"]


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
        axes: how its axes lie, a key of `fxint4.graph.constants.AXES`.
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
class PrepackedMatch(Match):
    """A matmul by a weight that is packed already: `weight` is the node of its tiles.

    Attributes:
        scale_and_zero: the node of its scale_and_zero.
        prepacked: what the two are.
    """

    scale_and_zero: fx.Node = field(kw_only=True)
    prepacked: Prepacked = field(kw_only=True)

    @property
    def n(self) -> int:
        """Out features."""
        return self.prepacked.n

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
        return constants.prepacked_weight(self.weight, self.scale_and_zero, self.prepacked)

    def shape(self, config: Int4Config, rows_multiple: int) -> TileShape:
        """The packed shape, whatever the config asks for."""
        buffers = (value_of(self.weight), value_of(self.scale_and_zero))
        return self.prepacked.shape_of(buffers, rows_multiple)


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
