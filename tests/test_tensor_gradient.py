"""Gradients through packed weights: eager and compiled, what is saved for them, adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_within, module, rounding_bound
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxint4
from fxint4 import Int4Config, Int4TileTensor
from fxint4.weights import ops

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
K, N = 64, 96
#: Forward passes round x, W and y to bf16, each by at most 2^-8. A gradient that goes through
#: several of them is wrong by a few times that; a wrong one by much more.
ERROR = 0.01


def error(y: Tensor | None, expected: Tensor | None) -> float:
    assert y is not None
    assert expected is not None
    assert y.dtype == expected.dtype
    return float((y.double() - expected.double()).norm() / expected.double().norm())


class Layer(nn.Module):
    """Two packed layers, the first with an adapter, a norm with parameters of its own."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(K)
        self.up = nn.Linear(K, N)
        self.down = nn.Linear(N, K, bias=False)
        self.lora_A = nn.Linear(K, 4, bias=False)
        self.lora_B = nn.Linear(4, N, bias=False)
        self.dropout = nn.Dropout(0.0)
        self.to(dtype)
        with torch.no_grad():
            for linear in (self.up, self.down):
                packed = Int4TileTensor.from_float(linear.weight, Int4Config(group_size=32))
                linear.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = F.silu(self.up(h) + self.lora_B(self.lora_A(self.dropout(h))))
        return x + self.down(h)


def twins(dtype: torch.dtype = torch.float32, make: Callable[..., Any] = Layer) -> tuple[Any, Any]:
    """A packed module in training, and one with the dequantized weights."""
    torch.manual_seed(0)
    packed = make(dtype).train()
    dense = copy.deepcopy(packed)
    fxint4.dequantize_(dense)
    return packed, dense


def gradients(model: Callable[[Tensor], Tensor], x: Tensor, of: nn.Module) -> dict[str, Tensor]:
    """Of a sum of squares, for x and all parameters that want one."""
    x = x.detach().requires_grad_()
    of.zero_grad()
    model(x).float().square().mean().backward()
    assert x.grad is not None
    found = {name: p.grad for name, p in of.named_parameters() if p.grad is not None}
    wanted = {name for name, p in of.named_parameters() if p.requires_grad}
    assert found.keys() == wanted
    return {"x": x.grad, **found}


