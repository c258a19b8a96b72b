"""Checkpoints of other libraries, written here by the definitions of their formats, and loaded.

A writer takes codes, scales and zero points, and packs them as its format says, in numpy and
without anything of the reader. What comes out is held to `(code - zero_point) * scale` in float64.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import relative_error
from support import assert_within, peak_bytes, rounding_bound
from torch import Tensor, nn

import fxint4
from fxint4 import CheckpointError, Int4TileTensor
from fxint4.tensor.files import flatten

pytest.importorskip("safetensors")

BF16 = 2.0**-8
"""The largest relative change of a number that is rounded to bf16."""
FP32 = 2.0**-24

Tensors = dict[str, Tensor]


# --- what is quantized ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantized:
    """A quantized weight, before any format packs it.

    codes: int64 [N, K], 0..15.
    scale: [N, groups], the dtype that is stored.
    zero_point: int64 [N, groups], 0..15.
    group_of: int64 [K].
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    group_of: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight in float64, by the definition that all three formats share."""
        return (self.codes - self.zero_points) * self.scales

    @property
    def scales(self) -> Tensor:
        return self.scale.double()[:, self.group_of]

    @property
    def zero_points(self) -> Tensor:
        return self.zero_point[:, self.group_of]

    @property
    def bound(self) -> Tensor:
        """The largest change of each weight when scale and zero are rounded to bf16.

        What is stored is s' = s (1 + a) and z' = (8 - zp) s' (1 + b), |a| and |b| <= 2^-8. So
        (code - 8) s' + z' is off by (code - zp) s a + (8 - zp) s' b.
        """
        own = (self.codes - self.zero_points).abs() + (1 + BF16) * (8 - self.zero_points).abs()
        return BF16 * own * self.scales


def quantized(
    n: int,
    k: int,
    group_size: int,
    *,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    exact: bool = False,
) -> Quantized:
    """Random codes and parameters; `exact` ones are not changed when they are stored in bf16."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // group_size)
    scale = (torch.rand(n, groups, generator=generator) * 0.05 + 0.005).to(dtype)
    if exact:  # 4 bits, so that 8 bits hold (8 - zero point) * scale
        scale = (torch.randint(8, 16, (n, groups), generator=generator) / 2**10).to(dtype)
    zero_point = torch.randint(1, 16, (n, groups), generator=generator)
    if symmetric:
        zero_point.fill_(8)
    codes = torch.randint(0, 16, (n, k), generator=generator)
    return Quantized(codes, scale, zero_point, torch.arange(k) // group_size)


def in_words(numbers: Tensor, order: Sequence[int] = range(8)) -> Tensor:
    """Eight numbers of the last axis in each int32: number `order[i]` in the i-th nibble."""
    values = numbers.numpy().astype(np.uint32)
    pad = -values.shape[-1] % 8
    values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, pad)])
    values = values.reshape(*values.shape[:-1], -1, 8)
    words = np.zeros(values.shape[:-1], dtype=np.uint32)
    for nibble, place in enumerate(order):
        words |= values[..., place] << np.uint32(4 * nibble)
    return torch.from_numpy(words.view(np.int32).copy())


# --- the formats ---------------------------------------------------------------------------------


def gptq(made: Quantized, *, version: int = 1) -> Tensors:
    """qweight [K/8, N], qzeros [groups, N/8], scales [groups, N], g_idx [K]."""
    zeros = in_words(made.zero_point.T.contiguous())
    if version == 1:  # GPTQModel takes one from every number by subtracting whole words
        zeros = torch.from_numpy(zeros.numpy().view(np.uint32) - np.uint32(0x11111111)).to(
            torch.int32
        )
    return {
        "qweight": in_words(made.codes).T.contiguous(),
        "qzeros": zeros,
        "scales": made.scale.T.contiguous(),
        "g_idx": made.group_of.to(torch.int32),
    }


