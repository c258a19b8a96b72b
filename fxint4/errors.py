"""The exceptions fxint4 raises. Each message says what was given, what is needed and what to do."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CommandError",
    "FoldError",
    "Int4Error",
    "OptionError",
    "PackedFormatError",
    "ReportError",
    "TrainingError",
    "UnsupportedOpError",
    "first_line",
]


class Int4Error(Exception):
    """Base of every error that fxint4 raises on purpose."""


class OptionError(Int4Error, ValueError):
    """An option or mode that neither fxint4 nor Inductor knows, or a value outside its range."""


class TrainingError(Int4Error, RuntimeError):
    """A model or an input that still wants gradients; int4 weights are for inference."""


class FoldError(Int4Error, RuntimeError):
    """A weight that could not be folded. Names the layer; the model is left as it was."""


class PackedFormatError(Int4Error, ValueError):
    """Packed buffers of a wrong dtype or layout, or that disagree: a damaged file, say."""


class CheckpointError(Int4Error, ValueError):
    """A checkpoint that can't be loaded, or not into this model. The model is left as it was."""


class ReportError(Int4Error, ValueError):
    """A file that is no report, or of another schema; or a report that can't be written."""


class CommandError(Int4Error):
    """What a command of `python -m fxint4` was given and can't use, in one line.

    Attributes:
        status: the exit status.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        """An error with its message and exit status."""
        super().__init__(message)
        self.status = status


class UnsupportedOpError(Int4Error, NotImplementedError):
    """An operator that packed weights don't support. Names those that they do."""


def first_line(error: BaseException) -> str:
    """The beginning of what an error says; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
