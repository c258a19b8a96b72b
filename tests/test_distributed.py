"""Weights that DTensor splits among processes: each packs and multiplies by its part."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from reference import dequantized
from torch import Tensor, nn
from torch.distributed import get_rank, get_world_size
from torch.nn import functional as F

import fxint4
from fxint4 import Int4TileTensor
from fxint4.errors import UnsupportedOpError

DTensor: Any
try:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )
except ImportError:
    pytest.skip("this PyTorch has no DTensor", allow_module_level=True)

pytestmark = [pytest.mark.compiles, pytest.mark.by_aten]

GROUP = {"group_size": 32}
HIDDEN, MIDDLE = 64, 128


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.end()


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.end()


class Mlp(nn.Module):
    def __init__(self, middle: int = MIDDLE) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, middle)
        self.down = nn.Linear(middle, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def rows() -> Tensor:
    return torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))


def plan() -> dict[str, ParallelStyle]:
    return {"up": ColwiseParallel(), "down": RowwiseParallel()}


def line() -> Any:
    return init_device_mesh("cpu", (get_world_size(),))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def quantized(weight: Tensor) -> Tensor:
    """``[N, K]``, or experts ``[E, K, N]``, in float64."""
    if weight.ndim > 2:
        return torch.stack([quantized(each.t()).t() for each in weight])
    return dequantized(weight, 32, torch.float64)


def exact(model: nn.Module, split: Mapping[str, int]) -> nn.Module:
    """The model in float64, with weights quantized part by part.

    Args:
        model: The whole model.
        split: The axis along which each weight is split, by its name.
    """
    made = copy.deepcopy(model).double()
    for name, axis in split.items():
        parameter = made.get_parameter(name)
        parts = model.get_parameter(name).detach().chunk(get_world_size(), axis)
        with torch.no_grad():
            parameter.copy_(torch.cat([quantized(part) for part in parts], axis))
    return made


def check(y: Tensor, wanted: Tensor) -> None:
    """Within roundings to bf16 of x, of products, and of what is between."""
    assert ((y.double() - wanted).norm() / wanted.norm()) < 2.0**-6


def compiled(model: nn.Module, *args: Any) -> tuple[Any, fxint4.Report]:
    torch.compiler.reset()
    with torch.no_grad():
        y = torch.compile(model, backend="int4tile", options=GROUP)(*args)
    return (y.full_tensor() if isinstance(y, DTensor) else y), fxint4.last_report()


# --- compiled ------------------------------------------------------------------------------------


def columns_and_rows(middle: int) -> None:
    whole = seeded(lambda: Mlp(middle))
    model = parallelize_module(copy.deepcopy(whole), line(), plan())
    y, report = compiled(model, rows())
    with torch.no_grad():
        check(y, exact(whole, {"up.weight": 0, "down.weight": 1})(rows().double()))
    part, rank = middle // 2, get_rank()
    assert [
        (each.name, each.action, each.n, each.k, each.shard.partition(",")[2], each.parameters)
        for each in report.records
    ] == [
        ("up", "packed", part, HIDDEN, " along N", ("up.weight",)),
        ("down", "packed", HIDDEN, part, " along K", ("down.weight",)),
    ]
    assert all(each.shard.startswith(f"shard {rank + 1} of 2,") for each in report.records)
    assert f"shard {rank + 1} of 2" in str(report)
    sizes = part * HIDDEN * 2
    share = sizes / (sizes + part)
    assert report.coverage["parameter_share"] == pytest.approx(share)
    # A call with changed values of the local part packs it anew.
    with torch.no_grad():
        model.up.weight.to_local().neg_()
        model.up.bias.to_local().neg_()
        whole.up.weight.neg_()
        whole.up.bias.neg_()
        again = torch.compile(model, backend="int4tile", options=GROUP)(rows())
        check(again, exact(whole, {"up.weight": 0, "down.weight": 1})(rows().double()))


@pytest.mark.parametrize("middle", [MIDDLE, 96])  # 48 columns cut a group of 32
def test_columns_and_rows(middle: int, two: Ranks) -> None:
    two.call(columns_and_rows, middle)


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.mlp = Mlp()
        self.head = nn.Linear(HIDDEN, 96)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        return self.head(hidden + self.mlp(self.norm(hidden)))  # type: ignore[no-any-return]


def sequence() -> None:
    whole = seeded(Sequence)
    model = parallelize_module(
        copy.deepcopy(whole),
        line(),
        {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(use_local_output=True),
            "mlp": PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
            ),
            "mlp.up": ColwiseParallel(),
            "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        },
    )
    ids = torch.arange(8)[None]
    y, report = compiled(model, ids)
    split = {"mlp.up.weight": 0, "mlp.down.weight": 1, "head.weight": 0}
    with torch.no_grad():
        check(y, exact(whole, split)(ids))
    names = ["mlp.up", "mlp.down", "head"]
    assert [(each.name, each.action) for each in report.records] == [
        (name, "packed") for name in names
    ]
    kept = {each["name"]: each["reason"] for each in report.coverage["not_packed"]}
    assert "embedding" in kept["embed.weight"]


def test_a_sequence_in_parts(two: Ranks) -> None:
    two.call(sequence)


class Experts(nn.Module):
    """Experts ``[E, K, N]``; x comes as it is in every process."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, HIDDEN, 96) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class Distributed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        mesh = self.inner.weight.device_mesh
        whole = [Replicate()] * mesh.ndim
        return self.inner(DTensor.from_local(x, mesh, whole, run_check=False))  # type: ignore[no-any-return]


