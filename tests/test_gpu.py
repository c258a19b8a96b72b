"""End to end on a CUDA GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fxint4
from fxint4 import Int4TileTensor
from fxint4.kernels import triton_linear as linear
from fxint4.quant.primitives import dequantize, quantize
from fxint4.weights.cache import weight_cache

pytestmark = [
    pytest.mark.gpu,
    # Inductor's CUDA graph trees reserve a memory pool in this way.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]

#: Four roundings to bf16 and fp32 accumulation over K <= 8192 (see test_backend).
ROUNDING = (1 + 2.0**-8) ** 4 - 1 + 8192 * 2.0**-24


def assert_linear(y: Tensor, x: Tensor, layer: nn.Linear, group: int = 128) -> None:
    """`y` is the layer with its int4 weight, to the rounding of bf16."""
    made = quantize(layer.weight.detach(), group, -(-layer.in_features // group) * group)
    w = dequantize(made.codes, made.scale, made.zero, group, torch.float64, layer.in_features)
    x = x.double()
    b = torch.zeros((), device=x.device) if layer.bias is None else layer.bias.detach().double()
    bound = ROUNDING * (x.abs() @ w.abs().T + b.abs())
    assert ((y.double() - (x @ w.T + b)).abs() <= bound).all()


def layer(k: int = 512, n: int = 256, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    return nn.Linear(k, n, device="cuda", dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("k", "n"), [(512, 256), (600, 50), (4304, 72), (576, 264)])
def test_dtypes_and_padded_shapes(dtype: torch.dtype, k: int, n: int) -> None:
    model = layer(k, n, dtype)
    compiled = torch.compile(model, backend="int4tile", dynamic=False)
    with torch.no_grad():
        for shape in [(1, k), (2, 3, k), (33, k), (0, k), (k,)]:
            x = torch.randn(shape, device="cuda", dtype=dtype)
            y = compiled(x)
            assert (y.shape, y.dtype) == ((*shape[:-1], n), dtype)
            [record] = fxint4.last_report().records
            assert record.action == "packed"
            assert_linear(y.view(-1, n), x.view(-1, k), model, record.group_size)


def test_dynamic_rows() -> None:
    model = layer()
    compiled = torch.compile(model, backend="int4tile", dynamic=True)
    with torch.no_grad():
        for rows in (2, 17, 300, 4, 0, 1):
            x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
            assert_linear(compiled(x), x, model)


def test_an_output_of_more_elements_than_32_bits_count() -> None:
    model = nn.Linear(64, 2**16, bias=False, device="cuda", dtype=torch.bfloat16).eval()
    x = torch.randn(2**15 + 8, 64, device="cuda", dtype=torch.bfloat16)  # x W^T: 2^31 + 2^19
    with torch.no_grad():
        y = torch.compile(model, backend="int4tile")(x)
    rows = torch.tensor([0, 2**14, 2**15 - 1, 2**15 + 7], device="cuda")
    assert_linear(y[rows], x[rows], model, 64)


def test_cuda_graphs_with_changing_weights() -> None:
    model = nn.Sequential(layer(512, 512), nn.GELU(), layer(512, 512))
    compiled = torch.compile(model, backend="int4tile", mode="reduce-overhead")
    counters.clear()
    with torch.no_grad():
        for step in range(6):
            x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(x).clone()
            hidden = torch.nn.functional.gelu(_eager(model[0], x))
            expected = _eager(model[2], hidden)
            error = (y - expected).float().norm() / expected.float().norm()
            assert error < 2 * ROUNDING, step  # two layers
            if step == 2:
                model[0].weight.mul_(-0.5)
            if step == 4:
                model[2].weight = nn.Parameter(torch.randn_like(model[2].weight))
    assert counters["inductor"]["cudagraph_skips"] == 0


def _eager(linear: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(linear, nn.Linear)
    made = quantize(linear.weight.detach(), 128)
    weight = dequantize(made.codes, made.scale, made.zero, 128, torch.bfloat16)
    return torch.nn.functional.linear(x, weight, linear.bias)


def test_repeated_layers_under_cuda_graphs_keep_their_own_weights() -> None:
    layers = [layer(512, 512) for _ in range(4)]
    compiled = [torch.compile(one, backend="int4tile", mode="reduce-overhead") for one in layers]
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(4):
            for one, fast in zip(layers, compiled, strict=True):
                torch.compiler.cudagraph_mark_step_begin()
                assert_linear(fast(x).clone(), x, one)


def test_a_gpu_too_old_is_kept_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxint4.weights.formats import device_fault

    device_fault.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    model = layer()
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context():
        fault = device_fault(x.device)
    monkeypatch.undo()
    assert fault == ("the GPU has compute capability 7.5; int4 tiles need 8.0 (Ampere) or newer")
    with torch.no_grad():
        y = torch.compile(model, backend="int4tile")(x)
    torch.testing.assert_close(y, model(x))
    [record] = fxint4.last_report().records
    assert (record.action, record.reason) == ("kept", fault)
    device_fault.cache_clear()


def test_folding_needs_little_more_than_the_packed_weights() -> None:
    weights = [nn.Parameter(torch.randn(8192, 8192, device="cuda").bfloat16()) for _ in range(4)]

    def products(x: Tensor) -> list[Tensor]:
        return [x @ weight.T for weight in weights]

    x = torch.randn(4, 8192, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        torch.compile(products, backend="int4tile")(x)
    report = fxint4.last_report()
    peak = torch.cuda.max_memory_allocated() - before
    one_weight = weights[0].numel() * 2
    # The packed weights stay; the scratch of a chunk is 2^24 elements at 16 bytes.
    assert peak <= report.totals["bytes_after"] + one_weight + 2**24 * 16


def test_moving_a_model_to_the_gpu_after_compiling() -> None:
    model = nn.Linear(512, 256).bfloat16().eval()
    compiled = torch.compile(model, backend="int4tile")
    with torch.no_grad():
        x = torch.randn(4, 512).bfloat16()
        assert_linear(compiled(x), x, model)
        model.cuda()
        assert_linear(compiled(x.cuda()), x.cuda(), model)
        model.cpu()
        assert_linear(compiled(x), x, model)


def test_a_copied_model_has_its_own_packed_weights() -> None:
    model = layer()
    twin: Any = copy.deepcopy(model)
    with torch.no_grad():
        twin.weight.neg_()
        x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
        compiled = torch.compile(lambda m, x: m(x), backend="int4tile")
        assert_linear(compiled(model, x), x, model)
        assert_linear(compiled(twin, x), x, twin)
        assert len(weight_cache.of(twin.weight)) == 1


def test_a_weight_folded_on_one_stream_is_ready_on_others() -> None:
    model = layer(4096, 4096)
    compiled = torch.compile(model, backend="int4tile", dynamic=False)
    x = torch.randn(4, 4096, device="cuda", dtype=torch.bfloat16)
    streams = [torch.cuda.Stream() for _ in range(3)]
    with torch.no_grad():
        compiled(x)
        for _ in range(5):
            model.weight.copy_(torch.randn_like(model.weight))
            torch.cuda.synchronize()
            results = []
            for stream in streams:  # the first one folds
                with torch.cuda.stream(stream):
                    results.append(compiled(x))
            torch.cuda.synchronize()
            for y in results:
                assert_linear(y, x, model)


# --- the lowering --------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the functions that multiplied since the set was last cleared."""
    taken: set[str] = set()
    for name in ("_aten", "_multiply", "_multiply_in_cuda", "_dequantize"):
        original = getattr(linear, name)

        def counting(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            taken.add(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(linear, name, counting)
    return taken


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_one_compiled_graph_chooses_a_kernel_for_every_number_of_rows(
    mode: str | None, kernels: set[str]
) -> None:
    model = layer(4096, 4096)
    compiled = torch.compile(model, backend="int4tile", dynamic=True, mode=mode)
    taken = {}
    with torch.no_grad():
        compiled(torch.randn(3, 4096, device="cuda", dtype=torch.bfloat16))
        counters.clear()
        for rows in (2, 16, 256, 4096):
            x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
            kernels.clear()
            for _ in range(3):
                torch.compiler.cudagraph_mark_step_begin()
                y = compiled(x).clone()
            assert_linear(y, x, model)
            taken[rows] = set(kernels)
    assert counters["stats"]["unique_graphs"] == 0  # the one compiled before
    # Launched one by one, few rows are faster by the aten op, which the host launches in no time.
    # CUDA kernels want a CUDA graph or more work.
    if mode is None:
        ways = ["_aten", "_aten", "_multiply", "_dequantize"]
    else:
        ways = ["_multiply_in_cuda", "_multiply", "_multiply_in_cuda", "_dequantize"]
    assert taken == {rows: {way} for rows, way in zip((2, 16, 256, 4096), ways, strict=True)}


# --- packed tensors ------------------------------------------------------------------------------


def assert_product(y: Tensor, x: Tensor, w: Tensor) -> None:
    """`y` is x @ w.T for w in float64, to the rounding of bf16."""
    x = x.double()
    assert ((y.double() - x @ w.mT).abs() <= ROUNDING * (x.abs() @ w.abs().mT)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(256, 512), (50, 600), (72, 4304)])
def test_packed_tensors_multiply(dtype: torch.dtype, n: int, k: int) -> None:
    torch.manual_seed(0)
    packed = Int4TileTensor.from_float(torch.randn(n, k, device="cuda", dtype=dtype))
    w = packed.dequantize(torch.float64)
    for rows in (1, 3, 200, 0):
        x = torch.randn(rows, k, device="cuda", dtype=dtype)
        assert_product(nn.functional.linear(x, packed), x, w)
        assert_product((packed @ x.t()).t(), x, w)
    x = torch.randn(5, k, device="cuda", dtype=dtype)
    assert_product(x[:, : k - 72] @ packed[8:, 72:].t(), x[:, : k - 72], w[8:, 72:])
    assert_product(x[:, 9:40] @ packed[3:33, 9:40].t(), x[:, 9:40], w[3:33, 9:40])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k", "inner"), [(256, 512, 8), (50, 600, 2), (72, 320, 4)])
def test_packed_experts_multiply(dtype: torch.dtype, n: int, k: int, inner: int) -> None:
    torch.manual_seed(0)
    experts = 6
    config = fxint4.Int4Config(inner_k_tiles=inner)
    weight = torch.randn(experts, n, k, device="cuda", dtype=dtype)
    packed = Int4TileTensor.from_float(weight, config)
    w = packed.dequantize(torch.float64)
    x = torch.randn(experts, 5, k, device="cuda", dtype=dtype)
    assert_product(x @ packed.mT, x, w)
    rows = torch.randn(40, k, device="cuda", dtype=dtype)
    ids = torch.randint(experts, (40,), device="cuda")
    buffers = (packed.tiles, packed.scale_and_zero)
    y = torch.ops.fxint4.indexed_mm(rows, *buffers, ids, packed.group_size, n)
    assert_product(y[:, None], rows[:, None], w[ids])
    y = torch.bmm(packed[ids], rows[..., None])[..., 0]
    assert_product(y[:, None], rows[:, None], w[ids])
    ids = ids.sort().values
    offs = torch.bincount(ids, minlength=experts).cumsum(0).int()
    y = torch.ops.fxint4.grouped_mm(rows, *buffers, offs, packed.group_size, n)
    assert_product(y[:, None], rows[:, None], w[ids])


def test_packed_buffers_beyond_32_bits_of_offsets() -> None:
    """x and y of more than 2**31 elements go through the op in parts."""
    n, k, rows = 64, 65536, 40000
    packed = Int4TileTensor.from_float(torch.randn(n, k, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    y = nn.functional.linear(x, packed)
    w = packed.dequantize(torch.float64)
    for part in (slice(0, 3), slice(32766, 32770), slice(rows - 3, rows)):
        x_part, bound = x[part].double(), (1 + 2.0**-8) ** 3 - 1 + k * 2.0**-24
        error = (y[part].double() - x_part @ w.T).abs()
        assert (error <= bound * (x_part.abs() @ w.abs().T)).all()
