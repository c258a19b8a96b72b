"""Writing to packed weights as code does that merges adapters; arithmetic that dequantizes."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxint4
from fxint4 import Int4Config, Int4TileTensor, RequantizedWarning, UnsupportedOpError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
METHODS = ("rtn", "mse", "hqq")


def weight_of(*shape: int, method: str = "rtn", dtype: torch.dtype = torch.float32) -> Any:
    config = Int4Config(group_size=32, method=method)
    return Int4TileTensor.from_float(torch.randn(shape).to(dtype), config)


def again(values: Tensor, method: str = "rtn", dtype: torch.dtype = torch.float32) -> Tensor:
    """Values that were quantized, as the weight they are written to."""
    packed = Int4TileTensor.from_float(values.float(), Int4Config(group_size=32, method=method))
    return packed.dequantize(dtype)


# --- sums in place -------------------------------------------------------------------------------

WRITES: dict[str, tuple[Callable[[Any, Tensor], Any], float]] = {
    # name: what is written how, and the factor of the other operand
    "add": (lambda w, d: w.add_(d), 1),
    "add-scaled": (lambda w, d: w.add_(d, alpha=-0.5), -0.5),
    "sub": (lambda w, d: w.sub_(d), -1),
    "sub-scaled": (lambda w, d: w.sub_(d, alpha=2), -2),
    "operator": (lambda w, d: w.__iadd__(d), 1),
    "data": (lambda w, d: w.data.__iadd__(d), 1),
    "assigned": (lambda w, d: setattr(w, "data", w.data + d), 1),
    "cloned": (lambda w, d: setattr(w, "data", w.data.clone().__iadd__(d)), 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("write", WRITES)
def test_sums_are_quantized_by_the_method_and_group_of_the_weight(
    write: str, method: str, dtype: torch.dtype
) -> None:
    function, factor = WRITES[write]
    weight = nn.Parameter(weight_of(20, 100, method=method, dtype=dtype), requires_grad=False)
    delta = (torch.randn(20, 100) / 8).to(dtype).requires_grad_()
    wanted = weight.dequantize(torch.float32) + factor * delta.detach().float()
    if write == "assigned":
        wanted = (weight.dequantize() + delta.detach()).float()
    with pytest.warns(RequantizedWarning) as caught, torch.no_grad():
        function(weight, delta)
    assert torch.equal(weight.dequantize(torch.float32), again(wanted, method))
    assert (weight.dtype, weight.group_size, weight.method) == (dtype, 32, method)
    [warning] = caught
    error = (weight.dequantize(torch.float32) - wanted).norm() / wanted.norm()
    assert re.search(
        rf"relative error of {float(error):.0%}, by method {method}\. ", str(warning.message)
    )
    assert "call fxint4.dequantize_(model) first, or merge before pack_" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.mT,
        lambda w: w[1],
        lambda w: w[:, 8:16],
        lambda w: w[1:, :, 128:],
        lambda w: w[2][:, None],
        lambda w: w.unsqueeze(-1),
    ],
)
def test_sums_are_written_to_views(view: Any) -> None:
    weight, summed = weight_of(3, 24, 256), torch.zeros(3, 24, 256)
    wanted = weight.dequantize()
    part = view(weight)
    delta = torch.randn(part.shape) / 8
    view(summed.copy_(wanted)).add_(delta)
    with pytest.warns(RequantizedWarning):
        part.add_(delta)
    # What lies beside the view keeps its codes: to quantize values again may move a scale by a bit.
    view(wanted).copy_(view(again(summed)))
    assert torch.equal(weight.dequantize(), wanted)


def test_the_sum_of_two_packed_weights() -> None:
    one, other = weight_of(20, 100), weight_of(20, 100)
    wanted = one.dequantize() + other.dequantize()
    with pytest.warns(RequantizedWarning):
        one += other
    assert torch.equal(one.dequantize(), again(wanted))


def test_a_pre_scale_stays() -> None:
    factors = torch.rand(100) + 0.5
    weight = Int4TileTensor.from_plain(
        *weight_of(20, 100).get_plain(), group_size=32, dtype=torch.float32, pre_scale=factors
    )
    delta = torch.randn(20, 100) / 8
    wanted = weight.dequantize() + delta
    with pytest.warns(RequantizedWarning, match="by method mse"):
        weight += delta
    assert torch.equal(weight.plain_pre_scale, factors)
    assert torch.equal(weight.dequantize(), again(wanted / factors, "mse") * factors)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        (
            lambda w: torch.cat([w[:, :40], w[:, 60:]], 1),
            lambda w: torch.zeros_like(w.dequantize()),
        ),
        (lambda w: w[:13], lambda w: torch.zeros(13, 100)),  # the tile has three more rows
        (lambda w: w, lambda w: torch.full((20, 100), torch.nan)),
        (lambda w: w, lambda w: torch.zeros(20, 1)),
        (lambda w: w, lambda w: torch.ones(20, 100, dtype=torch.int32)),
        (lambda w: w, lambda w: 1.0),
    ],
    ids=["columns apart", "edge of a tile", "nan", "broadcast", "integers", "number"],
)
def test_what_can_not_be_added_changes_nothing(part: Any, change: Any) -> None:
    weight = weight_of(20, 100)
    before = weight.dequantize()
    target = part(weight)
    values = target.dequantize()
    delta = change(target)
    with pytest.raises((UnsupportedOpError, ValueError)) as caught:
        target += delta
    if not (isinstance(delta, Tensor) and delta.isnan().any()):
        assert "fxint4.dequantize_(model) first" in str(caught.value)
        assert "merge before pack_" in str(caught.value)
    assert torch.equal(target.dequantize(), values)
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("method", ["gptq", "awq", "gptq+awq", None])
def test_methods_that_need_statistics_give_way(method: str | None) -> None:
    weight = weight_of(20, 100)
    weight.method = method
    delta = torch.randn(20, 100) / 8
    wanted = weight.dequantize() + delta
    remark = (
        "" if method is None else rf" \(there are no statistics any more for {re.escape(method)}"
    )
    with pytest.warns(RequantizedWarning, match=f"by method mse{remark}"):
        weight += delta
    assert torch.equal(weight.dequantize(), again(wanted, "mse"))


def test_python_shows_the_warning_once_for_many_weights() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(20):
            weight = weight_of(256, 256)
            weight += torch.randn(256, 256) / 8
    assert 1 <= len(caught) <= 2  # the percentage may be rounded to two numbers


@pytest.mark.parametrize("method", METHODS)
def test_copies_keep_the_method(method: str) -> None:
    weight = weight_of(3, 24, 128, method=method)
    linear = nn.Linear(128, 24, bias=False)
    linear.weight = nn.Parameter(weight[1], requires_grad=False)
    copies = [
        weight.data,
        weight.clone(),
        weight.to(torch.bfloat16),
        weight[1, 8:],
        nn.Parameter(weight),
        copy.deepcopy(nn.Parameter(weight)),
        linear.weight,
        copy.deepcopy(linear).half().weight,
        linear.state_dict()["weight"],
        weight_of(3, 24, 128).copy_(weight),
    ]
    assert [each.method for each in copies] == [method] * len(copies)
    new = torch.randn(3, 24, 128)
    assert torch.equal(weight.copy_(new).dequantize(), again(new, method))


def test_files_do_not_hold_the_method() -> None:
    weight = weight_of(20, 100, method="hqq")
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded.method is None
    new = torch.randn(20, 100)
    assert torch.equal(loaded.copy_(new).dequantize(), again(new, "mse"))


def test_pack_records_the_method(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    fxint4.pack_(model, options={"overrides": {"1": {"method": "hqq"}}})
    assert [layer.weight.method for layer in model] == ["rtn", "hqq"]


def test_ops_that_read_the_weight_see_the_sum() -> None:
    """What the CPU's op reads is made anew."""
    weight = weight_of(32, 64)
    x = torch.eye(64)
    before = nn.functional.linear(x, weight)
    with pytest.warns(RequantizedWarning):
        weight += torch.ones(32, 64)
    after = nn.functional.linear(x, weight)
    assert (after - before - 1).abs().max() < 0.3


