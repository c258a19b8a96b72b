"""Adapters of PEFT's over int4 weights: left alone, and right at the next call after any change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxint4
from fxint4 import Report

peft = pytest.importorskip("peft")
hotswap = pytest.importorskip("peft.utils.hotswap")

#: PEFT warns of names of adapters that are part of "lora_".
FIRST, SECOND = "first", "second"


class Projections(nn.Module):
    """Layers whose weights int4 holds exactly, for activations that bf16 does.

    So an int4 matmul gives the bits of an fp32 one, and adapters are compared to fp32's precision.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q = nn.Linear(hidden, hidden)
        self.v = nn.Linear(hidden, 2 * hidden, bias=False)
        with torch.no_grad():
            self.q.bias.zero_()
            for layer in (self.q, self.v):
                codes = torch.randint(-8, 8, layer.weight.shape)
                codes[:, 0::8], codes[:, 1::8] = -8, 7  # each group has scale 2^-8 and zero 0
                layer.weight.copy_(codes / 256)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.v(x)], -1)


def activations(rows: int, hidden: int) -> Tensor:
    return torch.randint(-1, 2, (rows, hidden)) * (torch.rand(rows, hidden) < 0.1).float()


def config(rank: int, **values: Any) -> Any:
    asked = {"lora_alpha": rank, "target_modules": ["q", "v"], "init_lora_weights": False}
    return peft.LoraConfig(r=rank, **{**asked, **values})


def adapted(hidden: int, asked: Any, seed: int = 0) -> Any:
    """A model with an adapter; equal seeds give equal weights of the base."""
    torch.manual_seed(7)
    base = Projections(hidden)
    torch.manual_seed(seed)
    return peft.get_peft_model(base, asked, FIRST).eval()


class Pair:
    """A model that runs with int4 weights, and its original, to which the same is done."""

    def __init__(self, hidden: int, asked: Any, device: str = "cpu", **compiled: Any) -> None:
        self.original = adapted(hidden, asked).to(device)
        self.model = copy.deepcopy(self.original)
        self.run: Callable[..., Tensor] = torch.compile(self.model, backend="int4tile", **compiled)
        self.x = activations(4, hidden).to(device)
        with torch.no_grad():
            self.before = self.check()

    def each(self) -> Iterable[Any]:
        return (self.original, self.model)

    def check(self, x: Tensor | None = None, *, changed: bool = True) -> Tensor:
        """Assert that both give the same, by int4 matmuls, and not the same as before."""
        x = self.x if x is None else x
        with torch.no_grad():
            expected = self.original(x)
            torch.testing.assert_close(self.run(x), expected)
            torch.testing.assert_close(self.run(x), expected)
        if hasattr(self, "before") and changed:
            assert x is not self.x or not torch.allclose(self.before, expected, rtol=1e-2)
        if x is self.x:
            self.before = expected
        check_report(fxint4.last_report())
        return expected


def check_report(report: Report | None, kept: str = "lora_") -> None:
    assert report is not None
    assert not report.recompile_limits
    for record in report.records:
        assert (record.action == "kept") == (kept in record.name), record
        if record.action == "kept":
            assert "an adapter" in record.reason


def adapters_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lora_" in name]


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # PyTorch's own first one
@pytest.mark.parametrize("hidden", [128, 256])
@pytest.mark.parametrize("rank", [4, 32, 64])
@pytest.mark.parametrize(
    ("device", "mode"),
    [
        ("cpu", None),
        pytest.param("cuda", None, marks=pytest.mark.gpu),
        # CUDA graphs keep the addresses of parameters.
        pytest.param("cuda", "reduce-overhead", marks=pytest.mark.gpu),
    ],
)
def test_weights_that_change_are_read_at_the_next_call(
    hidden: int, rank: int, device: str, mode: str | None
) -> None:
    pair = Pair(hidden, config(rank), device, mode=mode)
    other = adapted(hidden, config(rank), seed=1).to(device)
    for model in pair.each():
        for own, new in zip(adapters_of(model), adapters_of(other), strict=True):
            own.data.copy_(new.data)
    pair.check()
    for model in pair.each():
        for own in adapters_of(model):
            own.data = own.data * 2
    pair.check()
    for model in pair.each():
        model.load_state_dict(other.state_dict())
    pair.check()
    state = peft.get_peft_model_state_dict(
        adapted(hidden, config(rank), seed=2), adapter_name=FIRST
    )
    for model in pair.each():
        peft.set_peft_model_state_dict(model, state, adapter_name=FIRST)
    pair.check()
    report = fxint4.last_report()
    assert len(report.graphs) == 1  # the code stays
    assert report.totals["packed"] == 2


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize(("hidden", "ranks"), [(128, (4, 64)), (256, (32, 32))])
# PEFT's layers are compiled once for each set of adapters that are active.
@torch._dynamo.config.patch(recompile_limit=16)
def test_switching_mixing_and_disabling(hidden: int, ranks: tuple[int, int]) -> None:
    pair = Pair(hidden, config(ranks[0]))
    for model in pair.each():
        torch.manual_seed(1)
        model.add_adapter(SECOND, config(ranks[1]))  # in training mode, as PEFT leaves it
    pair.check(changed=False)
    for active in (SECOND, FIRST, [FIRST, SECOND]):
        for model in pair.each():
            model.base_model.set_adapter(active)
        pair.check()
    with pair.original.disable_adapter(), pair.model.disable_adapter():
        pair.check()
    pair.check()
    for kind in ("cat", "linear") if ranks[0] == ranks[1] else ("cat", "svd"):
        for model in pair.each():
            names, weights = [FIRST, SECOND], [0.75, -0.5]
            torch.manual_seed(2)
            model.add_weighted_adapter(names, weights, kind, combination_type=kind)
            model.set_adapter(kind)
        pair.check()
    for model in pair.each():
        model.delete_adapter("cat")
        model.set_adapter(FIRST)
    pair.check()


