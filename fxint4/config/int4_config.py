"""`Int4Config`, the one place where options live, and how a user's options become one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxint4.config.names_matched import checked_patterns, matches
from fxint4.errors import OptionError
from fxint4.quant.statistics import Calibration, Choice
from fxint4.quant.tile_layout import GROUP_SIZES, INNER_K_TILES

__all__ = ["METHODS", "REPORT_SUFFIXES", "Int4Config"]

#: How codes are chosen; those after "hqq" look at activations.
METHODS = ("rtn", "mse", "hqq", "gptq", "awq", "gptq+awq")
_CALIBRATED = METHODS[3:]
#: What a layer can have of its own.
_OVERRIDDEN = ("group_size", "inner_k_tiles", "method", "min_sqnr_db")
#: Ways to multiply by int4 weights on a GPU.
KERNELS = ("triton", "cuda", "dequantize", "aten")
#: Files that a report can be written to.
REPORT_SUFFIXES = (".json", ".txt", ".html")


@dataclass(frozen=True)
class Int4Config:
    """What to pack and how. Frozen and hashable: it is part of every cache key.

    Attributes:
        group_size: neighbouring k of one row that share a scale and a zero: 32, 64, 128 or 256.
            An upper bound: a weight whose K it does not divide takes the largest smaller one
            that does, or is padded.
        inner_k_tiles: 16-wide k tiles that one thread's words hold: 2, 4 or 8. An upper bound too.
        method: how codes, scales and zeros are chosen. "rtn" rounds to nearest; "mse" and "hqq"
            look for scales and zeros that lose less of the weight; "gptq" and "awq" lose less of
            the layer's output, for which they need a `calibration`, and "gptq+awq" does both.
        calibration: what `fxint4.calibrate` returned.
        overrides: other options for some layers: for a pattern as in `include` the fields that
            differ, of group_size, inner_k_tiles, method and min_sqnr_db. Where several patterns
            match a layer, later ones win.
        target_error: choose group size and method of each weight, or to leave it as it is, so that
            packing takes the fewest bytes that keep the relative error of the model's output at
            this or below. Where the options are given to `fxint4.calibrate`, it chooses, on its
            batches; its result with the same target_error then packs by these choices.
            `fxint4.pack_` and `fxint4.explain` choose by themselves on their example arguments.
        max_bytes: likewise, for the least error in so many bytes of packed and kept weights.
        include: patterns of modules to pack; empty means all.
        skip: patterns of modules to leave alone; stronger than `include`.
            A pattern is a glob, or a regular expression after the prefix "re:". It must match the
            full name of the layer, of its parameter, or of a module that holds it.
        min_sqnr_db: keep a layer whose weight has a lower signal-to-quantization-noise ratio, in
            dB, than this.
        min_features: keep a matmul with fewer in or out features than this.
        progress: show a tqdm bar while weights are folded.
        free_weights: replace the model's parameters by packed ones when it is first compiled, so
            that the originals are freed; see `fxint4.pack_`.
        fuse_projections: on the GPU, multiply weights that share an activation (q, k and v; gate
            and up) in one matmul.
        kernel: on the GPU, how to multiply, whatever M is: "triton" (a kernel that unpacks weights
            in registers), "dequantize" (write the weight out, then cuBLAS) or "aten" (PyTorch's
            int4 op); or "cuda" (kernels in CUDA C++, where there is one for M and K, also outside
            of CUDA graphs; not in packages). None is the fastest: by rule, or with
            mode="max-autotune" by measurement.
        measure: measure what quantizing does to the output of each matmul and of the whole model,
            by running it on the example inputs with both kinds of weights. None is for
            `fxint4.explain` alone; `fxint4.pack_`, `rewrite` and `package` do it where it is True.
            A backend does not: it has no inputs before the model runs. No part of any cache key.
        report: a file that holds the report as soon as there is one, and follows as it grows: .json
            (which `fxint4.Report.load` reads), .txt or .html. Its folder must exist. No part of any
            cache key: two configs that differ in it are equal.

    Raises:
        OptionError: a value is outside its range.
    """

    group_size: int = 128
    inner_k_tiles: int = 8
    method: str = "rtn"
    calibration: Calibration | None = None
    overrides: Any = ()
    target_error: float | None = None
    max_bytes: int | None = None
    include: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    min_sqnr_db: float | None = None
    min_features: int = 32
    progress: bool = False
    free_weights: bool = False
    fuse_projections: bool = True
    kernel: str | None = None
    measure: bool | None = field(default=None, compare=False)
    report: str | os.PathLike[str] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check every field, and turn lists of patterns into tuples."""
        _one_of("group_size", self.group_size, GROUP_SIZES)
        _one_of("inner_k_tiles", self.inner_k_tiles, INNER_K_TILES)
        _one_of("method", self.method, METHODS)
        _one_of("kernel", self.kernel, (None, *KERNELS))
        if self.calibration is not None and not isinstance(self.calibration, Calibration):
            raise OptionError(
                f"calibration is {self.calibration!r}; it takes what fxint4.calibrate returns, or "
                "None"
            )
        for name in ("target_error", "max_bytes"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or value <= 0):
                raise OptionError(f"{name} is {value!r}; it takes a number above 0, or None")
        if self.target_error is not None and self.max_bytes is not None:
            raise OptionError("target_error and max_bytes exclude each other; give one of them")
        if self.needs_calibration and self.calibration is None and self.budget is None:
            raise OptionError(
                f"method={self.method!r} looks at activations: give it "
                "calibration=fxint4.calibrate(model, batches)"
            )
        object.__setattr__(self, "overrides", _overrides(self.overrides))
        for pattern, changes in self.overrides:
            try:
                self._with(changes)
            except OptionError as error:
                raise OptionError(f"overrides for {pattern!r}: {error}") from error
        for name in ("include", "skip"):
            object.__setattr__(self, name, checked_patterns(name, getattr(self, name)))
        if self.min_sqnr_db is not None and not _is_number(self.min_sqnr_db):
            raise OptionError(
                f"min_sqnr_db is {self.min_sqnr_db!r}; it takes a number of dB, or None"
            )
        if not _is_number(self.min_features) or self.min_features % 1 != 0:  # inf % 1 is NaN
            raise OptionError(f"min_features is {self.min_features!r}; it takes a whole number")
        for name in ("progress", "free_weights", "fuse_projections"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; it takes True or False")
        if self.measure is not None and not isinstance(self.measure, bool):
            raise OptionError(f"measure is {self.measure!r}; it takes True, False or None")
        _report_file(self.report)

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at activations."""
        return self.method in _CALIBRATED

    def of(self, name: str, parameters: Iterable[str], key: str = "") -> Int4Config:
        """What was asked for one weight: this, what `overrides` change, and what a budget chose.

        Args:
            name: full name of the layer.
            parameters: full names of the parameters its weight is made of.
            key: the weight's name in the calibration.
        """
        choice = self._choice(key)
        if choice is not None and choice.group_size is not None:
            return self.choosing(choice)
        changes = self.changes(name, parameters)
        return self._with(changes.items()) if changes else self

    def choosing(self, choice: Choice) -> Int4Config:
        """What a budget's choice to pack a weight makes of this."""
        return self._with({"group_size": choice.group_size, "method": choice.method}.items())

    def changes(self, name: str, parameters: Iterable[str]) -> dict[str, Any]:
        """What `overrides` change for a layer; see `of`."""
        parameters = tuple(parameters) if self.overrides else ()
        return {
            field: value
            for pattern, fields in self.overrides
            if matches(name, parameters, (pattern,)) is not None
            for field, value in fields
        }

    def kept_by_budget(self, key: str) -> str | None:
        """Why a weight stays as it is, where that is what a budget chose; else None.

        Args:
            key: the weight's name in the calibration.
        """
        choice = self._choice(key)
        return f"kept by {self.budget}" if choice and choice.group_size is None else None

    @property
    def budget(self) -> str | None:
        """The option that says what packing may cost, as text; None where none was given."""
        given = {"target_error": self.target_error, "max_bytes": self.max_bytes}
        return next((f"{key}={value}" for key, value in given.items() if value is not None), None)

    @property
    def has_choices(self) -> bool:
        """Whether there is no budget, or a calibration that chose by it."""
        trade = self.calibration.trade if self.calibration is not None else None
        return self.budget is None or (trade is not None and trade.budget == self.budget)

    def check_choices(self) -> None:
        """Raise OptionError where a budget has nothing to choose by."""
        if not self.has_choices:
            name, _, value = str(self.budget).partition("=")
            raise OptionError(
                f"{self.budget} has nothing to choose by: give it calibration=fxint4.calibrate("
                f"model, batches, options={{{name!r}: {value}}}), with the other options the same"
            )

    def _choice(self, key: str) -> Choice | None:
        if self.budget is None or self.calibration is None:
            return None
        return self.calibration.choices.get(key)

    def asked(self) -> dict[str, Any]:
        """The options as plain values, for a report."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        values["overrides"] = {pattern: dict(changes) for pattern, changes in self.overrides}
        calibration = self.calibration
        values["calibration"] = None if calibration is None else str(calibration)
        if self.budget is not None and calibration is not None and calibration.trade is not None:
            values["trade"] = str(calibration.trade)
        return values

    def _with(self, changes: Iterable[tuple[str, Any]]) -> Int4Config:
        return dataclasses.replace(
            self, overrides=(), target_error=None, max_bytes=None, **dict(changes)
        )


def _overrides(value: object) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
    """Patterns and what they change, hashable."""
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple) or not all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], (Mapping, tuple))
        for pair in pairs
    ):
        raise OptionError(f"overrides is {value!r}; it takes a dict of options by pattern")
    made = []
    for pattern, changes in pairs:
        checked_patterns("overrides", [pattern])
        try:
            fields = dict(changes)
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"overrides for {pattern!r} are {changes!r}; it takes a dict of options"
            ) from error
        unknown = sorted(fields.keys() - set(_OVERRIDDEN))
        if unknown:
            raise OptionError(
                f"overrides for {pattern!r} hold {unknown[0]!r}; a layer can have its own "
                f"{', '.join(_OVERRIDDEN)}"
            )
        made.append((pattern, tuple(fields.items())))
    return tuple(made)


def _report_file(path: object) -> None:
    suffix = Path(path).suffix.lower() if isinstance(path, (str, os.PathLike)) else None
    if path is not None and suffix not in REPORT_SUFFIXES:
        raise OptionError(
            f"report is {path!r}; it takes the name of a {', '.join(REPORT_SUFFIXES)} file"
        )


def _one_of(field: str, value: object, allowed: tuple[object, ...]) -> None:
    # By type, too: 64.0 and NumPy's 64 are equal to 64, but neither is a size, or fits into JSON.
    if not any(type(value) is type(one) and value == one for one in allowed):
        known = ", ".join(map(repr, allowed))
        raise OptionError(f"{field} is {value!r}; it takes one of {known}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
