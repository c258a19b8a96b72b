"""`Int4TileTensor`: a packed weight that behaves like the weight it was made from.

`core` holds the class; `views` the operators that keep a weight packed, such as slicing; `matmul`
those that multiply by it; `arithmetic` those that change or decompose it; `layers` those that are a
whole layer; `quick` those of eager `nn.Linear`; `collectives` those between processes; `files`
reads and writes safetensors.
"""

from __future__ import annotations

from fxint4.tensor import arithmetic, collectives, layers, matmul, quick, views
from fxint4.tensor.core import Int4TileTensor, dequantizing, is_packed

__all__ = [
    "Int4TileTensor",
    "arithmetic",
    "collectives",
    "dequantizing",
    "is_packed",
    "layers",
    "matmul",
    "quick",
    "views",
]