@pytest.mark.compiles
@pytest.mark.by_aten
def test_adapters_that_are_loaded(tmp_path: Path) -> None:
    other = adapted(128, config(64), seed=3)
    other.save_pretrained(tmp_path)
    pair = Pair(128, config(32))
    for model in pair.each():
        model.load_adapter(tmp_path / FIRST, SECOND)
        model.set_adapter(SECOND)
    pair.check()


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize(("rank", "new"), [(32, 32), (64, 4), (4, 64)])
def test_hotswapping(rank: int, new: int, tmp_path: Path) -> None:
    other = adapted(128, config(new, lora_alpha=new if new == rank else 3 * new), seed=3)
    other.save_pretrained(tmp_path)
    pair = Pair.__new__(Pair)
    pair.original = adapted(128, config(rank))
    if new != rank:
        hotswap.prepare_model_for_compiled_hotswap(pair.original, target_rank=64)
    pair.model = copy.deepcopy(pair.original)
    pair.run = torch.compile(pair.model, backend="int4tile", fullgraph=True)
    pair.x = activations(4, 128)
    pair.check()
    for model in pair.each():
        hotswap.hotswap_adapter(model, tmp_path / FIRST, FIRST)
    pair.check()
    with torch.no_grad():
        torch.testing.assert_close(pair.run(pair.x), other(pair.x))
    report = fxint4.last_report()
    assert len(report.graphs) == 1


@pytest.mark.compiles
@pytest.mark.by_aten
def test_an_adapter_for_each_row_of_a_batch() -> None:
    original = adapted(128, config(32))
    original.add_adapter(SECOND, config(64))
    original.eval()
    compiled, packed = copy.deepcopy(original), copy.deepcopy(original)
    x = activations(4, 128)
    fxint4.pack_(packed, (x,))
    run = torch.compile(compiled, backend="int4tile")
    for names in ([FIRST, SECOND, "__base__", SECOND], [SECOND, FIRST, SECOND, FIRST]):
        with torch.no_grad():
            expected = original(x, adapter_names=names)
            torch.testing.assert_close(run(x, adapter_names=names), expected)
            torch.testing.assert_close(packed(x, adapter_names=names), expected)
        check_report(fxint4.last_report())


@pytest.mark.compiles
@pytest.mark.by_aten
def test_dynamic_shapes() -> None:
    pair = Pair(128, config(32), dynamic=True, fullgraph=True)
    other = adapted(128, config(32), seed=1)
    for rows in (2, 7, 4):
        pair.check(activations(rows, 128))
        for model in pair.each():
            for own, new in zip(adapters_of(model), adapters_of(other), strict=True):
                own.data = new.data * rows


@pytest.mark.compiles
@pytest.mark.by_aten
def test_layers_that_share_code() -> None:
    """Each layer is compiled by itself; the second runs the code of the first."""
    asked = config(32)
    torch.manual_seed(7)
    layers = nn.ModuleList([Projections(128) for _ in range(3)])
    model = peft.get_peft_model(layers, asked).eval()
    original = copy.deepcopy(model)
    x = activations(4, 128)
    for layer in layers:
        layer.compile(backend="int4tile", fullgraph=True)
    with torch.no_grad():
        for layer, own in zip(layers, original.base_model.model, strict=True):
            torch.testing.assert_close(layer(x), own(x))
    report = fxint4.last_report()
    check_report(report)
    assert report is not None
    assert report.totals["packed"] == 6
    assert report.totals["kept"] == 12


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("rank", [4, 32, 64, 128])
def test_pack_leaves_adapters_alone(rank: int, examples: bool) -> None:
    original = adapted(128, config(rank))
    model = copy.deepcopy(original)
    x = activations(4, 128)
    report = fxint4.pack_(model, (x,) if examples else ())
    check_report(report)
    assert report.totals["packed"] == 2
    torch.testing.assert_close(model(x), original(x))


