"""Calibration: statistics of the activations that each weight multiplies."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fxint4.atomic_files import write_tensors
from fxint4.errors import PackedFormatError, WriteError
from fxint4.quant.methods import METHODS
from fxint4.quant.tile_layout import GROUP_SIZES
from fxint4.untrusted_files import check_metadata, open_tensors, parse_json

__all__ = ["Calibration", "Choice", "Statistics", "Trade", "computed_key", "transposed_key"]

#: The entry of a file's header that says which tensors belong to which weight.
_HEADER = "fxint4.quant.statistics"
_VERSION = 1


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of the activations x ``[rows, K]`` of one weight; compared by identity.

    A weight ``[E, N, K]`` has separate statistics for each of its E matrices, of the rows that this
    matrix multiplies.

    Attributes:
        second_moments: fp32 ``[K, K]`` or ``[E, K, K]``, the sum of x^T x over the rows.
        magnitudes: fp32 ``[K]`` or ``[E, K]``, the mean of abs(x) over the rows.
        rows: int64 ``[]`` or ``[E]``, the number of rows.
        pre_scale: fp32 ``[K]``, factors that x is multiplied by and the weight is divided by to
            reduce its error; None for no factors. Weights that multiply the same x share them, and
            so do the E matrices of one weight.
    """

    second_moments: Tensor
    magnitudes: Tensor
    rows: Tensor
    pre_scale: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """What a budget chose for a weight.

    Attributes:
        group_size: Neighbouring k that share a scale and a zero; None if the weight is not packed.
        method: See `fxint4.Int4Config`; empty if the weight is not packed.
    """

    group_size: int | None
    method: str = ""

    def __str__(self) -> str:
        return "as it is" if self.group_size is None else f"{self.method} g{self.group_size}"


@dataclass(frozen=True)
class Trade:
    """What a budget bought.

    Attributes:
        budget: The option, such as "target_error=0.01".
        error: The relative error of the model's output, measured on the batches.
        nbytes: Bytes of all weights that the budget covers, after packing.
        next_step: What the next smaller error would cost; empty if there is none.
    """

    budget: str
    error: float
    nbytes: int
    next_step: str = ""

    def __str__(self) -> str:
        price = f"; next step: {self.next_step}" if self.next_step else ""
        return f"{self.budget}: error {self.error:.3g} in {self.nbytes} bytes{price}"


