"""What a report says of a parameter by what it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fxint4
from fxint4.graph.names import parameters_of
from fxint4.graph.parameters import described
from fxint4.report import Place


class Tagged(nn.Parameter):
    """As vLLM's parameters: its values are its own."""


def packed() -> Tensor:
    layer = nn.Linear(64, 64)
    fxint4.pack_(layer)
    return layer.weight


REASONS: dict[str, tuple[Any, str]] = {
    "a matrix": (lambda: nn.Parameter(torch.randn(4, 4)), ""),
    "experts": (lambda: nn.Parameter(torch.randn(2, 4, 4)), ""),
    "a subclass of Parameter": (lambda: Tagged(torch.randn(4, 4)), ""),
    "a packed weight": (packed, "packed before"),
    "a vector": (lambda: nn.Parameter(torch.randn(4)), "a vector, no matrix"),
    "a number": (lambda: nn.Parameter(torch.tensor(1.0)), "a vector, no matrix"),
    "on meta": (
        lambda: nn.Parameter(torch.empty(4, 4, device="meta")),
        "on the meta device: offloaded, or not loaded yet",
    ),
    "another library's": (
        lambda: nn.Parameter(TwoTensor(torch.randn(4, 4), torch.randn(4, 4))),
        "a TwoTensor, a tensor of a kind that is not packed",
    ),
    "sparse": (
        lambda: nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False),
        "sparse (torch.sparse_coo)",
    ),
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_parameter_has_the_reason_of_its_kind(kind: str) -> None:
    make, reason = REASONS[kind]
    owner = nn.Module()
    owner.weight = parameter = make()
    found = described("layers.0.weight", parameter, owner)
    assert found == (
        "layers.0.weight",
        parameter.numel(),
        "Module",
        reason,
        Place(owner, "weight"),
        parameter.dtype.itemsize,
    )


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_is_named(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), kind(8, 8))
    reasons = {found.name: found.reason for found in parameters_of(model).values()}
    why = f"multiplied inside {kind.__name__}, of which PyTorch captures no graph"
    assert reasons.pop("0.weight") == ""
    assert reasons.pop("0.bias") == "a vector, no matrix"
    assert set(reasons.values()) == {why}


def test_a_parameter_of_another_kind_is_named() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    owner = nn.Linear(64, 64)
    values = owner.weight.detach()
    owner.weight = nn.Parameter(TwoTensor(values, values.clone()), requires_grad=False)
    reason = parameters_of(owner)[id(owner.weight)].reason
    assert reason == "a TwoTensor, a tensor of a kind that is not packed"


def test_a_parameter_of_a_distributed_model_can_be_packed(tmp_path: Any) -> None:
    from torch import distributed
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        owner = nn.Linear(64, 64)
        owner.weight = nn.Parameter(distribute_tensor(owner.weight.detach(), mesh))
        reason = parameters_of(owner)[id(owner.weight)].reason
    finally:
        distributed.destroy_process_group()
    assert reason == ""
