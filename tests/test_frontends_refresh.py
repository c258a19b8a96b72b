"""`refresh`: changes that can't be seen are folded when they are told of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_within, dequantized, rounding_bound
from torch import Tensor, nn

import fxint4
from fxint4.weights.cache import weight_cache

K = N = 64


def layer(weight: Tensor) -> nn.Linear:
    made = nn.Linear(K, N, bias=False).eval()
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def from_numpy(_: Path) -> tuple[nn.Linear, Callable[[], Any]]:
    array = torch.randn(N, K).numpy()
    return layer(torch.from_numpy(array)), lambda: array.__imul__(-1)


def shared_memory(folder: Path) -> tuple[nn.Linear, Callable[[], Any]]:
    """Memory that is mapped twice, as by two processes."""
    path = folder / "weight"
    path.write_bytes(torch.randn(N, K).numpy().tobytes())
    ours, theirs = (torch.from_file(str(path), True, N * K).view(N, K) for _ in range(2))
    assert ours.data_ptr() != theirs.data_ptr()
    return layer(ours), lambda: theirs.mul_(-1)


def data(_: Path) -> tuple[nn.Linear, Callable[[], Any]]:
    model = layer(torch.randn(N, K))
    return model, lambda: model.weight.data.mul_(-1)


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize(
    "told",
    [lambda m: m, lambda m: m.weight, lambda m: [torch.ones(3), m.weight.detach()]],
    ids=["module", "parameter", "tensors"],
)
@pytest.mark.parametrize("make", [from_numpy, shared_memory, data])
def test_a_write_that_can_not_be_seen(
    make: Callable[[Path], tuple[nn.Linear, Callable[[], Any]]],
    told: Callable[[nn.Linear], Any],
    tmp_path: Path,
) -> None:
    model, write = make(tmp_path)
    compiled = torch.compile(model, backend="int4tile")
    x = torch.randn(4, K)
    with torch.no_grad():
        before = compiled(x)
        (packed,) = weight_cache.of(model.weight)
        tiles = [part.data_ptr() for parts in packed.formats.values() for part in parts]
        for _ in range(2):
            write()
            assert packed.is_current([model.weight])  # else there is nothing to tell of
            fxint4.refresh(told(model))
            w = dequantized(model.weight, N, torch.float64)
            after = compiled(x)
            assert_within(after, x.double() @ w.T, rounding_bound(x, w))
            assert not torch.equal(after, before)
            before = after
    assert weight_cache.of(model.weight) == [packed]
    assert tiles == [part.data_ptr() for parts in packed.formats.values() for part in parts]


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize("told", [lambda m: m, lambda m: m.weight], ids=["module", "parameter"])
def test_buffers_of_a_packed_weight(told: Callable[[nn.Linear], Any]) -> None:
    """The product of the negative weight is the negative product, bit for bit."""
    model = layer(torch.randn(N, K))
    fxint4.pack_(model)
    compiled = torch.compile(model, backend="int4tile")
    x = torch.randn(4, K)
    with torch.no_grad():
        before = [model(x), compiled(x)]
        model.weight.scale_and_zero.data.mul_(-1)  # type: ignore[union-attr, operator]
        fxint4.refresh(told(model))
        after = [model(x), compiled(x)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new, -old)


def test_what_has_no_memory_changes_nothing() -> None:
    w = nn.Parameter(torch.randn(N, K))
    model = layer(w.detach())
    with torch.no_grad():
        fxint4.pack_(model)
        model(torch.randn(2, K))
    known = weight_cache.of(model.weight.tiles)  # type: ignore[arg-type]
    assert known
    before = [packed._versions for packed in known]
    for wrong in ([model.weight, 1], ["weight"], {"weight": model.weight}):
        with pytest.raises(TypeError, match="need a module, a tensor, or several tensors"):
            fxint4.refresh(wrong)  # type: ignore[arg-type]
    assert [packed._versions for packed in known] == before


# --- weights that come from elsewhere again and again --------------------------------------------


def policy() -> nn.Sequential:
    return nn.Sequential(nn.Linear(K, 2 * K), nn.ReLU(), nn.Linear(2 * K, N)).eval()


def sent(trainer: nn.Module) -> dict[str, Tensor]:
    """A trainer's weights after a step, as they arrive."""
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return {name: value.detach().clone() for name, value in trainer.named_parameters()}