def awq(made: Quantized) -> Tensors:
    """qweight [K, N/8], qzeros [groups, N/8], scales [groups, N]."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": in_words(made.codes.T.contiguous(), order),
        "qzeros": in_words(made.zero_point.T.contiguous(), order),
        "scales": made.scale.T.contiguous(),
    }


def compressed(made: Quantized, *, early: bool = False) -> Tensors:
    """weight_packed [N, K/8], weight_scale [N, groups]; zero points where they are not all 8."""
    tensors = {
        "weight_packed": in_words(made.codes),
        "weight_scale": made.scale,
        "weight_shape": torch.tensor(made.codes.shape),
    }
    if not bool((made.zero_point == 8).all()):
        packed = in_words(made.zero_point.T.contiguous()).T.contiguous()
        signed = (made.zero_point - 8).to(torch.int8)
        tensors["weight_zero_point"] = signed if early else packed
    return tensors


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
}


def compressed_config(**weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Case:
    """One format to write a layer in, and its config."""

    write: Callable[[Quantized], Tensors]
    config: Mapping[str, Any]
    group_size: int = 128
    symmetric: bool = False
    n: int = 48
    k: int = 512
    stored_group: int = 128
    dtype: torch.dtype = torch.float16


CASES = {
    "gptq": Case(gptq, GPTQ),
    "gptq, symmetric": Case(gptq, {**GPTQ, "sym": True}, symmetric=True),
    "gptq v2": Case(lambda made: gptq(made, version=2), {**GPTQ, "checkpoint_format": "gptq_v2"}),
    "gptq v2, symmetric": Case(
        lambda made: gptq(made, version=2),
        {**GPTQ, "sym": True, "checkpoint_format": "gptq_v2"},
        symmetric=True,
    ),
    "gptq v2, symmetric, not said": Case(
        lambda made: gptq(made, version=2), {**GPTQ, "sym": True}, symmetric=True
    ),
    "gptq, groups of 32": Case(gptq, {**GPTQ, "group_size": 32}, 32, stored_group=32),
    "gptq, groups of 96": Case(gptq, {**GPTQ, "group_size": 96}, 96, k=384, stored_group=32),
    "gptq, one group": Case(gptq, {**GPTQ, "group_size": -1}, 512, stored_group=256),
    "gptq, last group short": Case(gptq, GPTQ, k=1000),
    "gptq, fp32 scales": Case(gptq, GPTQ, dtype=torch.float32),
    "awq": Case(awq, AWQ),
    "awq, bf16 scales": Case(awq, AWQ, dtype=torch.bfloat16),
    "awq, groups of 64": Case(awq, {**AWQ, "group_size": 64}, 64, stored_group=64),
    "awq, one group": Case(awq, {**AWQ, "group_size": -1}, 576, k=576, stored_group=64),
    "auto-round": Case(gptq, AUTO_ROUND, symmetric=True),
    "auto-round, asymmetric": Case(gptq, {**AUTO_ROUND, "sym": False}),
    "auto-round, its own format": Case(
        lambda made: gptq(made, version=2),
        {**AUTO_ROUND, "packing_format": "auto_round", "sym": False},
    ),
    "auto-round, for gptqmodel": Case(
        lambda made: gptq(made, version=2),
        {**AUTO_ROUND, "packing_format": "auto_round:gptqmodel", "sym": False},
    ),
    "auto-round, awq": Case(
        awq, {**AUTO_ROUND, "packing_format": "auto_round:auto_awq", "sym": False}
    ),
    "auto-round, by its option": Case(
        lambda made: gptq(made, version=2),
        {"packing_format": "auto_round", "bits": 4, "group_size": 128, "sym": False},
    ),
    "auto-round, an older release": Case(
        gptq,
        {**AUTO_ROUND, "quant_method": "intel/auto-round", "packing_format": None},
        symmetric=True,
    ),
    "compressed": Case(compressed, compressed_config(group_size=128)),
    "compressed, symmetric": Case(
        compressed, compressed_config(group_size=128, symmetric=True), symmetric=True
    ),
    "compressed, channel": Case(
        compressed,
        compressed_config(strategy="channel", group_size=None),
        512,
        stored_group=256,
    ),
    "compressed, groups of 512": Case(
        compressed, compressed_config(group_size=512), 512, k=1024, stored_group=256
    ),
    "compressed, int8 zero points": Case(
        lambda made: compressed(made, early=True), compressed_config(group_size=128)
    ),
    "compressed, ragged": Case(compressed, compressed_config(group_size=32), 32, 0, 50, 100, 32),
}


def write_folder(
    folder: Path,
    tensors: Tensors,
    config: Mapping[str, Any] | None = None,
    *,
    metadata: dict[str, str] | None = None,
) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file(
        {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        },
        folder / "model.safetensors",
        metadata=metadata,
    )
    if config is not None:
        text = json.dumps({"model_type": "llama", "quantization_config": config})
        (folder / "config.json").write_text(text)
    return folder


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


class Layer(nn.Module):
    """One layer to be quantized, one that is not, a parameter and a buffer."""

    def __init__(self, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.fc = nn.Linear(k, n, dtype=dtype)
        self.norm = nn.LayerNorm(n, dtype=dtype)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))


def plain_tensors(n: int, dtype: torch.dtype = torch.float16) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    names = ("fc.bias", "norm.weight", "norm.bias")
    made = {name: torch.randn(n, generator=generator).to(dtype) for name in names}
    return {**made, "steps": torch.tensor(7)}


def write_layer(folder: Path, case: Case, *, with_config: bool = True) -> Quantized:
    made = quantized(case.n, case.k, case.group_size, symmetric=case.symmetric, dtype=case.dtype)
    tensors = {**under("fc", case.write(made)), **plain_tensors(case.n)}
    write_folder(folder, tensors, case.config if with_config else None)
    return made


# --- what is loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_what_its_format_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    made = write_layer(tmp_path, case)
    model = Layer(case.n, case.k).eval()
    report = fxint4.load_(model, tmp_path)

    packed = model.fc.weight
    assert isinstance(packed, Int4TileTensor)
    assert isinstance(packed, nn.Parameter)
    assert (packed.shape, packed.dtype) == ((case.n, case.k), torch.bfloat16)
    assert packed.group_size == case.stored_group
    codes, scale, zero = packed.get_plain()
    assert torch.equal(codes.long(), made.codes)
    groups = torch.arange(case.k) // packed.group_size
    stored = (codes.double() - 8) * scale.double()[:, groups] + zero.double()[:, groups]
    assert_within(stored, made.weight, made.bound)
    if case.symmetric:
        assert not zero.any()

    x = torch.randn(5, case.k, generator=torch.Generator().manual_seed(2)).bfloat16()
    bias = plain_tensors(case.n)["fc.bias"].bfloat16()
    with torch.no_grad():
        y = model.fc(x)
    expected = x.double() @ made.weight.T + bias.double()
    moved = x.double().abs() @ made.bound.T
    assert_within(y, expected, rounding_bound(x, stored, bias) + moved)

    for other in plain_tensors(case.n):
        loaded, written = model.state_dict()[other], plain_tensors(case.n)[other]
        assert torch.equal(loaded, written.to(loaded.dtype)), other
    [record] = report.records
    assert (record.name, record.action, record.group_size) == ("fc", "packed", case.stored_group)
    assert record.bytes_before == 2 * case.n * case.k
    assert record.bytes_after == packed.packed_bytes
    assert record.sqnr_db is None
    assert record.reason.startswith("from ")


@pytest.mark.parametrize(
    "name", ["gptq, symmetric", "gptq v2, symmetric", "awq", "compressed", "compressed, symmetric"]
)
def test_without_a_config_names_and_shapes_tell_the_format(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    write_layer(tmp_path / "with", case)
    write_layer(tmp_path / "without", case, with_config=False)
    known, guessed = Layer(case.n, case.k), Layer(case.n, case.k)
    fxint4.load_(known, tmp_path / "with")
    fxint4.load_(guessed, tmp_path / "without" / "model.safetensors")
    assert torch.equal(known.fc.weight, guessed.fc.weight)


def test_a_config_may_be_given(tmp_path: Path) -> None:
    case = CASES["gptq v2"]
    made = write_layer(tmp_path, case, with_config=False)
    model = Layer(case.n, case.k)
    fxint4.load_(model, tmp_path, quantization_config=case.config)
    zero = model.fc.weight.get_plain()[2].double()
    assert_within(zero, (8 - made.zero_point) * made.scale.double(), 3 * BF16 * 8 * 0.06)
    as_v1 = {"quant_method": "gptq"}  # the format's own default: zero points are one off
    other = Layer(case.n, case.k)
    fxint4.load_(other, tmp_path, quantization_config=as_v1)
    assert not torch.equal(other.fc.weight, model.fc.weight)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_the_quantizers_own_config_is_read(name: str, tmp_path: Path) -> None:
    case = CASES["awq, groups of 64"]
    write_layer(tmp_path, case, with_config=False)
    (tmp_path / name).write_text(json.dumps({"w_bit": 3, "q_group_size": 64, "version": "GEMM"}))
    with pytest.raises(CheckpointError, match="AWQ of 3 bits"):
        fxint4.load_(Layer(case.n, case.k), tmp_path)


def without_g_idx(made: Quantized) -> Tensors:
    return changed(gptq(made), g_idx=None)


def two_groups(first: str, second: str) -> dict[str, Any]:
    """A config of compressed-tensors with groups of 128 for one target and of 96 for another."""
    config = compressed_config(group_size=128)
    groups = [config["config_groups"]["group_0"], compressed_config(group_size=96)]
    groups[1] = groups[1]["config_groups"]["group_0"]
    targets = (first, second)
    named = {f"group_{i}": {**g, "targets": [targets[i]]} for i, g in enumerate(groups)}
    return {**config, "config_groups": named}


#: Writers and configs by which "a" has groups of 128 columns, and "b" of 96; K is 192.
OPTIONS_OF_LAYERS: dict[str, tuple[Callable[[Quantized], Tensors], dict[str, Any]]] = {
    "gptq, a prefix": (without_g_idx, {**GPTQ, "dynamic": {"+:b": {"group_size": 96}}}),
    "gptq, no sign": (without_g_idx, {**GPTQ, "dynamic": {r"b(\..*)?$": {"group_size": 96}}}),
    "gptq, the first that matches": (
        without_g_idx,
        {**GPTQ, "dynamic": {"-:a": {}, "+:c": {"bits": 8}, "+:b": {"group_size": 96}, ".*": {}}},
    ),
    "auto-round, a name": (
        without_g_idx,
        {**AUTO_ROUND, "sym": False, "extra_config": {"b": {"group_size": 96}}},
    ),
    "auto-round, a pattern": (
        without_g_idx,
        {
            **AUTO_ROUND,
            "sym": False,
            "extra_config": {"a.": {"bits": 8}, "^b$": {"group_size": 96}},
        },
    ),
    "compressed, a class": (compressed, two_groups("re:.*a", "Linear")),
    "compressed, a class first": (compressed, two_groups("Linear", "re:b")),
    "compressed, a name": (compressed, two_groups("re:.*", "b")),
    "compressed, names": (compressed, two_groups("a", "b")),
}


@pytest.mark.parametrize("name", OPTIONS_OF_LAYERS)
def test_options_of_a_layer(name: str, tmp_path: Path) -> None:
    """Groups of 128 and 96 columns of 192 are two groups each: shapes do not tell them apart."""
    write, config = OPTIONS_OF_LAYERS[name]
    made = {"a": quantized(48, 192, 128), "b": quantized(48, 192, 96, seed=1)}
    tensors = {**under("a", write(made["a"])), **under("b", write(made["b"]))}
    write_folder(tmp_path, tensors, config)
    model = nn.ModuleDict({layer: nn.Linear(192, 48, bias=False) for layer in made})
    fxint4.load_(model, tmp_path)
    for layer, quantized_layer in made.items():
        weight = model[layer].weight.dequantize(torch.float32)
        assert_within(weight, quantized_layer.weight, quantized_layer.bound + 2 * FP32)


@pytest.mark.parametrize("write", [without_g_idx, awq, compressed])
def test_shapes_that_leave_the_group_size_open(
    write: Callable[[Quantized], Tensors], tmp_path: Path
) -> None:
    made = quantized(48, 192, 96, symmetric=True)
    write_folder(tmp_path, under("0", write(made)))
    model = nn.Sequential(nn.Linear(192, 48, bias=False))
    with pytest.raises(CheckpointError, match="may have 96 columns each, or 128 and a shorter"):
        fxint4.load_(model, tmp_path)


def test_zero_points_of_zero_that_borrowed(tmp_path: Path) -> None:
    made = quantized(48, 512, 128)
    zero_point = made.zero_point.clone()
    zero_point[::3] = 0
    made = replace(made, zero_point=zero_point)
    write_folder(tmp_path, under("0", gptq(made)), GPTQ)
    model = nn.Sequential(nn.Linear(512, 48, bias=False, dtype=torch.bfloat16))
    fxint4.load_(model, tmp_path)
    _, scale, zero = model[0].weight.get_plain()
    assert torch.equal(zero, ((8 - zero_point) * scale.double()).bfloat16())


def test_weights_of_transformers_conv1d(tmp_path: Path) -> None:
    utils = pytest.importorskip("transformers.pytorch_utils")
    made = quantized(48, 512, 128)
    write_folder(tmp_path, {**under("0", gptq(made)), "0.bias": torch.zeros(48)}, GPTQ)
    model = nn.Sequential(utils.Conv1D(48, 512))  # its weight is [K, N]
    fxint4.load_(model, tmp_path)
    assert isinstance(model[0].weight, Int4TileTensor)
    assert_within(model[0].weight.dequantize(torch.float32), made.weight.T, made.bound.T + 2 * FP32)


# --- the order of activations --------------------------------------------------------------------


def reordered(made: Quantized, group_of: Tensor) -> Quantized:
    return replace(made, group_of=group_of)


def test_groups_in_another_order_are_exact(tmp_path: Path) -> None:
    order = torch.tensor([2, 0, 3, 1])
    made = reordered(quantized(48, 512, 128), order.repeat_interleave(128))
    write_folder(tmp_path, under("0", gptq(made)), {**GPTQ, "desc_act": True})
    model = nn.Sequential(nn.Linear(512, 48, bias=False))
    fxint4.load_(model, tmp_path)
    assert_within(model[0].weight.dequantize().double(), made.weight, made.bound + 2 * FP32)


@pytest.mark.parametrize(
    ("write", "config", "index"),
    [
        (gptq, {**GPTQ, "desc_act": True}, "g_idx"),
        (compressed, compressed_config(group_size=128, actorder="group"), "weight_g_idx"),
    ],
)
def test_the_order_of_activations_is_refused(
    write: Callable[[Quantized], Tensors], config: Any, index: str, tmp_path: Path
) -> None:
    mixed = torch.randperm(512, generator=torch.Generator().manual_seed(0)) // 128
    made = reordered(quantized(48, 512, 128), mixed)
    tensors = {**write(made), index: mixed.to(torch.int32)}
    write_folder(tmp_path, under("layers.0.fc", tensors), config)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(512, 48)})])})
    model["layers"][0]["fc"].bias = None
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc .*desc_act=False, or with static"):
        fxint4.load_(model, tmp_path)


def test_an_order_that_is_not_in_use(tmp_path: Path) -> None:
    tensors = compressed(quantized(48, 512, 128))
    unused = torch.full((512,), -1, dtype=torch.int32)
    write_folder(tmp_path, under("0", {**tensors, "weight_g_idx": unused}))
    write_folder(tmp_path / "plain", under("0", tensors))
    models = [nn.Sequential(nn.Linear(512, 48, bias=False)) for _ in range(2)]
    fxint4.load_(models[0], tmp_path)
    fxint4.load_(models[1], tmp_path / "plain")
    assert torch.equal(models[0][0].weight, models[1][0].weight)


# --- torchao -------------------------------------------------------------------------------------


def tiled(weight: Int4TileTensor, kind: str = "Int4TilePackedTo4dTensor") -> tuple[Tensors, str]:
    """The tensors of a weight as torchao names them, and the entry of the header."""
    data = {"block_size": [1, weight.group_size], "shape": list(weight.shape)}
    names = ["qdata", "scale_and_zero"]
    entry = {"_type": kind, "_data": data, "_tensor_data_names": names}
    tensors = {"_weight_qdata": weight.tiles, "_weight_scale_and_zero": weight.scale_and_zero}
    return tensors, json.dumps(entry)


def padded_to_1024(n: int, k: int) -> Int4TileTensor:
    """A weight as torchao packs it: K is padded to 1024, and the padding is quantized, too."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, 1024), generator=generator).to(torch.uint8)
    scale = torch.rand(n, 8, generator=generator) + 0.5
    zero = torch.randn(n, 8, generator=generator)
    return Int4TileTensor.from_plain(codes, scale, zero, shape=(n, k))


