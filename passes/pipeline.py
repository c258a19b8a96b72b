"""The passes that find what to pack in a captured graph, in order.

What follows them needs the weights' values: `fold`, then `rewrite` once for each choice of formats.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxint4.config.int4_config import Int4Config
from fxint4.graph.constants import Constants
from fxint4.graph.placeholders import GraphWeights
from fxint4.passes.find import find
from fxint4.passes.inline import inline_regions
from fxint4.passes.patterns import PATTERNS
from fxint4.passes.plan import Plans
from fxint4.passes.site import Site

__all__ = ["Analysis"]


class Analysis:
    """What the passes found in one captured graph, of torch.compile or torch.export.

    Args:
        captured: The graph, of ATen ops, its weights among its inputs; regions are inlined in it.
        weights: Its constant placeholders.
        config: What the user asked for.
        fake_mode: The FakeTensorMode of the graph's values.

    Attributes:
        captured: The graph.
        weights: Its constant placeholders.
        fake_mode: The FakeTensorMode of the graph's values.
        constants: The role of each node.
        plans: Decides about the weights that the graph is called with.
        found: What `find` returns.
    """

    def __init__(
        self, captured: fx.GraphModule, weights: GraphWeights, config: Int4Config, fake_mode: Any
    ) -> None:
        self.captured = captured
        self.weights = weights
        self.fake_mode = fake_mode
        inline_regions(captured, fake_mode)
        self.constants = Constants(captured, weights.roles)
        self.plans = Plans(config)
        self.found = find(
            captured,
            PATTERNS,
            self.constants,
            weights.tensors,
            weights.names,
            self.plans,
            weights.origins,
        )

    @property
    def sites(self) -> list[Site]:
        """The matmuls that can be packed, with those whose own weight is kept."""
        return [entry for entry in self.found if isinstance(entry, Site)]