@pytest.mark.compiles
@pytest.mark.by_aten
def test_adapters_over_a_packed_model() -> None:
    """The base is packed first; the adapters come and change later."""
    torch.manual_seed(7)
    packed, plain = Projections(128).eval(), Projections(128).eval()
    plain.load_state_dict(packed.state_dict())
    fxint4.pack_(packed)
    x = activations(4, 128)
    models = []
    for base in (packed, plain):
        torch.manual_seed(0)
        models.append(peft.get_peft_model(base, config(32), FIRST).eval())
    with torch.no_grad():
        torch.testing.assert_close(models[0](x), models[1](x))
        compiled = torch.compile(models[0], backend="int4tile")
        torch.testing.assert_close(compiled(x), models[1](x))
        for model in models:
            torch.manual_seed(1)
            model.add_adapter(SECOND, config(64))
            model.base_model.set_adapter([FIRST, SECOND])
        torch.testing.assert_close(compiled(x), models[1](x))
    report = fxint4.last_report()
    check_report(report)
    assert report is not None
    assert {r.reason for r in report.records if r.action == "packed"} == {
        "packed before; activations cast from float32 to bfloat16"
    }


KIN = {
    "LoHa": lambda: peft.LoHaConfig(r=32, target_modules=["q", "v"], init_weights=False),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=["q", "v"], init_weights=False),
    "VeRA": lambda: peft.VeraConfig(r=32, target_modules=["q"], init_weights=False),
    "IA3": lambda: peft.IA3Config(
        target_modules=["q", "v"], feedforward_modules=[], init_ia3_weights=False
    ),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=32, target_r=16, total_step=9, target_modules=["q", "v"], init_lora_weights=False
    ),
}


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize("kind", KIN)
# Dynamo makes an instance where a model, such as LoHa's, has a function with a gradient of its own.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_other_kinds_of_adapters(kind: str) -> None:
    original = adapted(128, KIN[kind]())
    packed, compiled = copy.deepcopy(original), copy.deepcopy(original)
    x = activations(4, 128)
    for examples in ((), (x,)):
        packed = copy.deepcopy(original)
        report = fxint4.pack_(packed, examples)
        assert {r.name.rpartition(".")[2] for r in report.records if r.action == "packed"} <= {
            "base_layer",
            "v",
        }
        assert report.totals["packed"] == 2
        assert all("an adapter" in r.reason for r in report.records if r.action == "kept")
        with torch.no_grad():
            torch.testing.assert_close(packed(x), original(x))
    run = torch.compile(compiled, backend="int4tile")
    with torch.no_grad():
        torch.testing.assert_close(run(x), original(x))
        for model in (original, compiled):
            for name, parameter in model.named_parameters():
                if "base_layer" not in name and parameter.requires_grad:
                    parameter.data.mul_(-2)
        torch.testing.assert_close(run(x), original(x))
    report = fxint4.last_report()  # type: ignore[assignment]
    assert report.totals["packed"] == 2
    assert all("an adapter" in r.reason for r in report.records if r.action == "kept")


@pytest.mark.compiles
@pytest.mark.by_aten
def test_dora() -> None:
    """It computes norms of W + B @ A; pack_ keeps W for that. Dynamo runs PEFT's layer in eager."""
    original = adapted(128, config(32, use_dora=True, target_modules=["q"]))
    x = activations(4, 128)
    for examples in ((), (x,)):
        packed = copy.deepcopy(original)
        report = fxint4.pack_(packed, examples)
        assert [r.name for r in report.records if r.action == "packed"] == ["base_model.model.v"]
        with torch.no_grad():
            torch.testing.assert_close(packed(x), original(x))
        why = {r.name.rpartition(".")[2]: r.reason for r in report.records}
        assert examples or "(DoRA) computes a norm of it" in why["base_layer"]
    compiled = copy.deepcopy(original)
    run = torch.compile(compiled, backend="int4tile")
    with torch.no_grad():
        torch.testing.assert_close(run(x), original(x))
        for model in (original, compiled):
            for own in adapters_of(model):
                own.data.mul_(-2)
        torch.testing.assert_close(run(x), original(x))
    report = fxint4.last_report()  # type: ignore[assignment]
    assert all("an adapter" in r.reason for r in report.records if r.action == "kept")


