"""One matmul's record, and one graph's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

__all__ = ["GraphReport", "Record", "checked"]

#: Fields of a record that are no whole number, and what JSON makes of them.
_TUPLES = ("fused_with", "kernels", "parameters")
_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "op": (str,),
    "group_size": (int, NoneType),
    "action": (str,),
    "method": (str,),
    "reason": (str,),
    "source": (str,),
    "sqnr_db": (float, int, NoneType),
    "output_error": (float, int, NoneType),
    **dict.fromkeys(_TUPLES, (list,)),
}


@dataclass(frozen=True)
class Record:
    """One matmul-like node with a constant weight.

    Attributes:
        name: full name of the layer, or of the parameter where no layer owns it.
        op: the aten op, such as "addmm".
        n: out features.
        k: in features.
        group_size: neighbouring k that share a scale and a zero; None where kept.
        action: "packed" or "kept".
        reason: why it was kept; for a packed one, what is cast or copied. May be empty.
        method: how its codes were chosen, see `Int4Config`; empty where kept.
        sqnr_db: signal-to-quantization-noise ratio of the weight, in dB; None where not measured.
        bytes_before: bytes of the weight as it was.
        bytes_after: bytes of tiles and scale_and_zero, or bytes_before where kept.
        dense_bytes: bytes of a dequantized copy held beside them for speed.
        held_bytes: bytes of the parameters it was made from, which stay in memory.
        batch: how many matrices of N x K the weight holds: its experts.
        fused_with: full names of the other layers that are multiplied in the same matmul.
        kernels: on a GPU what multiplies, for each range of M, such as "M<=16: ..."; one entry
            where M is fixed, none for experts.
        parameters: full names of the parameters the weight is made of.
        source: the line of the user's code that multiplies, such as "model.py:31 in forward"; empty
            where it is not known.
        output_error: what quantizing this weight alone does to the product: |x W_q^T - x W^T| as a
            part of |x W^T| (Frobenius norms), over all x of the example inputs. None where it was
            not measured, or where no x or a product of zeros gives nothing to measure.
        weight_key: equal for matmuls that share one weight; not part of `to_dict`, where
            `Report.to_dict` has a number for it.
    """

    name: str
    op: str
    n: int
    k: int
    group_size: int | None
    action: str
    reason: str
    sqnr_db: float | None
    bytes_before: int
    bytes_after: int
    dense_bytes: int = 0
    held_bytes: int = 0
    batch: int = 1
    fused_with: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    source: str = ""
    method: str = ""
    output_error: float | None = None
    weight_key: Hashable = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON can hold it.

        JSON has no infinity, so for a weight that int4 holds exactly `sqnr_db` is None, and `exact`
        True.
        """
        values = {
            name: getattr(self, name)
            for name in (f.name for f in dataclasses.fields(self))
            if name != "weight_key"
        }
        for name in _TUPLES:
            values[name] = list(values[name])
        values["exact"] = self.sqnr_db == math.inf
        for name in ("sqnr_db", "output_error"):
            if values[name] is not None and not math.isfinite(values[name]):
                values[name] = None
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], weight_key: Hashable = None) -> Record:
        """The record that `to_dict` gave these values of.

        Args:
            values: they, and others, which are left alone.
            weight_key: of the record.

        Raises:
            KeyError: a field is missing.
            TypeError: a value is not what its field takes.
        """
        names = [field.name for field in dataclasses.fields(cls) if field.name != "weight_key"]
        given = {name: checked(values, name, *_TYPES.get(name, (int,))) for name in names}
        for name in _TUPLES:
            if not all(isinstance(item, str) for item in given[name]):
                raise TypeError(f"{name} is {given[name]!r}")
            given[name] = tuple(given[name])
        if checked(values, "exact", bool):
            given["sqnr_db"] = math.inf
        return cls(**given, weight_key=weight_key)


@dataclass(frozen=True)
class GraphReport:
    """One captured graph.

    Attributes:
        records: its matmuls with constant weights, in the order they run.
        parameters: full name and elements of every parameter it reads, and of those beside them in
            the modules that are called; by identity.
        before: the graph as captured, as text; empty where there is none (`fxint4.pack_`).
        after: the graph as rewritten, as text.
        graph_break: why Dynamo ended it early, or None.
    """

    records: tuple[Record, ...]
    parameters: Mapping[int, tuple[str, int]]
    before: str
    after: str
    graph_break: str | None = None


def checked(values: Mapping[str, Any], name: str, *types: type) -> Any:
    """A value of a dict that JSON gave.

    Args:
        values: the dict.
        name: the key.
        *types: what the value may be; a bool is no int.

    Raises:
        KeyError: there is none.
        TypeError: it is something else.
    """
    value = values[name]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise TypeError(f"{name} is {value!r}")
    return value
