"""Products in fp8: the kernels in Triton's interpreter and compiled, the products on a GPU."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from kernel_support import (
    compile_for,
    compiled_only,
    interpreted_only,
    make_experts,
    needs_triton,
    quiet_triton,
    rows,
    run_in_the_interpreter,
)
from pretended_gpu import generated, packed_specs
from torch import Tensor, nn

import fxint4
from fxint4 import Int4TileTensor
from fxint4.kernels import select, triton_fp8
from fxint4.kernels.prepared import prepared
from fxint4.kernels.select import Gpu, MatmulShape, select_kernel, serves_fp8
from fxint4.kernels.triton_common import Launch, run
from fxint4.kernels.triton_linear import buffers_of, dequantize_launch_of, sizes_of
from fxint4.lowering import graph as lowering
from fxint4.passes.site import Site
from fxint4.tensor import quick

gpu = pytest.mark.gpu
#: Half a step of e4m3, relative to a normal number, and absolute below 2^-6.
STEP, SMALLEST = 2.0**-4, 2.0**-10


@needs_triton
@compiled_only
@pytest.mark.compiles
def test_all_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


def written_out(
    n: int, k: int, group: int, inner: int, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """W in e4m3, its scales, and W in float64."""
    made = make_experts(1, n, k, group, inner, device)
    weights = [(made.tiles[0], made.scale_and_zero[0])]
    sizes, k_padded, half_inner = sizes_of([made.tiles[0].shape], [n])
    scales = torch.full((n,), float("nan"), device=device)
    group = made.shape.group_size
    buffers = buffers_of(weights)
    run(triton_fp8.row_scales_launch_of(k, sizes, group), {**buffers, "scales_ptr": scales})
    # The interpreter's e4m3 is wrong for small numbers, so there W is not rounded.
    dtype = triton_fp8.E4M3 if device == "cuda" else torch.float32
    w8 = torch.full((n, k), float("nan"), device=device).to(dtype)
    launch = dequantize_launch_of(k, sizes, k_padded, group, half_inner, triton_fp8.E4M3)
    run(launch, {**buffers, "w_ptr": w8, "scales_ptr": scales})
    zero, scale = (made.scale_and_zero[0][: -(-k // group), :n].double()[..., i] for i in (1, 0))
    ends = torch.maximum((zero - 8 * scale).abs(), (zero + 7 * scale).abs()).amax(0)
    torch.testing.assert_close(scales.double(), ends / 448, rtol=1e-6, atol=0)
    return w8, scales, made.weight[0]


SIZES = [(48, 256, 64, 4), (100, 1000, 128, 8), (64, 96, 32, 2), (40, 512, 256, 8)]


@pytest.mark.parametrize(("n", "k", "group", "inner"), SIZES)
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted_only), pytest.param("cuda", marks=gpu)]
)
def test_w_is_written_out(n: int, k: int, group: int, inner: int, device: str) -> None:
    w8, scales, weight = written_out(n, k, group, inner, device)
    made = w8.double() * scales.double()[:, None]
    step, least = (STEP, SMALLEST) if device == "cuda" else (0, 0)
    # Scale and zero over the row's scale, at most 448 together, are rounded to fp16, and so is w.
    bound = step * 1.001 * weight.abs() + (least + 2.0**-9 * 448) * scales.double()[:, None]
    assert ((made - weight).abs() <= bound).all()


def check_rows(x: Tensor, step: float, least: float) -> None:
    x8, scales = triton_fp8.rows_in_e4m3(x)
    largest = x.double().abs().amax(1, keepdim=True)
    wanted = (largest / 448).clamp(min=1e-12)
    torch.testing.assert_close(scales.double(), wanted, rtol=1e-6, atol=0, equal_nan=True)
    fine = largest.isfinite().squeeze(1)
    made, exact = (x8.double() * scales.double())[fine], x.double()[fine]
    assert ((made - exact).abs() <= step * 1.001 * exact.abs() + least * scales[fine]).all()


def hard_rows(k: int, device: str) -> Tensor:
    """Ordinary rows, zeros, one large number, one NaN, one inf."""
    x = rows(6, k, device)
    x[1], x[2, 1], x[3, 0], x[4, -1] = 0, 1e4, float("nan"), float("inf")
    return x


@gpu
@pytest.mark.parametrize("k", [16, 64, 96, 4096, 9008, 28672])
def test_rows_are_quantized(k: int) -> None:
    x = hard_rows(k, "cuda")
    check_rows(x, STEP, SMALLEST)
    x8, scales = triton_fp8.rows_in_e4m3(x)
    for row in (3, 4):  # what is not finite stays so, in its row alone
        assert not torch.isfinite(x8[row].double() * scales[row]).all()


@needs_triton
@compiled_only
@pytest.mark.compiles
@quiet_triton
@pytest.mark.parametrize("capability", [89, 90, 100])
def test_compiled_for_gpus_that_are_not_here(capability: int) -> None:
    weights, e4m3 = [(64, 64)] * 3, triton_fp8.E4M3
    arguments = {"K": 4096, "STEP": 4096, "LARGEST": 448.0, "LEAST": 1e-12}
    launches = [
        (dequantize_launch_of(4096, weights, 4096, 128, 4, e4m3), 56),
        (triton_fp8.row_scales_launch_of(4096, weights, 128), 40),
        (Launch(triton_fp8._rows_kernel, 4, arguments, 8, 1), 40),
    ]
    for launch, most in launches:
        kinds = {"tiles": torch.int32, "scales": torch.float32, "w": e4m3, "y": e4m3}
        dtypes = [
            next((d for kind, d in kinds.items() if name.startswith(kind)), torch.bfloat16)
            for name in launch.tensor_names()
        ]
        made = compile_for(capability, launch, dtypes)
        assert made.spilled == 0
        assert made.registers <= most, launch.kernel
        if e4m3 in dtypes:  # 16 bytes a thread at a time
            assert not re.search(r"st\.global\.b8|st\.global\.b16", made.ptx)


# --- when ----------------------------------------------------------------------------------------


def test_which_matmuls_are_in_fp8() -> None:
    cpu = torch.device("cpu")  # as for an H200

    def chosen(m: int, n: int = 4096, **further: Any) -> str:
        shape = MatmulShape(m, n, 4096, activations="fp8", **further)
        return select_kernel(shape, cpu, "inductor").kernel

    assert chosen(1024) == chosen(8192) == "fp8"
    assert chosen(1023) != "fp8"
    assert chosen(512, n=28672) == "fp8"
    assert chosen(511, n=28672) != "fp8"
    assert chosen(4096, dtype=torch.float16) != "fp8"
    assert chosen(4096, n=2048) != "fp8"
    shape = MatmulShape(4096, 4096, 4096)
    assert select_kernel(shape, cpu, "inductor").kernel != "fp8"
    asked = MatmulShape(4096, 4096, 4096, activations="fp8")
    assert select_kernel(asked, cpu, "package").kernel == "fp8"
    assert select_kernel(asked, cpu, "inductor", "triton").kernel == "triton"
    assert not serves_fp8(asked, Gpu(wgmma=False, fp8=False))
    assert not serves_fp8(MatmulShape(4096, 4104, 4096, activations="fp8"), Gpu())


def normed(x: Tensor, tiles: Tensor, scale_and_zero: Tensor) -> Tensor:
    y = x.float()
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
    op = torch.ops.fxint4.linears
    return op(y, [tiles], [scale_and_zero], 128, [4096], activations="fp8")  # type: ignore[no-any-return]


def of_channels_first(x: Tensor, tiles: Tensor, scale_and_zero: Tensor) -> Tensor:
    rows = x.permute(0, 2, 3, 1).reshape(-1, 4096)
    op = torch.ops.fxint4.linears
    return op(rows, [tiles], [scale_and_zero], 128, [4096], activations="fp8")  # type: ignore[no-any-return]


@needs_triton
@compiled_only
@pytest.mark.compiles
def test_x_is_quantized_in_rows() -> None:
    """Not in the order of what it is a copy of, which the matmul takes only along rows."""
    specs = [((2, 4096, 32, 32), torch.bfloat16), *packed_specs(4096, 4096)]
    assert generated(of_channels_first, specs).count("aten._scaled_mm.default(") == 1


@needs_triton
@compiled_only
@pytest.mark.compiles
def test_a_norm_and_the_quantization_of_x_are_one_kernel() -> None:
    code = generated(normed, [((2048, 4096), torch.bfloat16), *packed_specs(4096, 4096)])
    ran = re.findall(r"^\s*(\w+?)(?:_\d+)?\.run\(", code, re.MULTILINE)
    inductors = [name for name in ran if not name.startswith("_kernel_of")]
    assert sorted(set(ran) - set(inductors)) == ["_kernel_of_dequantize", "_kernel_of_row_scales"]
    assert len(inductors) == 1
    assert code.count("aten._scaled_mm.default(") == 1


@compiled_only
@pytest.mark.compiles
@pytest.mark.by_aten
def test_reasons() -> None:
    model, x = nn.Linear(64, 64, dtype=torch.bfloat16).eval(), torch.ones(2, 64).bfloat16()
    with torch.no_grad():
        torch.compile(model, backend="int4tile", options={"activations": "fp8"})(x)
    [record] = fxint4.last_report().records
    assert "activations stay as they are: device cpu has no fp8 matmul" in record.reason


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(64, 64, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)  # type: ignore[no-any-return]


def told(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What int4 ops of graphs that are compiled from now on are told, as if there was a GPU."""
    seen: list[str | None] = []

    def compile_graph(gm: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        for node in gm.graph.nodes:
            if "int4pack" in str(node.target) or "linears" in str(node.target):
                seen.append(node.kwargs.get("activations"))
        return compiles(gm, *args, **kwargs)

    compiles = lowering.compile_graph
    monkeypatch.setattr(lowering, "compile_graph", compile_graph)
    monkeypatch.setattr(Site, "fp8_fault", property(lambda _: ""))
    return seen


@compiled_only
@pytest.mark.compiles
@pytest.mark.by_aten
def test_overrides_of_layers_that_share_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = told(monkeypatch)
    model = nn.Sequential(*(Block() for _ in range(2))).eval()
    options = {"activations": "fp8", "overrides": {"1.lin": {"activations": None}}}
    for block in model:
        block.compile(backend="int4tile", options=options)
    with torch.no_grad():
        model(torch.ones(2, 64, dtype=torch.bfloat16))
    assert seen == ["fp8", None]


@compiled_only
@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize("wanted", [None, "fp8"])
def test_overrides_of_packed_layers(wanted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = told(monkeypatch)
    model = nn.Sequential(Block()).eval()
    fxint4.pack_(model)
    other = "fp8" if wanted is None else None
    options = {"activations": other, "overrides": {"0.lin": {"activations": wanted}}}
    with torch.no_grad():
        x = torch.ones(2, 64, dtype=torch.bfloat16)
        torch.compile(model, backend="int4tile", options=options)(x)
    assert seen == [wanted]


# --- packed in place -----------------------------------------------------------------------------


def packed(options: dict[str, Any] | None = None) -> nn.Sequential:
    model = nn.Sequential(Block()).eval()
    fxint4.pack_(model, options=options or {"activations": "fp8"})
    return model


@compiled_only
def test_packed_weights_keep_it() -> None:
    weight: Any = packed()[0].lin.weight
    experts = torch.stack([weight, weight])
    alike = [weight, weight.t(), weight[:16], weight[:, :32], weight.detach(), experts[1]]
    alike += [copy.deepcopy(weight), weight.clone(), weight.to(torch.float32), torch.cat(alike[:1])]
    assert all(each.activations == "fp8" for each in alike)
    assert "fp8 activations" in repr(weight)
    plain: Any = packed({"overrides": {"*": {"activations": None}}, "activations": "fp8"})
    plain = plain[0].lin.weight
    assert plain.activations is None
    assert torch.cat([weight, plain]).activations is None
    weight.copy_(plain)  # values are copied; how they are multiplied is of the weight
    assert weight.activations == "fp8"
    weight.data = plain
    assert weight.activations is None


@compiled_only
def test_pack_says_which_weights_will_never_be_multiplied_so() -> None:
    layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 40), nn.Linear(64, 64).bfloat16()])
    layers[1].bfloat16()
    report = fxint4.pack_(layers, options={"activations": "fp8"})
    assert [record.reason for record in report.records] == [
        "activations stay as they are: only bf16 models have them in fp8",
        "activations stay as they are: fp8 takes sizes that 16 divides, not 40x64",
        "",
    ]