def test_an_oft_adapter_is_left_alone() -> None:
    asked = peft.OFTConfig(oft_block_size=32, target_modules=["q", "v"])
    report = fxint4.pack_(adapted(128, asked), (activations(4, 128),))
    assert [r.name.rpartition(".")[2] for r in report.records if r.action == "packed"] == [
        "base_layer",
        "base_layer",
    ]


class Unknown(nn.Module):
    """A layer as PEFT's are, of a kind that no list has."""

    adapter_layer_names = ("newest_down", "newest_up")

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.newest_down = nn.ModuleDict({"x": nn.Linear(64, 64)})
        self.newest_up = nn.ModuleDict({"x": nn.Linear(64, 64)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.newest_up["x"](self.newest_down["x"](x).relu())


@pytest.mark.parametrize("examples", [False, True])
def test_layers_of_kinds_to_come(examples: bool) -> None:
    model = nn.Sequential(Unknown(nn.Linear(64, 64))).eval()
    x = (torch.randn(2, 64),) if examples else ()
    report = fxint4.pack_(copy.deepcopy(model), x)
    reason = "an adapter, newest_{}, beside base_layer; to pack it, name it in include"
    assert {record.name: record.reason for record in report.records} == {
        "0.base_layer": "",
        "0.newest_down.x": reason.format("down"),
        "0.newest_up.x": reason.format("up"),
    }
    report = fxint4.pack_(copy.deepcopy(model), x, {"include": ["*", "*newest_up*"]})
    assert [r.name for r in report.records if r.action == "packed"] == [
        "0.base_layer",
        "0.newest_up.x",
    ]


def test_include_packs_adapters() -> None:
    model = adapted(128, config(32))
    report = fxint4.pack_(model, options={"include": ["*", "*.q.lora_[AB]"]})
    packed = [record.name for record in report.records if record.action == "packed"]
    assert packed == [
        f"base_model.model.{name}"
        for name in ("q.base_layer", f"q.lora_A.{FIRST}", f"q.lora_B.{FIRST}", "v.base_layer")
    ]


def test_modules_to_save_of_a_packed_model(tmp_path: Path) -> None:
    asked = config(8, target_modules=["q"], modules_to_save=["v"])
    base = Projections(128)
    fxint4.pack_(base, options={"group_size": 32})
    with pytest.warns(fxint4.UntrainedWarning, match="has no gradient and is not trained"):
        peft.get_peft_model(copy.deepcopy(base), asked, FIRST)

    fxint4.dequantize_(base.v)
    tuned = peft.get_peft_model(base, asked, FIRST)
    tuned(activations(4, 128)).sum().backward()
    assert tuned.base_model.v.modules_to_save[FIRST].weight.grad is not None
    tuned.save_pretrained(tmp_path)


def test_modules_to_save_are_packed() -> None:
    """PEFT trains a copy of a whole layer, which is a layer as any other."""
    model = adapted(128, config(32, target_modules=["q"], modules_to_save=["v"]))
    report = fxint4.pack_(model, (activations(4, 128),))
    kept = {r.name.split(".", 2)[2]: r.action for r in report.records}
    assert kept[f"v.modules_to_save.{FIRST}"] == "packed"


@pytest.mark.parametrize(
    "packaged", [False, pytest.param(True, marks=[pytest.mark.compiles, pytest.mark.full])]
)
def test_exported_programs(packaged: bool, tmp_path: Path) -> None:
    model = adapted(128, config(32))
    x = activations(4, 128)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        expected = model(x)
        if packaged:
            path = fxint4.package(program, tmp_path / "model.pt2")
            y = torch._inductor.aoti_load_package(path)(x)
        else:
            y = fxint4.rewrite(program).module()(x)
    torch.testing.assert_close(y, expected)
    report = fxint4.last_report()
    check_report(report)
    assert report is not None
    reason = "an adapter of rank 32 beside base_layer; to pack it, name it in include"
    assert [r.reason for r in report.records if r.action == "kept"] == [reason] * 4


@pytest.mark.parametrize("budget", [{}, {"max_bytes": 1}])
def test_runs_of_our_own_leave_adapters_alone(budget: dict[str, Any]) -> None:
    model = adapted(64, config(32, target_modules=["q"]))
    x = activations(150, 64)
    options = {"method": "gptq", **budget}
    calibration = fxint4.calibrate(model, [x], options)
    assert [key for key in calibration if "lora_" in key] == []
    assert len(calibration) == 2
    assert set(calibration.choices) <= set(calibration)
    given = {**options, "calibration": calibration, "measure": True}
    report = fxint4.pack_(model, (x,), given)
    check_report(report)
    measured = {record.name for record in report.records if record.output_error is not None}
    assert len(measured) == 2
