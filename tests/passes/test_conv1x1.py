"""1x1 convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    Case,
    assert_rounded,
    check_rewritten,
    compile_and_report,
    int4_matmuls,
    kept,
    module,
)
from torch import Tensor, nn

import fxint4
from fxint4.passes import find as finding

pytestmark = [pytest.mark.compiles, pytest.mark.by_aten]

N, K = 50, 72  # N and K are both padded
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def case(
    name: str,
    dims: int,
    shape: tuple[int, ...],
    last: str = "",
    **kwargs: Any,
) -> Case:
    """One convolution.

    Args:
        name: of the case.
        dims: of the positions.
        shape: of the input.
        last: of "x" and "w", what is in channels_last format.
        **kwargs: of the module.
    """

    def model() -> nn.Module:
        made = CONVS[dims](K, N, 1, **kwargs).eval()
        return made.to(memory_format=LAST[dims]) if "w" in last else made

    def inputs() -> tuple[Tensor]:
        x = torch.randn(shape)
        return (x.to(memory_format=LAST[dims]) if "x" in last else x,)

    return Case(f"conv1x1-{name}", model, inputs, {"weight": "NK1"}, ("convolution",))


CASES = [
    case("1d", 1, (2, K, 3)),
    case("1d-no-bias", 1, (2, K, 3), bias=False),
    case("2d", 2, (1, K, 3, 2)),
    case("2d-batch", 2, (2, K, 1, 3)),
    case("2d-channels-last", 2, (2, K, 2, 2), last="xw"),
    case("2d-channels-last-input", 2, (2, K, 2, 2), last="x"),
    case("2d-channels-last-weight", 2, (2, K, 2, 2), last="w"),
    case("2d-unbatched", 2, (K, 2, 3)),
    case("3d", 3, (2, K, 1, 3, 2)),
    case("1d-unbatched", 1, (K, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rewritten(case: Case, golden: Callable[[str, str], None]) -> None:
    golden(case.name, check_rewritten(case).graph_diff)


def test_a_3d_convolution_in_channels_last_format() -> None:
    """No golden diff: its strides depend on how many threads torch has."""
    check_rewritten(case("3d-channels-last", 3, (2, K, 1, 3, 2), last="xw", bias=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rewritten_in_other_dtypes(dtype: torch.dtype) -> None:
    check_rewritten(CASES[2], dtype)
    check_rewritten(CASES[4], dtype)


def test_dynamic_sizes_cross_from_int4_to_dense_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "most_int4_rows", lambda *_: 12)
    model = nn.Conv2d(K, N, 1).bfloat16().eval()
    compiled = torch.compile(model, backend="int4tile", dynamic=True, fullgraph=True)
    for shape in ((2, K, 2, 2), (2, K, 3, 5), (3, K, 2, 2)):
        x = torch.randn(shape).bfloat16()
        with torch.no_grad():
            y = compiled(x)
            assert y.stride() == model(x).stride()
        report = fxint4.last_report()
        assert_rounded(y, model, [x], report, {"weight": "NK1"})


def test_a_stack_of_convolutions_and_batch_norms() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)
    ).eval()
    x = torch.randn(1, 64, 2, 2)
    _, report = compile_and_report(model, x)
    assert [(r.name, r.action, r.reason[:28]) for r in report.records] == [
        ("0", "packed", "activations cast from float3"),
        ("3", "kept", "a convolution with kernel 3x"),
    ]
    assert int4_matmuls(report) == 1


# --- left alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(64, 64, 3), "a convolution with kernel 3x3 (only 1x1 is packed)"),
        (nn.Conv2d(64, 64, (1, 3)), "a convolution with kernel 1x3 (only 1x1 is packed)"),
        (nn.Conv2d(64, 64, 1, stride=2), "a convolution with stride [2, 2] (only 1 is packed)"),
        (nn.Conv2d(64, 64, 1, groups=2), "a convolution with 2 groups (only 1 is packed)"),
        (nn.Conv2d(64, 64, 1, padding=1), "a padded or transposed convolution"),
        (nn.ConvTranspose2d(64, 64, 1), "a padded or transposed convolution"),
        (nn.Conv2d(64, 24, 1), "24x64 is small: min_features is 32"),
        (
            nn.Conv2d(64, 64, 1).double(),
            "weights of dtype torch.float64 (bfloat16, float16 and float32 are packed)",
        ),
    ],
    ids=["3x3", "1x3", "stride", "groups", "padding", "transposed", "small", "float64"],
)
def test_refused(conv: nn.Module, reason: str) -> None:
    x = torch.randn(2, 64, 5, 5, dtype=next(conv.parameters()).dtype)
    assert kept(conv.eval(), x) == [("weight", reason)]


def test_refused_for_a_kernel_in_one_and_three_dimensions() -> None:
    x = torch.randn(2, 64, 5)
    assert kept(nn.Conv1d(64, 64, 5).eval(), x) == [
        ("weight", "a convolution with kernel 5 (only 1x1 is packed)")
    ]
    assert kept(nn.Conv3d(64, 64, (2, 1, 1)).eval(), torch.randn(1, 64, 2, 2, 2)) == [
        ("weight", "a convolution with kernel 2x1x1 (only 1x1 is packed)")
    ]


def test_a_kernel_that_varies_is_no_weight() -> None:
    model = module(lambda m, x, w: torch.conv2d(x, w))
    assert kept(model, torch.randn(1, 64, 2, 2), torch.randn(64, 64, 1, 1)) == []