def test_tiles_of_torchao_are_taken_as_they_are(tmp_path: Path) -> None:
    weight = padded_to_1024(48, 500)
    tensors, entry = tiled(weight)
    header = {
        "fc.weight": entry,
        **dict.fromkeys(plain_tensors(48), '{"_type": "Tensor"}'),
        "tensor_names": json.dumps(["fc.weight", *plain_tensors(48)]),
    }
    write_folder(tmp_path, {**under("fc", tensors), **plain_tensors(48)}, metadata=header)
    model = Layer(48, 500)
    fxint4.load_(model, tmp_path)
    assert torch.equal(model.fc.weight.tiles, weight.tiles)
    assert torch.equal(model.fc.weight.scale_and_zero, weight.scale_and_zero)
    assert torch.equal(model.fc.weight.dequantize(), weight.dequantize())


@pytest.mark.parametrize("factors", [torch.rand(500) + 0.5, torch.tensor([1.5])])
def test_act_pre_scale_of_torchao_multiplies_x(factors: Tensor, tmp_path: Path) -> None:
    weight = padded_to_1024(48, 500)
    tensors, entry = tiled(weight)
    tensors["_weight_act_pre_scale"] = factors.bfloat16()
    header = {"0.weight": entry, "tensor_names": '["0.weight"]'}
    write_folder(tmp_path, under("0", tensors), metadata=header)
    model = nn.Sequential(nn.Linear(500, 48, bias=False, dtype=torch.bfloat16))
    fxint4.load_(model, tmp_path)
    w = weight.dequantize(torch.float64) * factors.bfloat16().double()
    assert_within(model[0].weight.dequantize(torch.float32), w, FP32 * w.abs())
    x = torch.randn(5, 500, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        y = model(x)
    assert_within(y, x.double() @ w.T, rounding_bound(x, w))


def test_unwrapped_tiles_of_torchao(tmp_path: Path) -> None:
    weight = padded_to_1024(48, 500)
    parts = {"original0": weight.tiles, "original1": weight.scale_and_zero}
    write_folder(tmp_path, under("0.parametrizations.weight", parts))
    model = nn.Sequential(nn.Linear(500, 48, bias=False))
    fxint4.load_(model, tmp_path)
    assert torch.equal(model[0].weight.dequantize(), weight.dequantize(torch.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "Int4Tensor"}, "0.weight is a Int4Tensor of torchao"),
        ({"_weight_act_pre_scale": torch.ones(1024)}, "act_pre_scale is torch.float32"),
        ({"_weight_act_pre_scale": torch.ones(500).int()}, "act_pre_scale is torch.int32"),
        ({"_weight_qdata": torch.zeros(6, 8, 32, 4, dtype=torch.int64)}, "not int32"),
        ({"_weight_scale_and_zero": torch.zeros(8, 40, 2).bfloat16()}, "scale_and_zero has shape"),
    ],
)
def test_other_tensors_of_torchao_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors, entry = tiled(padded_to_1024(48, 500), change.pop("kind", "Int4TilePackedTo4dTensor"))
    header = {"0.weight": entry, "tensor_names": '["0.weight"]'}
    write_folder(tmp_path, under("0", {**tensors, **change}), metadata=header)
    with pytest.raises(CheckpointError, match=message):
        fxint4.load_(nn.Sequential(nn.Linear(500, 48, bias=False)), tmp_path)