class Calibration:
    """The calibration statistics of a model, as `fxint4.calibrate` returns them.

    Args:
        statistics: The statistics of each weight, by `fxint4.weights.expression.Weight.key`.
        choices: What a budget chose for each weight, by the same key.
        trade: What the budget bought; None without one.
    """

    def __init__(
        self,
        statistics: Mapping[str, Statistics],
        choices: Mapping[str, Choice] = MappingProxyType({}),
        trade: Trade | None = None,
    ) -> None:
        self._statistics = dict(statistics)
        self.choices = dict(choices)
        self.trade = trade

    def __len__(self) -> int:
        return len(self._statistics)

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __getitem__(self, key: str) -> Statistics:
        return self._statistics[key]

    def get(self, key: str) -> Statistics | None:
        """The statistics of a weight, or None."""
        return self._statistics.get(key)

    def __repr__(self) -> str:
        return f"Calibration of {len(self)} weights, {self.nbytes} bytes"

    @property
    def nbytes(self) -> int:
        """Bytes of all statistics; shared tensors count once."""
        return sum(tensor.nbytes for tensor in self._parts()[0].values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; shared tensors are written once.

        Args:
            path: The path of the file.

        Raises:
            WriteError: The file can't be written; it is as it was.
        """
        tensors, weights = self._parts()
        header = json.dumps(
            {
                "version": _VERSION,
                "weights": weights,
                "choices": {key: asdict(choice) for key, choice in self.choices.items()},
                "trade": None if self.trade is None else asdict(self.trade),
            }
        )
        values = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {_HEADER: header}
        check_metadata(path, metadata, WriteError)
        write_tensors(Path(path), values, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu") -> Calibration:
        """Read what `save` wrote.

        Args:
            path: The path of the file.
            device: The device of the statistics.

        Raises:
            PackedFormatError: The file can't be read, is damaged, or `save` did not write it. The
                message names the weight whose statistics have a wrong shape or dtype, or are not
                finite.
        """
        with open_tensors(path, PackedFormatError, device) as file:
            text = (file.metadata() or {}).get(_HEADER)
            if text is None:
                raise PackedFormatError(f"{path} is no calibration: Calibration.save wrote none")
            header = parse_json(text, path, PackedFormatError)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        try:
            if header["version"] != _VERSION:
                raise PackedFormatError(
                    f"{path} is of version {header['version']}; this fxint4 reads {_VERSION}"
                )
            trade = header["trade"]
            return cls(
                {
                    key: _checked(key, {part: tensors[name] for part, name in parts.items()})
                    for key, parts in header["weights"].items()
                },
                {key: _choice(key, choice) for key, choice in header["choices"].items()},
                None if trade is None else _trade(trade),
            )
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, PackedFormatError):
                raise
            raise PackedFormatError(
                f"{path} is no calibration, or a damaged one: {type(error).__name__}: {error}"
            ) from error

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
        """All tensors by name; and for each weight the names of its statistics' tensors."""
        names: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        weights: dict[str, dict[str, str]] = {}
        for key, statistics in self._statistics.items():
            weights[key] = {}
            for part in (field.name for field in fields(Statistics)):
                tensor = getattr(statistics, part)
                if tensor is None:
                    continue
                name = names.setdefault(id(tensor), f"{len(names)}.{part}")
                tensors[name] = tensor
                weights[key][part] = name
        return tensors, weights


def _checked(key: str, parts: Mapping[str, Tensor]) -> Statistics:
    """The statistics of a weight from a file; ValueError if they can't be any."""
    given = Statistics(**parts)
    *batch, k = given.magnitudes.shape or (0,)
    wanted = {
        "second_moments": ((*batch, k, k), torch.float32),
        "magnitudes": ((*batch, k), torch.float32),
        "rows": (tuple(batch), torch.int64),
        "pre_scale": ((k,), torch.float32),
    }
    for name, tensor in parts.items():
        shape, dtype = wanted[name]
        if tuple(tensor.shape) != shape or tensor.dtype is not dtype or not k or len(batch) > 1:
            raise ValueError(
                f"{name} of {key} is {tensor.dtype} {tuple(tensor.shape)}; with magnitudes of "
                f"{tuple(given.magnitudes.shape)} it must be {dtype} {shape}"
            )
        least = torch.finfo(dtype).tiny if name == "pre_scale" else 0
        values = tensor.diagonal(dim1=-2, dim2=-1) if name == "second_moments" else tensor
        if not bool(tensor.isfinite().all()) or bool((values < least).any()):
            raise ValueError(f"{name} of {key} holds inf, NaN or numbers below {least:g}")
    return given


def _choice(key: str, values: Mapping[str, Any]) -> Choice:
    """A choice from a file; ValueError if it can't be one."""
    size, method = values["group_size"], values["method"]
    packed = type(size) is int and size in GROUP_SIZES and method in METHODS
    if not (packed or (size is None and method == "")):
        raise ValueError(
            f"the choice for {key} is {size!r} by {method!r}; it must be one of {GROUP_SIZES} by "
            f"one of {METHODS}, or None"
        )
    return Choice(**values)


def _trade(values: Mapping[str, Any]) -> Trade:
    """A trade from a file; ValueError if it can't be one."""
    texts = all(isinstance(values[name], str) for name in ("budget", "next_step"))
    if not texts or type(values["nbytes"]) is not int or not math.isfinite(values["error"]):
        raise ValueError(f"the trade is {dict(values)!r}")
    return Trade(**values)


def computed_key(parameters: Sequence[str], signature: str) -> str:
    """The key of a weight that is computed from parameters, the same in every process.

    Args:
        parameters: The full names of the parameters, the largest first.
        signature: The signature of the computation, see `fxint4.weights.expression.Weight`.
    """
    return f"{'+'.join(parameters)}#{hashlib.sha256(signature.encode()).hexdigest()[:8]}"


def transposed_key(parameter: str) -> str:
    """The key of a parameter ``[..., K, N]``; that of ``[..., N, K]`` is the parameter's name."""
    return f"{parameter}.T"
