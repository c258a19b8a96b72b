"""Int4 weights by other projects, for accuracy.py; each where it is installed.

torchao 0.18
    `quantize_` with its round-to-nearest and its HQQ, into the layout that its int4 op reads on the
    device: tile_packed_to_4d on a GPU, opaque on a CPU.
hqq 0.2
    `HQQLinear` with its defaults for 4 bits, groups along K; its dequantized bf16 weights.
gptqmodel 7.7
    Its `GPTQ`, asymmetric, otherwise by its defaults: group-aware order, static groups along K.
    Linear layers that share an input form a set; the sets are quantized in the order of the model,
    each on inputs from the quantized sets before it. Dequantized weights as `GPTQ` returns them,
    rounded to bf16; its scales are not rounded to what a file would hold.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Linear layers that share an input, in the order in which a decoder layer runs them.
SETS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that every contender quantizes, by name."""
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}


def torchao(model: nn.Module, group_size: int, algorithm: str) -> None:
    """Quantize in place.

    Args:
        model: The model, in bf16.
        group_size: Divides K of every linear layer.
        algorithm: "tinygemm", which is round-to-nearest, or "hqq".

    Raises:
        ImportError: Torchao is not installed, or too old.
    """
    quantization = imported("torchao.quantization")
    if next(model.parameters()).is_cuda:
        config = quantization.Int4WeightOnlyConfig(
            group_size=group_size,
            int4_packing_format="tile_packed_to_4d",
            int4_choose_qparams_algorithm=algorithm,
            set_inductor_config=False,
        )
    else:
        opaque = imported("torchao.prototype.quantization.int4")
        config = opaque.PrototypeInt4WeightOnlyConfig(
            group_size=group_size,
            int4_choose_qparams_algorithm=algorithm,
            set_inductor_config=False,
        )
    quantization.quantize_(model, config)


def hqq(model: nn.Module, group_size: int) -> None:
    """Quantize in place; weights stay dense.

    Raises:
        ImportError: Hqq is not installed.
    """
    core = imported("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=4, group_size=group_size, axis=1)
    for layer in linears(model).values():
        made = core.HQQLinear(
            layer,
            config,
            compute_dtype=torch.bfloat16,
            device=str(layer.weight.device),
            del_orig=False,
        )
        layer.weight.data = made.dequantize().to(layer.weight.dtype).view_as(layer.weight)


def gptqmodel(model: nn.Module, group_size: int, batches: Sequence[Tensor]) -> None:
    """Quantize in place; weights stay dense.

    Args:
        model: With linear layers named as in `SETS`, and others, which come last.
        group_size: Divides K of every linear layer.
        batches: Inputs of the model.

    Raises:
        ImportError: Gptqmodel, or a package that it needs, is not installed.
    """
    gptq = imported("gptqmodel.quantization.gptq").GPTQ
    config = imported("gptqmodel.quantization").QuantizeConfig(
        bits=4, group_size=group_size, sym=False, offload_to_disk=False
    )
    for names in sets_of(model):
        layers = [model.get_submodule(name) for name in names]
        solvers = [gptq(layer, config) for layer in layers]
        for solver in solvers:
            solver.quantizer.configure(perchannel=True)
        hooks = [
            layer.register_forward_hook(
                lambda _, inputs, output, solver=solver: solver.add_batch(inputs[0], output)
            )
            for layer, solver in zip(layers, solvers, strict=True)
        ]
        for batch in batches:
            model(batch)
        for hook in hooks:
            hook.remove()
        for layer, solver in zip(layers, solvers, strict=True):
            layer.weight.data = solver.quantize()[0].to(layer.weight)
            solver.free()


def sets_of(model: nn.Module) -> Iterator[list[str]]:
    """Sets of names of linear layers; those of one set share an input."""
    left = dict.fromkeys(linears(model))
    parents = dict.fromkeys(name.rpartition(".")[0] for name in left)
    for parent in parents:
        for members in SETS:
            names = [f"{parent}.{member}" for member in members if f"{parent}.{member}" in left]
            for name in names:
                del left[name]
            if names:
                yield names
    yield from ([name] for name in left)


def imported(name: str) -> Any:
    """Import a module, without its prints and warnings."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        module = importlib.import_module(name)
    for logger in ("gptqmodel", "torchao"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    return module
