"""The interface of a pattern: what it matches, and how it rewrites a match."""

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
from fxint4.graph.build import Build
from fxint4.graph.constants import Constants
from fxint4.graph.symbolic import value_of
from fxint4.quant.tile_layout import TileShape
from fxint4.weights.expression import AXES, Prepacked, Weight
from fxint4.weights.formats import rows_multiple

__all__ = ["Match", "Multiply", "Pattern", "PrepackedMatch", "Unmatched", "kept_pick"]


@dataclass(frozen=True)
class Unmatched:
    """A matmul with a constant weight that a pattern does not rewrite.

    Attributes:
        weight: The constant operand.
        reason: Why it is not rewritten, with the offending value.
        n: Out features N; 0 if the op has none.
        k: In features K; 0 if the op has none.
        batch: Number of ``[N, K]`` matrices in the weight.
    """

    weight: fx.Node
    reason: str
    n: int = 0
    k: int = 0
    batch: int = 1


@dataclass(frozen=True)
class Match:
    """A matmul that a pattern can rewrite: Y ``[M, N]`` = X ``[M, K]`` @ W ``[N, K]``^T.

    With E weights W is ``[E, N, K]``. Then `offs` or `ids` say which weight multiplies which rows
    of X; if both are None, X is ``[E, M, K]``.

    Attributes:
        weight: The constant operand.
        axes: Meaning of its axes, such as "NK"; a key of `fxint4.weights.expression.AXES`.
        x: The other operand.
        bias: The node added to the product, or None.
        offs: For each weight the end of its rows, integers ``[E]``; or None.
        ids: For each member of the batch its weight, int32 or int64 ``[B]``; or None.
    """

    weight: fx.Node
    axes: str
    x: fx.Node
    bias: fx.Node | None = None
    offs: fx.Node | None = None
    ids: fx.Node | None = None

    @property
    def n(self) -> int:
        """Out features N."""
        return int(self._matrix.shape[-2])

    @property
    def k(self) -> int:
        """In features K."""
        return int(self._matrix.shape[-1])

    @property
    def batch(self) -> tuple[int, ...]:
        """Axes of the weight in front of N and K: (E,) for experts."""
        return tuple(map(int, self._matrix.shape[:-2]))

    @property
    def m(self) -> int | torch.SymInt:
        """Rows M of the activation; with E weights the average rows of each, rounded up."""
        count = self.batch[0] if self.batch else 1
        rows = value_of(self.x).numel() // self.k if self.k else 0
        return (rows + count - 1) // count

    def constant(self, constants: Constants) -> Weight:
        """The computation behind the weight."""
        return constants.weight(self.weight, self.axes)

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
    """A matmul by a prepacked weight: `weight` is the node of its tiles.

    Attributes:
        scale_and_zero: The node of its scale_and_zero ``[K/group, N, 2]``.
        prepacked: Logical sizes of the weight.
        activations: What the packed weight has of `Int4Config.activations`.
    """

    scale_and_zero: fx.Node = field(kw_only=True)
    prepacked: Prepacked = field(kw_only=True)
    activations: str | None = field(default=None, kw_only=True)

    @property
    def n(self) -> int:
        """Out features N."""
        return self.prepacked.n

    @property
    def k(self) -> int:
        """In features K: those of x, which may be fewer than the stored ones."""
        return int(value_of(self.x).shape[-1])

    @property
    def batch(self) -> tuple[int, ...]:
        """Axes of the weight in front of N and K: (E,) for experts."""
        return tuple(map(int, value_of(self.weight).shape[:-4]))

    def constant(self, constants: Constants) -> Weight:
        """The computation behind the buffers."""
        return constants.prepacked_weight(self.weight, self.scale_and_zero, self.prepacked)

    @property
    def stored(self) -> TileShape:
        """The packed shape, for the device of the buffers."""
        buffers = (value_of(self.weight), value_of(self.scale_and_zero))
        return self.prepacked.shape_of(buffers, rows_multiple(buffers[0].device))


class Multiply(Protocol):
    """Multiplies by the packed weight of a match."""

    def __call__(
        self, x: fx.Node, *, offs: fx.Node | None = None, ids: fx.Node | None = None
    ) -> fx.Node:
        """Return Y ``[M, N]`` for X ``[M, K]``, in X's dtype.

        Args:
            x: X ``[M, K]``; with E weights ``[S, K]``, or ``[E, M, K]`` without `offs` and `ids`.
            offs: For each weight the end of its rows of X, integers ``[E]``.
            ids: For each row of X its weight, integers ``[S]``.
        """


class Pattern(ABC):
    """One kind of matmul with a constant weight.

    Attributes:
        ops: The ops that a match starts from.
    """

    ops: tuple[Any, ...]

    @abstractmethod
    def match(self, node: fx.Node, constants: Constants) -> Match | Unmatched | None:
        """Match one node; changes nothing.

        Args:
            node: A call of one of `ops`.
            constants: The role of each node.

        Returns:
            A `Match`; `Unmatched` if the weight is constant but the matmul can't be rewritten; None
            if there is no constant weight.
        """

    @abstractmethod
    def rewrite(self, node: fx.Node, match: Match, multiply: Multiply, build: Build) -> fx.Node:
        """Build the replacement of `node`.

        Args:
            node: The matched node, still in the graph.
            match: What `match` returned, with nodes of this graph.
            multiply: Multiplies by the packed weight.
            build: Inserts nodes before `node`.

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


def kept_pick(operands: Iterable[Any], constants: Constants) -> Unmatched | None:
    """`Unmatched` if an operand picks varying matrices out of a constant weight, else None."""
    for operand in operands:
        node = operand
        while isinstance(node, fx.Node) and node.target in _PICKS:
            node = node.args[0]
            if constants.is_weight(node) and value_of(node).ndim > 2:  # type: ignore[arg-type]
                *batch, rows, columns = value_of(node).shape  # type: ignore[arg-type]
                count = math.prod(map(int, batch))
                reason = f"picked out of {count} matrices in a form that is not packed"
                return Unmatched(node, reason, int(rows), int(columns), count)  # type: ignore[arg-type]
    return None
