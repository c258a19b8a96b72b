"""One matmul's record, and one graph's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from fxint4.report.parameters import Parameter

__all__ = ["GraphReport", "Record", "checked"]

#: The types that JSON has for fields of a record; a field not listed is a whole number.
_TUPLES = ("fused_with", "kernels", "parameters", "aliases")
_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "op": (str,),
    "group_size": (int, NoneType),
    "action": (str,),
    "method": (str,),
    "reason": (str,),
    "source": (str,),
    "shard": (str,),
    "sqnr_db": (float, int, NoneType),
    "output_error": (float, int, NoneType),
    **dict.fromkeys(_TUPLES, (list,)),
}
#: Fields that only this process can use; `Record.to_dict` leaves them out.
_HIDDEN = ("weight_key", "place")


@dataclass(frozen=True)
class Record:
    """One matmul-like node with a constant weight.

    Attributes:
        name: Full name of the layer, or of the parameter where no layer owns it.
        op: The aten op, such as "addmm".
        n: Out features (N).
        k: In features (K).
        group_size: Neighbouring k that share a scale and a zero; None where kept.
        action: "packed" or "kept".
        reason: Why it was kept; of a packed one, which casts or copies it needs. May be empty.
        method: How the codes were chosen, see `Int4Config`; empty where kept.
        sqnr_db: Signal-to-quantization-noise ratio of the weight, in dB; None where not measured.
        bytes_before: Bytes of the original weight.
        bytes_after: Bytes of tiles and scale_and_zero, or bytes_before where kept.
        dense_bytes: Bytes of a dequantized copy that is held beside them for speed.
        held_bytes: Bytes of the parameters the weight was made from, which stay in memory.
        batch: How many matrices [N, K] the weight holds: its experts.
        fused_with: Full names of the other layers in the same matmul.
        kernels: On a GPU, the kernel for each range of M, such as "M<=16: ..."; one entry where M
            is fixed, none for experts.
        parameters: Full names of the parameters the weight is made of.
        aliases: Their other full names, where they are tied.
        source: The line of the user's code that multiplies, such as "model.py:31 in forward"; empty
            where it is not known.
        output_error: Relative error of the product where this weight alone is quantized:
            |x W_q^T - x W^T| / |x W^T| (Frobenius norms), over all x of the example inputs. None
            where it was not measured, or no x reached the weight, or the product is all zeros.
        shard: Which part of the weight this process has, such as "shard 1 of 2, along N"; empty for
            the whole.
        weight_key: Equal for matmuls that share one weight. `to_dict` leaves it out;
            `Report.to_dict` has a number in its place.
        place: Where the weight sits, a `Place` or a tuple of them; None where that is not known.
            `to_dict` leaves it out.
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
    aliases: tuple[str, ...] = ()
    source: str = ""
    method: str = ""
    shard: str = ""
    output_error: float | None = None
    weight_key: Hashable = field(default=None, compare=False, repr=False)
    place: Hashable = field(default=None, compare=False, repr=False)

    @classmethod
    def fields(cls) -> list[str]:
        """Return the names of the fields that `to_dict` has."""
        return [each.name for each in dataclasses.fields(cls) if each.name not in _HIDDEN]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as values that JSON can hold.

        JSON has no infinity: of a weight that int4 holds exactly, `sqnr_db` is None and `exact` is
        True.
        """
        values = {name: getattr(self, name) for name in self.fields()}
        for name in _TUPLES:
            values[name] = list(values[name])
        values["exact"] = self.sqnr_db == math.inf
        for name in ("sqnr_db", "output_error"):
            if values[name] is not None and not math.isfinite(values[name]):
                values[name] = None
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], weight_key: Hashable = None) -> Record:
        """Make a record of what `to_dict` returned.

        Args:
            values: Those values; further keys are ignored.
            weight_key: The `weight_key` of the record.

        Raises:
            KeyError: A field is missing.
            TypeError: A value has a wrong type.
        """
        given = {name: checked(values, name, *_TYPES.get(name, (int,))) for name in cls.fields()}
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
        records: Its matmuls with constant weights, in the order they run.
        parameters: Every parameter that the graph reads, and the other parameters of the modules
            that are called; by `id`. A tuple of name and elements becomes a `Parameter`.
        before: The captured graph as text; empty where there is none (`fxint4.pack_`).
        after: The rewritten graph as text.
        graph_break: Why Dynamo ended the graph early, or None.
    """

    records: tuple[Record, ...]
    parameters: Mapping[int, Parameter]
    before: str
    after: str
    graph_break: str | None = None

    def __post_init__(self) -> None:
        """Turn pairs of name and elements into a `Parameter` each."""
        parameters = {key: Parameter(*value) for key, value in self.parameters.items()}
        object.__setattr__(self, "parameters", parameters)


def checked(values: Mapping[str, Any], name: str, *types: type) -> Any:
    """Return a value of a dict that was read from JSON, if it has one of these types.

    Args:
        values: The dict.
        name: The key.
        *types: Types that the value may have; a bool does not count as an int.

    Raises:
        KeyError: The key is missing.
        TypeError: The value has another type.
    """
    value = values[name]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise TypeError(f"{name} is {value!r}")
    return value
