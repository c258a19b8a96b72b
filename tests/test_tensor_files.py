"""Whole packed models in safetensors files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxint4
from fxint4 import Int4Config, Int4TileTensor, PackedFormatError
from fxint4.tensor.files import PARTS, Header, assemble, flatten, read_header

safe_open = pytest.importorskip("safetensors").safe_open


class Model(nn.Module):
    """A tied weight, a ragged one, a transposed one, experts, a plain parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(100, 50, dtype=torch.bfloat16)
        self.b = nn.Linear(100, 50, bias=False, dtype=torch.bfloat16)
        self.b.weight = self.a.weight
        self.c = nn.Parameter(torch.randn(96, 64, dtype=torch.bfloat16))
        self.experts = nn.Parameter(torch.randn(3, 40, 64, dtype=torch.bfloat16))
        self.norm = nn.LayerNorm(50, dtype=torch.bfloat16)
        self.register_buffer("positions", torch.arange(7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x) + self.b(x))
        z = torch.einsum("mk,kn->mn", x[:, :96], self.c)
        return y.sum(-1) + torch.bmm(z.expand(3, -1, -1), self.experts.mT).sum((0, -1))


@pytest.fixture
def inputs() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 100, dtype=torch.bfloat16)


def pack(model: nn.Module, inputs: Tensor, pre_scaled: bool) -> nn.Module:
    """Pack in place; if asked for, with a pre-scale for each weight that differs in each call."""
    fxint4.pack_(model, (inputs,))
    packed = {n: p for n, p in model.named_parameters() if isinstance(p, Int4TileTensor)}
    assert len(packed) == 3
    for name, parameter in packed.items():
        if pre_scaled:
            factors = torch.rand(parameter.stored.k_padded) + 0.5
            scaled = parameter.detach().like(pre_scale=factors)
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(scaled))
    if pre_scaled:
        model.b.weight = model.a.weight
    return model


@pytest.fixture(params=[False, True], ids=["plain", "pre-scaled"])
def pre_scaled(request: pytest.FixtureRequest) -> bool:
    """Whether packed weights have a pre-scale."""
    made: bool = request.param
    return made


@pytest.fixture
def packed(inputs: Tensor, pre_scaled: bool) -> nn.Module:
    return pack(Model().eval(), inputs, pre_scaled)


