"""Facts about one FX graph, and the tools to make nodes in it."""
