"""The ways in: one file for each function that a user calls."""
