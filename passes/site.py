"""`Site`: a matmul that can be packed, with all that is known of it before folding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from fxint4._pytorch import inductor
from fxint4.config.int4_config import Int4Config
from fxint4.kernels import cpu_rows
from fxint4.passes.pattern import Match, Pattern
from fxint4.quant.recipe import RTN, Recipe
from fxint4.quant.tile_layout import TileShape, choose_shape
from fxint4.report import Record
from fxint4.weights.expression import Weight
from fxint4.weights.formats import (
    Dense,
    Format,
    activation_dtype,
    choose_format,
    fp8_fault,
    has_fp8,
    rows_multiple,
)

__all__ = ["Adapter", "Site"]


#: Axes of the weights of plain matmuls, which are what is measured on the CPU: no experts, no 1x1
#: convolutions, no weight that is repeated over a batch.
_MEASURED = ("NK", "KN")


@dataclass(frozen=True)
class Adapter:
    """What is known of a weight of an adapter, such as A and B of LoRA.

    Attributes:
        what: What it is, for the report.
        base: The path of the layer that it adapts, in the module that holds both; empty if it is
            that module.
        own: How many parts its layer's name has beyond that module's.
    """

    what: str
    base: str
    own: int


@dataclass(frozen=True)
class Site:
    """A matmul that can be packed.

    Calls of compiled code, which threads make side by side, plan the weights of sites. So what that
    takes is held as plain values: the graph's fake tensors may be read inside the compiler only.

    Attributes:
        node: The matmul.
        pattern: The pattern that matched it.
        match: Its operands.
        weight: The computation behind the weight.
        n: Out features N.
        k: In features K.
        batch: Axes of the weight in front of N and K: (E,) for experts.
        m: Rows M of the activation; with E weights the average rows of each, rounded up.
        dtype: The dtype of the weight.
        device: Its device.
        int4: The packed format that the device's int4 op reads.
        fallback: The format for more than `most_rows` rows: a dequantized copy, int4 if its op
            takes any number of rows, or None if the matmul then stays as it is.
        most_rows: The largest M for the int4 op, unless that is measured, see `format_for`.
        record: Its record as long as the weight is not folded.
        shape: The packed shape, if the weight is packed.
        config: What the user asked for the weight.
        recipe: How to choose the weight's codes.
        kept: Why the weight is not packed; empty if it is to be packed.
        alike: Whether `kept` holds for every weight of this shape, dtype and device.
        key: The weight's key in the calibration statistics.
        x_dtype: The dtype of the activation.
        stored: The packed shape of a prepacked weight; None for others.
        only_aten: Whether its rewrite uses ATen ops only, which run without fxint4.
        adapter: The adapter that the structure of the graph shows it to be, or None.
    """

    node: fx.Node
    pattern: Pattern
    match: Match
    weight: Weight
    n: int
    k: int
    batch: tuple[int, ...]
    m: int | torch.SymInt
    dtype: torch.dtype
    device: torch.device
    int4: Format
    fallback: Format | None
    most_rows: int
    record: Record
    shape: TileShape
    config: Int4Config
    recipe: Recipe = RTN
    kept: str = ""
    alike: bool = False
    key: str = ""
    x_dtype: torch.dtype = torch.bfloat16
    stored: TileShape | None = None
    only_aten: bool = False
    adapter: Adapter | None = None

    def shape_by(self, config: Int4Config) -> TileShape:
        """The packed shape, for what the user asked for the weight."""
        return choose_shape(
            self.n,
            self.k,
            config.group_size,
            config.inner_k_tiles,
            rows_multiple(self.device),
            self.batch,
        )

    def format_for(self, rows: int | None) -> Format | None:
        """The format that the matmul reads; None if it is left alone.

        Args:
            rows: M; None if it is not known before the graph runs.
        """
        fallback = self.fallback
        if self.config.measured_rows and isinstance(fallback, Dense) and fallback.axes in _MEASURED:
            sizes = (self.shape.n_padded, self.shape.k_padded, self.shape.group_size)
            rule = cpu_rows.measured_rule(inductor.cache_folder(), self.x_dtype, *sizes)
            if rule is not None:
                few = rows is not None and rows < rule.least_rows
                return choose_format(
                    self.int4,
                    replace(fallback, dtype=rule.dense),
                    0 if few else rule.most_rows,
                    rows,
                )
        return choose_format(self.int4, fallback, self.most_rows, rows)

    @property
    def activations(self) -> str | None:
        """What the int4 op is told of `Int4Config.activations`: None if it can't follow."""
        asked = self.config.activations
        return None if asked is None or self.fp8_fault else asked

    @property
    def fp8_fault(self) -> str:
        """Why the matmul can't be computed in fp8; empty if it can, for enough rows."""
        if self.fp8_fault_anywhere:
            return self.fp8_fault_anywhere
        if self.int4 != "tiles":
            return f"device {self.device.type} has no fp8 matmul"
        experts = bool(self.batch)
        if not has_fp8(self.device, experts):
            what, gpus = ("experts need", "sm_90") if experts else ("needs", "sm_89 or newer")
            return f"an fp8 matmul {'of ' * experts}{what} Triton and a GPU of {gpus}"
        return ""

    @property
    def fp8_fault_anywhere(self) -> str:
        """Why no device could compute the matmul in fp8; empty if one could."""
        if self.batch and self.match.offs is None and self.match.ids is None:
            return "batches have no fp8 matmul, but for those of experts"
        return fp8_fault(self.n, self.k, self.x_dtype)

    @property
    def activation_dtype(self) -> torch.dtype:
        """The dtype that the activation is cast to for the int4 op."""
        if self.only_aten or self.shape.batch:
            return torch.bfloat16  # the ops for experts take any dtype and cast to bf16
        return activation_dtype(self.int4, self.x_dtype)
