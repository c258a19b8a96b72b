"""Saving, loading, copying and converting packed weights and modules that hold them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxint4 import Int4Config, Int4TileTensor, PackedFormatError, UnsupportedOpError, WriteError
from fxint4.quant.tile_layout import DTYPES
from fxint4.tensor.core import NEW_AXIS


@pytest.fixture(params=[False, True], ids=["set-data", "swap"])
def swapping(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether modules convert and load by swapping their parameters."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(before)


def saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def loaded(value: Any, **kwargs: Any) -> Any:
    return torch.load(saved(value), weights_only=True, **kwargs)


def weight(*shape: int, group_size: int = 32, **kwargs: Any) -> Int4TileTensor:
    return Int4TileTensor.from_float(
        torch.randn(shape, **kwargs), Int4Config(group_size=group_size)
    )


def pre_scaled(*shape: int, seed: int = 0, **kwargs: Any) -> Int4TileTensor:
    plain = weight(*shape, **kwargs)
    factors = torch.rand(shape[-1], generator=torch.Generator().manual_seed(seed)) + 0.5
    return Int4TileTensor.from_plain(
        *plain.get_plain(), group_size=32, dtype=plain.dtype, pre_scale=factors
    )


class Model(nn.Module):
    """Two layers, the second of them tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 64)
        self.inner = nn.Sequential(nn.Linear(64, 64), nn.GELU())
        self.head = nn.Linear(64, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        made: Tensor = self.head(self.inner(self.embedding(tokens)))
        return made


def packed_model(seed: int | None = None) -> Model:
    """A seed gives the first layer a random pre-scale."""
    model = Model().eval()
    linear = model.inner[0]
    assert isinstance(linear, nn.Linear)
    first = weight(64, 64) if seed is None else pre_scaled(64, 64, seed=seed)
    linear.weight = nn.Parameter(first, requires_grad=False)
    tied = nn.Parameter(weight(30, 64), requires_grad=False)
    model.embedding.weight = model.head.weight = tied
    return model


TOKENS = torch.tensor([[0, 29, 7], [1, 1, 2]])


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(TOKENS)
    return y


# --- torch.save and torch.load -------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: weight(20, 100),
        lambda: weight(3, 20, 100),
        lambda: weight(20, 100).half(),
        lambda: weight(20, 100).t(),
        lambda: weight(24, 256)[8:, 64:],
        lambda: weight(24, 256)[3:, 5:99],
        lambda: weight(3, 24, 256)[1:, 8:, 128:].mT,
        lambda: weight(20, 100)[None, :, None],
        lambda: weight(20, 100).expand(2, 20, 100),
        lambda: torch.cat([weight(20, 100), weight(20, 30)], 1),
        lambda: weight(20, 100).like(activations="fp8"),
        lambda: pre_scaled(20, 100),
        lambda: pre_scaled(3, 24, 256)[1:, 8:, 128:].mT,
        lambda: torch.cat([weight(20, 100), pre_scaled(20, 30)], 1),
    ],
)
def test_a_tensor_comes_back_as_it_was(make: Any) -> None:
    packed = make()
    back = loaded(packed)
    assert type(back) is Int4TileTensor
    assert not isinstance(back, nn.Parameter)
    assert (back.shape, back.dtype, back.metadata) == (packed.shape, packed.dtype, packed.metadata)
    assert torch.equal(back, packed)
    assert torch.equal(back.dequantize(), packed.dequantize())
    again = pickle.loads(pickle.dumps(packed))
    assert torch.equal(again, packed)


def test_a_parameter_comes_back_as_one() -> None:
    parameter = nn.Parameter(weight(20, 100), requires_grad=False)
    back = loaded(parameter)
    assert isinstance(back, nn.Parameter)
    assert isinstance(back, Int4TileTensor)
    assert not back.requires_grad
    assert torch.equal(back, parameter)


def test_only_the_rebuilding_function_is_trusted() -> None:
    trusted = [item for item in torch.serialization.get_safe_globals() if callable(item)]
    ours = [item for item in trusted if item.__module__.startswith("fxint4")]
    assert [item.__name__ for item in ours] == ["_rebuild"]


@pytest.mark.parametrize("seeds", [(None, None), (1, 2)])
def test_a_state_dict_from_a_file(tmp_path: Path, seeds: tuple[int | None, ...]) -> None:
    model, other = map(packed_model, seeds)
    assert not torch.equal(run(model), run(other))
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    for kwargs in ({}, {"map_location": "cpu"}, {"mmap": True}):
        state = torch.load(path, weights_only=True, **kwargs)
        assert list(state) == list(model.state_dict())
        assert other.load_state_dict(state, strict=True)
        assert torch.equal(run(model), run(other))
    # Packed it is smaller than the same weights in int8 would be.
    assert path.stat().st_size < 64 * 64 + 30 * 64 + 4096