# --- the libraries themselves --------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [128, None])
def test_what_compressed_tensors_writes(
    symmetric: bool, group_size: int | None, tmp_path: Path
) -> None:
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    del library
    strategy = "group" if group_size else "channel"
    arguments = QuantizationArgs(
        num_bits=4, symmetric=symmetric, strategy=strategy, group_size=group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    weight = torch.randn(48, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    grouped = weight.view(48, -1, group_size or 512)
    scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    written = PackedQuantizationCompressor.compress(state, scheme)
    read = PackedQuantizationCompressor.decompress(dict(written), scheme)["weight"]

    write_folder(tmp_path, under("0", written))
    model = nn.Sequential(nn.Linear(512, 48, bias=False))
    fxint4.load_(model, tmp_path)
    # Scales are bf16, so that only the zero is rounded here; the library rounds its result to bf16.
    step = scale.double().repeat_interleave(group_size or 512, -1)
    bound = BF16 * (8 * step * (0 if symmetric else 1) + read.double().abs() * (1 + BF16))
    assert_within(model[0].weight.dequantize().double(), read.double(), bound + 16 * FP32 * step)


def test_what_torchao_writes(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    from torchao.quantization import Int4TilePackedTo4dTensor

    weight = padded_to_1024(48, 500)
    theirs = Int4TilePackedTo4dTensor(
        weight.tiles, weight.scale_and_zero, [1, weight.group_size], weight.shape
    )
    tensors, metadata = support.flatten_tensor_state_dict(
        {"fc.weight": theirs, **plain_tensors(48)}
    )
    write_folder(tmp_path, tensors, metadata=metadata)
    model = Layer(48, 500)
    fxint4.load_(model, tmp_path)
    assert torch.equal(model.fc.weight.dequantize(), weight.dequantize())


@pytest.mark.filterwarnings("ignore:Models quantized with version 1:UserWarning")
def test_what_torchao_unwraps(tmp_path: Path) -> None:
    """A TensorCoreTiledLayout, which is in torchao 0.15 but not in 0.18."""
    layouts = pytest.importorskip("torchao.dtypes.uintx.tensor_core_tiled_layout")
    from torchao.dtypes import AffineQuantizedTensor
    from torchao.utils import unwrap_tensor_subclass

    weight = padded_to_1024(48, 500)
    tiles = layouts.TensorCoreTiledAQTTensorImpl(
        weight.tiles, weight.scale_and_zero, False, layouts.TensorCoreTiledLayout(8)
    )
    theirs = AffineQuantizedTensor(
        tiles, (1, weight.group_size), weight.shape, 0, 15, dtype=torch.bfloat16
    )
    written = nn.Sequential(nn.Linear(500, 48, bias=False, dtype=torch.bfloat16))
    written[0].weight = nn.Parameter(theirs, requires_grad=False)
    write_folder(tmp_path, unwrap_tensor_subclass(written).state_dict())
    model = nn.Sequential(nn.Linear(500, 48, bias=False, dtype=torch.bfloat16))
    fxint4.load_(model, tmp_path)
    assert torch.equal(model[0].weight.dequantize(), weight.dequantize())


# --- what is refused -----------------------------------------------------------------------------


def changed(tensors: Tensors, **changes: Tensor | None) -> Tensors:
    """The tensors, some replaced, and without those replaced by None."""
    return {name: value for name, value in {**tensors, **changes}.items() if value is not None}


def eight_bits(tensors: Tensors) -> Tensors:
    """A qweight that holds twice as many words along K."""
    return changed(tensors, qweight=tensors["qweight"].repeat(2, 1))


def with_infinity(tensors: Tensors) -> Tensors:
    scales = tensors["scales"].clone()
    scales[0, 0] = torch.inf
    return changed(tensors, scales=scales)


MADE = quantized(48, 512, 128)
ACTIVATIONS = compressed_config(group_size=128)
ACTIVATIONS["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}

REFUSED: dict[str, tuple[Tensors, Mapping[str, Any], str]] = {
    "another method": (gptq(MADE), {"quant_method": "aqlm"}, "by 'aqlm'; fxint4 reads gptq, awq, "),
    "gptq of 3 bits": (gptq(MADE), {**GPTQ, "bits": 3}, "GPTQ of 3 bits in the format 'gptq'"),
    "gptq for marlin": (
        gptq(MADE),
        {**GPTQ, "checkpoint_format": "marlin"},
        "in the format 'marlin'; fxint4 reads 4 bits in the formats gptq, gptq_v2",
    ),
    "gptq of 8 bits, not said": (
        eight_bits(gptq(quantized(48, 512, 128, symmetric=True))),
        {},
        r"fc \(GPTQ\): qweight is torch.int32 \(128, 48\); here it must be .*\(64, 48\)",
    ),
    "gptq of another layer": (
        gptq(quantized(48, 256, 128)),
        GPTQ,
        r"qweight is .* \(32, 48\); .* the model has another shape",
    ),
    "gptq without zeros": (changed(gptq(MADE), qzeros=None), GPTQ, "fc.qweight but no fc.qzeros"),
    "gptq of the other version": (
        gptq(quantized(48, 512, 128, symmetric=True), version=2),
        {**GPTQ, "sym": True},
        "fc .*says sym, but not all zero points are 8 when they are read as gptq: ",
    ),
    "groups of 16": (
        gptq(quantized(48, 512, 16)),
        {**GPTQ, "group_size": 16},
        "Quantize with groups of a multiple of 32, not 16",
    ),
    "groups that do not divide": (
        changed(gptq(quantized(48, 512, 100)), g_idx=None),
        GPTQ,
        r"there are 6 groups for 512 columns, and the config's group_size is 128. Give quantiz",
    ),
    "groups that are not there": (
        changed(gptq(MADE), g_idx=torch.arange(512, dtype=torch.int32) // 64),
        GPTQ,
        "there are 4 groups, and g_idx must name each of them; it goes from 0 to 7 and names 8",
    ),
    "groups that no column uses": (
        changed(gptq(MADE), g_idx=torch.zeros(512, dtype=torch.int32)),
        GPTQ,
        "there are 4 groups, and g_idx must name each of them; it goes from 0 to 0 and names 1",
    ),
    "infinite scales": (with_infinity(gptq(MADE)), GPTQ, "fc .*scale or zero holds inf or NaN"),
    "awq of another version": (awq(MADE), {**AWQ, "version": "gemv"}, "in the version 'gemv'"),
    "compressed of 8 bits": (
        compressed(MADE),
        compressed_config(num_bits=8),
        "of 8 bits of type 'int' in the format 'pack-quantized'",
    ),
    "compressed for marlin": (
        compressed(MADE),
        {**compressed_config(), "format": "marlin-24"},
        "in the format 'marlin-24'",
    ),
    "quantized activations": (compressed(MADE), ACTIVATIONS, "activations are quantized too"),
    "transforms": (
        compressed(MADE),
        {**compressed_config(), "transform_config": {"config_groups": {"R1": {}}}},
        "activations go through transforms",
    ),
    "zero points that are missing": (
        changed(compressed(MADE), weight_zero_point=None),
        compressed_config(group_size=128),
        "fc .*no weight_zero_point, and the config says asymmetric",
    ),
    "scales without axes": (
        changed(gptq(MADE), scales=torch.tensor(1.0).half()),
        GPTQ,
        r"fc \(GPTQ\): scales is torch.float16 \(\); it must have two axes",
    ),
    **{
        f"zeros of {tuple(zeros.shape)}": (
            changed(gptq(MADE), qzeros=zeros),
            {"quant_method": "gptq"},
            rf"fc \(GPTQ\): qzeros is torch.int32 \({', '.join(map(str, zeros.shape))}",
        )
        for zeros in (torch.tensor(0).int(), torch.zeros(24).int(), torch.zeros(1, 4, 6).int())
    },
    "awq scales without axes": (
        changed(awq(MADE), scales=torch.ones(4).half()),
        AWQ,
        r"scales is torch.float16 \(4,\); it must have two axes",
    ),
    "compressed scales without axes": (
        changed(compressed(MADE), weight_scale=torch.tensor(1.0).half()),
        compressed_config(group_size=128),
        r"weight_scale is torch.float16 \(\); it must have two axes",
    ),
    "no groups at all": (
        changed(gptq(MADE), scales=torch.ones(0, 48).half(), qzeros=torch.zeros(0, 6).int()),
        GPTQ,
        "there are 0 groups",
    ),
    "zero points above 4 bits": (
        changed(compressed(MADE, early=True), weight_zero_point=torch.full((48, 4), 127).char()),
        compressed_config(group_size=128),
        r"weight_zero_point goes from 127 to 127; of 4 bits it must be in -8\.\.7",
    ),
    "zero points below 4 bits": (
        changed(compressed(MADE, early=True), weight_zero_point=torch.full((48, 4), -9).char()),
        compressed_config(group_size=128),
        "weight_zero_point goes from -9 to -9",
    ),
    "a shape that is no shape": (
        changed(compressed(MADE), weight_shape=torch.tensor([[48, 512]])),
        compressed_config(group_size=128),
        r"weight_shape is torch.int64 \(1, 2\); here it must be",
    ),
    "a scale for all": (
        compressed(MADE),
        compressed_config(strategy="tensor", group_size=None),
        "a scale for each 'tensor'; fxint4 reads one for each 'group' or 'channel'",
    ),
    **{
        f"{key}, a group size of {size!r}": (write(MADE), config_of(size), message)
        for size in (0, -2, "128", 128.0, True)
        for key, write, config_of, message in (
            ("gptq", gptq, lambda size: {**GPTQ, "group_size": size}, f"group_size is {size!r}; "),
            ("awq", awq, lambda size: {**AWQ, "group_size": size}, f"group_size is {size!r}; "),
            (
                "compressed",
                compressed,
                lambda size: compressed_config(group_size=size),
                f"group_size is {size!r}; ",
            ),
        )
    },
    "a group size beyond all": (
        changed(gptq(MADE), g_idx=None),
        {**GPTQ, "group_size": 10**30},
        "there are 4 groups for 512 columns",
    ),
    "gptq of 8 bits in one layer": (
        gptq(MADE),
        {**GPTQ, "dynamic": {"-:other": {}, "+:f.$": {"bits": 8}}},
        r"fc \(GPTQ\): GPTQ of 8 bits",
    ),
    "a pattern that is none": (
        gptq(MADE),
        {**GPTQ, "dynamic": {"+:(": {}}},
        r"'\(' in the config is",
    ),
    "dynamic options that are none": (
        gptq(MADE),
        {**GPTQ, "dynamic": ["fc"]},
        "the quantizer's config can't be read",
    ),
    "asymmetric, and no config": (gptq(MADE), {}, "nothing tells whether zero points are stored"),
    "AutoRound in another format": (
        gptq(MADE),
        {**AUTO_ROUND, "packing_format": "auto_round:mx"},
        "in the packing_format 'auto_round:mx'; fxint4 reads auto_round, auto_round:gptqmodel, ",
    ),
    "AutoRound without a format": (
        gptq(MADE),
        {**AUTO_ROUND, "packing_format": None, "sym": False},
        "has no packing_format",
    ),
    "AutoRound of floats": (gptq(MADE), {**AUTO_ROUND, "data_type": "mx_fp"}, "of type 'mx_fp'"),
    "AutoRound of activations": (
        gptq(MADE),
        {**AUTO_ROUND, "act_bits": 8},
        "activations of 8 bits",
    ),
    "AutoRound of options that are none": (
        gptq(MADE),
        {**AUTO_ROUND, "sym": False, "extra_config": {"fc": "4"}},
        "the quantizer's config can't be read",
    ),
    "AutoRound of 8 bits": (
        gptq(MADE),
        {**AUTO_ROUND, "sym": False, "extra_config": {"fc": {"bits": 8}}},
        r"fc \(AutoRound\): AutoRound of 8 bits",
    ),
    "a shape that is another": (
        changed(compressed(MADE), weight_shape=torch.tensor([48, 510])),
        compressed_config(group_size=128),
        r"weight_shape is \[48, 510\]; the model's weight is \[48, 512\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_tiles_cannot_hold_is_refused_and_changes_nothing(name: str, tmp_path: Path) -> None:
    tensors, config, message = REFUSED[name]
    write = awq if "awq" in name else gptq if "qweight" in tensors else compressed
    symmetric = not config or config.get("sym") is True
    good = under("good", write(quantized(48, 512, 128, symmetric=symmetric)))
    model = nn.ModuleDict({layer: nn.Linear(512, 48, bias=False) for layer in ("good", "fc")})
    before = {name: (value, value.clone()) for name, value in model.named_parameters()}
    write_folder(tmp_path, {**good, **under("fc", tensors)}, config)
    with pytest.raises(CheckpointError, match=message):
        fxint4.load_(model, tmp_path)
    for name, (value, copied) in before.items():
        assert model.get_parameter(name) is value
        assert torch.equal(value, copied)


def test_int4_goes_into_layers_that_multiply_only(tmp_path: Path) -> None:
    write_folder(tmp_path, under("0", gptq(quantized(512, 48, 48))), GPTQ)
    with pytest.raises(CheckpointError, match=r"0\.weight is a parameter of Embedding; int4"):
        fxint4.load_(nn.Sequential(nn.Embedding(512, 48)), tmp_path)


def test_a_model_in_float64(tmp_path: Path) -> None:
    write_folder(tmp_path, under("0", gptq(MADE)), GPTQ)
    model = nn.Sequential(nn.Linear(512, 48, bias=False, dtype=torch.float64))
    with pytest.raises(CheckpointError, match=r"the model's is torch\.float64; it must be one of"):
        fxint4.load_(model, tmp_path)


def test_experts_in_one_parameter(tmp_path: Path) -> None:
    class Experts(nn.Module):
        is_transposed = False

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(2, 48, 512))

    tensors = {**under("experts.0.up", gptq(MADE)), **under("experts.1.up", gptq(MADE))}
    write_folder(tmp_path / "apart", tensors, GPTQ)
    with pytest.raises(CheckpointError, match=r"experts\.1\.up\.weight.* Experts that the check"):
        fxint4.load_(nn.ModuleDict({"experts": Experts()}), tmp_path / "apart")
    write_folder(tmp_path / "one", under("experts.up", gptq(MADE)), GPTQ)
    with pytest.raises(CheckpointError, match=r"experts\.up\.weight"):
        fxint4.load_(nn.ModuleDict({"experts": Experts()}), tmp_path / "one")

    weight = Int4TileTensor.from_float(torch.randn(2, 48, 512))
    parts = {"_up_qdata": weight.tiles, "_up_scale_and_zero": weight.scale_and_zero}
    entry = {"_type": "Int4TilePackedTo4dTensor"}
    header = {"experts.up": json.dumps(entry), "tensor_names": '["experts.up"]'}
    write_folder(tmp_path / "tiles", under("experts", parts), metadata=header)
    model = nn.ModuleDict({"experts": Experts()})
    report = fxint4.load_(model, tmp_path / "tiles")
    assert torch.equal(model["experts"].up, weight)
    assert [(r.op, r.batch) for r in report.records] == [("experts", 2)]


# --- fxint4's own files --------------------------------------------------------------------------


class Conv1D(nn.Module):
    """Named and made as that of transformers: x @ weight + bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(96, 64, dtype=torch.bfloat16))
        self.bias = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))


class Kinds(nn.Module):
    """A weight of each kind that can be packed, and what is not packed."""

    def __init__(self) -> None:
        super().__init__()
        bf16 = torch.bfloat16
        self.fc = nn.Linear(100, 50, dtype=bf16)
        self.tied = nn.Linear(100, 50, bias=False, dtype=bf16)
        self.tied.weight = self.fc.weight
        self.fp16 = nn.Linear(128, 64, dtype=torch.float16)
        self.single = nn.Linear(320, 64)
        self.conv1d = Conv1D()
        self.conv = nn.Conv2d(64, 32, 1, dtype=bf16)
        self.experts = nn.Parameter(torch.randn(3, 64, 40, dtype=bf16))
        self.runs = nn.Linear(96, 32, bias=False, dtype=bf16)
        self.embed = nn.Embedding(7, 50, dtype=bf16)
        self.head = nn.Linear(50, 7, bias=False, dtype=bf16)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(7))
        self.register_buffer("table", torch.randn(32, 64, dtype=bf16))
        self.register_buffer("fp8", torch.randn(4, 4).to(torch.float8_e4m3fn))
        self.register_buffer("unsigned", torch.arange(4).to(torch.uint16))


def kinds() -> Kinds:
    """A packed model; its weights differ in axes, groups, columns, dtypes and pre-scales."""
    torch.manual_seed(0)
    model = Kinds().eval()
    fxint4.pack_(model)
    wide = Int4TileTensor.from_float(torch.randn(32, 256).bfloat16())
    new = {
        "single": Int4TileTensor.from_float(
            torch.randn(64, 320), fxint4.Int4Config(group_size=32, inner_k_tiles=2)
        ).like(pre_scale=torch.rand(320) + 0.5),
        "runs": wide.like(columns=((0, 40), (50, 74), (128, 160)), is_part=True),
    }
    for name, weight in new.items():
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    experts = Int4TileTensor.from_float(model.experts.detach().mT)
    model.experts = nn.Parameter(experts.like(axes=(0, 2, 1)), requires_grad=False)
    model.table = Int4TileTensor.from_float(model.table)
    packed = [name for name, value in model.state_dict().items() if is_packed(value)]
    assert len(packed) == 9
    return model


def is_packed(value: Any) -> bool:
    return isinstance(value, Int4TileTensor)


def write_own(folder: Path, state: Mapping[str, Tensor], shards: int, config: bool = False) -> Path:
    """Write a state dict as `save_file` does, or spread over several files with an index."""
    folder.mkdir(exist_ok=True)
    if config:
        text = json.dumps({"model_type": "x", "quantization_config": {"quant_method": "int4tile"}})
        (folder / "config.json").write_text(text)
    if shards == 1:
        fxint4.save_file(state, folder / "model.safetensors")
        return folder
    tensors, entries = flatten(state)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    split = {
        name: {key: value for j, (key, value) in enumerate(tensors.items()) if j % shards == i}
        for i, name in enumerate(names)
    }
    write_shards(folder, split, entries)
    return folder


def assert_same(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Assert that a model holds the tensors of a state dict, bit for bit."""
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        other = loaded[name]
        assert (type(other), other.dtype) == (type(value), value.dtype), name
        assert other.shape == value.shape, name
        if is_packed(value):
            assert other.metadata == value.metadata, name
            assert other.buffers.keys() == value.buffers.keys()
            assert all(torch.equal(b, value.buffers[part]) for part, b in other.buffers.items())
        elif value.dtype is torch.float8_e4m3fn:
            assert torch.equal(other.view(torch.uint8), value.view(torch.uint8))
        else:
            assert torch.equal(other, value), name


@pytest.mark.parametrize("config", [False, True], ids=["header only", "config"])
@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_own_files_are_taken_bit_for_bit(
    device: str, shards: int, config: bool, tmp_path: Path
) -> None:
    state = kinds().state_dict()
    write_own(tmp_path, state, shards, config)
    with torch.device(device):
        model = Kinds()
    before = dict(model.named_modules())
    report = fxint4.load_(model, tmp_path)
    assert dict(model.named_modules()) == before
    assert_same(model, state)
    assert model.fc.weight is model.tied.weight
    assert model.head.weight is model.embed.weight
    assert isinstance(model.single.weight, nn.Parameter)
    assert not isinstance(model.table, nn.Parameter)

    packed = {name: value for name, value in state.items() if is_packed(value)}
    records = {record.parameters[0]: record for record in report.records}
    # Those that are tied are one parameter, which has one record.
    assert len(packed.keys() & records.keys()) == len(packed) - 1
    for name, record in records.items():
        if name in packed:
            shape = packed[name].stored
            assert (record.action, record.reason) == ("packed", "from fxint4")
            assert (record.n, record.k, record.group_size) == (shape.n, shape.k, shape.group_size)
            assert record.bytes_after == packed[name].packed_bytes
    assert (records["head.weight"].action, records["experts"].batch) == ("kept", 3)
    assert str(report)


def test_an_own_file_and_a_config_of_what_was_packed(tmp_path: Path) -> None:
    """A checkpoint of GPTQ, loaded and saved again beside the config.json that it came with."""
    write_layer(tmp_path / "gptq", CASES["gptq"])
    model, again = Layer(48, 512), Layer(48, 512)
    fxint4.load_(model, tmp_path / "gptq")
    fxint4.save_file(model.state_dict(), tmp_path / "gptq" / "model.safetensors")
    fxint4.load_(again, tmp_path / "gptq")
    assert_same(again, model.state_dict())


def test_an_own_file_into_a_packed_model(tmp_path: Path) -> None:
    state = kinds().state_dict()
    fxint4.save_file(state, tmp_path / "m.safetensors")
    model = Kinds()
    fxint4.pack_(model, options={"group_size": 32})
    fxint4.load_(model, tmp_path / "m.safetensors")
    assert_same(model, state)


def test_an_own_file_takes_the_models_dtype(tmp_path: Path) -> None:
    state = kinds().state_dict()
    fxint4.save_file(state, tmp_path / "m.safetensors")
    model = Kinds().float()
    model.fp8 = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
    fxint4.load_(model, tmp_path / "m.safetensors")
    assert model.fc.weight.dtype is torch.float32
    expected = state["fc.weight"].dequantize(torch.float32)
    assert torch.equal(model.fc.weight.dequantize(), expected)


def test_an_own_file_without_a_packed_weight(tmp_path: Path) -> None:
    state = Tied().state_dict()
    fxint4.save_file(state, tmp_path / "m.safetensors")
    model = Tied()
    fxint4.load_(model, tmp_path / "m.safetensors")
    assert_same(model, state)


def test_ties_of_an_own_file_come_back(tmp_path: Path) -> None:
    """Also into a model that does not tie, and under other names."""
    model = nn.ModuleDict({name: nn.Linear(64, 32, bias=False) for name in ("a", "b")})
    model["b"].weight = model["a"].weight
    fxint4.pack_(model)
    fxint4.save_file(model.state_dict(), tmp_path / "m.safetensors")
    apart = nn.ModuleDict({name: nn.Linear(64, 32, bias=False) for name in ("x_a", "x_b")})
    fxint4.load_(apart, tmp_path / "m.safetensors", rename=lambda name: f"x_{name}")
    assert apart["x_a"].weight is apart["x_b"].weight
    assert torch.equal(apart["x_a"].weight, model["a"].weight)
    with pytest.raises(CheckpointError, match=r"Not in the model: a\.weight, b\.weight\."):
        fxint4.load_(apart, tmp_path / "m.safetensors")
    only = nn.ModuleDict({"a": nn.Linear(64, 32, bias=False)})
    fxint4.load_(only, tmp_path / "m.safetensors", ignore="b")
    assert torch.equal(only["a"].weight, model["a"].weight)


def test_an_own_file_of_another_shape(tmp_path: Path) -> None:
    fxint4.save_file(kinds().state_dict(), tmp_path / "m.safetensors")
    model = Kinds()
    model.conv = nn.Conv2d(64, 31, 1, dtype=torch.bfloat16)
    with (
        unchanged(model),
        pytest.raises(
            CheckpointError,
            match=r"^conv \(fxint4\): it is \(32, 64, 1, 1\); the model's parameter is \(31, 64, ",
        ),
    ):
        fxint4.load_(model, tmp_path / "m.safetensors")
    model = Kinds()
    model.embed = nn.Embedding(8, 50, dtype=torch.bfloat16)
    with unchanged(model), pytest.raises(CheckpointError, match=r"embed\.weight is .* \(7, 50\)"):
        fxint4.load_(model, tmp_path / "m.safetensors")
    model = Kinds().double()
    with (
        unchanged(model),
        pytest.raises(CheckpointError, match=r"model's is torch\.float64; it mu"),
    ):
        fxint4.load_(model, tmp_path / "m.safetensors")


def test_one_of_an_own_folders_files(tmp_path: Path) -> None:
    write_own(tmp_path, kinds().state_dict(), 3)
    for path in sorted(tmp_path.glob("*.safetensors")):
        with pytest.raises(CheckpointError, match="one of several files of a model: then give the"):
            fxint4.load_(Kinds(), path)


def test_own_tensors_without_their_header(tmp_path: Path) -> None:
    tensors, _ = flatten(kinds().state_dict())
    for entries in (None, {"format": "pt"}, {"fxint4": '{"version":1,"packed":{},"shared":{}}'}):
        write_folder(tmp_path, tensors, metadata=entries)
        with pytest.raises(CheckpointError, match=r"_experts_tiles is named like a part of a"):
            fxint4.load_(Kinds(), tmp_path)


def test_own_shards_of_two_models(tmp_path: Path) -> None:
    one, two = kinds(), Kinds()
    fxint4.pack_(two, options={"group_size": 32})
    parts = {"model-1.safetensors": one, "model-2.safetensors": two}
    flat = {name: flatten(model.state_dict()) for name, model in parts.items()}
    index = dict.fromkeys(flat["model-1.safetensors"][0], "model-1.safetensors")
    index["fc._weight_tiles"] = "model-2.safetensors"
    for name, (tensors, entries) in flat.items():
        own = {key: value for key, value in tensors.items() if index.get(key) == name}
        write_shards(tmp_path, {name: own}, entries)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=r"headers of two files differ in .*not of one model"):
        fxint4.load_(Kinds(), tmp_path)


def small() -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """A packed model with a tied weight and a pre-scale, its tensors in a file, and its header."""
    model = nn.ModuleDict({name: nn.Linear(64, 32, bias=False) for name in ("a", "b", "c")})
    model["b"].weight = model["a"].weight
    fxint4.pack_(model)
    weight = model["c"].weight.detach().like(pre_scale=torch.ones(64))
    model["c"].weight = nn.Parameter(weight, requires_grad=False)
    tensors, entries = flatten(model.state_dict())
    return model, tensors, json.loads(entries["fxint4"])


DAMAGED: dict[str, tuple[Callable[[dict[str, Any], Tensors], Any], str]] = {
    "more rows": (lambda h, t: set_in(h, 1, 99), r"^a \(fxint4\): .* 99 rows and"),
    "fewer rows": (lambda h, t: set_in(h, 1, 9), r"^a \(fxint4\): it is \(9, 64\); the model's"),
    "no rows": (lambda h, t: set_in(h, 1, 0), r"^a \(fxint4\): "),
    "huge": (lambda h, t: set_in(h, 1, 10**30), r"^a \(fxint4\): "),
    "huge columns": (lambda h, t: set_in(h, 2, [[0, 10**30]]), r"^a \(fxint4\): "),
    "negative": (lambda h, t: set_in(h, 2, [[-64, 64]]), r"^a \(fxint4\): "),
    "text": (lambda h, t: set_in(h, 3, "32"), r"^a \(fxint4\): "),
    "other axes": (lambda h, t: set_in(h, 4, [1, 0]), r"^a \(fxint4\): it is \(64, 32\)"),
    "no axes": (lambda h, t: set_in(h, 4, None), r"^a \(fxint4\): "),
    "a dtype": (lambda h, t: set_in(h, 0, "__class__"), r"^a \(fxint4\): .*dtype is '__class__'"),
    "nothing": (lambda h, t: h["packed"].update(a=None), r"has no _a_tiles"),
    "not there": (
        lambda h, t: h["packed"].update(d=h["packed"]["c.weight"]),
        "has no _d_tiles, wh",
    ),
    "no pre-scale": (lambda h, t: t.pop("c._weight_pre_scale"), r"has no c\._weight_pre_scale, w"),
    "one too many": (lambda h, t: h["pre_scaled"].clear(), r"Not in the model: c\._weight_pre_sca"),
    "not packed": (lambda h, t: h["packed"].pop("a.weight"), r"has no a\.weight, whose memory b"),
    "a tie to itself": (lambda h, t: h["shared"].update(d="d"), r"has no d, whose memory d shares"),
    "packed and tied": (
        lambda h, t: h["shared"].update({"c.weight": "a.weight"}),
        r"c\.weight is packed, and shares the memory of another",
    ),
    "twice": (
        lambda h, t: t.update({"b.weight": torch.zeros(32, 64)}),
        r"b\.weight and b\.weight are both for b\.weight",
    ),
    "plain, too": (
        lambda h, t: t.update({"a.weight": torch.zeros(32, 64)}),
        r"a\.weight and a\.weight are both for a\.weight",
    ),
    "a version": (lambda h, t: h.update(version=4), "is of version 4; this fxint4 reads 1, 2, 3"),
    "a list": (lambda h, t: h.update(packed=[1]), "its header is damaged"),
    "int64 tiles": (
        lambda h, t: t.update({"a._weight_tiles": t["a._weight_tiles"].long()}),
        r"^a \(fxint4\): .* tiles are torch\.int64",
    ),
    "short tiles": (
        lambda h, t: t.update({"a._weight_tiles": t["a._weight_tiles"][:2].clone()}),
        r"^a \(fxint4\): .*scale_and_zero has shape",
    ),
    "no tiles": (
        lambda h, t: t.update({"a._weight_tiles": torch.zeros(0, 4, dtype=torch.int32)}),
        r"^a \(fxint4\): ",
    ),
    "not finite": (
        lambda h, t: t["a._weight_scale_and_zero"].view(-1)[:1].fill_(torch.inf),
        r"^a \(fxint4\): .*scale_and_zero holds inf or NaN",
    ),
}


def set_in(header: dict[str, Any], place: int, value: Any) -> None:
    header["packed"]["a.weight"][place] = value


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that a model's tensors are the same objects with the same values at the end."""
    before = {name: (value, value.clone()) for name, value in model.named_parameters()}
    yield
    for name, (value, copied) in before.items():
        assert model.get_parameter(name) is value
        assert torch.equal(value, copied)


@pytest.mark.parametrize("name", DAMAGED)
def test_own_files_that_are_damaged(name: str, tmp_path: Path) -> None:
    change, message = DAMAGED[name]
    model, tensors, header = small()
    for value in model.parameters():
        assert is_packed(value)
    change(header, tensors)
    write_folder(tmp_path, tensors, metadata={"fxint4": json.dumps(header)})
    fresh = nn.ModuleDict({layer: nn.Linear(64, 32, bias=False) for layer in ("a", "b", "c")})
    with unchanged(fresh), pytest.raises(CheckpointError, match=message):
        fxint4.load_(fresh, tmp_path)


@pytest.mark.parametrize("kind", ["Llama", "Mixtral"])
def test_a_packed_model_that_transformers_saved(kind: str, tmp_path: Path) -> None:
    """Under its own names, not those of the original checkpoints, which differ for Mixtral."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=96,
        tie_word_embeddings=kind == "Llama",
    )
    make = transformers.AutoModelForCausalLM.from_config
    model, again = make(config).eval(), make(config).eval()
    fxint4.pack_(model)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    fxint4.load_(again, tmp_path)
    assert_same(again, model.state_dict())


JUNK = (None, True, -1, 0, 3, 2**31, 10**30, 1.5, float("nan"), "", "a.weight", "x" * 99, [], {})


def test_own_headers_with_anything_in_them(tmp_path: Path) -> None:
    """Whatever a header says, it is refused with an error of ours, or read as it says."""
    _, tensors, header = small()
    chance = random.Random(0)
    refused = 0
    for _ in range(150):
        changed_header = copy.deepcopy(header)
        for _ in range(chance.choice((1, 1, 2))):
            mutate(changed_header, chance)
        write_folder(tmp_path, tensors, metadata={"fxint4": json.dumps(changed_header)})
        fresh = nn.ModuleDict({layer: nn.Linear(64, 32, bias=False) for layer in ("a", "b", "c")})
        before = list(fresh.parameters())
        try:
            fxint4.load_(fresh, tmp_path)
        except CheckpointError:
            refused += 1
            assert all(a is b for a, b in zip(before, fresh.parameters(), strict=True))
    assert refused > 100


def mutate(tree: Any, chance: random.Random) -> None:
    """Change, add or remove one value of a tree of JSON, at any depth."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = chance.choice(keys) if keys else None
    if key is not None and isinstance(tree[key], (dict, list)) and chance.random() < 0.75:
        mutate(tree[key], chance)
    elif key is not None and chance.random() < 0.3:
        del tree[key]
    elif isinstance(tree, dict):
        tree[chance.choice([*keys, "d", "a.weight"])] = copy.copy(chance.choice(JUNK))
    elif key is not None:
        tree[key] = copy.copy(chance.choice(JUNK))
    else:
        tree.append(copy.copy(chance.choice(JUNK)))


def test_one_own_weight_at_a_time(tmp_path: Path) -> None:
    layers, n, k = 12, 512, 512
    model = nn.Sequential(*(nn.Linear(k, n, bias=False) for _ in range(layers)))
    fxint4.pack_(model)
    write_own(tmp_path, model.state_dict(), 2)
    with torch.device("meta"):
        fresh = nn.Sequential(*(nn.Linear(k, n, bias=False) for _ in range(layers)))
    peak, kept = peak_bytes(lambda: fxint4.load_(fresh, tmp_path))
    assert kept >= layers * n * k / 2
    # The profiler counts the mapped files as if they had been allocated.
    mapped = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert peak - kept - mapped < n * k


# --- files ---------------------------------------------------------------------------------------


def write_shards(
    folder: Path, shards: Mapping[str, Tensors], metadata: dict[str, str] | None = None
) -> None:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    places = {}
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata=metadata)
        places.update(dict.fromkeys(tensors, name))
    text = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)


def shards() -> dict[str, Tensors]:
    """A layer whose parts are in two files."""
    tensors = under("fc", gptq(MADE))
    second = {"fc.qzeros": tensors.pop("fc.qzeros"), **plain_tensors(48)}
    return {"model-1.safetensors": tensors, "model-2.safetensors": second}


def test_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "two", shards())
    write_folder(tmp_path / "one", {**under("fc", gptq(MADE)), **plain_tensors(48)})
    two, one = Layer(48, 512), Layer(48, 512)
    fxint4.load_(two, tmp_path / "two", quantization_config=GPTQ)
    fxint4.load_(one, str(tmp_path / "one"), quantization_config=GPTQ)
    for name, value in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], value), name


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    write_shards(tmp_path, shards())
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 'model-2\.safetensors', which is no"):
        fxint4.load_(Layer(48, 512), tmp_path)