@compiled_only
def test_eager_code_tells_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    x, seen = torch.ones(2, 64, dtype=torch.bfloat16), []

    def linear(*args: Any, activations: str | None = None) -> Tensor:
        seen.append(activations)
        return op(*args)  # type: ignore[no-any-return]

    op = torch.ops.fxint4.linear
    models = [packed(), packed({"group_size": 64})]
    monkeypatch.setattr(torch.ops.fxint4, "linear", linear)
    with torch.no_grad():
        made = [model(x) for model in models]
    assert seen == ["fp8", None]
    assert made[0].shape == (2, 64)


@compiled_only
def test_eager_experts_tell_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    x, offs = torch.ones(6, 64).bfloat16(), torch.tensor([2, 6], dtype=torch.int32)
    seen, op = [], torch.ops.fxint4.grouped_mm

    def grouped_mm(*args: Any, activations: str | None = None) -> Tensor:
        seen.append(activations)
        return op(*args)  # type: ignore[no-any-return]

    monkeypatch.setattr(torch.ops.fxint4, "grouped_mm", grouped_mm)
    experts = Int4TileTensor.from_float(torch.ones(2, 48, 64).bfloat16())
    for weight in (experts.like(activations="fp8"), experts):
        assert torch._grouped_mm(x, weight.transpose(1, 2), offs).shape == (6, 48)
    assert seen == ["fp8", None]