def test_tied_weights_share_their_buffers_in_the_file() -> None:
    state = loaded(packed_model().state_dict())
    embedding, head = state["embedding.weight"], state["head.weight"]
    assert embedding.tiles.data_ptr() == head.tiles.data_ptr()
    assert embedding.scale_and_zero.data_ptr() == head.scale_and_zero.data_ptr()


# --- savers and readers of other libraries -------------------------------------------------------

FOREIGN_SAVERS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "save_file": lambda model, path: safetensors.torch.save_file(model.state_dict(), path),
    "save_model": lambda model, path: safetensors.torch.save_model(model, str(path)),
    "save": lambda model, path: path.write_bytes(safetensors.torch.save(model.state_dict())),
}


@pytest.mark.parametrize("save", FOREIGN_SAVERS.values(), ids=FOREIGN_SAVERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saver_that_cannot_says_which_one_can(
    save: Callable[[nn.Module, Path], Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)).to(dtype)
    model[0].weight = nn.Parameter(weight(32, 64, dtype=dtype), requires_grad=False)
    path = tmp_path / "model.safetensors"
    path.write_text("what was there")
    with pytest.raises(WriteError, match=r"\(32, 64\).*fxint4\.save_file.*save_pretrained"):
        save(model, path)
    assert path.read_text() == "what was there"


READERS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda packed: packed.numpy(),
    "numpy of a copy": lambda packed: packed.detach().cpu().numpy(force=True),
    "asarray": np.asarray,
    "tolist": lambda packed: packed.tolist(),
    "dlpack": torch.from_dlpack,
    "numpy dlpack": np.from_dlpack,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_values_are_read_by_dequantize_alone(read: Callable[[Tensor], Any]) -> None:
    with pytest.raises(UnsupportedOpError, match=r"\(20, 100\).*\.dequantize\(\)"):
        read(weight(20, 100))


def test_no_address_that_others_could_read() -> None:
    packed = weight(20, 100)
    assert not hasattr(packed, "__cuda_array_interface__")
    assert packed.data_ptr() < 0


# --- damaged files -------------------------------------------------------------------------------


def cut(tensor: Tensor, *index: Any) -> Tensor:
    return tensor[index].contiguous()


DAMAGE: dict[str, Any] = {
    "more rows": lambda t, p, m: (t, p, (m[0], 25, *m[2:])),
    "no rows": lambda t, p, m: (t, p, (m[0], 0, *m[2:])),
    "negative rows": lambda t, p, m: (t, p, (m[0], -20, *m[2:])),
    "more columns": lambda t, p, m: (t, p, (*m[:2], ((0, 129),), *m[3:])),
    "negative columns": lambda t, p, m: (t, p, (*m[:2], ((-5, 95),), *m[3:])),
    "columns twice": lambda t, p, m: (t, p, (*m[:2], ((0, 50), (0, 50)), *m[3:])),
    "columns reversed": lambda t, p, m: (t, p, (*m[:2], ((50, 100), (0, 50)), *m[3:])),
    "empty run": lambda t, p, m: (t, p, (*m[:2], ((0, 100), (100, 100)), *m[3:])),
    "no columns": lambda t, p, m: (t, p, (*m[:2], (), *m[3:])),
    "another group": lambda t, p, m: (t, p, (*m[:3], 64, *m[4:])),
    "group 0": lambda t, p, m: (t, p, (*m[:3], 0, *m[4:])),
    "axis twice": lambda t, p, m: (t, p, (*m[:4], (0, 0), *m[5:])),
    "axis missing": lambda t, p, m: (t, p, (*m[:4], (0,), *m[5:])),
    "axis 2": lambda t, p, m: (t, p, (*m[:4], (0, 2), *m[5:])),
    "axis -2": lambda t, p, m: (t, p, (*m[:4], (0, 1, -2), *m[5:])),
    "float64": lambda t, p, m: (t, p, (torch.float64, *m[1:])),
    "int8": lambda t, p, m: (t, p, (torch.int8, *m[1:])),
    "dtype by name": lambda t, p, m: (t, p, ("bfloat16", *m[1:])),
    "no metadata": lambda t, p, m: (t, p, None),
    "short metadata": lambda t, p, m: (t, p, m[:3]),
    "words for numbers": lambda t, p, m: (t, p, (m[0], "twenty", *m[2:])),
    "tiles cut": lambda t, p, m: (cut(t, slice(1, None)), p, m),
    "tiles cut in k": lambda t, p, m: (cut(t, slice(None), slice(0, 0)), p, m),
    "words cut": lambda t, p, m: (cut(t, ..., slice(0, 1)), p, m),
    "parameters cut": lambda t, p, m: (t, cut(p, slice(1, None)), m),
    "parameter rows cut": lambda t, p, m: (t, cut(p, slice(None), slice(8, None)), m),
    "zeros cut": lambda t, p, m: (t, cut(p, ..., slice(0, 1)), m),
    "int64 tiles": lambda t, p, m: (t.long(), p, m),
    "float32 parameters": lambda t, p, m: (t, p.float(), m),
    "tiles not contiguous": lambda t, p, m: (t.mT.contiguous().mT, p, m),
    "parameters not contiguous": lambda t, p, m: (t, p.mT.contiguous().mT, m),
    "swapped": lambda t, p, m: (p, t, m),
    "no tensors": lambda t, p, m: (3, None, m),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = weight(20, 100)
    rebuild, (tiles, parameters, metadata, is_parameter) = packed.__reduce_ex__(2)
    arguments = (*DAMAGE[damage](tiles, parameters, metadata), is_parameter)
    with monkeypatch.context() as patch:
        patch.setattr(Int4TileTensor, "__reduce_ex__", lambda self, protocol: (rebuild, arguments))
        file = saved({"weight": packed})
    with pytest.raises(PackedFormatError):
        torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: f[:-1],
        lambda f: f[None],
        lambda f: f.double(),
        lambda f: f.to(torch.int32),
        lambda f: torch.stack([f, f], 1)[:, 0],
        lambda f: 3,
    ],
)
def test_a_damaged_pre_scale_is_refused(damage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pre_scaled(20, 100)
    rebuild, (*others, factors) = packed.__reduce_ex__(2)
    with monkeypatch.context() as patch:
        arguments = (*others, damage(factors))
        patch.setattr(Int4TileTensor, "__reduce_ex__", lambda self, protocol: (rebuild, arguments))
        file = saved({"weight": packed})
    with pytest.raises(PackedFormatError):
        torch.load(file, weights_only=True)


def test_a_weight_without_a_pre_scale_is_written_as_before_there_were_any() -> None:
    _, arguments = weight(20, 100).__reduce_ex__(2)
    assert len(arguments) == 4


def test_a_truncated_file_is_refused() -> None:
    whole = saved(weight(20, 100)).getvalue()
    for length in range(0, len(whole), 97):
        with pytest.raises((RuntimeError, EOFError, pickle.UnpicklingError)):
            torch.load(io.BytesIO(whole[:length]), weights_only=True)


# --- copying -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_parameter", [False, True])
def test_deepcopy(is_parameter: bool) -> None:
    packed = pre_scaled(3, 20, 100)
    original = nn.Parameter(packed, requires_grad=False) if is_parameter else packed
    made = copy.deepcopy(original)
    assert type(made) is Int4TileTensor
    assert isinstance(made, nn.Parameter) == is_parameter
    assert made.metadata == original.metadata
    assert torch.equal(made, original)
    before = made.dequantize()
    for buffer in original.buffers.values():
        buffer.zero_()
    assert torch.equal(made.dequantize(), before)


def test_deepcopy_of_views_of_one_memory() -> None:
    whole = weight(16, 64)
    module = nn.ParameterList([nn.Parameter(w, False) for w in (whole, whole.t(), whole[8:])])
    made = copy.deepcopy(module)
    memory = [w.tiles.untyped_storage().data_ptr() for w in made]
    assert len(set(memory)) == 1
    assert memory[0] != whole.tiles.untyped_storage().data_ptr()
    assert all(
        torch.equal(a.dequantize(), b.dequantize()) for a, b in zip(made, module, strict=True)
    )
    assert made[2].is_part


def test_deepcopy_of_a_module_keeps_tied_weights_tied() -> None:
    model = packed_model()
    made = copy.deepcopy(model)
    assert made.head.weight is made.embedding.weight
    assert made.head.weight is not model.head.weight
    y = run(model)
    with torch.no_grad():
        model.head.weight.copy_(torch.zeros(30, 64))
    assert not torch.equal(run(model), y)
    assert torch.equal(run(made), y)


# --- load_state_dict -----------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [(None, None), (1, 2)])
def test_packed_into_packed(swapping: bool, seeds: tuple[int | None, ...]) -> None:
    model, other = map(packed_model, seeds)
    addresses = [part.tiles.data_ptr() for part in (other.inner[0].weight, other.head.weight)]
    run(other)  # what the CPU op reads of the old weights is there
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(other), run(model))
    if not swapping:
        made = [part.tiles.data_ptr() for part in (other.inner[0].weight, other.head.weight)]
        assert made == addresses
    for name, parameter in other.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert torch.equal(parameter, model.get_parameter(name))
    assert other.inner[0].weight.tiles.data_ptr() != model.inner[0].weight.tiles.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_float_into_packed_quantizes_again(dtype: torch.dtype, swapping: bool) -> None:
    model, source = packed_model(), Model().to(dtype)
    run(model)
    model.load_state_dict(source.state_dict(), strict=True)
    for linear, new in ((model.inner[0], source.inner[0]), (model.head, source.head)):
        expected = Int4TileTensor.from_float(new.weight.detach().float(), Int4Config(group_size=32))
        assert isinstance(linear.weight, nn.Parameter)
        assert type(linear.weight) is Int4TileTensor
        assert torch.equal(linear.weight, expected)
        x = torch.randn(3, 64)
        assert torch.equal(F.linear(x, linear.weight), F.linear(x, expected))