def test_an_index_names_files_beside_it_only(tmp_path: Path) -> None:
    write_folder(tmp_path / "other", plain_tensors(48))
    (tmp_path / "here").mkdir()
    places = {"weight_map": {"fc.bias": "../other/model.safetensors"}}
    (tmp_path / "here" / "model.safetensors.index.json").write_text(json.dumps(places))
    with pytest.raises(CheckpointError, match=r"'\.\./other/model\.safetensors', which is no"):
        fxint4.load_(Layer(48, 512), tmp_path / "here")


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.gguf"])
def test_pickles_and_other_files(name: str, tmp_path: Path) -> None:
    torch.save({"fc.bias": torch.zeros(48)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name} is no \.safetensors file"):
        fxint4.load_(Layer(48, 512), tmp_path / name)
    message = "must hold one" if name.endswith("gguf") else "only pickles; reading one can run code"
    with pytest.raises(CheckpointError, match=message):
        fxint4.load_(Layer(48, 512), tmp_path)


def test_several_files_and_no_index(tmp_path: Path) -> None:
    write_folder(tmp_path, plain_tensors(48))
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    write_folder(tmp_path, plain_tensors(48))
    with pytest.raises(CheckpointError, match=r"there: a\.safetensors, model\.safetensors"):
        fxint4.load_(Layer(48, 512), tmp_path)
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        fxint4.load_(Layer(48, 512), tmp_path / "nowhere")


@pytest.mark.parametrize("left", [0, 4, 200, 5000])
def test_a_file_that_was_cut_short(left: int, tmp_path: Path) -> None:
    write_layer(tmp_path, CASES["gptq"])
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        fxint4.load_(Layer(48, 512), tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"a":' * 100_000, '{"a": ' + "1" * 5000 + "}"])
@pytest.mark.parametrize(
    "name", ["config.json", "quantize_config.json", "model.safetensors.index.json"]
)
def test_a_config_or_index_that_is_damaged(name: str, text: str, tmp_path: Path) -> None:
    write_layer(tmp_path, CASES["gptq"], with_config=False)
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        fxint4.load_(Layer(48, 512), tmp_path)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "quant_config.json", "model.safetensors.index.json"],
)
def test_a_fifo_in_the_folder_is_not_read(name: str, tmp_path: Path) -> None:
    write_layer(tmp_path, CASES["gptq"], with_config=False)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name} can't be read: it is a FIFO"):
        fxint4.load_(Layer(48, 512), tmp_path)


