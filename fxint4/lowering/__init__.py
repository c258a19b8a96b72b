"""A rewritten graph as code: what Inductor makes of it, and its weights at run time."""
