"""1x1 convolutions, which multiply the channels at each position by one matrix."""

from __future__ import annotations

from torch import fx

from fxint4._pytorch.tensors import aten
from fxint4.graph.build import Build
from fxint4.graph.constants import Constants
from fxint4.graph.symbolic import value_of
from fxint4.passes.pattern import Match, Multiply, Pattern, Unmatched


class Conv1x1(Pattern):
    """`convolution` in 1, 2 or 3 dimensions with a kernel of size 1."""

    ops = (aten.convolution.default,)

    def match(self, node: fx.Node, constants: Constants) -> Match | Unmatched | None:
        """Match kernel 1, stride 1, no padding and one group; others are `Unmatched`."""
        x, weight, bias, stride, padding, _, transposed, _, groups = node.args
        if not isinstance(weight, fx.Node) or not constants.is_weight(weight):
            return None
        shape = value_of(weight).shape
        kernel = list(shape[2:])
        if any(size != 1 for size in kernel):
            reason = f"a convolution with kernel {'x'.join(map(str, kernel))} (only 1x1 is packed)"
        elif any(step != 1 for step in stride):  # type: ignore[union-attr]
            reason = f"a convolution with stride {list(stride)} (only 1 is packed)"  # type: ignore[arg-type]
        elif any(padding) or transposed:  # type: ignore[arg-type]
            reason = "a padded or transposed convolution"
        elif groups != 1:
            reason = f"a convolution with {groups} groups (only 1 is packed)"
        else:
            return Match(weight, "NK1", x, bias)  # type: ignore[arg-type]
        return Unmatched(weight, reason, int(shape[0]), int(shape[1:].numel()))

    def rewrite(self, node: fx.Node, match: Match, multiply: Multiply, build: Build) -> fx.Node:
        """Move the channels last, multiply all positions at once, and move the channels back."""
        dims = value_of(match.x).ndim
        channels_last = [0, *range(2, dims), 1]
        channels_first = [0, dims - 1, *range(1, dims - 1)]
        x = build(aten.permute.default, match.x, channels_last)
        product = multiply(build.rows(x))
        outer = [build.size(x, dim) for dim in range(dims - 1)]
        product = build(aten.view.default, product, [*outer, match.n])
        product = build.add_scaled(product, match.bias)
        return build(aten.permute.default, product, channels_first)