def test_a_fifo_among_shards_is_not_read(tmp_path: Path) -> None:
    write_shards(tmp_path, shards())
    (tmp_path / "model-2.safetensors").unlink()
    os.mkfifo(tmp_path / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"names 'model-2\.safetensors', .*it is a FIFO"):
        fxint4.load_(Layer(48, 512), tmp_path)


@pytest.mark.parametrize("name", ["a" * 5000 + ".safetensors", "\0.safetensors", "x\x1b[2J", ".."])
def test_an_index_with_names_that_are_none(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"fc.bias": name}})
    )
    with pytest.raises(
        CheckpointError, match=r"which is no \.safetensors file beside it"
    ) as caught:
        fxint4.load_(Layer(48, 512), tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_tensor_that_is_in_two_shards(tmp_path: Path) -> None:
    twice = {name: {**part, "fc.bias": torch.ones(48)} for name, part in shards().items()}
    write_shards(tmp_path, twice)
    with pytest.raises(CheckpointError, match=r"fc\.bias is in two files"):
        fxint4.load_(Layer(48, 512), tmp_path)


def test_tiles_in_two_shards(tmp_path: Path) -> None:
    """Each file of torchao lists its own tensors."""
    from safetensors.torch import save_file

    weights = [padded_to_1024(48, 512) for _ in range(2)]
    places = {}
    for number, weight in enumerate(weights):
        tensors, entry = tiled(weight)
        named = under(f"{number}", tensors)
        name = f"{number}.safetensors"
        header = {f"{number}.weight": entry, "tensor_names": json.dumps([f"{number}.weight"])}
        save_file(named, tmp_path / name, metadata=header)
        places.update(dict.fromkeys(named, name))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    model = nn.Sequential(*(nn.Linear(512, 48, bias=False) for _ in range(2)))
    fxint4.load_(model, tmp_path)
    for layer, weight in zip(model, weights, strict=True):
        assert torch.equal(layer.weight.dequantize(), weight.dequantize(torch.float32))


def test_tiles_that_are_not_finite(tmp_path: Path) -> None:
    weight = padded_to_1024(48, 512)
    weight.scale_and_zero[0, 0, 0] = torch.nan
    tensors, entry = tiled(weight)
    header = {"0.weight": entry, "tensor_names": '["0.weight"]'}
    write_folder(tmp_path, under("0", tensors), metadata=header)
    model = nn.Sequential(nn.Linear(512, 48, bias=False))
    with pytest.raises(CheckpointError, match=r"0 \(torchao\): scale_and_zero holds inf or NaN"):
        fxint4.load_(model, tmp_path)
    assert not isinstance(model[0].weight, Int4TileTensor)


@pytest.mark.parametrize("listed", ["[" * 100_000, "{}", "[1]", "[[]]", "nothing"])
def test_tiles_with_a_header_that_is_damaged(listed: str, tmp_path: Path) -> None:
    tensors, entry = tiled(padded_to_1024(48, 512))
    for header in (
        {"0.weight": entry, "tensor_names": listed},
        {"0.weight": "[" * 100_000, "tensor_names": '["0.weight"]'},
        {"tensor_names": '["0.weight"]'},
    ):
        write_folder(tmp_path, under("0", tensors), metadata=header)
        with pytest.raises(CheckpointError, match="header"):
            fxint4.load_(nn.Sequential(nn.Linear(512, 48, bias=False)), tmp_path)


@pytest.mark.parametrize(
    "config", [{"quant_method": ["gptq"]}, {**compressed_config(), "config_groups": [1]}]
)
def test_a_config_that_makes_no_sense(config: Any, tmp_path: Path) -> None:
    write_folder(tmp_path, {**under("fc", compressed(MADE)), **plain_tensors(48)}, config)
    with pytest.raises(CheckpointError, match="the quantizer's config can't be read"):
        fxint4.load_(Layer(48, 512), tmp_path)


# --- names ---------------------------------------------------------------------------------------


def test_names_that_do_not_agree(tmp_path: Path) -> None:
    tensors = {**under("up", gptq(MADE)), **plain_tensors(48)}
    write_folder(tmp_path, changed(tensors, **{"norm.bias": None}), GPTQ)
    model = Layer(48, 512)
    message = r"Not in the checkpoint: fc\.weight, norm\.bias\. Not in the model: up\.weight\."
    with pytest.raises(CheckpointError, match=message):
        fxint4.load_(model, tmp_path)


def test_names_may_be_mapped_and_tensors_left_out(tmp_path: Path) -> None:
    tensors = {**under("fc", gptq(MADE)), **plain_tensors(48)}
    extra = {**under("model.mtp", gptq(MADE)), "model.rotary.inv_freq": torch.ones(4)}
    write_folder(tmp_path, {**under("model", tensors), **extra}, GPTQ)
    model = Layer(48, 512)
    fxint4.load_(
        model,
        tmp_path,
        ignore=["model.mtp", "*.inv_freq"],
        rename=lambda name: name.removeprefix("model."),
    )
    assert isinstance(model.fc.weight, Int4TileTensor)
    with pytest.raises(CheckpointError, match="are both for fc"):
        fxint4.load_(model, tmp_path, ignore="*.inv_freq", rename=lambda name: "fc")


def test_a_bias_of_zeros_for_a_layer_that_has_none(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 48, bias=False))
    write_folder(tmp_path, {**under("0", gptq(MADE)), "0.bias": torch.zeros(48)}, GPTQ)
    fxint4.load_(model, tmp_path)
    write_folder(tmp_path, {**under("0", gptq(MADE)), "0.bias": torch.ones(48)}, GPTQ)
    with pytest.raises(CheckpointError, match=r"Not in the model: 0\.bias"):
        fxint4.load_(model, tmp_path)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(47), torch.zeros(48, dtype=torch.int32)], ids=["shape", "dtype"]
)
def test_other_tensors_must_fit(tensor: Tensor, tmp_path: Path) -> None:
    tensors = {**under("fc", gptq(MADE)), **plain_tensors(48), "norm.bias": tensor}
    write_folder(tmp_path, tensors, GPTQ)
    with pytest.raises(CheckpointError, match=r"norm\.bias is .*; the model's is torch\.bfloat16"):
        fxint4.load_(Layer(48, 512), tmp_path)


