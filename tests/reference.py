"""What a model compiled to int4 is compared with: plain eager code around the quantizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxint4 import Record
from fxint4.quant.primitives import dequantize, quantize

aten = torch.ops.aten


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Frobenius norm, computed in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def dequantized(weight: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """What int4 leaves of a weight [N, K], rounded once to `dtype`; the groups lie along K."""
    made = quantize(weight.detach(), group_size)
    return dequantize(made.codes, made.scale, made.zero, group_size, dtype, weight.shape[1])


def dequantized_copy(
    model: nn.Module, records: Iterable[Record], dtype: torch.dtype = torch.float64
) -> nn.Module:
    """A copy of a model whose packed weights hold their dequantized values.

    Every module gets a parameter of its own, so a tied embedding keeps its original values while
    the lm_head that shares its weight gets the dequantized ones. All parameters are converted to
    `dtype`, the dequantized ones from fp32. Buffers stay as they are, as with `from_pretrained`:
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
                value = _dequantized_parameter(module, parameter.detach(), record, dtype)
            setattr(copied, name, nn.Parameter(value, requires_grad=False))
    assert found == set(packed), [packed[key] for key in set(packed) - found]
    return twin


def _dequantized_parameter(
    module: nn.Module, parameter: Tensor, record: Record, dtype: torch.dtype
) -> Tensor:
    assert record.group_size is not None
    swapped = in_features_first(module)
    if record.batch > 1:
        assert len(parameter) == record.batch, record
        matrices = list(parameter)
    else:
        matrices = [parameter if swapped else parameter.flatten(1)]
    made = []
    for matrix in matrices:
        matrix = matrix.t() if swapped else matrix
        assert matrix.shape == (record.n, record.k), record
        one = dequantized(matrix, record.group_size, dtype)
        made.append(one.t() if swapped else one)
    return torch.stack(made).view_as(parameter)


def in_features_first(module: nn.Module) -> bool:
    """Whether a module of transformers computes x @ W, not x @ W^T, with W or each expert's."""
    name = type(module).__name__
    return name in ("Conv1D", "Llama4TextExperts") or getattr(module, "is_transposed", False)


def matmul_parameters(model: nn.Module, run: Callable[[], Any]) -> dict[int, str]:
    """Parameters that are, unchanged, an operand of a matmul or convolution while `run` runs.

    Found by looking at every op that reaches the dispatcher in eager, so independently of the
    kind of module and of how the compiler captures it. A view of a parameter counts as it, and so
    do matrices picked out of a 3-D one. Works for weights that need no computation before the
    matmul.

    Returns:
        The aten op by `id` of the parameter.
    """
    storages = {p.untyped_storage().data_ptr(): id(p) for p in model.parameters()}
    found: dict[int, str] = {}
    picked: list[Tensor] = []  # kept, so that nothing else gets their storage

    def owner_of(operand: Tensor) -> int | None:
        return storages.get(operand.untyped_storage().data_ptr())

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            for operand in _factors(func, args):
                owner = owner_of(operand)
                if owner is not None:
                    found[owner] = func._schema.name.removeprefix("aten::").replace("::", ".")
            result = func(*args, **(kwargs or {}))
            if func is aten.index.Tensor and args[0].ndim == 3:
                owner = owner_of(args[0])
                if owner is not None:
                    storages[result.untyped_storage().data_ptr()] = owner
                    picked.append(result)
            return result

    with torch.no_grad(), Watch():
        run()
    return found


def _factors(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands that an op multiplies with each other."""
    if func in (aten.mm.default, aten.bmm.default, aten.mv.default, aten.convolution.default):
        return args[:2]
    if func in (aten.addmm.default, aten.baddbmm.default, aten.addmv.default):
        return args[1:3]
    if func is aten._grouped_mm.default or func.name() == "transformers::grouped_mm_fallback":
        return args[:2]
    return ()


def in_e4m3(rows: Tensor) -> Tensor:
    """Rows ``[..., K]`` in float64, rounded to e4m3, each over its largest magnitude / 448.

    e4m3 has 3 bits behind the leading one, and nothing finer than 2^-9.
    """
    wide = rows.detach().double()
    scales = (wide.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
    exponent = torch.frexp(wide / scales)[1].sub(1).clamp(min=-6)
    step = torch.exp2(exponent.double() - 3)
    return (wide / scales / step).round() * step * scales  # halves to even