def experts(axis: int, letter: str) -> None:
    whole = seeded(Experts)
    inner = copy.deepcopy(whole)
    inner.weight = nn.Parameter(distribute_tensor(inner.weight.data, line(), [Shard(axis)]))
    x = torch.randn(4, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    y, report = compiled(Distributed(inner), x)
    with torch.no_grad():
        check(y, exact(whole, {"weight": axis})(x.double()))
    (record,) = report.records
    assert (record.action, record.shard) == (
        "packed",
        f"shard {get_rank() + 1} of 2, along {letter}",
    )


@pytest.mark.parametrize(("axis", "letter"), [(0, "E"), (1, "K"), (2, "N")])
def test_experts(axis: int, letter: str, two: Ranks) -> None:
    two.call(experts, axis, letter)


def plane() -> None:
    """A mesh of two axes, of which one splits N and the other K."""
    mesh = init_device_mesh("cpu", (2, 2))
    whole = seeded(lambda: nn.Linear(HIDDEN, MIDDLE, bias=False))
    inner = copy.deepcopy(whole)
    inner.weight = nn.Parameter(distribute_tensor(inner.weight.data, mesh, [Shard(0), Shard(1)]))
    y, report = compiled(Distributed(inner), rows())
    parts = [half.chunk(2, 1) for half in whole.weight.detach().chunk(2)]
    values = torch.cat(
        [torch.cat([dequantized(p, 32, torch.float64) for p in row], 1) for row in parts]
    )
    check(y, F.linear(rows().double(), values))
    (record,) = report.records
    first, second = mesh.get_coordinate()
    assert record.shard == f"shard {first + 1} of 2, along N; shard {second + 1} of 2, along K"
    assert (record.n, record.k) == (MIDDLE // 2, HIDDEN // 2)


def test_a_mesh_of_two_axes(four: Ranks) -> None:
    four.call(plane)


# --- packed in place -----------------------------------------------------------------------------


def locals_of(model: nn.Module) -> list[Tensor]:
    parameters = [each.to_local() for each in model.parameters() if isinstance(each, DTensor)]
    packed = [each for each in parameters if isinstance(each, Int4TileTensor)]
    assert len(packed) == 2
    return [each.dequantize() for each in packed]


def packed_in_place() -> None:
    whole = seeded(Mlp)
    reference = exact(whole, {"up.weight": 0, "down.weight": 1})
    after = parallelize_module(copy.deepcopy(whole), line(), plan())
    report = fxint4.pack_(after, options=GROUP)
    shards = [each.shard for each in report.records]
    assert shards == [f"shard {get_rank() + 1} of 2, along {axis}" for axis in "NK"]
    one = copy.deepcopy(whole)
    fxint4.pack_(one, options=GROUP)
    models = {"after": after}
    for source in (0, None):
        models[f"before, {source}"] = parallelize_module(
            copy.deepcopy(one), line(), plan(), src_data_rank=source
        )
    with torch.no_grad():
        wanted = reference(rows().double())
        for name, model in models.items():
            assert all(map(torch.equal, locals_of(model), locals_of(after))), name
            check(model(rows()), wanted)
            for weight, of_one in ((model.up.weight, one.up), (model.down.weight, one.down)):
                full = weight.full_tensor()
                assert isinstance(full, Int4TileTensor)
                assert torch.equal(full.dequantize(), of_one.weight.dequantize())
    y, report = compiled(after, rows())
    check(y, wanted)
    assert [each.shard for each in report.records] == shards
    assert all(each.reason.startswith("packed before") for each in report.records)
    fxint4.dequantize_(after)
    assert type(after.up.weight.to_local()) is Tensor
    with torch.no_grad():
        check(after(rows()), wanted)


def test_packed_in_place(two: Ranks) -> None:
    two.call(packed_in_place)


def moved(n: int) -> None:
    mesh = line()
    values = torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(0))
    packed = Int4TileTensor.from_float(values, fxint4.Int4Config(group_size=32))
    wanted, count, rank = packed.dequantize(), get_world_size(), get_rank()
    for axis in (0, 1):
        for source in (0, None):
            given = distribute_tensor(packed, mesh, [Shard(axis)], src_data_rank=source)
            part = wanted.chunk(count, axis)[rank]
            assert torch.equal(given.to_local().dequantize(), part)
            other = given.redistribute(mesh, [Shard(1 - axis)])
            assert torch.equal(other.to_local().dequantize(), wanted.chunk(count, 1 - axis)[rank])
            for made in (given, other, given.redistribute(mesh, [Replicate()])):
                assert torch.equal(made.full_tensor().dequantize(), wanted)
    mine = (
        packed
        if rank == 0
        else Int4TileTensor.from_float(-values, fxint4.Int4Config(group_size=32))
    )
    everywhere = distribute_tensor(mine, mesh, [Replicate()])
    assert torch.equal(everywhere.to_local().dequantize(), wanted)
    local = packed.chunk(count)[rank]
    lies = {"shape": packed.shape, "stride": packed.stride()}
    again = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, **lies)
    assert torch.equal(again.full_tensor().dequantize(), wanted)


