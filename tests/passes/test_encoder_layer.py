"""nn.TransformerEncoderLayer in eval mode, whose fast path is one opaque op."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    assert_nearer,
    assert_within,
    compile_and_report,
    int4_matmuls,
    kept,
    propagated,
    reference_model,
    slow_path,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxint4.passes.encoder_layer import DECOMPOSITIONS

pytestmark = [pytest.mark.compiles, pytest.mark.by_aten]

B, L, D, FF, HEADS = 2, 3, 40, 56, 2  # N and K of every weight are padded
OP = torch.ops.aten._transformer_encoder_layer_fwd.default
RECORDS = [
    ("self_attn.in_proj_weight", 3 * D, D, "packed"),
    ("self_attn.out_proj", D, D, "packed"),
    ("linear1", FF, D, "packed"),
    ("linear2", D, FF, "packed"),
]
WEIGHTS = {
    "self_attn.in_proj_weight": "NK",
    "self_attn.out_proj.weight": "NK",
    "linear1.weight": "NK",
    "linear2.weight": "NK",
}

PADDING = torch.tensor([[False, False, True], [False, True, True]])
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "padding": {"src_key_padding_mask": PADDING},
    "causal": {"src_mask": CAUSAL},
    "both": {"src_mask": CAUSAL, "src_key_padding_mask": PADDING},
    "by head": {"src_mask": torch.stack([CAUSAL, CAUSAL.T] * B)},
    "float causal": {"src_mask": torch.zeros(L, L).masked_fill(CAUSAL, float("-inf"))},
    "added": {"src_mask": torch.linspace(-2, 2, L * L).view(L, L)},
    "added and padding": {
        "src_mask": torch.linspace(-2, 2, L * L).view(L, L),
        "src_key_padding_mask": torch.zeros(B, L).masked_fill(PADDING, float("-inf")),
    },
}


def layer(norm_first: bool, activation: str) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    made = nn.TransformerEncoderLayer(
        D, HEADS, FF, activation=activation, norm_first=norm_first, batch_first=True
    )
    for parameter in made.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return made.eval()


def wide(mask: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: m.double() if m.is_floating_point() else m for key, m in mask.items()}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_decomposition_is_the_slow_path(
    mask: dict[str, Tensor], norm_first: bool, activation: str
) -> None:
    model, x = layer(norm_first, activation).double(), torch.randn(B, L, D, dtype=torch.float64)
    ours = []

    class TakeApart(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is OP:
                ours.append(DECOMPOSITIONS[OP](*args, **(kwargs or {})))
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        with TakeApart():
            model(x, **wide(mask))
        with slow_path():
            expected = model(x, **wide(mask))
    torch.testing.assert_close(ours, [expected])


@pytest.mark.parametrize(
    ("norm_first", "activation", "mask"),
    [
        (False, "relu", "none"),
        (True, "gelu", "padding"),
        (False, "gelu", "both"),
        (True, "relu", "added"),
    ],
)
def test_rewritten(
    norm_first: bool,
    activation: str,
    mask: str,
    golden: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = layer(norm_first, activation), torch.randn(B, L, D)
    y, report = compile_and_report(model, x, **MASKS[mask])
    assert [(r.name, r.n, r.k, r.action) for r in report.records] == RECORDS
    assert int4_matmuls(report) == 4
    assert "_transformer_encoder_layer_fwd" not in report.graph_diff
    with torch.no_grad():
        assert y.stride() == model(x).stride()
    reference = functools.partial(reference_model(model, report, WEIGHTS), **wide(MASKS[mask]))
    expected, bound = propagated(reference, [x.double()], monkeypatch)
    assert_within(y, expected, bound)
    with slow_path(), torch.no_grad():
        assert_nearer(y, expected, model.double()(x.double(), **wide(MASKS[mask])))
    if mask in ("none", "padding"):
        golden(f"encoder_layer-{'pre' if norm_first else 'post'}-norm", report.graph_diff)


def test_a_row_that_sees_nothing_is_what_the_slow_path_gives() -> None:
    model, x = layer(False, "relu"), torch.randn(B, L, D)
    padding = torch.tensor([[False, False, True], [True, True, True]])
    y, _ = compile_and_report(model, x, options={"skip": ["*"]}, src_key_padding_mask=padding)
    with slow_path(), torch.no_grad():
        torch.testing.assert_close(y, model(x, src_key_padding_mask=padding))


def test_a_stack_of_layers_in_bf16() -> None:
    model = nn.TransformerEncoder(layer(False, "gelu"), 2).bfloat16().eval()
    x = torch.randn(B, L, D).bfloat16()
    y, report = compile_and_report(model, x)
    assert [(r.name, r.n, r.k, r.action) for r in report.records] == [
        (f"layers.{number}.{name}", n, k, action)
        for number in range(2)
        for name, n, k, action in RECORDS
    ]
    weights = {f"layers.{number}.{name}": "NK" for number in range(2) for name in WEIGHTS}
    reference = reference_model(model, report, weights)
    with slow_path(), torch.no_grad():
        assert_nearer(y, reference(x.double()), model.double()(x.double()))


def test_refused_by_name_and_equal_to_eager() -> None:
    model, x = layer(False, "relu"), torch.randn(B, L, D)
    reasons = kept(model, x, skip=["self_attn", "linear*"])
    assert reasons == [
        ("self_attn.in_proj_weight", "skip='self_attn'"),
        ("self_attn.out_proj", "skip='self_attn'"),
        ("linear1", "skip='linear*'"),
        ("linear2", "skip='linear*'"),
    ]
