"""Decompose the fast path of nn.TransformerEncoderLayer.

In eval mode PyTorch runs the layer as one opaque op, and no pattern would find its four matmuls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxint4._pytorch.tensors import aten
from fxint4.tensor.fast_paths import encoder_layer

#: Decompositions that AOTAutograd applies while it traces.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten._transformer_encoder_layer_fwd.default: encoder_layer,
}