# --- arithmetic that dequantizes -----------------------------------------------------------------


def test_operands_of_as_many_axes() -> None:
    weight, other = weight_of(20, 100), weight_of(20, 100)
    dense, x = weight.dequantize(), torch.randn(20, 100)
    pairs = ((weight, x), (x, weight), (weight, other), (weight.t(), x.t()), (weight, x[:1]))
    for op in (torch.add, torch.sub, torch.mul, torch.div, torch.eq):
        for left, right in pairs:
            plain = [
                each.dequantize() if isinstance(each, Int4TileTensor) else each
                for each in (left, right)
            ]
            torch.testing.assert_close(op(left, right), op(*plain), rtol=0, atol=0, equal_nan=True)
        for wrong in (1.0, x[0], torch.tensor(1.0)):
            with pytest.raises(UnsupportedOpError):
                op(weight, wrong)
    assert torch.equal(torch.sub(x, weight, alpha=2), x - 2 * dense)
    half = weight.half()
    assert (half + x).dtype == torch.float32


def test_sums_of_a_weight_and_a_product() -> None:
    weight, experts = weight_of(20, 100), weight_of(3, 20, 100)
    left, right = torch.randn(20, 4), torch.randn(4, 100)
    y = torch.addmm(weight, left, right, beta=0.5, alpha=2)
    assert torch.equal(y, torch.addmm(weight.dequantize(), left, right, beta=0.5, alpha=2))
    lefts, rights = left.expand(3, -1, -1), right.expand(3, -1, -1)
    y = torch.baddbmm(experts, lefts, rights, alpha=2)
    assert torch.equal(y, torch.baddbmm(experts.dequantize(), lefts, rights, alpha=2))


def test_isfinite() -> None:
    weight = weight_of(20, 100)
    assert torch.isfinite(weight).all()
    weight.scale_and_zero[0, 3, 1] = torch.nan
    found = torch.isfinite(weight)
    assert found.shape == (20, 100)
    assert not found[3, :32].any()
    assert found.sum() == 19 * 100 + 68


def test_decompositions() -> None:
    weight = weight_of(20, 100)
    dense = weight.dequantize()
    for function in (
        lambda w: torch.linalg.svd(w, full_matrices=False),
        lambda w: torch.linalg.svdvals(w),
        lambda w: torch.linalg.qr(w),
        lambda w: torch.linalg.qr(w.t()),
    ):
        made, expected = function(weight), function(dense)
        if isinstance(made, Tensor):
            made, expected = (made,), (expected,)
        for one, other in zip(made, expected, strict=True):
            assert type(one) is Tensor
            torch.testing.assert_close(one, other)
