"""Warm starts: what PyTorch's caches hold of graphs that int4tile compiled, and for whom."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import fxint4
from fxint4.passes import capture as capture_module

pytestmark = [pytest.mark.compiles, pytest.mark.own_cache, pytest.mark.by_aten]

HIT, MISS = (1, 1), (0, 0)


class Two(nn.Module):
    """Two layers, and a buffer that each call writes to."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(128, 64)
        self.down = nn.Linear(64, 128)
        self.register_buffer("seen", torch.zeros(1, 128))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x[:1])
        return self.down(self.up(x).relu()) + self.seen


def started(model: nn.Module, backend: str = "int4tile", **arguments: Any) -> Callable[..., Any]:
    """Compile the model as a new process would, to which others left only what is on disk."""
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, backend=backend, **arguments)


def hits() -> tuple[int, int]:
    """Hits of AOTAutograd's cache, and of Inductor's, since `started`."""
    return counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"]


def assert_runs(model: Two, x: Tensor, run: Callable[..., Any], **options: Any) -> None:
    """Compare a call with one of the same model, its weights rounded to int4, not compiled."""
    rounded = copy.deepcopy(model)
    fxint4.pack_(rounded, options=options)
    fxint4.dequantize_(rounded)
    wanted, y = rounded(x), run(x)
    assert (y - wanted).norm() < 1e-2 * wanted.norm()
    assert torch.equal(model.seen, rounded.seen)


@torch.no_grad()
def test_a_second_start_neither_traces_nor_generates_code() -> None:
    x, texts = torch.randn(4, 128), []
    for expected in (MISS, HIT):
        model = Two()
        assert_runs(model, x, started(model))
        assert hits() == expected
        texts.append(str(fxint4.last_report()))
    assert "2 of 2 matmuls" in texts[0]
    assert texts[0] == texts[1]


@torch.no_grad()
def test_the_weights_are_those_of_the_process_that_runs() -> None:
    x = torch.randn(4, 128)
    started(Two())(x)
    other = Two(seed=1)
    assert_runs(other, x, started(other))
    assert hits() == HIT


@torch.no_grad()
def test_the_options_are_those_of_the_process_that_runs() -> None:
    x = torch.randn(4, 128)
    started(Two())(x)
    for options, code in (({"group_size": 32}, 0), ({"method": "mse"}, 1)):
        model = Two()
        assert_runs(model, x, started(model, options=options), **options)
        assert hits() == (1, code)  # the group size is in the code, the method is not
    model = Two()
    started(model, options={"skip": ["*"]})(x)
    assert "0 of 2 matmuls" in str(fxint4.last_report())


@torch.no_grad()
def test_plain_inductor_and_int4tile_find_nothing_of_each_other() -> None:
    x = torch.randn(4, 128)
    for order in (("inductor", "int4tile"), ("int4tile", "inductor")):
        with torch.compiler.config.patch(cache_key_tag=" and ".join(order)):
            for backend in order:
                model = Two()
                compiled = started(model, backend)
                if backend == "inductor":
                    torch.testing.assert_close(compiled(x), Two()(x))
                else:
                    assert_runs(model, x, compiled)
                assert hits() == MISS


@torch.no_grad()
def test_another_version_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 128)
    started(Two())(x)
    monkeypatch.setattr(capture_module, "source_version", lambda *packages: "of tomorrow")
    started(Two())(x)
    assert hits() == MISS


@torch.no_grad()
def test_packed_models_have_entries_of_their_own() -> None:
    x = torch.randn(4, 128)
    started(Two())(x)
    for expected in (MISS, HIT):
        model = Two()
        fxint4.pack_(model)
        wanted = copy.deepcopy(model)
        fxint4.dequantize_(wanted)
        y = started(model)(x)
        assert hits()[0] == expected[0]
        torch.testing.assert_close(y, wanted(x), atol=1e-2, rtol=1e-2)


@torch.no_grad()
def test_sizes_vary_in_a_graph_from_the_cache() -> None:
    started(Two(), dynamic=True)(torch.randn(4, 128))
    model = Two()
    compiled = started(model, dynamic=True)
    assert_runs(model, torch.randn(4, 128), compiled)
    assert hits() == HIT
    for rows in (7, 300):
        assert_runs(model, torch.randn(rows, 128), compiled)
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_a_size_that_only_a_run_tells_is_traced_again() -> None:
    def picked(x: Tensor) -> Tensor:
        return model.down(x[x[:, 0] > 0])

    x = torch.randn(6, 64)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for _ in range(2):
            model = Two()
            y = started(picked)(x)  # type: ignore[arg-type]
            assert hits()[0] == 0
            assert y.shape == (int((x[:, 0] > 0).sum()), 128)
            assert "1 of 1 matmuls" in str(fxint4.last_report())