@pytest.mark.parametrize("n", [MIDDLE, 101])  # the parts of 101 rows differ
def test_moved_between_processes(n: int, two: Ranks) -> None:
    two.call(moved, n)


def test_moved_between_more(four: Ranks) -> None:
    """A quarter of K is half a group."""
    four.call(cut)


def cut() -> None:
    values = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))
    packed = Int4TileTensor.from_float(values, fxint4.Int4Config(group_size=32))
    given = distribute_tensor(packed, line(), [Shard(1)], src_data_rank=None)
    part = packed.dequantize().chunk(4, 1)[get_rank()]
    assert torch.equal(given.to_local().dequantize(), part)
    with pytest.raises(UnsupportedOpError, match="cuts a group"):
        given.full_tensor()


def calibrated() -> None:
    """Each process has statistics of the columns that its part multiplies."""
    whole = seeded(Mlp)
    model = parallelize_module(copy.deepcopy(whole), line(), plan())
    x = torch.randn(512, HIDDEN, generator=torch.Generator().manual_seed(1)) @ torch.randn(
        HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(2)
    )
    calibration = fxint4.calibrate(model, [(x,)])
    errors = {}
    with torch.no_grad():
        exact_y = whole(x)
        for method in ("rtn", "gptq"):
            packed = copy.deepcopy(model)
            options = {**GROUP, "method": method, "calibration": calibration}
            report = fxint4.pack_(packed, (x,), options=options)
            assert [(each.action, each.method) for each in report.records] == [
                ("packed", method)
            ] * 2
            errors[method] = (packed(x) - exact_y).norm()
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_calibrated(two: Ranks) -> None:
    two.call(calibrated)


def pipelined() -> None:
    """Each process has packed layers of its own, and hands activations on."""
    whole = seeded(lambda: nn.Sequential(Mlp(), Mlp()))
    fxint4.pack_(whole, options=GROUP)
    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1))
    rank = get_rank()
    stage = PipelineStage(whole[rank], rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2)
    with torch.no_grad():
        y = schedule.step(x) if rank == 0 else schedule.step()
        if rank == 1:
            check(y, whole(x).double())


def test_a_pipeline(two: Ranks) -> None:
    two.call(pipelined)


# --- models of transformers ----------------------------------------------------------------------


def of_transformers(folder: str) -> None:
    from transformers import LlamaForCausalLM

    def load(folder: str, **given: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions rename `tp_plan`
            return LlamaForCausalLM.from_pretrained(folder, **given)

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False).logits  # type: ignore[no-any-return]

    ids = torch.arange(7)[None]
    one = load(folder)
    fxint4.pack_(one, options=GROUP)
    wanted = logits(one).double()
    packed = sum(isinstance(each, Int4TileTensor) for each in one.parameters())

    plain = load(folder, tp_plan="auto")
    y, report = compiled(plain, ids)
    check(y.logits, wanted)
    assert report.totals["packed"] == packed
    assert all(each.shard.startswith("shard") for each in report.records)

    config = fxint4.Int4TileConfig(**GROUP)
    loaded = load(folder, tp_plan="auto", quantization_config=config)
    check(logits(loaded), wanted)
    records = loaded.int4tile_report.records
    assert [each.action for each in records] == ["packed"] * packed
    assert {each.shard.partition(", ")[0] for each in records} == {f"shard {get_rank() + 1} of 2"}
    saved = f"{folder}/saved"
    loaded.save_pretrained(saved, is_main_process=get_rank() == 0)
    torch.distributed.barrier()
    again = load(saved, tp_plan="auto")
    assert torch.equal(logits(again), logits(loaded))
    assert again.int4tile_report.totals["packed"] == packed
    assert [each.shard for each in again.int4tile_report.records] == [
        each.shard for each in records
    ]
    whole = load(saved)
    for name, parameter in one.named_parameters():
        if isinstance(parameter, Int4TileTensor):
            assert torch.equal(whole.get_parameter(name).dequantize(), parameter.dequantize())


def test_a_model_of_transformers(two: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("transformers.core_model_loading", reason="transformers before 5.17")
    from tiny_transformers import llama

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    llama(num_hidden_layers=1, **sizes).save_pretrained(tmp_path)
    two.call(of_transformers, str(tmp_path))
