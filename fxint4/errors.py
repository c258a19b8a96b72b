"""The exceptions of fxint4. A message says what it got, what it needs and what to do next."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CommandError",
    "FoldError",
    "Int4Error",
    "OptionError",
    "PackedFormatError",
    "PassError",
    "ReportError",
    "RequantizedWarning",
    "TrainingError",
    "UnsupportedOpError",
    "UntrainedWarning",
    "WriteError",
    "first_line",
    "printable",
]


class Int4Error(Exception):
    """Base of every error that fxint4 raises on purpose."""

    def __str__(self) -> str:
        """The message, see `printable`: it may hold names from files."""
        return printable(super().__str__(), keep="\n")


class OptionError(Int4Error, ValueError):
    """An option or mode that neither fxint4 nor Inductor knows, or a value outside its range."""


class TrainingError(Int4Error, RuntimeError):
    """A model in training mode, or an input that requires grad, where nothing is trained.

    Adapters are trained over weights that were packed before.
    """


class FoldError(Int4Error, RuntimeError):
    """A weight that could not be folded. Names the layer; the model is left as it was."""


class PackedFormatError(Int4Error, ValueError):
    """Packed buffers of a wrong dtype or layout, or that do not fit each other (a damaged file)."""


class CheckpointError(Int4Error, ValueError):
    """A checkpoint that can't be loaded, or not into this model. The model is left as it was."""


class PassError(Int4Error, RuntimeError):
    """A pass over a captured graph failed, by a fault of fxint4's."""


class ReportError(Int4Error, ValueError):
    """A file that is no report or has another schema, or a report that can't be written."""


class WriteError(Int4Error, OSError):
    """A file that can't be written: a full disk, no folder, no permission. What was there stays."""


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


class RequantizedWarning(UserWarning):
    """Values were quantized into a packed weight by code that takes it for an ordinary one.

    Merging an adapter does that, and assigning float values to `weight.data`. The message says what
    error it costs.
    """


class UntrainedWarning(UserWarning):
    """Code that trains a layer has asked for the gradient of a packed weight, which has none."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[0]) if lines else type(error).__name__


def printable(text: str, keep: str = "") -> str:
    r"""Return a text that a terminal shows and obeys nothing of, and that any file can hold.

    Names come from files and modules of others. Control characters (also those that begin a
    terminal's escape sequences), invisible ones, those that turn the direction of a line, and lone
    surrogates are written as in a Python literal: ``\x1b``, ``\u202e``, ``\ud800``.

    Args:
        text: Any text.
        keep: Characters to leave as they are, such as the ends of lines.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )
