"""Packed weights where accelerate puts them: hooks that move, offload and replace parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxint4
from fxint4 import Int4Config, Int4TileTensor, UnsupportedOpError, WriteError

accelerate = pytest.importorskip("accelerate")

from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules  # noqa: E402
from accelerate.utils import CustomDtype, compute_module_sizes  # noqa: E402

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two blocks between an embedding and a head that are tied."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, size)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.norm.register_buffer("scale", torch.full((), 0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(self.norm(x) * self.norm.scale)
        return logits


TOKENS = torch.tensor([[0, 39, 7, 7]])
#: Every module of `Net` on one device, so that accelerate puts a hook on each of them.
PARTS = ("embedding", "blocks.0", "blocks.1", "norm", "head")


def packed_net(dtype: torch.dtype = torch.float32, size: int = 64) -> Net:
    """`Net` with every matrix packed, the tied one, too."""
    torch.manual_seed(0)
    net = Net(size).to(dtype).eval()
    fxint4.pack_(net, options={"group_size": 32})
    tied = Int4TileTensor.from_float(net.head.weight, Int4Config(group_size=32))
    net.embedding.weight = net.head.weight = nn.Parameter(tied, requires_grad=False)
    assert len(packed_in(net)) == 5
    return net


def packed_in(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if isinstance(p, Int4TileTensor)]


def run(model: Callable[..., Any], tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(tokens)
    return y


class Fresh(Mapping[str, Tensor]):
    """Weights that lie elsewhere at each call, as those that come from the CPU to a GPU do."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = {name: value.clone() for name, value in state.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name].clone()

    def __iter__(self) -> Any:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


# --- a parameter in another's place --------------------------------------------------------------


@pytest.mark.parametrize("way", ["requires_grad", "attributes"])
def test_the_type_of_a_packed_parameter_makes_one(way: str) -> None:
    old, value = (block[0].weight for block in packed_net().blocks)
    arguments = {"requires_grad": False} if way == "requires_grad" else dict(vars(old))
    made = type(old)(value, **arguments)
    assert isinstance(made, nn.Parameter)
    assert made.tiles.data_ptr() == value.tiles.data_ptr()
    assert torch.equal(made, value)


def test_float_values_in_the_place_of_packed_ones_are_refused() -> None:
    net = packed_net()
    with pytest.raises(TypeError, match=r"float32 tensor \(128, 64\) .*before fxint4\.pack_"):
        accelerate.utils.set_module_tensor_to_device(
            net, "blocks.0.0.weight", "cpu", value=torch.zeros(128, 64)
        )
    assert torch.equal(run(net), run(packed_net()))


def test_without_values_on_meta() -> None:
    net = packed_net()
    with accelerate.init_empty_weights():
        empty = nn.Linear(64, 128)
        empty.weight = net.blocks[0][0].weight
    assert isinstance(empty.weight, Int4TileTensor)
    assert isinstance(empty.weight, nn.Parameter)
    assert empty.weight.is_meta
    assert torch.equal(run(net), run(packed_net()))


# --- hooks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_offload(dtype: torch.dtype) -> None:
    net = packed_net(dtype)
    y = run(net)
    accelerate.cpu_offload(net, execution_device=CPU)
    for _ in range(2):
        assert torch.equal(run(net), y)
        assert all(p.is_meta for p in net.parameters())
        assert len(packed_in(net)) == 5 + 1  # tied no more: accelerate offloads each name
    remove_hook_from_submodules(net)
    assert not any(p.is_meta for p in net.parameters())
    assert torch.equal(run(net), y)


def test_cpu_offload_with_hook() -> None:
    net = packed_net()
    y = run(net)
    net, hook = accelerate.cpu_offload_with_hook(net, CPU)
    assert torch.equal(run(net), y)
    hook.offload()
    assert torch.equal(run(net), y)


def test_dispatch_keeps_tied_weights_tied_and_the_others_apart() -> None:
    net = packed_net()
    y = run(net)
    accelerate.dispatch_model(net, dict.fromkeys(PARTS, "cpu"), force_hooks=True, main_device="cpu")
    assert net.embedding.weight is net.head.weight
    assert torch.equal(run(net), y)


