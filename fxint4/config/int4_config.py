"""`Int4Config`: every option of fxint4, checked."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxint4.config.layer_patterns import checked_patterns, first_match
from fxint4.errors import OptionError
from fxint4.quant.methods import METHODS
from fxint4.quant.statistics import Calibration, Choice
from fxint4.quant.tile_layout import GROUP_SIZES, INNER_K_TILES

__all__ = ["METHODS", "REPORT_SUFFIXES", "Int4Config"]

#: Methods that need statistics of activations.
_CALIBRATED = METHODS[3:]
#: Fields that `overrides` can change.
_OVERRIDDEN = ("group_size", "inner_k_tiles", "method", "min_sqnr_db", "activations")
#: Ways to multiply by int4 weights on a GPU.
KERNELS = ("triton", "cuda", "dequantize", "aten")
#: Dtypes of activations other than the model's.
ACTIVATIONS = ("fp8",)
#: Suffixes of the files that a report can be written to.
REPORT_SUFFIXES = (".json", ".txt", ".html")


@dataclass(frozen=True)
class Int4Config:
    """What to pack and how. Frozen and hashable: it is part of every cache key.

    Attributes:
        group_size: Neighbouring k of one row that share a scale and a zero: 32, 64, 128 or 256.
            An upper bound: a weight whose K it does not divide takes the largest smaller size
            that divides K, or is padded.
        inner_k_tiles: 16-wide k tiles that one thread's words hold: 2, 4 or 8. An upper bound too.
        method: How codes, scales and zeros are chosen. "rtn" rounds to nearest. "mse" and "hqq"
            look for scales and zeros that lose less of the weight. "gptq" and "awq" lose less of
            the layer's output and need a `calibration`; "gptq+awq" does both.
        calibration: The result of `fxint4.calibrate`.
        overrides: Other options for some layers: a dict from a pattern, as in `include`, to a dict
            of group_size, inner_k_tiles, method, min_sqnr_db and activations. Where several
            patterns match a layer, later ones win.
        target_error: A budget: the largest relative error of the model's output. Group size and
            method of each weight, or to keep it as it is, are chosen so that the weights take the
            fewest bytes. `fxint4.calibrate` with this option chooses on its batches; pass its
            result as `calibration` with the same target_error. `fxint4.pack_` and `fxint4.explain`
            can also choose by themselves, on their example arguments.
        max_bytes: A budget: the most bytes that packed and kept weights take together. The choices
            are those of the least error.
        include: Patterns of modules to pack; empty means all. Adapters (LoRA and its kin) are
            left alone, unless a pattern matches them and not, like "*", the layer that they adapt.
        skip: Patterns of modules to keep as they are; stronger than `include`.
            A pattern is a glob, or a regular expression after the prefix "re:". It must match the
            full name of the layer, of its parameter, or of a module that holds it.
        min_sqnr_db: Keep a layer whose packed weight would have a lower
            signal-to-quantization-noise ratio, in dB.
        min_features: Keep a matmul with fewer in or out features.
        progress: Show a tqdm bar while weights are folded.
        fuse_projections: On the GPU, multiply weights that share an activation (q, k and v; gate
            and up) in one matmul.
        one_shot_all_reduce: On GPUs of one host that reach each other's memory, let small
            all-reduces of a model that is split among processes (`torch.distributed.tensor`) each
            be one kernel that reads the other processes' parts, by PyTorch's symmetric memory,
            in place of NCCL's. All processes must ask for it alike.
        activations: "fp8" lets a compiled model multiply many rows in fp8 where that is faster: on
            a GPU with fp8 (sm_89 and newer), in bf16 models. Weights stay int4 tiles. Weights that
            are packed in place keep it, and multiply so in eager mode and wherever they are
            compiled. None never does, or leaves it to weights that were packed before; for those
            None in `overrides` switches it off.
        kernel: On the GPU, how to multiply for every M: "triton" (unpack weights in registers),
            "dequantize" (write the weight out, then cuBLAS), "aten" (PyTorch's int4 op) or "cuda"
            (kernels in CUDA C++, where there is one for M and K, also outside of CUDA graphs; not
            in packages). None takes the fastest: by rule, or with mode="max-autotune" by
            measurement.
        measured_rows: On the CPU, measure for which numbers of rows the int4 op is faster than a
            dense copy, and whether that copy is faster in fp32: once on each machine, for each
            dtype and class of sizes. False takes a fixed number of rows for each dtype.
        measure: Run the model on its example inputs with its own weights and with quantized ones,
            and report the error of each matmul's output and of the model's. With None only
            `fxint4.explain` does so; with True `fxint4.pack_`, `rewrite` and `package` do too. A
            backend can't: it has no inputs before the model runs. "fp8" measures as if all layers
            with `activations="fp8"` were computed in fp8 on any device, for any number of rows. Not
            part of any cache key.
        report: File that always holds the newest state of the report: .json (which
            `fxint4.Report.load` reads), .txt or .html. Its folder must exist. Not part of any cache
            key: two configs that differ in it are equal.

    Raises:
        OptionError: A value is outside its range.
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
    fuse_projections: bool = True
    one_shot_all_reduce: bool = False
    activations: str | None = None
    kernel: str | None = None
    measured_rows: bool = True
    measure: bool | str | None = field(default=None, compare=False)
    report: str | os.PathLike[str] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check every field, and turn patterns and overrides into tuples."""
        _one_of("group_size", self.group_size, GROUP_SIZES)
        _one_of("inner_k_tiles", self.inner_k_tiles, INNER_K_TILES)
        _one_of("method", self.method, METHODS)
        _one_of("kernel", self.kernel, (None, *KERNELS))
        _one_of("activations", self.activations, (None, *ACTIVATIONS))
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
                self._with(dict(changes))
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
        for name in ("progress", "fuse_projections", "one_shot_all_reduce", "measured_rows"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; it takes True or False")
        if not (isinstance(self.measure, bool) or self.measure in (None, *ACTIVATIONS)):
            raise OptionError(f"measure is {self.measure!r}; it takes True, False, None or 'fp8'")
        _report_file(self.report)

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at activations."""
        return self.method in _CALIBRATED

    # --- a budget: first a calibration chooses by it, then each weight has its choice -------------

    @property
    def budget(self) -> str | None:
        """The budget as text, such as "max_bytes=1000"; None without one."""
        for name in ("target_error", "max_bytes"):
            if getattr(self, name) is not None:
                return f"{name}={getattr(self, name)}"
        return None

    @property
    def needs_choices(self) -> bool:
        """Whether there is a budget that the calibration did not choose by."""
        trade = None if self.calibration is None else self.calibration.trade
        return self.budget is not None and (trade is None or trade.budget != self.budget)

    def require_choices(self) -> None:
        """Refuse a budget that the calibration did not choose by.

        Raises:
            OptionError: See `needs_choices`.
        """
        if self.needs_choices:
            name, _, value = str(self.budget).partition("=")
            raise OptionError(
                f"{self.budget} has nothing to choose by: give it calibration=fxint4.calibrate("
                f"model, batches, options={{{name!r}: {value}}}), with the other options the same"
            )

    @property
    def choices(self) -> Mapping[str, Choice]:
        """What a budget chose, by the weight's name in the calibration; empty without one."""
        if self.budget is None or self.calibration is None:
            return {}
        return self.calibration.choices

    def kept_by_budget(self, key: str) -> str | None:
        """Return the reason where the budget keeps a weight as it is, else None.

        Args:
            key: The weight's name in the calibration.
        """
        choice = self.choices.get(key)
        return f"kept by {self.budget}" if choice and choice.group_size is None else None

    # --- the options of one weight ---------------------------------------------------------------

    def for_weight(self, name: str, parameters: Iterable[str], key: str = "") -> Int4Config:
        """Return the options of one weight: the budget's choice, or else `overrides`, applied.

        Args:
            name: Full name of the layer.
            parameters: Full names of the parameters the weight is made of.
            key: The weight's name in the calibration.
        """
        overrides = self.overrides_of(name, parameters)
        choice = self.choices.get(key)
        if choice is not None and choice.group_size is not None:
            activations = overrides.get("activations", self.activations)
            return dataclasses.replace(self.with_choice(choice), activations=activations)
        return self._with(overrides) if overrides else self

    def with_choice(self, choice: Choice) -> Int4Config:
        """Return the options of a weight that a budget packs in this way."""
        return self._with({"group_size": choice.group_size, "method": choice.method})

    def overrides_of(self, name: str, parameters: Iterable[str]) -> dict[str, Any]:
        """Return the fields that `overrides` change for a layer; arguments as in `for_weight`."""
        parameters = tuple(parameters)
        return {
            field: value
            for pattern, fields in self.overrides
            if first_match(name, parameters, (pattern,)) is not None
            for field, value in fields
        }

    def _with(self, changes: Mapping[str, Any]) -> Int4Config:
        return dataclasses.replace(self, overrides=(), target_error=None, max_bytes=None, **changes)

    def asked(self) -> dict[str, Any]:
        """Return the options as plain values, for a report."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        values["overrides"] = {pattern: dict(changes) for pattern, changes in self.overrides}
        calibration = self.calibration
        values["calibration"] = None if calibration is None else str(calibration)
        if self.budget is not None and calibration is not None and calibration.trade is not None:
            values["trade"] = str(calibration.trade)
        return values


def _overrides(value: object) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
    """Return checked overrides as hashable pairs of a pattern and the fields that it changes."""
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
    # The type is compared too: 64.0 and NumPy's 64 equal 64, but are no sizes and do not fit JSON.
    if not any(type(value) is type(one) and value == one for one in allowed):
        known = ", ".join(map(repr, allowed))
        raise OptionError(f"{field} is {value!r}; it takes one of {known}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
