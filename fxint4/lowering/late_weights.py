"""Records of weights that compiled code uses for the first time when it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

from fxint4.config.int4_config import Int4Config
from fxint4.graph.names import layer_name, names_in_call, parameters_in_call
from fxint4.kernels.policy import Policy
from fxint4.lowering.graph import LateWeights
from fxint4.passes.fold import folded_record
from fxint4.passes.fuse import with_matmuls
from fxint4.passes.site import Site
from fxint4.report import Parameter, Report

__all__ = ["LateRecords"]


class LateRecords:
    """Adds the late weights of a graph to a report.

    Code that was compiled for one of twelve equal layers runs the other eleven, too.

    Args:
        report: The report.
        key: Of the graph in the report.
        sites: Of the graph.
        config: What the user asked for.
        policy: Which kernels the graph's compile chooses.
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

    def __call__(self, late: LateWeights) -> None:
        """Add a record for every matmul of the graph whose weight is not in the report yet."""
        roots = [[late.tensors[root] for root in site.weight.roots] for site in self._sites]
        keys = [
            (*map(id, of_site), site.weight.signature)
            for site, of_site in zip(self._sites, roots, strict=True)
        ]
        if self._known.issuperset(keys):
            return
        by_identity = names_in_call(root for of_site in roots for root in of_site)
        records, new = [], []
        for position, (site, format) in enumerate(zip(self._sites, late.formats, strict=True)):
            packed = late.packed.get((site.weight.roots, site.weight.signature))
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
        records = with_matmuls(records, self._sites, late.formats, self._config, self._policy)
        self._known.update(keys[position] for position in new)
        new_roots = [root for position in new for root in roots[position]]
        parameters = parameters_in_call(new_roots) or {
            id(root): Parameter(by_identity.get(id(root), ""), root.numel()) for root in new_roots
        }
        self._report.add(self._key, [records[position] for position in new], parameters)
