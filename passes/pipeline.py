"""What the passes find in one captured graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxint4._pytorch.aot import CompileState
from fxint4.config.int4_config import Int4Config
from fxint4.graph.constants import Constants
from fxint4.graph.names import Inputs
from fxint4.graph.placeholders import GraphWeights
from fxint4.passes.find import find
from fxint4.passes.inline import inline_regions
from fxint4.passes.patterns import PATTERNS

__all__ = ["Analysis"]


class Analysis:
    """What the passes found in one captured graph.

    Attributes:
        captured: the graph, of ATen ops, its weights among its inputs.
        weights: its inputs that are constant.
        found: see `fxint4.passes.find`.
        fake_mode: the FakeTensorMode of the graph's values.
    """

    def __init__(
        self,
        captured: fx.GraphModule,
        dynamo_gm: fx.GraphModule,
        inputs: Inputs,
        example_inputs: Sequence[Any],
        config: Int4Config,
        state: CompileState,
    ) -> None:
        self.captured = captured
        self.fake_mode = state.fake_mode
        self.weights = GraphWeights(captured, dynamo_gm, inputs, example_inputs)
        inline_regions(captured, self.fake_mode)
        self.constants = Constants(captured, self.weights.roles)
        tensors, names = self.weights.tensors, self.weights.names
        self.found = find(captured, PATTERNS, self.constants, tensors, names, config)
