"""Ops of our own in place of ATen's: nothing that another compile of the process could notice."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretended_gpu import int4pack_mm, packed_specs, pretended_gpu
from torch import Tensor, nn
from torch._inductor.codecache import compiled_fx_graph_hash
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _config_module

import fxint4
from fxint4 import Int4Config, Int4TileTensor
from fxint4._pytorch import inductor
from fxint4.kernels import cuda
from fxint4.kernels.policy import Policy
from fxint4.kernels.select import MatmulShape
from fxint4.lowering import all_reduce, dense
from fxint4.lowering.own_ops import use_own_ops

pytestmark = pytest.mark.compiles

aten = torch.ops.aten
K, N = 64, 96


class Plain(nn.Module):
    """ATen's op and a matrix times a vector, called by the model itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("tiles", torch.randint(0, 256, (N, K // 2), dtype=torch.uint8))
        self.register_buffer("scale_and_zero", (torch.rand(K // 32, N, 2) / K).bfloat16())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = aten._weight_int4pack_mm_for_cpu(x, self.tiles, 32, self.scale_and_zero)
        return torch.relu(y), torch.mv(y.float(), torch.ones(N)) + 1


def x_of(rows: int = 3) -> Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).bfloat16()


def tables() -> dict[str, dict[Any, Any]]:
    """What Inductor holds for all compiles of a process, without ops of ours."""
    from torch._inductor import decomposition, lowering

    return {
        name: {op: value for op, value in table.items() if "fxint4" not in str(op)}
        for name, table in (
            ("lowerings", lowering.lowerings),
            ("constraints", lowering._maybe_layout_constraints),
            ("decompositions", decomposition.decompositions),
            ("fallbacks", dict.fromkeys(lowering.fallbacks)),
            ("realized", dict.fromkeys(lowering.needs_realized_inputs)),
        )
    }


def assert_same(before: dict[str, dict[Any, Any]]) -> None:
    for name, table in tables().items():
        assert table.keys() == before[name].keys(), name
        assert all(table[op] is before[name][op] for op in table), name


@contextlib.contextmanager
def held_in_a_lowering(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """A block during which another thread makes a package, and is inside a lowering of ours."""
    inside, go_on = threading.Event(), threading.Event()
    called = inductor.contiguous

    def held(value: Any) -> Any:
        inside.set()
        assert go_on.wait(300)
        return called(value)

    monkeypatch.setattr(inductor, "contiguous", held)
    program = export(nn.Sequential(nn.Linear(K, N), nn.ReLU()).eval(), (torch.randn(4, K),))
    done: list[str] = []
    thread = threading.Thread(
        target=lambda: done.append(fxint4.package(program, folder / "held.pt2"))
    )
    thread.start()
    try:
        assert inside.wait(300)
        yield
    finally:
        go_on.set()
        thread.join()
    assert done


def test_a_plain_compile_beside_ours_has_nothing_of_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x, model = x_of(), Plain()
    expected, alone = run_and_get_code(torch.compile(model), x)
    before = tables()
    torch._dynamo.reset()
    compiled = torch.compile(model)
    with held_in_a_lowering(monkeypatch, tmp_path):
        assert_same(before)
        result, beside = run_and_get_code(compiled, x)
    assert_same(before)
    for y, y_expected in zip(result, expected, strict=True):
        assert torch.equal(y, y_expected)
    assert "fxint4" not in "".join(map(statements, beside))
    # In torch 2.11 all threads share Inductor's config, so that this one's code is in C++, too.
    if hasattr(_config_module, "ContextVar"):
        assert list(map(statements, beside)) == list(map(statements, alone))


def statements(code: str) -> str:
    """Generated code without comments and names of kernels.

    Inductor makes these of the nodes that it is at, in a variable that all threads share.
    """
    return re.sub(r"#.*|//.*|\bcpp_fused_\w+", "", code)


def test_inductors_tables_keep_all_entries() -> None:
    """Compiled twice, ours registers its lowerings once."""
    from torch._inductor import lowering

    model, x = Plain(), x_of()
    torch.compile(model)(x)
    before = tables()
    ours: list[Any] = []
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(model, backend="int4tile")(x)
        assert_same(before)
        ours.append({op: f for op, f in lowering.lowerings.items() if "fxint4" in str(op)})
    assert {str(op) for op in ours[0]} >= {"fxint4.linears.by_policy", "fxint4.linear.for_cpu"}
    assert ours[0] == ours[1]


def test_lowerings_are_registered_once_by_many_threads() -> None:
    from torch._inductor import lowering

    def enter() -> None:
        with dense.our_compile():
            pass

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = lowering.lowerings[torch.ops.fxint4.linears.by_policy]
    enter()
    assert lowering.lowerings[torch.ops.fxint4.linears.by_policy] is first


WITHOUT_FXINT4 = """
import sys, torch
from torch._dynamo.utils import counters
aten = torch.ops.aten
tiles, scale_and_zero, x = torch.load(sys.argv[1])
@torch.compile
def f(x):
    y = aten._weight_int4pack_mm_for_cpu(x, tiles, 32, scale_and_zero)
    return torch.relu(y), torch.mv(y.float(), torch.ones(y.shape[1])) + 1
y, sums = f(x)
assert not any(name.startswith("fxint4") for name in sys.modules)
torch.save((y, sums, dict(counters["inductor"])), sys.argv[2])
"""


@pytest.mark.own_cache
def test_a_process_without_fxint4_takes_nothing_of_ours_from_the_cache(tmp_path: Path) -> None:
    """The other way round neither: each finds its own entry again."""
    model, x = Plain(), x_of()
    ours = torch.compile(model, backend="int4tile")(x)
    torch.save((model.tiles, model.scale_and_zero, x), tmp_path / "given.pt")
    for hits in (0, 1):
        command = [sys.executable, "-W", "ignore", "-c", WITHOUT_FXINT4]
        command += [str(tmp_path / "given.pt"), str(tmp_path / "result.pt")]
        subprocess.run(command, check=True, cwd=tmp_path, env=os.environ)
        *theirs, counted = torch.load(tmp_path / "result.pt")
        assert counted.get("fxgraph_cache_hit", 0) == hits
        for y, expected in zip(theirs, ours, strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


# --- what is a part of the key -------------------------------------------------------------------


def on_a_gpu(function: Callable[..., Any], policy: Policy) -> tuple[torch.fx.GraphModule, str]:
    """The graph of a matmul on a GPU, and its key in Inductor's cache."""
    fake = FakeTensorMode()
    specs = [((4096, 4096), torch.bfloat16), *packed_specs(4096, 4096)]
    with fake:
        made = [torch.empty(*size, dtype=dtype, device="cuda:0") for size, dtype in specs]
        gm = make_fx(lambda *given: function(*given))(*made)  # a name without annotations
    with pretended_gpu(), dense.our_compile():
        use_own_ops(gm, policy)
        key, _ = compiled_fx_graph_hash(gm, made, {}, [])
    return gm, key


def own_policy(gm: torch.fx.GraphModule) -> Policy:
    """The policy among the arguments of the graph's int4 matmul."""
    [node] = gm.graph.find_nodes(op="call_function", target=torch.ops.fxint4.linears.by_policy)
    _, _, _, _, _, *policy = node.args
    return Policy(*policy)  # type: ignore[arg-type]


def test_each_field_of_the_policy_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "available", lambda _: False)
    policies = [
        Policy(),
        Policy("triton"),
        Policy(cuda_graphs=True),
        Policy(measured=True),
        Policy(package=True),
    ]
    keys = [on_a_gpu(int4pack_mm, policy)[1] for policy in policies]
    assert len(set(keys)) == len(policies)
    assert on_a_gpu(int4pack_mm, Policy())[1] == keys[0]


def test_whether_cuda_kernels_load_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that launches them is not found again under a driver that refuses them."""
    keys = {}
    for loads in (True, False):
        monkeypatch.setattr(cuda, "available", lambda _, loads=loads: loads)
        gm, keys[loads] = on_a_gpu(int4pack_mm, Policy(cuda_graphs=True))
        assert own_policy(gm).in_cuda is loads
        # What is decided while compiling is what the key tells, even if the GPU now answers anew.
        monkeypatch.setattr(cuda, "available", lambda _: not loads)  # noqa: B023
        with pretended_gpu():
            choice = own_policy(gm).choose(MatmulShape(8, 4096, 4096), torch.device("cuda:0"))
        assert (choice.kernel == "cuda") is loads
    assert keys[True] != keys[False]
    gm, _ = on_a_gpu(int4pack_mm, Policy(package=True))
    assert own_policy(gm).in_cuda is False  # a package has none


# --- what the ops compute ------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_int4_operands_that_are_not_contiguous(nested: bool) -> None:
    tiles, scale_and_zero = Plain().tiles, Plain().scale_and_zero

    def times(x: Tensor, tiles: Tensor, scale_and_zero: Tensor) -> Tensor:
        y = aten._weight_int4pack_mm_for_cpu(x.t(), tiles, 32, scale_and_zero)
        return y + 1

    def model(x: Tensor, tiles: Tensor, scale_and_zero: Tensor) -> Tensor:
        if not nested:
            return times(x, tiles, scale_and_zero)
        operands = (x, tiles, scale_and_zero)
        return torch.cond(x.sum() > 0, times, lambda *given: times(*given) * 2, operands)

    x = x_of(5).t().contiguous()
    with torch.no_grad():
        x = x * x.sum().sign()  # the sum is positive
        y = torch.compile(model, backend="int4tile")(x, tiles, scale_and_zero)
    expected = aten._weight_int4pack_mm_for_cpu(x.t().contiguous(), tiles, 32, scale_and_zero) + 1
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, "vector", "one", "scalar"])
def test_a_matrix_times_a_vector(bias: str | None, dtype: torch.dtype) -> None:
    def model(w: Tensor, v: Tensor, b: Tensor | None) -> Tensor:
        return torch.mv(w, v) if b is None else torch.addmv(b, w, v, beta=0.5, alpha=3)

    torch.manual_seed(0)
    w, v = torch.randn(K, N, dtype=dtype).t(), torch.randn(K, dtype=dtype)
    sizes = {"vector": (N,), "one": (1,), "scalar": ()}
    b = torch.randn(sizes[bias], dtype=dtype) if bias else None
    with torch.no_grad():
        y = torch.compile(model, backend="int4tile")(w, v, b)
    expected = w.double() @ v.double()
    # A rounding of the product and one of the result; sums over K in fp32 or better.
    eps = torch.finfo(dtype).eps
    bound = w.double().abs() @ v.double().abs() * (2 * eps + K * min(eps, 2.0**-23))
    if b is not None:
        expected, bound = 0.5 * b.double() + 3 * expected, 3 * bound + 2 * eps * b.double().abs()
    assert (y.shape, y.dtype) == ((N,), dtype)
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("op", ["bmm", "grouped_mm", "indexed_mm"])
def test_packaged_experts_called_by_themselves(op: str) -> None:
    torch.manual_seed(0)
    packed = Int4TileTensor.from_float(torch.randn(2, N, K), Int4Config(group_size=32))
    buffers = (packed.tiles, packed.scale_and_zero)
    further, x = {
        "bmm": ((), torch.randn(2, 3, K)),
        "grouped_mm": ((torch.tensor([1, 4], dtype=torch.int32),), torch.randn(4, K)),
        "indexed_mm": ((torch.tensor([1, 0, 1]),), torch.randn(3, K)),
    }[op]
    ours = getattr(torch.ops.fxint4, op)
    given = (x, *buffers, *further, 32, N)
    assert torch.equal(ours.packaged(*given), ours.default(*given))


def test_dense_ops_called_by_themselves() -> None:
    torch.manual_seed(0)
    packed = Int4TileTensor.from_float(torch.randn(N, K), Int4Config(group_size=32))
    x, ours = torch.randn(3, K), torch.ops.fxint4
    given = (x, [packed.tiles], [packed.scale_and_zero], 32, [N])
    y = ours.linears.by_policy(*given, None, False, False, False, False)
    assert torch.equal(y, ours.linears.default(*given))
    model, x = Plain(), x_of()
    strided = x.t().contiguous().t()
    y = ours.linear.for_cpu(strided, model.tiles, 32, model.scale_and_zero)
    expected = aten._weight_int4pack_mm_for_cpu(x, model.tiles, 32, model.scale_and_zero)
    assert torch.equal(y, expected)


# --- sums over processes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype", "rows", "how", "replaced"),
    [
        ("cuda", torch.bfloat16, 4, "sum", True),
        ("cuda", torch.float32, 4, "sum", True),
        ("cuda", torch.bfloat16, 2**17, "sum", True),
        ("cuda", torch.bfloat16, 2**17 + 1, "sum", False),  # NCCL's is faster
        ("cuda", torch.float16, 4, "sum", False),  # PyTorch's kernel has none
        ("cuda", torch.bfloat16, 4, "max", False),
        ("cpu", torch.bfloat16, 4, "sum", False),
    ],
)
def test_sums_over_processes(
    kind: str,
    dtype: torch.dtype,
    rows: int,
    how: str,
    replaced: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    functional, shared = torch.ops._c10d_functional, list[Any]()
    monkeypatch.setattr(all_reduce, "symmetric_memory", lambda *given: shared.append(given))
    monkeypatch.setattr(all_reduce, "group_of", lambda _: SimpleNamespace(size=lambda: 2))

    def summed(x: Tensor) -> Tensor:
        return functional.wait_tensor(functional.all_reduce(x, how, "0")) + 1  # type: ignore[no-any-return]

    def graph(policy: Policy) -> list[Any]:
        with FakeTensorMode():
            gm = make_fx(summed)(torch.empty(rows, 8, dtype=dtype, device=kind))
        use_own_ops(gm, policy)
        gm.graph.lint()
        assert gm.code.count("all_reduce.default(") == 1
        return [node.target for node in gm.graph.nodes if node.op == "call_function"]

    ours = torch.ops.fxint4.all_reduce.default
    assert (ours in graph(Policy(one_shot_all_reduce=True))) is replaced
    # While it is compiled, so that no CUDA graph has the memory.
    memory = ("0", torch.device("cuda", 0), all_reduce.MOST_BYTES)
    assert shared == ([memory] if replaced else [])
    assert ours not in graph(Policy())