def test_assigning_packed_to_a_float_model() -> None:
    model, target = packed_model(), Model().eval()
    target.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert type(target.head.weight) is Int4TileTensor
    assert torch.equal(run(target), run(model))


def test_a_state_dict_that_does_not_fit_is_an_error_and_changes_nothing() -> None:
    model = packed_model()
    y = run(model)
    linear = model.inner[0]
    for new, said in (
        (weight(64, 64, group_size=64), ("group_size=64", "group_size=32")),
        (pre_scaled(64, 64), ("packed differently", "pre-scaled")),
        (torch.full((64, 64), torch.nan), ("inf or NaN",)),
        (weight(64, 96), ("[64, 64]", "[64, 96]")),
        (torch.zeros(64, 64, dtype=torch.int8), ("torch.int8", "(64, 64)")),
    ):
        with pytest.raises(RuntimeError) as caught:
            linear.load_state_dict({"weight": new, "bias": linear.bias})
        assert all(part in str(caught.value) for part in ("weight", *said)), str(caught.value)
        assert torch.equal(run(model), y)


def test_packed_into_float_is_an_error() -> None:
    target = nn.Linear(64, 64)
    before = target.weight.clone()
    with pytest.raises(RuntimeError, match=r"packed torch.float32 \(64, 64\)"):
        target.load_state_dict({"weight": weight(64, 64), "bias": target.bias})
    assert torch.equal(target.weight, before)


