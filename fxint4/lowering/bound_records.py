"""Records of the weights that a compiled graph has for some parameters."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from fxint4.config.int4_config import Int4Config
from fxint4.graph.names import parameters_of
from fxint4.kernels.policy import Policy
from fxint4.lowering.graph import Binding
from fxint4.passes.fold import folded_record
from fxint4.passes.fuse import with_matmuls
from fxint4.report import Record, Report

__all__ = ["BoundRecords", "bound_records"]


def bound_records(binding: Binding, config: Int4Config, policy: Policy) -> list[Record]:
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

    def __call__(self, binding: Binding) -> None:
        """Add the weights of a binding."""
        self._report.add_later(
            self._key,
            lambda: (
                bound_records(binding, self._config, self._policy),
                _parameters(binding),
            ),
        )


def _parameters(binding: Binding) -> Mapping[int, tuple[str, int]]:
    """Name and size of each parameter of the modules that a binding's weights are in, by `id`."""
    found: dict[int, tuple[str, int]] = {}
    for ref in dict.fromkeys(origin.outermost for origin in binding.origins.values()):
        module = ref()
        if module is not None:
            found.update(parameters_of(module))
    return found