def test_a_checkpoint_without_int4(tmp_path: Path) -> None:
    written = Layer(48, 512)
    write_folder(tmp_path, written.state_dict())
    model = Layer(48, 512)
    report = fxint4.load_(model, tmp_path)
    assert torch.equal(model.fc.weight, written.fc.weight)
    [record] = report.records
    assert (record.action, record.reason) == ("kept", "not quantized in the checkpoint")


# --- where it goes -------------------------------------------------------------------------------


def test_a_model_without_memory_of_its_own(tmp_path: Path) -> None:
    write_layer(tmp_path, CASES["gptq"])
    with torch.device("meta"):
        model = Layer(48, 512)
    model.norm.bias.requires_grad_(False)
    fxint4.load_(model, tmp_path)
    here = Layer(48, 512)
    fxint4.load_(here, tmp_path)
    for name, value in here.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.norm.weight.requires_grad
    assert not model.norm.bias.requires_grad


@pytest.mark.parametrize("name", ["gptq", "gptq, symmetric", "awq", "compressed, symmetric"])
def test_defaults_of_the_process_change_nothing(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    write_layer(tmp_path, case)
    expected = Layer(case.n, case.k)
    fxint4.load_(expected, tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            model = Layer(case.n, case.k)
            fxint4.load_(model, tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    for key, value in expected.state_dict().items():
        loaded = model.state_dict()[key]
        assert loaded.device.type == "cpu"
        assert torch.equal(loaded, value), key


def test_buffers_that_only_the_module_can_compute(tmp_path: Path) -> None:
    write_layer(tmp_path, CASES["gptq"])
    with torch.device("meta"):
        model = Layer(48, 512)
        model.norm.register_buffer("table", torch.ones(3), persistent=False)
    with pytest.raises(
        CheckpointError, match=r"norm\.table is on the meta device.* that LayerNorm"
    ):
        fxint4.load_(model, tmp_path)
    assert model.fc.weight.is_meta


@pytest.mark.gpu
def test_onto_the_gpu(tmp_path: Path) -> None:
    write_layer(tmp_path, CASES["gptq"])
    with torch.device("meta"):
        model = Layer(48, 512)
    model.norm.register_buffer("table", torch.ones(3), persistent=False)
    fxint4.load_(model, tmp_path, device="cuda")
    here = Layer(48, 512)
    fxint4.load_(here, tmp_path)
    for name, value in here.state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu(), value), name
    assert model.norm.table.is_cuda


def test_one_layer_at_a_time(tmp_path: Path) -> None:
    layers, n, k = 12, 512, 512
    tensors: Tensors = {}
    for layer in range(layers):
        tensors.update(under(str(layer), gptq(quantized(n, k, 128, seed=layer))))
    write_folder(tmp_path, tensors, GPTQ)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(k, n, bias=False) for _ in range(layers)))
    peak, kept = peak_bytes(lambda: fxint4.load_(model, tmp_path))
    assert kept >= layers * n * k / 2
    # The profiler counts the mapped file as if it had been allocated. The rest are the codes of one
    # layer, one a byte, and copies of them on their way into tiles.
    mapped = (tmp_path / "model.safetensors").stat().st_size
    assert peak - kept - mapped < 3 * n * k


