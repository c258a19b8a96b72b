"""Checkpoints of other libraries: written here from the definitions of their formats, and loaded.

A writer takes codes, scales and zero points, and packs them as its format says, in numpy and without
anything of the reader. What comes out is held to `(code - zero_point) * scale` in float64.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import assert_within, peak_bytes, rounding_bound
from torch import Tensor, nn
from torch.nn import functional as F

import fxint4
from fxint4 import CheckpointError, Int4TileTensor

pytest.importorskip("safetensors")

BF16 = 2.0**-8
"""Most that rounding to bf16 changes a number, as a share of it."""
FP32 = 2.0**-24

Tensors = dict[str, Tensor]


# --- what is quantised ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantised:
    """A quantised weight, before any format packs it.

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
        """Most that rounding to bf16 moves each weight.

        What is stored is s' = s (1 + a) and z' = (8 - zp) s' (1 + b), |a| and |b| <= 2^-8. So
        (code - 8) s' + z' is off by (code - zp) s a + (8 - zp) s' b.
        """
        own = (self.codes - self.zero_points).abs() + (1 + BF16) * (8 - self.zero_points).abs()
        return BF16 * own * self.scales


def quantised(
    n: int,
    k: int,
    group_size: int,
    *,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Quantised:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // group_size)
    scale = (torch.rand(n, groups, generator=generator) * 0.05 + 0.005).to(dtype)
    zero_point = torch.randint(1, 16, (n, groups), generator=generator)
    if symmetric:
        zero_point.fill_(8)
    codes = torch.randint(0, 16, (n, k), generator=generator)
    return Quantised(codes, scale, zero_point, torch.arange(k) // group_size)


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


def gptq(made: Quantised, *, version: int = 1) -> Tensors:
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


def awq(made: Quantised) -> Tensors:
    """qweight [K, N/8], qzeros [groups, N/8], scales [groups, N]."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": in_words(made.codes.T.contiguous(), order),
        "qzeros": in_words(made.zero_point.T.contiguous(), order),
        "scales": made.scale.T.contiguous(),
    }


def compressed(made: Quantised, *, early: bool = False) -> Tensors:
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
    """One way to write a layer, and what its config says."""

    write: Callable[[Quantised], Tensors]
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
    "gptq, groups of 32": Case(gptq, {**GPTQ, "group_size": 32}, 32, stored_group=32),
    "gptq, groups of 96": Case(gptq, {**GPTQ, "group_size": 96}, 96, k=384, stored_group=32),
    "gptq, one group": Case(gptq, {**GPTQ, "group_size": -1}, 512, stored_group=256),
    "gptq, last group short": Case(gptq, GPTQ, k=1000),
    "gptq, fp32 scales": Case(gptq, GPTQ, dtype=torch.float32),
    "awq": Case(awq, AWQ),
    "awq, bf16 scales": Case(awq, AWQ, dtype=torch.bfloat16),
    "awq, groups of 64": Case(awq, {**AWQ, "group_size": 64}, 64, stored_group=64),
    "awq, one group": Case(awq, {**AWQ, "group_size": -1}, 576, k=576, stored_group=64),
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
        {name: tensor.contiguous() for name, tensor in tensors.items()},
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
    """One layer to be quantised and one that stays, a parameter and a buffer."""

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


def write_layer(folder: Path, case: Case, *, with_config: bool = True) -> Quantised:
    made = quantised(case.n, case.k, case.group_size, symmetric=case.symmetric, dtype=case.dtype)
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


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed", "compressed, symmetric"])
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
    other = Layer(case.n, case.k)
    fxint4.load_(other, tmp_path)  # as v1, so that zero points are one off
    assert not torch.equal(other.fc.weight, model.fc.weight)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_the_quantisers_own_config_is_read(name: str, tmp_path: Path) -> None:
    case = CASES["awq, groups of 64"]
    write_layer(tmp_path, case, with_config=False)
    (tmp_path / name).write_text(json.dumps({"w_bit": 3, "q_group_size": 64, "version": "GEMM"}))
    with pytest.raises(CheckpointError, match="AWQ of 3 bits"):
        fxint4.load_(Layer(case.n, case.k), tmp_path)


def test_zero_points_of_zero_that_borrowed(tmp_path: Path) -> None:
    made = quantised(48, 512, 128)
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
    made = quantised(48, 512, 128)
    write_folder(tmp_path, {**under("0", gptq(made)), "0.bias": torch.zeros(48)}, GPTQ)
    model = nn.Sequential(utils.Conv1D(48, 512))  # its weight is [K, N]
    fxint4.load_(model, tmp_path)
    assert isinstance(model[0].weight, Int4TileTensor)
    assert_within(model[0].weight.dequantize(torch.float32), made.weight.T, made.bound.T + 2 * FP32)


# --- the order of activations --------------------------------------------------------------------


def reordered(made: Quantised, group_of: Tensor) -> Quantised:
    return replace(made, group_of=group_of)


def test_groups_in_another_order_are_exact(tmp_path: Path) -> None:
    order = torch.tensor([2, 0, 3, 1])
    made = reordered(quantised(48, 512, 128), order.repeat_interleave(128))
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
    write: Callable[[Quantised], Tensors], config: Any, index: str, tmp_path: Path
) -> None:
    mixed = torch.randperm(512, generator=torch.Generator().manual_seed(0)) // 128
    made = reordered(quantised(48, 512, 128), mixed)
    tensors = {**write(made), index: mixed.to(torch.int32)}
    write_folder(tmp_path, under("layers.0.fc", tensors), config)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(512, 48)})])})
    model["layers"][0]["fc"].bias = None
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc .*desc_act=False, or with static"):
        fxint4.load_(model, tmp_path)


def test_an_order_that_is_not_in_use(tmp_path: Path) -> None:
    tensors = compressed(quantised(48, 512, 128))
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
    """What torchao makes of a weight: K is padded to 1024, and the pad quantised with the rest."""
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
        **{name: '{"_type": "Tensor"}' for name in plain_tensors(48)},
        "tensor_names": json.dumps(["fc.weight", *plain_tensors(48)]),
    }
    write_folder(tmp_path, {**under("fc", tensors), **plain_tensors(48)}, metadata=header)
    model = Layer(48, 500)
    fxint4.load_(model, tmp_path)
    assert torch.equal(model.fc.weight.tiles, weight.tiles)
    assert torch.equal(model.fc.weight.scale_and_zero, weight.scale_and_zero)
    assert torch.equal(model.fc.weight.dequantize(), weight.dequantize())


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
        ({"_weight_act_pre_scale": torch.ones(500)}, "act_pre_scale"),
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
