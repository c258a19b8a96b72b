"""Calibration: statistics of the activations that each weight multiplies."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from fxint4.atomic_files import draft_of
from fxint4.errors import PackedFormatError

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
        """
        from safetensors.torch import save_file

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
        with draft_of(Path(path)) as draft:
            save_file(values, draft, metadata={_HEADER: header})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu") -> Calibration:
        """Read what `save` wrote.

        Args:
            path: The path of the file.
            device: The device of the statistics.

        Raises:
            PackedFormatError: The file does not exist, is damaged, or `save` did not write it.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise PackedFormatError(f"{path} is not there; it must be what Calibration.save wrote")
        try:
            with safe_open(path, framework="pt", device=device) as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header["version"] != _VERSION:
                raise PackedFormatError(
                    f"{path} is of version {header['version']}; this fxint4 reads {_VERSION}"
                )
            trade = header["trade"]
            return cls(
                {
                    key: Statistics(**{part: tensors[name] for part, name in parts.items()})
                    for key, parts in header["weights"].items()
                },
                {key: Choice(**choice) for key, choice in header["choices"].items()},
                None if trade is None else Trade(**trade),
            )
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise PackedFormatError(
                f"{path} is no calibration: {type(error).__name__}: {error}"
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
