"""The exceptions of fxint4. A message says what it got, what it needs and what to do next."""

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
    """A model in training mode, or an input that requires grad; int4 weights are for inference."""


class FoldError(Int4Error, RuntimeError):
    """A weight that could not be folded. Names the layer; the model is left as it was."""


class PackedFormatError(Int4Error, ValueError):
    """Packed buffers of a wrong dtype or layout, or that do not fit each other (a damaged file)."""


class CheckpointError(Int4Error, ValueError):
    """A checkpoint that can't be loaded, or not into this model. The model is left as it was."""


class ReportError(Int4Error, ValueError):
    """A file that is no report or has another schema, or a report that can't be written."""


class CommandError(Int4Error):
    """An argument that a command of `python -m fxint4` can't use; the message is one line.

    Attributes:
        status: The exit status of the process.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        """Create the error with its message and exit status."""
        super().__init__(message)
        self.status = status


class UnsupportedOpError(Int4Error, NotImplementedError):
    """An operator that packed weights don't support. The message lists the supported ones."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