@pytest.mark.parametrize(
    "way",
    [
        lambda x: fxint4.calibrate(Two(), [x]),
        lambda x: fxint4.explain(Two(), x),
        lambda x: fxint4.pack_(Two(), (x,)),
    ],
    ids=["calibrate", "explain", "pack_"],
)
def test_what_runs_captured_graphs_by_itself(way: Callable[[Tensor], Any]) -> None:
    x = torch.randn(300, 128)
    texts = []
    for known in (False, True):
        torch._dynamo.reset()
        counters.clear()
        texts.append(str(way(x)))
        assert hits()[0] or not known
        assert (counters["aot_autograd"]["autograd_cache_miss"] == 0) is known
    assert texts[0] == texts[1]


@torch.no_grad()
def test_a_graph_without_an_op() -> None:
    def same(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    x = torch.randn(4, 128)
    for _ in range(2):
        assert started(same)(x) is x  # type: ignore[arg-type]


@torch.no_grad()
def test_an_error_over_a_graph_from_the_cache_is_told_once() -> None:
    x = torch.randn(4, 128)
    started(Two())(x)
    folds = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        folds.append(args)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxint4.quant.recipe.quantize", fails)
        with pytest.raises(BackendCompilerFailed, match=r"fold the weight of up.*out of memory"):
            started(Two())(x)
    assert len(folds) == 1
    model = Two()
    assert_runs(model, x, started(model))
    assert hits() == HIT


@torch.no_grad()
def test_nothing_is_kept_where_the_user_has_the_cache_off() -> None:
    x = torch.randn(4, 128)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        for code in (0, 1):
            started(Two())(x)
            assert hits() == (0, code)


@torch.no_grad()
def test_artifacts_carry_the_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 128)
    started(Two())(x)
    artifacts = torch.compiler.save_cache_artifacts()
    assert artifacts is not None
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = Two(seed=1)
    started(model)
    torch.compiler.load_cache_artifacts(artifacts[0])
    assert_runs(model, x, torch.compile(model, backend="int4tile"))
    assert hits() == HIT


# --- aot_compile, of torch 2.12 and newer --------------------------------------------------------

needs_aot_compile = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="this PyTorch has no aot_compile for modules",
)


def saved(model: nn.Module, x: Tensor, path: Path, **arguments: Any) -> Callable[..., Any]:
    """Compile the model's forward ahead of time and save it; returns what is loaded again."""
    compiled = torch.compile(model, backend="int4tile", fullgraph=True, **arguments)
    made = compiled.forward.aot_compile(((x,), {}))
    wanted = made(model, x)
    made.save_compiled_function(str(path))
    torch._dynamo.reset()
    with path.open("rb") as file:
        loaded = torch.compiler.load_compiled_function(file)
    model.seen.sub_(x[:1])
    torch.testing.assert_close(loaded(model, x), wanted)
    return loaded


@needs_aot_compile
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_a_saved_model_takes_the_weights_of_the_process_that_loads(
    dynamic: bool, tmp_path: Path
) -> None:
    x = torch.randn(4, 128)
    options = {"group_size": 32}
    loaded = saved(Two(), x, tmp_path / "model", dynamic=dynamic or None, options=options)
    other = Two(seed=1)
    assert_runs(other, x, lambda x: loaded(other, x), **options)
    report = fxint4.last_report()
    assert len(report.records) == 4  # of both models
    assert {(r.name, r.action, r.group_size) for r in report.records} == {
        ("up", "packed", 32),
        ("down", "packed", 32),
    }
    if dynamic:
        more = torch.randn(300, 128)
        assert_runs(other, more, lambda x: loaded(other, x), **options)


@needs_aot_compile
@torch.no_grad()
def test_a_packed_model_is_saved_without_its_weights(tmp_path: Path) -> None:
    x, model = torch.randn(4, 128), Two()
    fxint4.pack_(model)
    loaded = saved(model, x, tmp_path / "model")
    other = Two(seed=1)
    fxint4.pack_(other)
    plain = copy.deepcopy(other)
    fxint4.dequantize_(plain)
    torch.testing.assert_close(loaded(other, x), plain(x), atol=1e-2, rtol=1e-2)


@needs_aot_compile
@torch.no_grad()
def test_what_was_loaded_is_saved_again(tmp_path: Path) -> None:
    x, model = torch.randn(4, 128), Two()
    loaded = saved(model, x, tmp_path / "model")
    loaded.save_compiled_function(str(tmp_path / "again"))
    with (tmp_path / "again").open("rb") as file:
        again = torch.compiler.load_compiled_function(file)
    assert_runs(model, x, lambda x: again(model, x))
