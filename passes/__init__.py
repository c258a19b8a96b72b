"""The graph passes: `pipeline` has their order, `patterns` the kinds of matmul they look for."""
