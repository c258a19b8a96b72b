"""The graph passes.

Their order stands in `fxint4.passes.pipeline`, the forms of a matmul in `fxint4.passes.patterns`.
"""
