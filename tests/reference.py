"""What a model compiled to int4 is compared with: plain eager code around the quantiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxint4 import Record
from fxint4.quantize import dequantize, quantize

aten = torch.ops.aten


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Frobenius norm, computed in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def dequantised(weight: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """What int4 leaves of a weight [N, K], rounded once to `dtype`; the groups lie along K."""
    made = quantize(weight.detach(), group_size)
    return dequantize(made.codes, made.scale, made.zero, group_size, dtype, weight.shape[1])


def dequantised_copy(
    model: nn.Module, records: Iterable[Record], dtype: torch.dtype = torch.float64
) -> nn.Module:
    """A copy of a model whose packed weights hold their dequantised values.

    Every module gets a parameter of its own, so a tied embedding keeps its original values while
    the lm_head that shares its weight gets the dequantised ones. All parameters are converted to
    `dtype`, the dequantised ones from fp32. Buffers stay as they are, as with `from_pretrained`:
    some (the frequencies of rotary embeddings) are fp32 in a model of any dtype.

    Args:
        model: not changed.
        records: those of a report about it; each packed one must be made of a single parameter.
        dtype: of the copy's parameters.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    packed = {
        id(parameters[name]): record
        for record in records
        if record.action == "packed"
        for [name] in [record.parameters]
    }
    found = set()
    twin = copy.deepcopy(model)
    for module, copied in zip(model.modules(), twin.modules(), strict=True):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            record = packed.get(id(parameter))
            if record is None or isinstance(module, nn.Embedding):
                value = getattr(copied, name).detach().to(dtype)
            else:
                found.add(id(parameter))
                value = _dequantised_parameter(module, parameter.detach(), record, dtype)
            setattr(copied, name, nn.Parameter(value, requires_grad=False))
    assert found == set(packed), [packed[key] for key in set(packed) - found]
    return twin


def _dequantised_parameter(
    module: nn.Module, parameter: Tensor, record: Record, dtype: torch.dtype
) -> Tensor:
    assert record.group_size is not None
    out_first = type(module).__name__ != "Conv1D"  # transformers' own, which computes x @ W
    matrix = parameter.flatten(1) if out_first else parameter.t()
    assert matrix.shape == (record.n, record.k), record
    made = dequantised(matrix, record.group_size, dtype)
    return made.view_as(parameter) if out_first else made.t().contiguous()


def matmul_parameters(model: nn.Module, run: Callable[[], Any]) -> dict[int, str]:
    """Parameters that are, unchanged, an operand of a matmul or convolution while `run` runs.

    Found by looking at every op that reaches the dispatcher in eager, so independently of the
    kind of module and of how the compiler captures it. A view of a parameter counts as it. Works
    for weights that need no computation before the matmul.

    Returns:
        The aten op by `id` of the parameter.
    """
    storages = {p.untyped_storage().data_ptr(): id(p) for p in model.parameters()}
    found: dict[int, str] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            for operand in _factors(func, args):
                owner = storages.get(operand.untyped_storage().data_ptr())
                if owner is not None:
                    found[owner] = func._schema.name.removeprefix("aten::")
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        run()
    return found


def _factors(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands that an op multiplies with each other."""
    if func in (aten.mm.default, aten.bmm.default, aten.mv.default, aten.convolution.default):
        return args[:2]
    if func in (aten.addmm.default, aten.baddbmm.default, aten.addmv.default):
        return args[1:3]
    return ()
