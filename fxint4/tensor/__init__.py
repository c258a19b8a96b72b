"""`Int4TileTensor`: a packed weight that behaves like the weight it was made from.

`core` is the class and what it is made from and into; `views` the operators that say which part of
a weight is meant and how its axes lie; `matmul` those that multiply by it, and `layers` those that
do more than that.
"""

from __future__ import annotations

from fxint4.tensor import layers, matmul, views
from fxint4.tensor.core import Int4TileTensor, dequantizing

__all__ = ["Int4TileTensor", "dequantizing", "layers", "matmul", "views"]
