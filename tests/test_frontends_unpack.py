"""`fxint4.dequantize_`: packed weights become plain parameters again."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxint4
from fxint4 import FoldError, Int4TileTensor, OptionError
from fxint4.quant.statistics import Statistics

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class Tied(nn.Module):
    """Two layers that share one weight, a 1x1 convolution, an attention and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64, bias=False)
        self.second.weight = self.first.weight
        self.conv = nn.Conv1d(64, 40, 1)
        self.attention = nn.MultiheadAttention(64, 4)
        self.odd = nn.Linear(100, 36)
        self.experts = nn.Parameter(torch.randn(3, 64, 48))
        self.norm = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(self.norm(x)))
        return torch.bmm(y.expand(3, *y.shape), self.experts).sum() + self.conv(y.T).sum()


@pytest.mark.parametrize("asked", [None, *DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_packed_weight_becomes_its_dequantized_values(
    dtype: torch.dtype, asked: torch.dtype | None
) -> None:
    model = Tied().to(dtype).eval()
    names = [name for name, _ in model.named_parameters()]
    kept = {name: value for name, value in model.named_parameters() if value.ndim == 1}
    fxint4.pack_(model, options={"group_size": 32})
    packed = {
        name: value for name, value in model.named_parameters() if isinstance(value, Int4TileTensor)
    }
    assert {f"{name}.weight" for name in ("first", "conv", "odd")} <= packed.keys()
    assert fxint4.dequantize_(model, asked) is None
    plain = dict(model.named_parameters())
    assert list(plain) == names
    for name, old in packed.items():
        new = plain[name]
        assert type(new) is nn.Parameter
        assert (new.requires_grad, new.device, new.shape) == (False, old.device, old.shape)
        # The values in float64, from codes, scales and zeros, rounded once.
        assert new.dtype == (asked or dtype)
        torch.testing.assert_close(new, old.dequantize(asked or dtype), rtol=0, atol=0)
    assert all(plain[name] is value for name, value in kept.items())
    assert model.second.weight is model.first.weight
    assert not model.second.weight.is_meta


def test_values_are_those_of_codes_scales_and_zeros() -> None:
    model = nn.Sequential(nn.Linear(128, 40)).eval()
    fxint4.pack_(model, options={"group_size": 32})
    codes, scale, zero = (part.double() for part in model[0].weight.get_plain())
    fxint4.dequantize_(model, torch.float64)
    expected = (codes - 8) * scale.repeat_interleave(32, 1) + zero.repeat_interleave(32, 1)
    # Computed in fp32: one rounding of the product, one of the sum.
    torch.testing.assert_close(model[0].weight.data, expected, rtol=2.0**-22, atol=2.0**-22)


def test_a_pre_scale_and_experts_are_undone_too() -> None:
    model = Tied().eval()
    statistics = Statistics(torch.eye(64), torch.ones(64), torch.tensor(9), torch.rand(64) + 0.5)
    options: dict[str, Any] = {"method": "awq", "group_size": 32}
    options["calibration"] = fxint4.Calibration({"first.weight": statistics})
    original = model.first.weight.detach().clone()
    fxint4.pack_(model, (torch.randn(8, 64),), options)
    assert isinstance(model.experts, Int4TileTensor)
    assert model.first.weight.pre_scale is not None
    fxint4.dequantize_(model)
    assert type(model.experts) is nn.Parameter
    assert ((model.first.weight - original).norm() / original.norm()) < 0.2


def test_the_model_runs_and_can_be_packed_again() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    x = torch.randn(4, 64)
    fxint4.pack_(model)
    twin = copy.deepcopy(model)
    fxint4.dequantize_(model)
    fxint4.dequantize_(model)  # nothing is left to do
    with torch.no_grad():
        y = twin(x)
        assert (model(x) - y).norm() / y.norm() < 2.0**-6  # packed weights multiply in bf16
        model[0].weight += 1
        fxint4.pack_(model)
    assert isinstance(model[0].weight, Int4TileTensor)


def test_packed_weights_are_freed() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).eval()
    fxint4.pack_(model)
    packed = [weakref.ref(layer.weight) for layer in model]
    fxint4.dequantize_(model)
    gc.collect()
    assert [ref() for ref in packed] == [None] * 3


def test_bad_input_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    fxint4.pack_(model)
    for bad in (torch.int8, torch.complex64, "bfloat16"):
        with pytest.raises(OptionError, match="it takes a floating dtype"):
            fxint4.dequantize_(model, bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got a Int4TileTensor, need the nn.Module to dequantize"):
        fxint4.dequantize_(model[0].weight)
    assert isinstance(model[0].weight, Int4TileTensor)


def test_a_weight_that_fails_is_named_and_the_rest_stays_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96), nn.Linear(96, 64))
    fxint4.pack_(model)
    dequantize = Int4TileTensor.dequantize

    def out_of_memory(weight: Int4TileTensor, dtype: torch.dtype | None = None) -> Tensor:
        if weight.shape == (96, 64):
            raise torch.OutOfMemoryError("too large")
        return dequantize(weight, dtype)

    monkeypatch.setattr(Int4TileTensor, "dequantize", out_of_memory)
    with pytest.raises(FoldError, match=r"could not dequantize 1\.weight \(96, 64\): OutOfMemory"):
        fxint4.dequantize_(model)
    assert [type(layer.weight) for layer in model] == [nn.Parameter, *[Int4TileTensor] * 2]


def test_what_can_not_be_done_with_a_packed_weight_names_it() -> None:
    model = nn.Linear(64, 64)
    fxint4.pack_(model)
    message = r"write to the weight\. Where it does, call fxint4\.dequantize_\(model\) first"
    with torch.no_grad(), pytest.raises(fxint4.UnsupportedOpError, match=message):
        model.weight *= torch.ones(64, 64)