@compiled_only
def test_prepared_calls_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch that is prepared for a shape of x is none where the rule takes fp8."""
    monkeypatch.setattr(quick, "_waits_for_host", lambda _: True)
    plans = quick._made_of(packed()[0].lin.weight).plans  # type: ignore[union-attr]
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(select, "gpu_of", lambda _: Gpu())
    monkeypatch.setattr(select, "_FP8_ROWS", ((64, 64 * 64),))
    of_weight = (*plans._w[:5], cuda, *plans._w[6:])  # type: ignore[union-attr]
    assert prepared((64,), *of_weight) is None
    assert prepared((63,), *of_weight) is not None
    assert prepared((64,), *of_weight[:-1], None) is not None


@compiled_only
@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, "fp8"),
        ({"activations": "fp8"}, "fp8"),
        ({"overrides": {"0.lin": {"activations": None}}}, None),
        ({"overrides": {"0.lin": {"group_size": 64}}}, "fp8"),
    ],
)
def test_compiled_packed_layers_do_what_their_weights_say(
    options: dict[str, Any], wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, model = told(monkeypatch), packed()
    with torch.no_grad():
        x = torch.ones(2, 64, dtype=torch.bfloat16)
        torch.compile(model, backend="int4tile", options=options)(x)
    assert seen == [wanted]


@compiled_only
@pytest.mark.compiles
@pytest.mark.by_aten
def test_code_of_one_weight_does_not_serve_one_that_says_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, model = told(monkeypatch), packed()
    model.compile(backend="int4tile")
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        model(x)
        weight: Any = model[0].lin.weight
        model[0].lin.weight = nn.Parameter(weight.like(activations=None), requires_grad=False)
        model(x)
    assert seen == ["fp8", None]


@gpu
def test_eager_packed_layers_on_a_gpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096)).to("cuda", torch.bfloat16).eval()
    plain = copy.deepcopy(model)
    fxint4.pack_(model, options={"activations": "fp8"})
    fxint4.pack_(plain)
    with torch.no_grad():
        for count in (16, 1024):
            x = rows(count, 4096, "cuda")
            wanted, y = plain(x), model(x)
            off = float((y.double() - wanted.double()).norm() / wanted.double().norm())
            assert (off == 0) if count < 1024 else 0.005 < off < 0.08, count


# --- products on a GPU ---------------------------------------------------------------------------


def error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    exact = x.double() @ weight.T
    return float((y.double() - exact).norm() / exact.norm())


@gpu
@pytest.mark.parametrize(("n", "k", "group", "inner"), [(4096, 4096, 128, 8), (48, 208, 32, 2)])
def test_products(n: int, k: int, group: int, inner: int) -> None:
    made = make_experts(1, n, k, group, inner, "cuda")
    weights = [(made.tiles[0], made.scale_and_zero[0])]
    for count in (1, 17, 1024):
        x = rows(count, k, "cuda")
        y = triton_fp8.linears(x, weights, made.shape.group_size, [n])
        # Both operands are rounded to 4 bits: each to within 2^-4, on average by some 0.026.
        assert error(y, x, made.weight[0]) < 0.05
        assert torch.equal(y, triton_fp8.linears(x, weights, made.shape.group_size, [n]))


@gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model(dynamic: bool, graphs: bool) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096), nn.GELU(), nn.Linear(4096, 4096))
    model = model.to("cuda", torch.bfloat16).eval()
    options = {"triton.cudagraphs": graphs}
    plain = torch.compile(model, backend="int4tile", options=options, dynamic=dynamic)
    fp8 = torch.compile(
        model, backend="int4tile", options={**options, "activations": "fp8"}, dynamic=dynamic
    )
    with torch.no_grad():
        for count in (16, 1024, 2048):
            x = rows(count, 4096, "cuda")
            wanted, y = plain(x).clone(), fp8(x).clone()
            off = float((y.double() - wanted.double()).norm() / wanted.double().norm())
            assert (off == 0) if count < 1024 else 0.005 < off < 0.08, count
    kernels = fxint4.last_report().records[0].kernels
    assert any("fp8" in each for each in kernels)
