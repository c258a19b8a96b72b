"""Weights that DTensor splits among processes: each packs and multiplies by its part."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, device
from reference import dequantized
from torch import Tensor, nn
from torch.distributed import get_rank, get_world_size
from torch.nn import functional as F

import fxint4
from fxint4 import Int4TileTensor
from fxint4._pytorch import distributed as private
from fxint4.errors import FoldError, UnsupportedOpError
from fxint4.lowering.all_reduce import MOST_BYTES

DTensor: Any
try:
    from torch.distributed import checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
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


#: Where processes compute. NCCL needs a GPU for each.
WHERE = [
    pytest.param(("gloo", "cpu"), id="cpu"),
    pytest.param(("nccl", "cuda"), id="gpus", marks=pytest.mark.gpu2),
]
#: Processes that share a GPU, too: gloo has some of the collectives for a GPU's memory.
ANYWHERE = [*WHERE, pytest.param(("gloo", "cuda"), id="gpu", marks=pytest.mark.gpu)]
two_anywhere = pytest.mark.parametrize("two", ANYWHERE, indirect=True)
four_anywhere = pytest.mark.parametrize("four", [ANYWHERE[0], ANYWHERE[2]], indirect=True)


@pytest.fixture(scope="module", params=WHERE)
def two(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(2, *request.param)
    yield ranks
    ranks.end()


@pytest.fixture(scope="module", params=WHERE[:1])
def four(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(4, *request.param)
    yield ranks
    ranks.end()


class Mlp(nn.Module):
    def __init__(self, middle: int = MIDDLE) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, middle)
        self.down = nn.Linear(middle, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device())


def rows() -> Tensor:
    return random(3, HIDDEN, seed=1)


def plan() -> dict[str, ParallelStyle]:
    return {"up": ColwiseParallel(), "down": RowwiseParallel()}


def line() -> Any:
    return init_device_mesh(device().type, (get_world_size(),))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval().to(device())


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


@two_anywhere
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
    ids = torch.arange(8, device=device())[None]
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
    x = random(4, 5, HIDDEN, seed=1)
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
    mesh = init_device_mesh(device().type, (2, 2))
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
    values = random(n, HIDDEN, seed=0)
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
    # Along another axis, as GPUs do it. On CPUs `redistribute` gathers the whole instead.
    for old, new in ((0, 1), (1, 0)) if n % count == 0 else ():
        part = packed.chunk(count, old)[rank]
        made = torch.ops._dtensor.shard_dim_alltoall(part, old, new, mesh.get_group().group_name)
        assert torch.equal(made.dequantize(), wanted.chunk(count, new)[rank])
    everywhere = distribute_tensor(mine, mesh, [Replicate()])
    assert torch.equal(everywhere.to_local().dequantize(), wanted)
    local = packed.chunk(count)[rank]
    lies = {"shape": packed.shape, "stride": packed.stride()}
    again = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, **lies)
    assert torch.equal(again.full_tensor().dequantize(), wanted)


@pytest.mark.parametrize("n", [MIDDLE, 101])  # the parts of 101 rows differ
def test_moved_between_processes(n: int, two: Ranks) -> None:
    two.call(moved, n)


@four_anywhere
def test_moved_between_more(four: Ranks) -> None:
    """A quarter of K is half a group."""
    four.call(cut)


def cut() -> None:
    values = random(HIDDEN, HIDDEN, seed=0)
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
    x = random(512, HIDDEN, seed=1) @ random(HIDDEN, HIDDEN, seed=2)
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


@two_anywhere
def test_calibrated(two: Ranks) -> None:
    two.call(calibrated)


def pipelined() -> None:
    """Each process has packed layers of its own, and hands activations on."""
    whole = seeded(lambda: nn.Sequential(Mlp(), Mlp()))
    fxint4.pack_(whole, options=GROUP)
    x = random(4, HIDDEN, seed=1)
    rank = get_rank()
    stage = PipelineStage(whole[rank], rank, 2, device())
    schedule = ScheduleGPipe(stage, 2)
    with torch.no_grad():
        y = schedule.step(x) if rank == 0 else schedule.step()
        if rank == 1:
            check(y, whole(x).double())


def test_a_pipeline(two: Ranks) -> None:
    two.call(pipelined)


# --- FSDP2 ---------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Linear layers, experts ``[E, N, K]``, and an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.experts = nn.Parameter(torch.randn(4, HIDDEN, HIDDEN) / 8)
        self.a = nn.Linear(HIDDEN, 4, bias=False)
        self.b = nn.Linear(4, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x) + self.b(self.a(x))
        return torch.bmm(x.expand(4, -1, -1), self.experts.transpose(1, 2)).sum(0)


def layers() -> nn.Module:
    model = seeded(Layers)
    fxint4.pack_(model, (rows(),), options={**GROUP, "min_features": 32})
    assert sum(isinstance(each, Int4TileTensor) for each in model.parameters()) == 3
    return model


def sharded(model: Any) -> Any:
    """A copy that is fully sharded: `mlp` by itself, as one does it with layers, then the rest."""
    made = copy.deepcopy(model)
    for module in (made.mlp, made):
        fully_shard(module, mesh=line())
    return made


class Counted:
    """An all-gather for `set_custom_all_gather` that counts the bytes which the process sends."""

    sent = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        self.sent += input_tensor.nbytes
        return torch.distributed.all_gather_into_tensor(
            output_tensor, input_tensor, group=group, async_op=async_op
        )


def fully() -> None:
    one = layers()
    model, gather = sharded(one), Counted()
    for module in (model.mlp, model):
        module.set_custom_all_gather(gather)
    x = rows()
    packed = sum(w.packed_bytes for w in one.parameters() if isinstance(w, Int4TileTensor))
    floats = sum(w.nbytes for w in one.parameters() if not isinstance(w, Int4TileTensor))
    with torch.no_grad():
        assert torch.equal(model(x), one(x))
        assert gather.sent == (packed + floats) / get_world_size()
        model.reshard()
        assert torch.equal(model(x), one(x))  # what was gathered was freed, and is gathered again
        model.reshard()
        # A weight that is written to is gathered anew.
        local = model.mlp.up.weight.to_local()
        assert isinstance(local, Int4TileTensor)
        local.scale_and_zero.neg_()
        one.mlp.up.weight.scale_and_zero.neg_()
        assert torch.equal(model(x), one(x))
    y, report = compiled(model, x)
    with torch.no_grad():
        check(y, one(x).double())
    packed = [each for each in report.records if each.action == "packed"]
    assert [each.name for each in packed] == ["mlp.up", "mlp.down", "experts"]
    assert all(each.reason.startswith("packed before") for each in packed)


@two_anywhere
def test_fully_sharded(two: Ranks) -> None:
    two.call(fully)


def policies() -> None:
    one = layers()
    for policy, dtype in (
        ({"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}, torch.bfloat16),
        ({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, torch.float32),
    ):
        model = copy.deepcopy(one)
        fully_shard(model, mesh=line(), **policy)
        with torch.no_grad():
            for _ in range(2):
                y = model(rows())
                assert y.dtype is dtype
                check(y, copy.deepcopy(one).to(dtype)(rows().to(dtype)).double())
                model.reshard()


def test_fully_sharded_by_policies(two: Ranks) -> None:
    two.call(policies)


def trained() -> None:
    """Adapters over packed weights learn as in one process that sees the rows of all."""
    one = layers()
    model = sharded(one)
    x = random(2 * get_world_size(), HIDDEN, seed=1)
    for each, inputs in ((one, x), (model, x.chunk(get_world_size())[get_rank()])):
        trained = [p for n, p in each.named_parameters() if n.endswith(("a.weight", "b.weight"))]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            each(inputs).square().mean().backward()
            optimizer.step()
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor()
        wanted = one.get_parameter(name)
        if isinstance(wanted, Int4TileTensor):
            assert torch.equal(whole.dequantize(), wanted.dequantize()), name
        else:
            torch.testing.assert_close(whole, wanted, msg=name)
    first = layers()
    assert not torch.equal(one.a.weight, first.a.weight)


def test_trained_fully_sharded(two: Ranks) -> None:
    two.call(trained)


def not_packed() -> None:
    """Float weights that are gathered for each call are not packed in it."""
    whole = seeded(Mlp)
    model = copy.deepcopy(whole)
    fully_shard(model, mesh=line())
    y, report = compiled(model, rows())
    with torch.no_grad():
        torch.testing.assert_close(y, whole(rows()))
    assert [(each.action, each.reason) for each in report.records] == [
        ("kept", "gathered by fully_shard in each call; fxint4.pack_ the model before fully_shard")
    ] * 2
    for change in (fxint4.pack_, fxint4.dequantize_):
        with pytest.raises(FoldError, match=r"up.weight is sharded by fully_shard.* before"):
            change(model)
    # Parts of a weight differ, or would be columns: all processes refuse alike.
    for n, place in ((101, None), (HIDDEN, Shard(1))):
        odd = nn.Sequential(nn.Linear(HIDDEN, n))
        fxint4.pack_(odd, options=GROUP)
        with pytest.raises(UnsupportedOpError, match="split a packed weight along its first axis"):
            fully_shard(odd, mesh=line(), shard_placement_fn=lambda _, place=place: place)


@two_anywhere
def test_not_packed_fully_sharded(two: Ranks) -> None:
    two.call(not_packed)


def both() -> None:
    """Tensor parallel within pairs, fully sharded among them."""
    mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=("data", "tensor"))
    whole = seeded(Mlp)
    model = parallelize_module(copy.deepcopy(whole), mesh["tensor"], plan())
    fxint4.pack_(model, options=GROUP)
    with torch.no_grad():
        wanted = model(rows())
        fully_shard(model, mesh=mesh["data"])
        for _ in range(2):
            assert torch.equal(model(rows()), wanted)
            model.reshard()
    fxint4.pack_(whole, options=GROUP)
    for name in ("up", "down"):
        full, one = (each.get_submodule(name).weight for each in (model, whole))
        assert torch.equal(full.full_tensor().dequantize(), one.dequantize())


def test_fully_sharded_and_tensor_parallel(four: Ranks) -> None:
    four.call(both)


# --- checkpoints ---------------------------------------------------------------------------------


def distributed_model(way: str) -> Any:
    """A packed model whose parts are whole tiles for one, two and four processes."""
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 64)))
    if way == "tensor parallel":
        columns_and_rows = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        model = parallelize_module(model, line(), columns_and_rows)
    fxint4.pack_(model, options={"group_size": 128})
    if way == "fully sharded":
        fully_shard(model, mesh=line())
    return model


def saved(way: str, folder: str) -> None:
    model = distributed_model(way)
    state = fxint4.plain_state_dict(model.state_dict())
    assert "0._weight_tiles" in state
    checkpoint.save(state, checkpoint_id=folder)


def loaded(way: str, folder: str) -> None:
    wanted, model = distributed_model(way), distributed_model(way)
    for each in model.parameters():
        local = each.to_local() if isinstance(each, DTensor) else each
        for values in local.buffers.values() if isinstance(local, Int4TileTensor) else [local]:
            with torch.no_grad():
                values.zero_()
    with torch.no_grad():
        assert not torch.equal(model(random(2, 64, seed=1)), wanted(random(2, 64, seed=1)))
    checkpoint.load(fxint4.plain_state_dict(model.state_dict()), checkpoint_id=folder)
    with torch.no_grad():
        assert torch.equal(model(random(2, 64, seed=1)), wanted(random(2, 64, seed=1)))


@two_anywhere
@pytest.mark.parametrize("way", ["tensor parallel", "fully sharded"])
def test_a_checkpoint_of_two_processes(way: str, two: Ranks, four: Ranks, tmp_path: Path) -> None:
    two.call(saved, way, str(tmp_path))
    four.call(loaded, way, str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch assumes that one process is meant, and says so
        loaded("one process", str(tmp_path))


def cut_checkpoint() -> None:
    model = parallelize_module(seeded(lambda: Mlp(96)), line(), plan())
    fxint4.pack_(model, options=GROUP)
    with pytest.raises(UnsupportedOpError, match=r"down\.weight .* no whole tiles"):
        fxint4.plain_state_dict(model.state_dict())


@two_anywhere
def test_a_checkpoint_of_cut_tiles(two: Ranks) -> None:
    two.call(cut_checkpoint)


# --- models of transformers ----------------------------------------------------------------------


def of_transformers(folder: str) -> None:
    from transformers import LlamaForCausalLM

    def load(folder: str, **given: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions rename `tp_plan`
            made = LlamaForCausalLM.from_pretrained(folder, **given)
        return made.to(device())

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False).logits  # type: ignore[no-any-return]

    split = {"tp_plan": "auto", "device_mesh": line()}
    ids = torch.arange(7, device=device())[None]
    one = load(folder)
    fxint4.pack_(one, options=GROUP)
    wanted = logits(one).double()
    packed = sum(isinstance(each, Int4TileTensor) for each in one.parameters())

    plain = load(folder, **split)
    y, report = compiled(plain, ids)
    check(y.logits, wanted)
    assert report.totals["packed"] == packed
    assert all(each.shard.startswith("shard") for each in report.records)

    config = fxint4.Int4TileConfig(**GROUP)
    loaded = load(folder, **split, quantization_config=config)
    check(logits(loaded), wanted)
    records = loaded.int4tile_report.records
    assert [each.action for each in records] == ["packed"] * packed
    assert {each.shard.partition(", ")[0] for each in records} == {f"shard {get_rank() + 1} of 2"}
    saved = f"{folder}/saved"
    loaded.save_pretrained(saved, is_main_process=get_rank() == 0)
    torch.distributed.barrier()
    again = load(saved, **split)
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


# --- sums by one kernel --------------------------------------------------------------------------


def one_shot(graphs: bool, dtype: torch.dtype) -> list[str]:
    """The names of the kernels that a compiled model runs, which gives what it gives with NCCL."""
    private._symmetric.clear()  # so that memory is made for these graphs
    torch.compiler.reset()
    layers = seeded(lambda: nn.Sequential(*(Mlp() for _ in range(3)))).to(dtype)
    whole = {f"{index}.{name}": style for index in range(3) for name, style in plan().items()}
    model = parallelize_module(layers, line(), whole)
    options = {**GROUP, "triton.cudagraphs": graphs}
    by_nccl = torch.compile(model, backend="int4tile", options=options)
    ours = torch.compile(
        model, backend="int4tile", options={**options, "one_shot_all_reduce": True}
    )
    largest = MOST_BYTES // HIDDEN // dtype.itemsize
    with torch.no_grad():
        # The processes share memory from sum to sum, so that one that runs ahead would overwrite.
        for turn, count in enumerate([1, 3, largest, largest + 1, 3, 3, 3, 1, 16]):
            x = random(count, HIDDEN, seed=turn).to(dtype)
            y = ours(x).clone()
            assert torch.equal(y, by_nccl(x)), count  # of two, either adds once and rounds once
        x = random(3, HIDDEN, seed=1).to(dtype)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            ours(x)
            torch.cuda.synchronize()
    return [event.name for event in profile.events()]


@pytest.mark.parametrize("two", WHERE[1:], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("graphs", [False, True])
def test_sums_by_one_kernel(two: Ranks, graphs: bool, dtype: torch.dtype) -> None:
    for names in two.call(one_shot, graphs, dtype):
        assert sum("one_shot_all_reduce" in name for name in names) == 3
        assert not any("nccl" in name.lower() for name in names)