def test_tied_weights_are_loaded_once() -> None:
    net = packed_net()
    y = run(net)
    tied: dict[int, Any] = {net.head.weight.data_ptr(): {}}
    seen = []
    net.head.register_forward_hook(lambda head, *_: seen.append(head.weight))
    state = net.state_dict()
    attach_align_device_hook(
        net,
        execution_device=CPU,
        offload=True,
        weights_map=state,
        tied_params_map=tied,
        preload_module_classes=["Net"],
    )
    assert torch.equal(run(net), y)
    assert len(seen) == 1
    assert not tied[state["head.weight"].data_ptr()]


def test_weights_that_lie_elsewhere_at_each_call() -> None:
    net = packed_net()
    y = run(net)
    accelerate.cpu_offload(net, execution_device=CPU, state_dict=Fresh(net.state_dict()))
    for _ in range(3):
        assert torch.equal(run(net), y)


def test_weights_are_told_apart_by_their_memory() -> None:
    net = packed_net()
    numbers = {p.data_ptr() for p in net.parameters()}
    assert len(numbers) == len(list(net.parameters()))
    assert all(p.data_ptr() == p.detach().data_ptr() for p in net.parameters())
    assert net.head.weight.t().data_ptr() == net.head.weight.data_ptr()
    assert net.head.weight.to("meta").data_ptr() == 0
    assert copy.deepcopy(net).head.weight.data_ptr() not in numbers


# --- the disk ------------------------------------------------------------------------------------