def test_a_packed_model_comes_back(packed: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fxint4.save_file(packed.state_dict(), path, {"made by": "a test"})
    loaded = Model().eval()
    values = fxint4.load_file(path)
    assert sorted(values) == sorted(packed.state_dict())
    loaded.load_state_dict(values, assign=True, strict=True)
    assert loaded.a.weight is loaded.b.weight or torch.equal(loaded.a.weight, loaded.b.weight)
    for name, value in packed.state_dict().items():
        other = loaded.state_dict()[name]
        assert type(other) is type(value)
        assert torch.equal(other, value), name
        if isinstance(value, Int4TileTensor):
            assert other.metadata == value.metadata
            assert torch.equal(other.dequantize(), value.dequantize())
    with torch.no_grad():
        assert torch.equal(loaded(inputs), packed(inputs))


def test_into_a_model_that_is_packed_alike(
    packed: nn.Module, inputs: Tensor, pre_scaled: bool, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    fxint4.save_file(packed.state_dict(), path)
    other = pack(Model().eval(), inputs, pre_scaled)
    with torch.no_grad():
        assert not torch.equal(other(inputs), packed(inputs))
        other.load_state_dict(fxint4.load_file(path))
        assert torch.equal(other(inputs), packed(inputs))


def test_tied_weights_are_written_once(packed: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fxint4.save_file(packed.state_dict(), path)
    size = sum(
        p.packed_bytes if isinstance(p, Int4TileTensor) else p.nbytes for p in packed.parameters()
    )
    assert path.stat().st_size < size + 8 * 7 + 2500  # the buffer and the header
    values = fxint4.load_file(path)
    assert values["a.weight"] is values["b.weight"]


def test_a_part_of_a_weight_is_written_by_itself(tmp_path: Path) -> None:
    whole = Int4TileTensor.from_float(torch.randn(64, 256))
    parts = {"top": whole[:32], "left": whole[:, 10:150], "rows": torch.ones(4, 4)[1:]}
    fxint4.save_file(parts, tmp_path / "parts.safetensors")
    for name, value in fxint4.load_file(tmp_path / "parts.safetensors").items():
        assert torch.equal(value, parts[name])
    size = parts["top"].packed_bytes + parts["left"].packed_bytes + parts["rows"].nbytes
    assert (tmp_path / "parts.safetensors").stat().st_size < size + 1000


def test_other_files_are_read_as_they_are(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, tmp_path / "plain.safetensors")
    values = fxint4.load_file(tmp_path / "plain.safetensors")
    assert torch.equal(values["w"], torch.ones(3))


def test_only_tensors_are_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step is a int; safetensors holds only tensors"):
        fxint4.save_file({"step": 3}, tmp_path / "x")  # type: ignore[dict-item]


def test_names_are_text(tmp_path: Path) -> None:
    for name in (5, None, b"w"):
        with pytest.raises(TypeError, match="names must be text"):
            fxint4.save_file({name: torch.ones(3)}, tmp_path / "x")  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


def test_what_has_no_values_to_write_is_named(tmp_path: Path) -> None:
    packed = Int4TileTensor.from_float(torch.randn(64, 256))
    for value in (torch.ones(3, device="meta"), packed.to("meta"), torch.eye(3).to_sparse()):
        with pytest.raises(ValueError, match=r"^w is .*holds only dense tensors with values"):
            fxint4.save_file({"w": value}, tmp_path / "w")
    with pytest.raises(TypeError, match=r"got a Linear, need a state dict"):
        fxint4.save_file(nn.Linear(3, 3), tmp_path / "w")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_file_is_written_whole_or_not_at_all(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_is_full(_: Any, path: Path, **__: Any) -> None:
        path.write_text("half")
        raise error

    path = tmp_path / "w.safetensors"
    fxint4.save_file({"w": torch.ones(3)}, path)
    monkeypatch.setattr("safetensors.torch.save_file", disk_is_full)
    for save in (partial(fxint4.save_file, {"w": torch.zeros(3)}), fxint4.Calibration({}).save):
        with pytest.raises(type(error)):
            save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.equal(fxint4.load_file(path)["w"], torch.ones(3))


@pytest.mark.parametrize("lazy", [Tensor.conj, lambda z: z.conj().imag, lambda z: z.conj().mT])
def test_lazy_views_are_written_as_they_look(
    lazy: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    z = torch.randn(4, 4, dtype=torch.complex64)
    state = {"own": z, "lazy": lazy(z), "again": lazy(z)}
    fxint4.save_file(state, tmp_path / "z")
    loaded = fxint4.load_file(tmp_path / "z")
    assert torch.equal(loaded["own"], z)
    for name in ("lazy", "again"):
        assert torch.equal(loaded[name], lazy(z).resolve_conj().resolve_neg())


@pytest.mark.parametrize("part", ["scale_and_zero", "pre_scale"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite(part: str, value: float, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weight = Int4TileTensor.from_float(torch.randn(64, 256)).like(pre_scale=torch.ones(256))
    path = tmp_path / "w.safetensors"
    fxint4.save_file({"fc.weight": weight}, path)
    getattr(weight, part).view(-1)[3] = value
    with pytest.raises(PackedFormatError, match=f"^fc.weight can't be saved: {part} holds inf or"):
        fxint4.save_file({"fc.weight": weight}, path)
    assert "fc.weight" in fxint4.load_file(path)  # as it was

    torch.save({"fc.weight": weight}, tmp_path / "w.pt")
    with pytest.raises(PackedFormatError, match=f"{part} holds inf or NaN"):
        torch.load(tmp_path / "w.pt")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    tensors[f"fc._weight_{part}"] = getattr(weight, part)
    save_file(tensors, path, metadata=header)
    with pytest.raises(PackedFormatError, match=rf"w\.safetensors.*fc\.weight.*{part} holds inf"):
        fxint4.load_file(path)


def test_a_file_of_weights_may_be_loaded_without_values(tmp_path: Path) -> None:
    torch.save(Int4TileTensor.from_float(torch.randn(64, 256)), tmp_path / "w.pt")
    assert torch.load(tmp_path / "w.pt", map_location="meta").is_meta


def test_names_that_collide(tmp_path: Path) -> None:
    weight = Int4TileTensor.from_float(torch.randn(32, 64))
    with pytest.raises(ValueError, match=r"_w_tiles is both a tensor and a part"):
        fxint4.save_file({"_w_tiles": torch.ones(2), "w": weight}, tmp_path / "x")


@pytest.mark.parametrize("scaled", [False, True])
def test_files_of_versions_1_and_2(scaled: bool, tmp_path: Path) -> None:
    """Their parts have the weight's name before a dot; the first has no pre-scales."""
    from safetensors.torch import save_file

    weight = Int4TileTensor.from_float(torch.randn(64, 256))
    if scaled:
        weight = weight.like(pre_scale=torch.rand(256))
    described = ["bfloat16", 64, [[0, 256]], 128, [0, 1], False]
    described[0] = str(weight.dtype).removeprefix("torch.")
    header: dict[str, Any] = {"version": 1, "packed": {"fc.w": described}, "shared": {"w": "fc.w"}}
    if scaled:
        header |= {"version": 2, "pre_scaled": ["fc.w"]}
    tensors = {f"fc.w.{part}": buffer for part, buffer in weight.buffers.items()}
    save_file(tensors, tmp_path / "x", metadata={"fxint4": json.dumps(header)})
    loaded = fxint4.load_file(tmp_path / "x")
    assert loaded.keys() == {"fc.w", "w"}
    assert torch.equal(loaded["w"], weight)
    assert loaded["w"] is loaded["fc.w"]


def test_activations_are_kept_and_files_without_them_are_as_before(tmp_path: Path) -> None:
    plain = Int4TileTensor.from_float(torch.randn(64, 256))
    fp8 = Int4TileTensor.from_float(torch.randn(64, 256), Int4Config(activations="fp8"))
    state = {"plain": plain, "fp8": fp8}
    fxint4.save_file(state, tmp_path / "x")
    header = json.loads(flatten(state)[1]["fxint4"])
    assert header["packed"]["plain"] == ["float32", 64, [[0, 256]], 128, [0, 1], False]
    assert header["packed"]["fp8"] == ["float32", 64, [[0, 256]], 128, [0, 1], False, "fp8"]
    loaded = fxint4.load_file(tmp_path / "x")
    assert {name: value.metadata for name, value in loaded.items()} == {
        name: value.metadata for name, value in state.items()
    }


@pytest.mark.parametrize("further", [["int8"], ["fp8", "fp8"], [8]])
def test_activations_that_there_are_not(further: list[Any]) -> None:
    weight = Int4TileTensor.from_float(torch.randn(64, 256))
    described = ["float32", 64, [[0, 256]], 128, [0, 1], False, *further]
    header = Header({"w": described}, {}, frozenset())
    with pytest.raises(PackedFormatError, match=r"w is damaged: activations are .*'fp8', or none"):
        assemble("x", "w", header, weight.buffers)


def test_a_weight_named_like_a_part_of_another(tmp_path: Path) -> None:
    one, two = (Int4TileTensor.from_float(torch.randn(64, 256)) for _ in range(2))
    for state in ({"w": one, "_w_tiles": two}, {"_w_tiles": two, "w": one, "_w_pre_scale": two}):
        fxint4.save_file(state, tmp_path / "w")
        loaded = fxint4.load_file(tmp_path / "w")
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())


def shards(state: dict[str, Tensor], folder: Path, count: int = 2) -> list[Path]:
    """Write a state dict as several files; each part goes to the next of them."""
    from safetensors.torch import save_file

    tensors, entries = flatten(state)
    paths = [folder / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        own = {name: value for j, (name, value) in enumerate(tensors.items()) if j % count == i}
        save_file(own, path, metadata=entries)
    return paths


def test_parts_in_several_files(packed: nn.Module, pre_scaled: bool, tmp_path: Path) -> None:
    state = packed.state_dict()
    tensors: dict[str, Tensor] = {}
    metadata = []
    for path in shards(state, tmp_path):
        with safe_open(path, framework="pt") as file:
            metadata.append(file.metadata())
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = read_header(tmp_path, *metadata)
    assert header == read_header(tmp_path, metadata[0])
    assert header.shared == {"b.weight": "a.weight"}
    assert header.packed.keys() == {"a.weight", "c", "experts"}
    for name in header.packed:
        names = header.parts(name)
        assert tuple(names) == PARTS[: 2 + pre_scaled]
        made = assemble(tmp_path, name, header, {part: tensors[names[part]] for part in names})
        assert torch.equal(made, state[name])
        assert made.metadata == state[name].metadata


def test_one_of_several_files_is_no_model(packed: nn.Module, tmp_path: Path) -> None:
    for path in shards(packed.state_dict(), tmp_path):
        with pytest.raises(PackedFormatError, match=r"one of several .*load their folder, with"):
            fxint4.load_file(path)


def test_headers_of_two_models(tmp_path: Path) -> None:
    one = Int4TileTensor.from_float(torch.randn(64, 256))
    entries = [
        flatten(state)[1]
        for state in (
            {"a": one, "b": one},
            {"c": Int4TileTensor.from_float(torch.randn(64, 100))},
            {"a": Int4TileTensor.from_float(torch.randn(32, 256))},
            {"a": one.like(pre_scale=torch.ones(256))},
        )
    ]
    both = read_header(tmp_path, entries[0], {}, entries[1])
    assert both.packed.keys() == {"a", "c"}
    assert both.shared == {"b": "a"}
    nothing = ({}, {}, frozenset(), False)
    assert read_header(tmp_path) == read_header(tmp_path, {"format": "pt"}) == nothing
    with pytest.raises(PackedFormatError, match="headers of two files differ in a; "):
        read_header(tmp_path, entries[0], entries[2])
    with pytest.raises(PackedFormatError, match="header of one file a has a pre-scale"):
        read_header(tmp_path, entries[0], entries[3])
    older = {"fxint4": json.dumps({"version": 1, "packed": {}, "shared": {}})}
    with pytest.raises(PackedFormatError, match="headers of two files are of different versions"):
        read_header(tmp_path, entries[0], older)


def test_what_does_not_make_a_weight() -> None:
    weight = Int4TileTensor.from_float(torch.randn(64, 256)).like(pre_scale=torch.ones(256))
    header = read_header("x", flatten({"w": weight})[1])
    parts = weight.buffers
    with pytest.raises(PackedFormatError, match=r"^x: the header does not list .* v$"):
        assemble("x", "v", header, parts)
    with pytest.raises(PackedFormatError, match=r"^x: .* w is damaged: there are no tensors; by "):
        assemble("x", "w", header, {})
    with pytest.raises(PackedFormatError, match=r"^x: .* w is damaged: there are scale_and_zero, "):
        assemble("x", "w", header, {name: parts[name] for name in PARTS[:2]})
    with pytest.raises(PackedFormatError, match=r"^x: .* w is damaged: scale_and_zero has shape"):
        assemble("x", "w", header, parts | {"tiles": parts["tiles"][..., :1].contiguous()})
    meta = {name: part.to("meta") for name, part in parts.items()}
    assert assemble("x", "w", header, meta).is_meta


def test_the_header_of_many_weights_is_small() -> None:
    weight = Int4TileTensor.from_float(torch.randn(32, 64))
    one, many = (
        len(
            flatten({f"model.layers.{i}.mlp.up_proj.weight": weight.clone() for i in range(n)})[1][
                "fxint4"
            ]
        )
        for n in (1, 101)
    )
    assert many - one < 100 * (len("model.layers.100.mlp.up_proj.weight") + 50)


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change only the header that fxint4 wrote."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    ours = json.loads(header["__metadata__"]["fxint4"])
    change(ours)
    header["__metadata__"]["fxint4"] = json.dumps(ours)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


DAMAGE: dict[str, Callable[[dict[str, Any]], None]] = {
    "more rows than there are": lambda h: h["packed"]["w"].__setitem__(1, 4096),
    "another group size": lambda h: h["packed"]["w"].__setitem__(3, 32),
    "columns that are not there": lambda h: h["packed"]["w"].__setitem__(2, [[0, 9999]]),
    "no dtype": lambda h: h["packed"]["w"].__setitem__(0, "nn"),
    "an integer dtype": lambda h: h["packed"]["w"].__setitem__(0, "int32"),
    "axes that are none": lambda h: h["packed"]["w"].__setitem__(4, [0, 0]),
    "nothing said": lambda h: h["packed"].__setitem__("w", None),
    "a weight that is not there": lambda h: h["packed"].__setitem__("v", h["packed"]["w"]),
    "a pre-scale that is not there": lambda h: h.__setitem__("pre_scaled", ["w"]),
    "a tie to nothing": lambda h: h["shared"].__setitem__("v", "u"),
    "half a row": lambda h: h["packed"]["w"].__setitem__(1, 1.5),
    "a list of packed weights": lambda h: h.__setitem__("packed", ["w"]),
    "no ties": lambda h: h.__setitem__("shared", None),
    "a tie to a list": lambda h: h["shared"].__setitem__("v", ["w"]),
    "a number of pre-scales": lambda h: h.__setitem__("pre_scaled", 3),
    "a group size below 0": lambda h: h["packed"]["w"].__setitem__(3, -128),
    "a group size of 0": lambda h: h["packed"]["w"].__setitem__(3, 0),
    "rows beyond all numbers": lambda h: h["packed"]["w"].__setitem__(1, 10**30),
    "columns beyond all numbers": lambda h: h["packed"]["w"].__setitem__(2, [[0, 10**30]]),
    "columns from behind": lambda h: h["packed"]["w"].__setitem__(2, [[-64, 64]]),
    "a dtype that is a list": lambda h: h["packed"]["w"].__setitem__(0, ["float32"]),
    "a pre-scale of nothing": lambda h: h.__setitem__("pre_scaled", ["v"]),
    "a pre-scale without a name": lambda h: h.__setitem__("pre_scaled", [["w"]]),
    "a weight that is two": lambda h: h["shared"].__setitem__("w", "w"),
    "a tie that is a tensor": lambda h: h["shared"].__setitem__("_w_tiles2", "w"),
    "a later version": lambda h: h.__setitem__("version", 4),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_header_that_was_tampered_with(name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = {"w": Int4TileTensor.from_float(torch.randn(64, 256)), "_w_tiles2": torch.ones(2)}
    fxint4.save_file(state, path)
    rewritten(path, lambda header: None)
    assert "w" in fxint4.load_file(path)
    rewritten(path, DAMAGE[name])
    with pytest.raises(PackedFormatError, match=r"w\.safetensors"):
        fxint4.load_file(path)


@pytest.mark.parametrize("header", ["[1]", "5", "null", "[" * 100_000])
def test_a_header_that_is_no_json_object(header: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors", metadata={"fxint4": header})
    with pytest.raises(PackedFormatError, match=r"w\.safetensors"):
        fxint4.load_file(tmp_path / "w.safetensors")


@pytest.mark.parametrize("left", [0, 4, 100, 5000])
def test_a_file_that_was_cut_short(left: int, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    fxint4.save_file({"w": Int4TileTensor.from_float(torch.randn(64, 256))}, path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(PackedFormatError, match="can't be read"):
        fxint4.load_file(path)
