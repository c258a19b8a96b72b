"""int4 weight-only inference for any PyTorch model: `torch.compile(model, backend="int4tile")`."""

from fxint4.backend import explain, last_report
from fxint4.config import Int4Config
from fxint4.errors import FoldError, Int4Error, OptionError, TrainingError
from fxint4.report import Record, Report

__version__ = "0.1.0"

__all__ = [
    "FoldError",
    "Int4Config",
    "Int4Error",
    "OptionError",
    "Record",
    "Report",
    "TrainingError",
    "explain",
    "last_report",
]