# --- whole models --------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 512, dtype=torch.bfloat16)
        self.head = nn.Linear(512, 48, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    table = torch.randn(48, 512).bfloat16()
    for tensors in ({"embed.weight": table}, {"head.weight": table}):
        write_folder(tmp_path, tensors)
        model = Tied()
        fxint4.load_(model, tmp_path)
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.head.weight, table)
    write_folder(tmp_path, {"embed.weight": table, "head.weight": table.clone()})
    fxint4.load_(model, tmp_path)
    assert model.head.weight is model.embed.weight


def test_a_head_that_is_quantized_is_no_longer_tied(tmp_path: Path) -> None:
    table = torch.randn(48, 512).bfloat16()
    write_folder(tmp_path, {"embed.weight": table, **under("head", gptq(MADE))}, GPTQ)
    model = Tied()
    fxint4.load_(model, tmp_path)
    assert torch.equal(model.embed.weight, table)
    assert isinstance(model.head.weight, Int4TileTensor)
    write_folder(tmp_path, under("head", gptq(MADE)), GPTQ)
    with pytest.raises(CheckpointError, match=r"embed\.weight is a parameter of Embedding"):
        fxint4.load_(Tied(), tmp_path)


@dataclass(frozen=True)
class Llama:
    """A tiny loaded model of transformers, and the model to compare it with.

    model: the loaded one, in bf16.
    ids: what goes in.
    expected: the logits of float64 with the weights that the formats define.
    bound: on the relative error of logits.
    """

    model: nn.Module
    ids: Tensor
    expected: Tensor
    bound: float


def llama(write: Callable[[Quantized], Tensors], folder: Path) -> Llama:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    make = transformers.AutoModelForCausalLM.from_config
    torch.manual_seed(0)
    exact = make(config, dtype=torch.float64).eval()
    tensors: Tensors = {}
    with torch.no_grad():
        for seed, (name, module) in enumerate(exact.named_modules()):
            if name == "lm_head" or getattr(module, "weight", None) is None:
                continue
            if isinstance(module, nn.Linear):
                made = quantized(*module.weight.shape, 32, seed=seed, exact=True)
                module.weight.copy_(made.weight)
                tensors.update(under(name, write(made)))
            else:
                tensors[f"{name}.weight"] = module.weight.bfloat16()
                module.weight.copy_(tensors[f"{name}.weight"])
    write_folder(folder, tensors, {"quant_method": "gptq"} if write is gptq else None)

    with torch.device("meta"):
        model = make(config, dtype=torch.bfloat16).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    report = fxint4.load_(model, folder)
    assert report.totals["packed"] == 7
    assert model.lm_head.weight is model.model.embed_tokens.weight

    ids = torch.randint(5, 99, (2, 20), generator=torch.Generator().manual_seed(0))
    near = make(config, dtype=torch.bfloat16).eval()
    near.load_state_dict(exact.state_dict())
    with torch.no_grad():
        expected = exact(ids).logits
        # Twice the roundings of eager in bf16 at most: tests/test_architectures.py says why.
        bound = 2 * relative_error(near(ids).logits, expected)
    return Llama(model, ids, expected, bound)


@pytest.mark.parametrize("write", [gptq, awq, compressed])
def test_a_model_of_transformers(write: Callable[[Quantized], Tensors], tmp_path: Path) -> None:
    case = llama(write, tmp_path)
    with torch.no_grad():
        assert relative_error(case.model(case.ids).logits, case.expected) <= case.bound


@pytest.mark.compiles
def test_a_model_of_transformers_compiled(tmp_path: Path) -> None:
    case = llama(gptq, tmp_path)
    # The head is in the file as the embedding only: it stays as it is.
    fast = torch.compile(case.model, backend="int4tile", options={"skip": "lm_head"})
    with torch.no_grad():
        assert relative_error(fast(case.ids).logits, case.expected) <= case.bound
    report = fxint4.last_report()
    assert report.totals["packed"] == 7