def test_missing_and_unexpected_keys_are_found() -> None:
    model = packed_model()
    state = model.state_dict()
    state["other"] = state.pop("head.weight")
    with pytest.raises(RuntimeError, match=r"head\.weight.*\n.*other"):
        model.load_state_dict(state, strict=True)


# --- converting a module -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_to_another_dtype(dtype: torch.dtype, swapping: bool) -> None:
    model = packed_model()
    plain = [part.clone() for part in model.head.weight.get_plain()]
    model.half() if dtype is torch.float16 else model.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    head = model.head.weight
    assert isinstance(head, nn.Parameter)
    assert type(head) is Int4TileTensor
    assert all(torch.equal(a, b) for a, b in zip(head.get_plain(), plain, strict=True))
    assert run(model).dtype == dtype
    x = torch.randn(2, 64, dtype=dtype)
    expected = Int4TileTensor.from_plain(*plain, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(model.head(x), F.linear(x, expected))


def test_a_module_to_float64_is_an_error(swapping: bool) -> None:
    model = packed_model()
    with pytest.raises((UnsupportedOpError, RuntimeError), match="_to_copy"):
        model.double()


@pytest.mark.parametrize("seed", [None, 1])
def test_a_module_to_the_meta_device_and_back(seed: int | None) -> None:
    model = packed_model(seed)
    state = copy.deepcopy(model.state_dict())
    y = run(model)
    model.to("meta")
    assert model.head.weight.device.type == "meta"
    assert type(model.head.weight) is Int4TileTensor
    model.to_empty(device="cpu")
    model.load_state_dict(state, strict=True)
    assert torch.equal(run(model), y)


def test_a_module_in_shared_memory() -> None:
    model = packed_model(seed=1)
    y = run(model)
    model.share_memory()
    assert all(buffer.is_shared() for buffer in model.inner[0].weight.buffers.values())
    assert torch.equal(run(model), y)


def test_swapping_two_tensors() -> None:
    a, b = weight(20, 100), weight(30, 64)
    shapes, values = (a.shape, b.shape), (a.dequantize(), b.dequantize())
    torch.utils.swap_tensors(a, b)
    assert (b.shape, a.shape) == shapes
    assert torch.equal(b.dequantize(), values[0])
    assert torch.equal(a.dequantize(), values[1])


def test_new_axis_is_not_a_stored_axis() -> None:
    assert weight(20, 100)[None].axes == (NEW_AXIS, 0, 1)
