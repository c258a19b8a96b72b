"""Held against torchao's Int4TilePackedTo4dTensor on the GPU, where torchao is installed.

`pip install 'fxint4[torchao]'`. Where its numbers are right ours are the same.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support import assert_within, rounding_bound
from torch import Tensor, nn
from torch.nn import functional as F

from fxint4 import Int4TileTensor

pytestmark = pytest.mark.gpu

SHAPES = [(256, 1024), (264, 2048), (100, 1024), (256, 768), (72, 1600)]


@pytest.fixture(scope="module")
def theirs() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        quantization = pytest.importorskip(
            "torchao.quantization", reason="compares with torchao (fxint4[torchao])"
        )
    return quantization.Int4TilePackedTo4dTensor


def both(theirs: Any, n: int, k: int, group: int) -> tuple[Any, Int4TileTensor]:
    """torchao's tensor of a random weight, and ours of the codes and parameters it chose."""
    torch.manual_seed(0)
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    packed = theirs.from_hp(weight, [1, group])
    codes, scale, zero = plain_of(packed)
    ours = Int4TileTensor.from_plain(codes, scale, zero, group_size=group, shape=(n, k))
    return packed, ours


def plain_of(packed: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and parameters of torchao's tensor, by its own op: row i of the identity picks k = i.

    With a scale of 1 and a zero of 0 for every group the op gives code - 8, exactly.
    """
    n, k = 8 * packed.qdata.shape[0], 128 * packed.qdata.shape[1]
    group = packed.block_size[-1]
    unit = torch.zeros(k // group, n, 2, device="cuda", dtype=torch.bfloat16)
    unit[..., 0] = 1
    identity = torch.eye(k, device="cuda", dtype=torch.bfloat16)
    codes = torch.ops.aten._weight_int4pack_mm(identity, packed.qdata, group, unit).t() + 8
    scale, zero = packed.scale_and_zero.unbind(-1)
    return codes.to(torch.uint8).contiguous(), scale.t(), zero.t()


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_same_tiles_for_the_same_codes(theirs: Any, n: int, k: int, group: int) -> None:
    packed, ours = both(theirs, n, k, group)
    assert ours.shape == packed.shape == (n, k)
    assert torch.equal(ours.tiles, packed.qdata)
    assert torch.equal(ours.scale_and_zero, packed.scale_and_zero)
    taken = Int4TileTensor.from_tiles(packed.qdata, packed.scale_and_zero, (n, k))
    for have, want in zip(taken.get_plain(), ours.get_plain(), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_same_linear(theirs: Any, n: int, k: int) -> None:
    packed, ours = both(theirs, n, k, 128)
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    for rows in [(1,), (2, 3), (40,), (0,)]:
        x = torch.randn(*rows, k, device="cuda", dtype=torch.bfloat16)
        for b in (None, bias):
            y = F.linear(x, ours, b)
            assert y.shape == (*rows, n)
            if x.numel():  # of an empty x torchao returns K columns
                assert torch.equal(y, F.linear(x, packed, b))


def test_slices_where_its_are_right_and_where_they_are_not(theirs: Any) -> None:
    n, k = 256, 768  # padded to 1024
    packed, ours = both(theirs, n, k, 128)
    x = torch.randn(5, k, device="cuda", dtype=torch.bfloat16)
    top = packed[:128]
    parameters = top.scale_and_zero.contiguous()  # without which its linear refuses
    top = theirs(top.qdata, parameters, top.block_size, top.shape)
    assert torch.equal(F.linear(x, ours[:128]), F.linear(x, top))
    weight = ours.dequantize(torch.float64)
    for start, stop in [(0, 384), (384, 768), (100, 333)]:
        part = ours[:, start:stop]
        assert torch.equal(part.dequantize(torch.float64), weight[:, start:stop])
        y = F.linear(x[:, start:stop], part)
        exact = weight[:, start:stop]
        expected = x[:, start:stop].double() @ exact.T
        assert_within(y, expected, rounding_bound(x[:, start:stop], exact))
    assert packed[:, :384].qdata.shape[1] * 128 != 384  # columns of someone else's


def test_codes_chosen_in_fp32_are_nearer_than_its(theirs: Any) -> None:
    """Ours are chosen against the stored scale and zero."""
    torch.manual_seed(0)
    layer = nn.Linear(1024, 512, bias=False, device="cuda", dtype=torch.bfloat16)
    weight = layer.weight.detach()
    packed = theirs.from_hp(weight, [1, 128])
    codes, scale, zero = plain_of(packed)
    of_torchao = Int4TileTensor.from_plain(codes, scale, zero, group_size=128)
    ours = Int4TileTensor.from_float(weight)
    errors = [
        (made.dequantize(torch.float64) - weight.double()).norm() for made in (ours, of_torchao)
    ]
    assert errors[0] < errors[1]