def quantized(model: nn.Module) -> nn.Module:
    """A copy of a model with the values that its weights have in int4."""
    made = copy.deepcopy(model)
    fxint4.pack_(made)
    fxint4.dequantize_(made)
    return made


WRITERS: dict[str, Callable[[nn.Module, str, Tensor], Any]] = {
    "data.copy_": lambda model, name, new: model.get_parameter(name).data.copy_(new),
    "data[:]": lambda model, name, new: model.get_parameter(name).data.__setitem__(
        slice(None), new
    ),
    "data =": lambda model, name, new: setattr(model.get_parameter(name), "data", new),
    "load": lambda model, name, new: model.load_state_dict({name: new}, strict=False),
}


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize("writer", WRITERS)
def test_a_trainer_sends_weights_to_a_compiled_model(writer: str) -> None:
    """As in reinforcement learning: the model that samples is compiled once."""
    trainer, model = policy(), policy()
    compiled = torch.compile(model, backend="int4tile")
    x = torch.randn(4, K)
    with torch.no_grad():
        compiled(x)
        for _ in range(3):
            for name, value in sent(trainer).items():
                WRITERS[writer](model, name, value)
            fxint4.refresh(model)
            y = compiled(x)
            expected = quantized(trainer)(x)
            assert (y - expected).norm() < 0.01 * expected.norm()
            assert (y - trainer(x)).norm() > 0.01 * expected.norm()
    report = fxint4.last_report()
    assert report.totals["packed"] == 2


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("refreshed", [False, True])
def test_a_loader_writes_to_packed_parameters(writer: str, refreshed: bool) -> None:
    """What it writes is quantized; nothing has to be told of."""
    trainer, model = policy(), policy()
    fxint4.pack_(model)
    compiled = torch.compile(model, backend="int4tile")
    x = torch.randn(4, K)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", fxint4.RequantizedWarning)
        model(x), compiled(x)
        packed = [model[0].weight, model[2].weight]
        tiles = [weight.tiles.data_ptr() for weight in packed]  # type: ignore[union-attr, operator]
        for _ in range(3):
            for name, value in sent(trainer).items():
                WRITERS[writer](model, name, value)
            if refreshed:
                fxint4.refresh(model)
            expected = quantized(trainer)
            assert [model[0].weight, model[2].weight] == packed
            for ours, theirs in ((model[0], expected[0]), (model[2], expected[2])):
                assert torch.equal(ours.weight.dequantize(), theirs.weight)  # type: ignore[operator]
            wanted = expected(x)
            for y in (model(x), compiled(x)):
                assert (y - wanted).norm() < 0.01 * wanted.norm()
    assert tiles == [weight.tiles.data_ptr() for weight in packed]  # type: ignore[union-attr, operator]


def test_only_assigning_warns() -> None:
    """Code that copies values knows that they are converted."""
    model = policy()
    fxint4.pack_(model)
    new = torch.randn(2 * K, K)
    for writer in ("data.copy_", "data[:]", "load"):
        WRITERS[writer](model, "0.weight", new)
    with pytest.warns(fxint4.RequantizedWarning, match="float values were assigned to a packed"):
        WRITERS["data ="](model, "0.weight", new)
    before = model[0].weight.dequantize()  # type: ignore[operator]
    for wrong in (torch.randn(3, K), torch.full((2 * K, K), torch.nan), torch.ones(2 * K, K) > 0):
        for writer in ("data.copy_", "data ="):
            with pytest.raises((ValueError, fxint4.UnsupportedOpError)):
                WRITERS[writer](model, "0.weight", wrong)
    assert torch.equal(model[0].weight.dequantize(), before)  # type: ignore[operator]
