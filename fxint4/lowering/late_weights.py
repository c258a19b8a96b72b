"""Weights that compiled code meets for the first time when it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

from fxint4.config.int4_config import Int4Config
from fxint4.graph.names import layer_name, names_in_call, parameters_in_call
from fxint4.kernels.policy import Policy
from fxint4.lowering.graph import LateUse
from fxint4.passes.fold import folded_record
from fxint4.passes.fuse import with_matmuls
from fxint4.passes.site import Site
from fxint4.report import Report

__all__ = ["LateWeights"]


class LateWeights:
    """Adds to a report the weights that a graph meets only when it runs.

    Code that was compiled for one of twelve equal layers serves the other eleven.

    Args:
        report: the report.
        key: of the graph in it.
        sites: of the graph.
        config: what the user asked for.
        policy: which kernels the graph's compile chooses.
    """

    def __init__(
        self,
        report: Report,
        key: Hashable,
        sites: Sequence[Site],
        config: Int4Config,
        policy: Policy,
    ) -> None:
        self._report = report
        self._key = key
        self._sites = sites
        self._config = config
        self._policy = policy
        self._known = {site.record.weight_key for site in sites}

    def __call__(self, meeting: LateUse) -> None:
        """Record every matmul of the graph whose weight is met and not known yet."""
        roots = [[meeting.tensors[root] for root in site.weight.roots] for site in self._sites]
        keys = [
            (*map(id, of_site), site.weight.signature)
            for site, of_site in zip(self._sites, roots, strict=True)
        ]
        if self._known.issuperset(keys):
            return
        by_identity = names_in_call(root for of_site in roots for root in of_site)
        records, new = [], []
        for position, (site, format) in enumerate(zip(self._sites, meeting.formats, strict=True)):
            packed = meeting.packed.get((site.weight.roots, site.weight.signature))
            record = folded_record(site, packed, format) if packed else site.record
            if packed and keys[position] not in self._known:
                new.append(position)
            known = record.parameters  # one name for all buffers of a packed weight
            largest_first = sorted(roots[position], key=lambda root: -root.numel())
            names = tuple(
                dict.fromkeys(
                    by_identity.get(id(root), known[min(index, len(known) - 1)])
                    for index, root in enumerate(largest_first)
                )
            )
            records.append(
                dataclasses.replace(
                    record, name=layer_name(names[0]), parameters=names, weight_key=keys[position]
                )
            )
        records = with_matmuls(records, self._sites, meeting.formats, self._config, self._policy)
        self._known.update(keys[position] for position in new)
        met = [root for position in new for root in roots[position]]
        met_names = names_in_call(met)
        parameters = parameters_in_call(met) or {
            id(root): (met_names.get(id(root), ""), root.numel()) for root in met
        }
        self._report.add(self._key, [records[position] for position in new], parameters)
