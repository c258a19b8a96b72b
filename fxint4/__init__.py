"""int4 weight-only inference for any PyTorch model: `torch.compile(model, backend="int4tile")`."""

from typing import TYPE_CHECKING, Any

from fxint4.config.int4_config import Int4Config
from fxint4.errors import (
    CheckpointError,
    FoldError,
    Int4Error,
    OptionError,
    PackedFormatError,
    PassError,
    ReportError,
    RequantizedWarning,
    TrainingError,
    UnsupportedOpError,
    UntrainedWarning,
    WriteError,
)
from fxint4.frontends.checkpoints import load_
from fxint4.frontends.explain import explain
from fxint4.frontends.export import rewrite
from fxint4.frontends.pack import pack_
from fxint4.frontends.package import package
from fxint4.frontends.refresh import refresh
from fxint4.frontends.unpack import dequantize_
from fxint4.integrations.registration import register_integrations
from fxint4.quant.statistics import Calibration
from fxint4.report import Record, Report
from fxint4.report.latest import last_report
from fxint4.runs.calibrate import CalibrationCost, calibrate, calibration_cost
from fxint4.tensor import Int4TileTensor, dequantizing
from fxint4.tensor.files import load_file, save_file
from fxint4.tensor.plain_state import plain_state_dict
from fxint4.version import __version__ as __version__
from fxint4.weights import ops as _ops  # noqa: F401  (registers torch.ops.fxint4)

if TYPE_CHECKING:
    from fxint4.integrations.transformers import Int4TileConfig as Int4TileConfig

__all__ = [
    "Calibration",
    "CalibrationCost",
    "CheckpointError",
    "FoldError",
    "Int4Config",
    "Int4Error",
    "Int4TileTensor",
    "OptionError",
    "PackedFormatError",
    "PassError",
    "Record",
    "Report",
    "ReportError",
    "RequantizedWarning",
    "TrainingError",
    "UnsupportedOpError",
    "UntrainedWarning",
    "WriteError",
    "calibrate",
    "calibration_cost",
    "dequantize_",
    "dequantizing",
    "explain",
    "last_report",
    "load_",
    "load_file",
    "pack_",
    "package",
    "plain_state_dict",
    "refresh",
    "rewrite",
    "save_file",
]

register_integrations()


def __getattr__(name: str) -> Any:
    """Import `Int4TileConfig`, which needs transformers, when it is asked for."""
    if name != "Int4TileConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fxint4.integrations.transformers import Int4TileConfig

    return Int4TileConfig


def __dir__() -> list[str]:
    """All public names, with those that are imported when they are asked for."""
    return sorted([*globals(), "Int4TileConfig"])
