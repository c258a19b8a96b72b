"""Numbers only: codes, scales and zeros, the tiled layout, errors. Knows no graph and no config."""
