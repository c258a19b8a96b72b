"""Take nn.TransformerEncoderLayer's fast path apart.

In eval mode the layer is one opaque op, chosen before the backend is asked, in which no pattern
could find the four matmuls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxint4._pytorch.tensors import aten
from fxint4.tensor.fast_paths import encoder_layer

#: What AOTAutograd takes apart for us while it traces.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten._transformer_encoder_layer_fwd.default: encoder_layer,
}
