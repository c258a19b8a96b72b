"""Runs of a model that compile nothing: statistics, errors, budgets."""
