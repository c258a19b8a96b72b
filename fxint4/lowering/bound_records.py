"""Records of the weights that a compiled graph has for some parameters."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

from fxint4.config.int4_config import Int4Config
from fxint4.graph.names import parameters_around
from fxint4.kernels.policy import Policy
from fxint4.lowering.graph import Binding
from fxint4.passes.fold import folded_record
from fxint4.passes.fuse import with_matmuls
from fxint4.report import Record, Report
from fxint4.weights.identity import KnownWeights

__all__ = ["BoundRecords"]


def _records(binding: Binding, config: Int4Config, policy: Policy) -> list[Record]:
    """The record of each site of a graph, for the weights of a binding.

    Args:
        binding: The binding.
        config: What the user asked for.
        policy: Which kernels the graph's compile chooses.
    """
    records = [
        folded_record(site, binding.packed.get(site.weight), format)
        for site, format in zip(binding.sites, binding.formats, strict=True)
    ]
    made = with_matmuls(records, binding.sites, binding.formats, config, policy)
    return [new if new.action == "packed" else old for new, old in zip(made, records, strict=True)]


class BoundRecords:
    """Adds the weights to a report that a compiled graph uses after it was compiled.

    Code that was compiled for one of twelve equal layers runs the other eleven, too. The records
    are made when the report is read.

    Args:
        report: The report.
        key: Of the graph in the report.
        config: What the user asked for.
        policy: Which kernels the graph's compile chooses.
    """

    def __init__(self, report: Report, key: Hashable, config: Int4Config, policy: Policy) -> None:
        self._report = report
        self._key = key
        self._config = config
        self._policy = policy
        self._known = KnownWeights[tuple[str, str]]()

    def first(self, binding: Binding) -> list[Record]:
        """The record of each site for the weights that the graph was compiled with."""
        records = _records(binding, self._config, self._policy)
        self._new(records)
        return records

    def __call__(self, binding: Binding) -> None:
        """Add the weights of a binding that a call made."""
        self._report.add_later(
            self._key,
            lambda: (
                self._new(_records(binding, self._config, self._policy)),
                parameters_around(binding.origins.values()),
            ),
        )

    def _new(self, records: Sequence[Record]) -> list[Record]:
        """Those whose weight was not met before, or has another outcome now."""
        outcomes = [(record.weight_key, (record.action, record.reason)) for record in records]
        new = [self._known.get(key) != outcome for key, outcome in outcomes]
        for key, outcome in outcomes:
            self._known[key] = outcome
        return list(itertools.compress(records, new))
