"""The version of fxint4."""

__all__ = ["__version__"]

__version__ = "0.1.0"
