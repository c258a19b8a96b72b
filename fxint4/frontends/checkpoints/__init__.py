"""Read checkpoints that other libraries quantized to int4 into tiles."""

from fxint4.frontends.checkpoints.load import load_

__all__ = ["load_"]