def assert_same_gradients(
    model: Callable[[Tensor], Tensor], packed: nn.Module, dense: nn.Module, x: Tensor
) -> None:
    expected = gradients(dense, x, dense)
    found = gradients(model, x, packed)
    assert len(found) > 1
    for name, grad in found.items():
        assert error(grad, expected[name]) < ERROR, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_dequantized_model(dtype: torch.dtype) -> None:
    packed, dense = twins(dtype)
    assert_same_gradients(packed, packed, dense, torch.randn(2, 5, K, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_x_is_rounded_to_its_dtype_alone(dtype: torch.dtype) -> None:
    weight = Int4TileTensor.from_float(torch.randn(N, K).to(dtype), Int4Config(group_size=32))
    x = torch.randn(3, K, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, N).to(dtype)
    F.linear(x, weight).backward(grad)
    exact = grad.double() @ weight.dequantize(torch.float32).double()
    assert x.grad is not None
    # The sum is of fp32, and the result is rounded once.
    bound = grad.double().abs() @ weight.dequantize(torch.float32).double().abs() * N * 2**-24
    assert ((x.grad.double() - exact).abs() <= bound + exact.abs() * torch.finfo(dtype).eps).all()


class Pointwise(nn.Module):
    def __init__(self, dtype: torch.dtype, dimensions: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.conv = conv(K, N, 1).to(dtype)
        with torch.no_grad():
            packed = Int4TileTensor.from_float(self.conv.weight.flatten(1))
        for _ in range(dimensions):
            packed = packed.unsqueeze(-1)  # type: ignore[assignment]
        self.conv.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions(dimensions: int, dtype: torch.dtype) -> None:
    packed, dense = twins(dtype, lambda dtype: Pointwise(dtype, dimensions))
    x = torch.randn(2, K, *(3, 4, 5)[:dimensions], dtype=dtype)
    assert_same_gradients(packed, packed, dense, x)
    packed.conv.bias.requires_grad_(False)
    gradients(packed, x, packed)  # of x alone
    packed.conv.bias.requires_grad_(True)
    packed.zero_grad()
    packed(x).float().sum().backward()  # of the bias alone
    assert torch.equal(packed.conv.bias.grad.float(), torch.full((N,), x[:, 0].numel() * 1.0))


def test_double_backward() -> None:
    packed, dense = twins()

    def penalty(model: nn.Module, x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return grad.square().sum()

    x = torch.randn(5, K)
    for model in (packed, dense):
        penalty(model, x.clone().requires_grad_()).backward()
    for (name, p), q in zip(packed.named_parameters(), dense.parameters(), strict=True):
        if p.requires_grad and q.grad is not None and q.grad.any():
            assert error(p.grad, q.grad) < 5 * ERROR, name


# --- what is saved -------------------------------------------------------------------------------


def saved_by(run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result, and what autograd saved for it."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = run()
    return y, saved


@pytest.mark.parametrize(
    "backend",
    [
        None,
        "aot_eager",
        pytest.param("inductor", marks=[pytest.mark.compiles, pytest.mark.by_aten]),
    ],
)
def test_what_is_saved_is_the_packed_weight(backend: str | None) -> None:
    weight = nn.Parameter(Int4TileTensor.from_float(torch.randn(512, 256)), requires_grad=False)
    run = module(lambda self, x: F.linear(F.linear(x, self.w).relu(), self.w.t()), w=weight)
    if backend is not None:
        run = torch.compile(run, backend=backend)
    x = torch.randn(2, 256, requires_grad=True)
    y, saved = saved_by(lambda: run(x))
    addresses = {buffer.data_ptr() for buffer in weight.buffers.values()}
    for tensor in saved:
        parts = list(tensor.buffers.values()) if isinstance(tensor, Int4TileTensor) else [tensor]
        assert {part.data_ptr() for part in parts} <= addresses or tensor.numel() <= 2 * 512
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    packed, dense = twins()

    def run(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(packed, x, use_reentrant=reentrant)
        return y

    assert_same_gradients(run, packed, dense, torch.randn(2, 5, K))


@pytest.mark.parametrize("offload", [False, True])
def test_autocast(offload: bool) -> None:
    """Also with activations kept on the CPU, which copies what is saved."""
    packed, dense = twins()

    def autocast(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y: Tensor = model(x)
            return y

        return run

    x = torch.randn(2, 5, K)
    expected = gradients(autocast(dense), x, dense)
    if offload:
        with torch.autograd.graph.save_on_cpu():
            found = gradients(autocast(packed), x, packed)
    else:
        found = gradients(autocast(packed), x, packed)
    for name, grad in found.items():
        assert error(grad, expected[name]) < 2 * ERROR, name


def test_a_weight_that_was_written_to_between_is_an_error() -> None:
    weight = Int4TileTensor.from_float(torch.randn(N, K))
    x = torch.randn(2, K, requires_grad=True)
    y = F.linear(x, weight)
    with torch.no_grad():
        weight.copy_(torch.randn(N, K))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_packed_weight_wants_no_gradient() -> None:
    weight = Int4TileTensor.from_float(torch.randn(N, K))
    assert not nn.Parameter(weight).requires_grad
    assert not weight.requires_grad_().requires_grad
    x = torch.randn(2, K, requires_grad=True)
    y = F.linear(x, weight)
    assert y.requires_grad
    assert not F.linear(x.detach(), weight).requires_grad


# --- compiled ------------------------------------------------------------------------------------

BACKENDS = (
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=[pytest.mark.compiles, pytest.mark.by_aten]),
    pytest.param("int4tile", marks=[pytest.mark.compiles, pytest.mark.by_aten]),
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_training(backend: str, dynamic: bool | None) -> None:
    packed, dense = twins()
    compiled = torch.compile(packed, backend=backend, dynamic=dynamic, fullgraph=True)
    for rows in (5, 7):
        assert_same_gradients(compiled, packed, dense, torch.randn(2, rows, K))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_gradient_checkpointing(backend: str) -> None:
    packed, dense = twins()

    def run(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(packed, x, use_reentrant=False)
        return y

    compiled = torch.compile(run, backend=backend)
    assert_same_gradients(compiled, packed, dense, torch.randn(2, 5, K))


class Stack(nn.Module):
    """Layers with graph breaks between them, and one that is not packed at the end."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dtype) for _ in range(3))
        self.head = nn.Linear(K, 8 * K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
            x = x * 2
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize("frozen", [False, True])
def test_training_where_graphs_break(frozen: bool) -> None:
    packed, dense = twins(make=Stack)
    for model in (packed, dense):
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, Int4TileTensor):
                parameter.requires_grad_("lora" in name or not frozen)
        if frozen:
            model.eval()
            for name, inner in model.named_modules():
                inner.train("lora" in name)
    compiled = torch.compile(packed, backend="int4tile")
    x = torch.randn(2, 5, K)
    assert_same_gradients(compiled, packed, dense, x)
    text = str(fxint4.last_report()).replace("\n ", "")
    assert "layers.0.up.weight" in text
    assert "packed before" in text
    assert "compiled for training, which packs nothing" in text  # the head


@pytest.mark.compiles
@pytest.mark.by_aten
def test_training_of_layers_that_are_compiled_one_by_one() -> None:
    packed, dense = twins(make=Stack)
    for layer in packed.layers:
        layer.compile(backend="int4tile")
    assert_same_gradients(packed, packed, dense, torch.randn(2, 5, K))


@pytest.mark.compiles
@pytest.mark.by_aten
def test_evaluation_between_steps() -> None:
    packed, dense = twins()
    compiled = torch.compile(packed, backend="int4tile")
    x = torch.randn(2, 5, K)
    assert_same_gradients(compiled, packed, dense, x)
    packed.eval()
    with torch.no_grad():
        y = compiled(x)
        report = fxint4.last_report()
        assert [r.name for r in report.records if r.action == "packed"] == ["up", "down"]
        assert error(y, dense(x)) < ERROR
    packed.train()
    assert_same_gradients(compiled, packed, dense, x)


@pytest.mark.compiles
@pytest.mark.by_aten
def test_training_with_code_that_was_compiled_for_inference_is_an_error() -> None:
    packed, dense = twins()
    packed.dropout = nn.Identity()  # Dynamo guards the mode of modules that read it
    packed.eval()
    compiled = torch.compile(packed, backend="int4tile")
    x = torch.randn(2, 5, K)
    assert not compiled(x).requires_grad  # of gradients that are enabled by mistake
    packed.train()
    with pytest.raises(fxint4.TrainingError, match=r"compiled for inference.*no_grad.*reset\(\)"):
        compiled(x)
    with torch.no_grad():
        compiled(x)
    torch.compiler.reset()
    assert_same_gradients(compiled, packed, dense, x)


@pytest.mark.compiles
@pytest.mark.by_aten
def test_the_gradient_of_an_input_in_evaluation_mode() -> None:
    """As for prompts that are learned: no parameter is trained."""
    packed, dense = twins()
    for model in (packed, dense):
        model.eval().requires_grad_(False)
    compiled = torch.compile(packed, backend="int4tile")
    prompt = torch.randn(2, 5, K)
    for make in (lambda x: x, lambda x: x * 2):  # a leaf, and none
        found, expected = [], []
        for model, grads in ((compiled, found), (dense, expected)):
            x = prompt.clone().requires_grad_()
            model(make(x)).square().mean().backward()
            grads.append(x.grad)
        assert error(found[0], expected[0]) < ERROR


def test_models_without_packed_weights_are_still_refused() -> None:
    _, dense = twins()
    message = r"call model.eval\(\) first.*pack_\(model\) has packed before"
    with pytest.raises(BackendCompilerFailed, match=message):
        torch.compile(dense, backend="int4tile")(torch.randn(2, K))
    packed, _ = twins()
    with pytest.raises(fxint4.TrainingError, match="in training mode"):
        fxint4.explain(packed, torch.randn(2, K))


# --- on a GPU ------------------------------------------------------------------------------------


def ends(*rows: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(20, 100), (96, 64), (300, 1000), (1024, 4096)])
@pytest.mark.parametrize("bytes_at_a_time", [1, 2**28])
def test_gradients_on_the_gpu(
    dtype: torch.dtype, n: int, k: int, bytes_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_MOST_COLUMNS_BYTES", bytes_at_a_time)
    config = Int4Config(group_size=32)
    experts = Int4TileTensor.from_float(torch.randn(4, n, k).to(dtype), config).to("cuda")
    dense = experts.dequantize(torch.float32).double()
    for rows in (1, 7, 300):
        x = torch.randn(4, rows, k, device="cuda", dtype=dtype, requires_grad=True)
        y = torch.bmm(x, experts.mT)
        grad = torch.randn_like(y)
        y.backward(grad)
        assert_within(x.grad, grad.double() @ dense, bounds(grad, dense))
        x = torch.randn(rows, k, device="cuda", dtype=dtype, requires_grad=True)
        F.linear(x, experts[1]).backward(grad[1])  # type: ignore[no-untyped-call]
        assert_within(x.grad, grad[1].double() @ dense[1], bounds(grad[1], dense[1]))
        offs = ends(0, rows // 2, 0, rows - rows // 2)
        x = torch.randn(rows + 3, k, device="cuda", dtype=dtype, requires_grad=True)
        grads = torch.randn(rows + 3, n, device="cuda", dtype=dtype)
        F.grouped_mm(x, experts.mT, offs=offs).backward(grads)
        for e, (start, stop) in ((1, (0, rows // 2)), (3, (rows // 2, rows))):
            part = grads[start:stop]
            assert_within(x.grad[start:stop], part.double() @ dense[e], bounds(part, dense[e]))
        assert not x.grad[rows:].any()


def bounds(grad: Tensor, weight: Tensor) -> Tensor:
    """`rounding_bound` of ``grad @ weight``, for one matrix or several."""
    if weight.ndim == 2:
        return rounding_bound(grad, weight.mT)
    return torch.stack([rounding_bound(g, w.mT) for g, w in zip(grad, weight, strict=True)])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "inductor", "int4tile"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_training_on_the_gpu(dtype: torch.dtype, backend: str | None) -> None:
    packed, dense = (model.cuda() for model in twins(dtype))
    run = packed if backend is None else torch.compile(packed, backend=backend)
    assert_same_gradients(run, packed, dense, torch.randn(2, 5, K, dtype=dtype, device="cuda"))


@pytest.mark.gpu
def test_backward_takes_the_memory_it_says() -> None:
    """Of a weight whose dequantized values would take four times the most columns at a time."""
    n, k = 8192, 4 * ops._MOST_COLUMNS_BYTES // (2 * 8192)
    weight = Int4TileTensor.from_float(torch.randn(n, k, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(16, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = F.linear(x, weight)
    grad = torch.randn_like(y)
    y.backward(grad, retain_graph=True)  # compiles the kernel
    x.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y.backward(grad)
    taken = torch.cuda.max_memory_allocated() - before
    most = ops._MOST_COLUMNS_BYTES
    # Beside the columns: a copy of their tiles, a quarter of that, their scales, and gradients.
    assert taken < 1.4 * most + 4 * x.nbytes + 2**25
