"""What does it cost at each call to take packed parameters apart, and who does it faster?

A packed parameter is a tensor subclass with two inner tensors. AOTAutograd takes subclasses apart
at every call; `UnwrappedInputs` (fxint4/_pytorch/unwrap.py) reads the inner tensors as attributes
and hands AOTAutograd those. Measured on a chain of 64 linear layers (32 x 32, one row) compiled
with backend int4tile: whole calls of the model packed in place, with and without that class, and of
the model as it was, whose weights are plain inputs. Contenders take turns. "us a parameter" is what
a call takes longer than that of the plain model, shared among the 64 parameters: Dynamo's guards
are in it (see compile_overhead.py). Predicted: 3 us without the class, 2 us with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from compile_overhead import Chain, with_own_code
from measure import describe, interleave, machine, parser, show, write
from torch import Tensor, nn

LAYERS = 64


class PassedThrough:
    """Stands in for `UnwrappedInputs` and leaves the inputs to AOTAutograd."""

    def __init__(self, gm: Any, inputs: Any, _: Any) -> None:
        self.gm, self.inputs = gm, inputs

    def telling_origins(self, inner_compile: Callable[..., Any]) -> Callable[..., Any]:
        return inner_compile

    def calling(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        return compiled


def call_times(rounds: int) -> list[dict[str, Any]]:
    """A row for each way to hand over the parameters."""
    import fxint4
    from fxint4._pytorch import aot

    model = Chain(LAYERS).eval().requires_grad_(False)
    packed = copy.deepcopy(model)
    fxint4.pack_(packed)
    x = torch.randn(1, 32, dtype=torch.bfloat16)

    def compiled(model: nn.Module) -> Callable[[], Tensor]:
        (made,) = with_own_code(nn.ModuleList([model]))
        run = torch.compile(made, backend="int4tile", dynamic=False)
        run(x)
        return lambda: run(x)

    with torch.no_grad():
        contenders = {"not packed": compiled(model), "UnwrappedInputs": compiled(packed)}
        with mock.patch.object(aot, "UnwrappedInputs", PassedThrough):
            contenders["AOTAutograd"] = compiled(packed)
        timings = interleave(contenders, rounds)
    floor = timings["not packed"].median
    return [
        {
            "packed parameters by": name,
            "call us": timing.to_dict()["us"],
            "us a parameter": 1e6 * (timing.median - floor) / LAYERS,
            "timing": timing.to_dict(),
        }
        for name, timing in timings.items()
    ]


def main() -> None:
    """Measure, print, write."""
    arguments = parser(__doc__).parse_args()
    facts = machine()
    print(describe(facts), flush=True)
    rows = call_times(rounds=5 if arguments.quick else 25)
    show([{key: row[key] for key in row if key != "timing"} for row in rows])
    write(arguments.json, facts, arguments, calls=rows)


if __name__ == "__main__":
    main()