TO_DISK: dict[str, Callable[[nn.Module, Path], Any]] = {
    "all": lambda net, folder: accelerate.disk_offload(net, folder, execution_device=CPU),
    "a block": lambda net, folder: accelerate.dispatch_model(
        net, {**dict.fromkeys(PARTS, "cpu"), "blocks.1": "disk"}, offload_dir=folder
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offload", TO_DISK.values(), ids=TO_DISK)
def test_offloading_to_the_disk_is_refused(
    tmp_path: Path, dtype: torch.dtype, offload: Callable[[nn.Module, Path], Any]
) -> None:
    net = packed_net(dtype)
    y = run(net)
    with pytest.raises(UnsupportedOpError, match=r"disk offload.*use 'cpu'.*before fxint4\.pack_"):
        offload(net, tmp_path)
    assert torch.equal(run(net), y)


@pytest.mark.parametrize("into", ["empty", "packed"])
def test_a_checkpoint_of_torch_save(tmp_path: Path, into: str) -> None:
    net = packed_net()
    path = tmp_path / "model.bin"
    torch.save(net.state_dict(), path)
    if into == "empty":
        with accelerate.init_empty_weights():
            other = Net().eval()
        other.head.weight = other.embedding.weight
        other.norm.scale = net.norm.scale
    else:
        other = packed_net()
        torch.nn.init.zeros_(other.norm.weight)
    accelerate.load_checkpoint_and_dispatch(other, str(path), device_map={"": "cpu"})
    assert len(packed_in(other)) == 5
    assert torch.equal(run(other), run(net))


def test_saving_by_accelerate(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    net = accelerator.prepare(packed_net())
    with pytest.raises(WriteError, match=r"fxint4\.save_file"):
        accelerator.save_model(net, tmp_path / "safe")
    accelerator.save_state(tmp_path / "state", safe_serialization=False)
    y = run(net)
    with torch.no_grad():
        net.head.weight.copy_(torch.zeros(40, 64))
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(run(net), y)


# --- sizes ---------------------------------------------------------------------------------------


def test_a_device_map_that_sees_packed_bytes() -> None:
    net = packed_net(size=128)
    packed = dict.fromkeys(packed_in(net), CustomDtype.INT4)
    held = sum(p.nbytes for p in net.parameters()) + sum(b.nbytes for b in net.buffers())
    told = compute_module_sizes(net, special_dtypes=packed)[""]
    # What it does not see are scales and zeros, 4 bytes for each group of 32, and padding.
    assert 0.78 * held < told < held
    sizes = {0: 2 * held, "cpu": 10 * held}
    places = accelerate.infer_auto_device_map(net, max_memory=sizes, special_dtypes=packed)
    assert set(places.values()) == {0}


def test_the_memory_of_a_weight() -> None:
    weight = packed_net().blocks[0][0].weight
    buffers = sum(buffer.nbytes for buffer in weight.buffers.values())
    assert weight.nbytes == weight.packed_bytes == buffers
    # As transformers and diffusers compute the memory of a model.
    assert weight.nelement() * weight.element_size() == pytest.approx(buffers, abs=1e-6)
    assert weight.itemsize == weight.element_size()
    assert weight.numel() == 128 * 64


# --- compiled ------------------------------------------------------------------------------------


OFFLOADED: dict[str, Callable[[nn.Module], Any]] = {
    "cpu_offload": lambda net: accelerate.cpu_offload(net, execution_device=CPU),
    "elsewhere": lambda net: accelerate.cpu_offload(
        net, execution_device=CPU, state_dict=Fresh(net.state_dict())
    ),
    "dispatch": lambda net: accelerate.dispatch_model(
        net, dict.fromkeys(PARTS, "cpu"), force_hooks=True, main_device="cpu"
    ),
}


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize("offload", OFFLOADED.values(), ids=OFFLOADED)
@pytest.mark.parametrize("packed", [True, False])
def test_a_compiled_model_with_hooks(offload: Callable[[nn.Module], Any], packed: bool) -> None:
    net = packed_net() if packed else Net().eval()
    reference = copy.deepcopy(net)
    if not packed:
        fxint4.pack_(reference)
        whole = Int4TileTensor.from_float(net.head.weight)
        reference.head.weight = nn.Parameter(whole, requires_grad=False)
        reference.embedding.weight = nn.Parameter(net.embedding.weight.detach())
    y = run(reference)
    offload(net)
    compiled = torch.compile(net, backend="int4tile")
    for _ in range(3):
        # The same int4 weights; what may differ is the order of sums in bf16 and fp32.
        torch.testing.assert_close(run(compiled), y, rtol=2**-8, atol=2**-8 * y.abs().max().item())
    report = fxint4.last_report()
    assert {record.action for record in report.records} == {"packed"}
    assert {record.name for record in report.records} == {
        *(f"blocks.{block}.{layer}" for block in (0, 1) for layer in (0, 2)),
        "head",
    }


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_on_the_gpu_and_the_cpu(compiled: bool) -> None:
    net = packed_net(torch.bfloat16)
    y = run(copy.deepcopy(net).cuda(), TOKENS.cuda())
    places = {**dict.fromkeys(PARTS, 0), "blocks.1": "cpu", "embedding": "cpu", "head": "cpu"}
    accelerate.dispatch_model(net, places)
    assert net.blocks[0][0].weight.is_cuda
    assert net.blocks[1][0].weight.is_meta
    assert net.head.weight.is_meta
    model = torch.compile(net, backend="int4tile") if compiled else net
    held = []
    for _ in range(5):
        got = run(model, TOKENS.cuda())
        torch.testing.assert_close(got, y, rtol=2**-6, atol=2**-6 * y.abs().max().item())
        held.append(torch.cuda.memory_allocated())
    assert held[-1] == held[1]


@pytest.mark.gpu
def test_a_device_map_over_the_gpu() -> None:
    net = packed_net(torch.bfloat16)
    y = run(copy.deepcopy(net).cuda(), TOKENS.cuda())
    accelerate.dispatch_model(net, dict.fromkeys(PARTS, 0), force_hooks=True)
    assert net.embedding.weight is net.head.weight
    assert net.head.weight.is_cuda
    assert torch.equal(run(net, TOKENS.cuda()), y)


@pytest.mark.gpu
def test_pinned_memory() -> None:
    weight = packed_net(torch.bfloat16).head.weight
    assert not weight.is_pinned()
    pinned = weight.pin_memory()
    assert pinned.is_pinned()
    assert pinned.pin_memory() is pinned
    assert all(buffer.is_pinned() for buffer in pinned.buffers.values())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        moved = pinned.to("cuda", non_blocking=True)
        moved.record_stream(torch.cuda.current_stream())
    stream.synchronize()
    assert torch.equal(moved.cpu(), weight)
