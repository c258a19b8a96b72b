"""The cache of packed weights, keyed by the identity of parameters; compiles nothing."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from support import rounding
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxint4.quant.blockwise
import fxint4.quant.chunks
import fxint4.quant.recipe
import fxint4.weights.cache
from fxint4 import Int4Config, Int4TileTensor
from fxint4.graph.constants import Constants, Role
from fxint4.quant.primitives import dequantize, quantize
from fxint4.quant.statistics import Statistics
from fxint4.quant.tile_layout import TileShape, choose_shape, unpack, unpack_scale_and_zero
from fxint4.weights.cache import PackedWeight, WeightCache
from fxint4.weights.expression import AXES, Prepacked, Weight
from fxint4.weights.formats import Dense, Format

N, K, GROUP = 40, 100, 32  # both are padded
SHAPE = choose_shape(N, K, GROUP, n_multiple=16)


def weight_of(
    function: Callable[..., Tensor], *shapes: tuple[int, ...], axes: str = "NK"
) -> Weight:
    """The weight that a captured graph computes by `function` of parameters of these shapes."""
    gm = make_fx(function)(*map(torch.randn, shapes))
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    [result] = gm.graph.output_node().all_input_nodes
    constants = Constants(gm, dict.fromkeys(placeholders, Role.WEIGHT))
    return constants.weight(result, axes)


def plain() -> Weight:
    return weight_of(lambda w: w, (N, K))


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape or (N, K), dtype=dtype))


def dense_values(w: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight ``[N, K]`` quantized and dequantized."""
    made = quantize(w.detach(), GROUP)
    return dequantize(made.codes, made.scale, made.zero, GROUP, dtype, w.shape[1])


def assert_holds(packed: PackedWeight, w: Tensor) -> None:
    """Every format of `packed`, dense copies and tiles, holds the weight ``[N, K]``."""
    made = quantize(w.detach(), GROUP)
    n = len(w)
    assert packed.formats
    for form, tensors in packed.formats.items():
        if form == "tiles":
            codes, (scale, zero) = unpack(tensors[0]), unpack_scale_and_zero(tensors[1])
            assert torch.equal(codes[:n], made.codes)
            assert torch.equal(scale[:n], made.scale)
            assert torch.equal(zero[:n], made.zero)
            assert (codes[n:] == 8).all()
            assert not scale[n:].any()
            assert not zero[n:].any()
        elif isinstance(form, Dense):
            assert torch.equal(AXES[form.axes](tensors[0]), dense_values(w, form.dtype))
        else:
            pytest.fail(f"{form} can't be unpacked")


def folded(
    weight_cache: WeightCache,
    weight: Weight,
    *roots: Tensor,
    forms: Collection[Format] = ("tiles",),
    shape: TileShape = SHAPE,
) -> PackedWeight:
    packed = weight_cache.find(weight, roots, shape)
    weight_cache.fold(packed, forms, roots)
    return packed


@pytest.fixture
def weight_cache() -> WeightCache:
    return WeightCache()


# --- one packed copy -----------------------------------------------------------------------------


def test_a_weight_reached_by_two_routes_is_one(weight_cache: WeightCache) -> None:
    w = parameter()
    direct = weight_cache.find(plain(), [w], SHAPE)
    transposed = weight_cache.find(weight_of(lambda w: w.t(), (N, K), axes="KN"), [w], SHAPE)
    batched = weight_cache.find(
        weight_of(lambda w: w.t().unsqueeze(0), (N, K), axes="*KN"), [w], SHAPE
    )
    assert direct is transposed is batched
    assert len(weight_cache) == 1


def test_other_parameters_computations_and_shapes_are_others(weight_cache: WeightCache) -> None:
    w, v = parameter(), parameter()
    packed = {
        weight_cache.find(plain(), [w], SHAPE),
        weight_cache.find(plain(), [v], SHAPE),
        weight_cache.find(weight_of(lambda w: 2 * w, (N, K)), [w], SHAPE),
        weight_cache.find(plain(), [w], choose_shape(N, K, GROUP, inner_k_tiles=2, n_multiple=16)),
    }
    assert len(packed) == len(weight_cache) == 4
    [of_v] = weight_cache.of(v)
    assert of_v in packed
    assert len(weight_cache.of(w)) == 3


def test_a_weight_made_of_several_parameters_belongs_to_each(weight_cache: WeightCache) -> None:
    merge = weight_of(lambda w, b, a: w + b @ a, (N, K), (N, 2), (2, K))
    values = {"w_1": parameter(), "b_1": parameter(N, 2), "a_1": parameter(2, K)}
    roots = [values[root.name] for root in merge.roots]
    packed = folded(weight_cache, merge, *roots)
    assert all(weight_cache.of(root) == [packed] for root in roots)
    w, b, a = values.values()
    assert_holds(packed, w + b @ a)
    with torch.no_grad():
        a.mul_(2)
    assert not packed.is_current(roots)
    weight_cache.fold(packed, ("tiles",), roots)
    assert_holds(packed, w + b @ a)


# --- forms ---------------------------------------------------------------------------------------


def test_tiles_unpack_to_the_codes(weight_cache: WeightCache) -> None:
    w = parameter()
    packed = folded(weight_cache, plain(), w)
    tiles, scale_and_zero = packed.formats["tiles"]
    assert (tiles.shape, tiles.dtype) == (SHAPE.tiles_shape, torch.int32)
    assert scale_and_zero.shape == SHAPE.scale_and_zero_shape
    assert_holds(packed, w)
    assert packed.sqnr_db == quantize(w.detach(), GROUP).sqnr_db


def test_the_cpu_form_multiplies_as_the_dequantized_weight(weight_cache: WeightCache) -> None:
    """x is bf16; w may be rounded to bf16, and y is; see `rounding`."""
    w = parameter()
    codes, scale_and_zero = folded(weight_cache, plain(), w, forms=("cpu",)).formats["cpu"]
    x = torch.randn(7, K, dtype=torch.bfloat16)
    padded = nn.functional.pad(x, (0, SHAPE.k_padded - K))
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(padded, codes, GROUP, scale_and_zero)
    wide, exact = x.double(), dense_values(w, torch.float64)
    bound = rounding(K, roundings=2) * (wide.abs() @ exact.abs().T)
    assert ((y[:, :N].double() - wide @ exact.T).abs() <= bound).all()
    assert not y[:, N:].any()  # rows that are not there


DENSE = {
    "NK": Dense(torch.float32, (N, K), (K, 1), "NK"),
    "NK as columns": Dense(torch.float32, (N, K), (1, N), "NK"),
    "KN": Dense(torch.bfloat16, (K, N), (N, 1), "KN"),
    "KN as a view": Dense(torch.bfloat16, (K, N), (1, K), "KN"),
    "*NK": Dense(torch.float16, (1, N, K), (N * K, K, 1), "*NK"),
    "*KN": Dense(torch.float32, (1, K, N), (K * N, N, 1), "*KN"),
    "NK1": Dense(torch.float32, (N, K, 1, 1), (K, 1, 1, 1), "NK1"),
    "NK1, channels last": Dense(torch.float32, (N, K, 1, 1), (K, 1, K, K), "NK1"),
}


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_copy_holds_what_int4_leaves_where_the_weight_lay(
    name: str, weight_cache: WeightCache
) -> None:
    form, w = DENSE[name], parameter()
    [dense] = folded(weight_cache, plain(), w, forms=(form,)).formats[form]
    assert (dense.dtype, dense.shape, dense.stride()) == (form.dtype, form.size, form.stride)
    values = dense_values(w, form.dtype)
    values = values.t() if form.axes.endswith("KN") else values
    assert torch.equal(dense, values.reshape(form.size))


def test_dense_copies_of_every_axes_are_tested() -> None:
    assert {form.axes for form in [*DENSE.values(), *DENSE_EXPERTS]} == set(AXES)


# --- experts -------------------------------------------------------------------------------------

E = 3
EXPERTS = choose_shape(N, K, GROUP, n_multiple=16, batch=(E,))
DENSE_EXPERTS = (
    Dense(torch.float32, (E, N, K), (N * K, K, 1), "ENK"),
    Dense(torch.bfloat16, (E, K, N), (N * K, 1, K), "EKN"),
)


@pytest.mark.parametrize("chunk", [1, 2 * N * K, 2**19])
def test_each_expert_holds_what_it_would_hold_alone(
    chunk: int, weight_cache: WeightCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many experts are folded at a time."""
    monkeypatch.setattr(fxint4.quant.chunks, "CPU_CHUNK", chunk)
    w = parameter(E, N, K)
    weight = weight_of(lambda w: w, (E, N, K), axes="ENK")
    forms: tuple[Format, ...] = ("tiles", "cpu", *DENSE_EXPERTS)
    packed = folded(weight_cache, weight, w, forms=forms, shape=EXPERTS)
    matrices = [parameter(N, K) for _ in range(E)]
    alone = []
    for matrix, expert in zip(matrices, w, strict=True):
        matrix.data.copy_(expert)
        alone.append(folded(weight_cache, plain(), matrix, forms=("tiles", "cpu")))
    for form in ("tiles", "cpu"):
        for part, buffer in enumerate(packed.formats[form]):
            assert torch.equal(buffer, torch.stack([one.formats[form][part] for one in alone]))
    for form in DENSE_EXPERTS:
        [dense] = packed.formats[form]
        assert (dense.shape, dense.stride()) == (form.size, form.stride)
        expected = torch.stack([dense_values(expert, form.dtype) for expert in w])
        assert torch.equal(AXES[form.axes](dense), expected)
    assert packed.sqnr_db == pytest.approx(quantize(w.detach().view(-1, K), GROUP).sqnr_db)


# --- weights that are packed already -------------------------------------------------------------


def given() -> tuple[Int4TileTensor, Prepacked, list[Tensor]]:
    packed = Int4TileTensor.from_float(torch.randn(N, K), Int4Config(group_size=GROUP))
    return packed, Prepacked(packed.n, GROUP), [packed.tiles, packed.scale_and_zero]


def test_tiles_that_are_given_are_not_copied(weight_cache: WeightCache) -> None:
    _packed, computation, roots = given()
    found = weight_cache.find(computation, roots, computation.shape_of(roots, 8))
    weight_cache.fold(found, ("tiles",), roots)
    assert not found.holds("tiles")
    held = found.tensors("tiles", roots)
    assert [t.data_ptr() for t in held] == [t.data_ptr() for t in roots]
    assert found.sqnr_db is None


def test_the_cpu_form_of_given_tiles_is_that_of_the_weight_they_were_made_from(
    weight_cache: WeightCache,
) -> None:
    w = parameter()
    packed = Int4TileTensor.from_float(w, Int4Config(group_size=GROUP))
    computation, roots = Prepacked(packed.n, GROUP), [packed.tiles, packed.scale_and_zero]
    found = weight_cache.find(computation, roots, computation.shape_of(roots, 16))
    weight_cache.fold(found, ("cpu",), roots)
    shape = choose_shape(N, K, GROUP, n_multiple=16)
    direct = folded(weight_cache, plain(), w, forms=("cpu",), shape=shape)
    for one, other in zip(found.formats["cpu"], direct.formats["cpu"], strict=True):
        assert torch.equal(one, other)


def test_given_tiles_that_change_are_packed_again(weight_cache: WeightCache) -> None:
    packed, computation, roots = given()
    found = weight_cache.find(computation, roots, computation.shape_of(roots, 16))
    weight_cache.fold(found, ("cpu",), roots)
    before = [buffer.clone() for buffer in found.formats["cpu"]]
    packed.copy_(torch.randn(N, K))
    assert not found.is_current(roots)
    weight_cache.fold(found, ("cpu",), roots)
    assert not torch.equal(before[0], found.formats["cpu"][0])


def test_given_tiles_are_not_kept_alive(weight_cache: WeightCache) -> None:
    packed, computation, roots = given()
    found = weight_cache.find(computation, roots, computation.shape_of(roots, 16))
    weight_cache.fold(found, ("tiles", "cpu"), roots)
    assert len(weight_cache) == 1
    del packed, roots
    assert len(weight_cache) == 0


def test_a_weight_that_is_folded_in_blocks_of_rows_holds_the_same(
    weight_cache: WeightCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """150 rows in blocks of 64, the smallest."""
    n, x = 150, torch.randn(3, SHAPE.k_padded, dtype=torch.bfloat16)
    shape = choose_shape(n, K, GROUP, n_multiple=16)
    dense = Dense(torch.float32, (K, n), (n, 1), "KN")
    w = parameter(n, K)

    def product(packed: PackedWeight) -> Tensor:
        codes, scale_and_zero = packed.formats.pop("cpu")
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, GROUP, scale_and_zero)

    def fold(into: WeightCache) -> PackedWeight:
        weight = weight_of(lambda w: w, (n, K))
        return folded(into, weight, w, forms=("cpu", "tiles", dense), shape=shape)

    whole = fold(WeightCache())
    monkeypatch.setattr(fxint4.quant.chunks, "CPU_CHUNK", 64 * K)
    calls = counted(monkeypatch)
    blocks = fold(weight_cache)
    assert len(calls) == 3
    # Sums of squares are taken in another order, in float64.
    assert blocks.sqnr_db == pytest.approx(whole.sqnr_db, rel=n * K * 2.0**-52)
    assert torch.equal(product(blocks), product(whole))
    assert_holds(blocks, w)


def test_forms_are_added_as_they_are_asked_for(
    weight_cache: WeightCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    w = parameter()
    packed = folded(weight_cache, plain(), w)
    tiles = packed.formats["tiles"]
    weight_cache.fold(packed, ("tiles",), [w])
    assert len(calls) == 1
    weight_cache.fold(packed, ("tiles", DENSE["KN"]), [w])
    assert len(calls) == 2
    assert packed.formats["tiles"] is tiles
    assert set(packed.formats) == {"tiles", DENSE["KN"]}
    assert_holds(packed, w)


def counted(monkeypatch: pytest.MonkeyPatch, seconds: float = 0) -> list[TileShape]:
    """A list that grows whenever a weight is quantized; that takes `seconds` longer."""
    calls: list[Any] = []

    def counting(*args: Any) -> Any:
        calls.append(args)
        time.sleep(seconds)
        return quantize(*args)

    monkeypatch.setattr(fxint4.quant.recipe, "quantize", counting)
    return calls


# --- changes -------------------------------------------------------------------------------------


def in_place(w: nn.Parameter) -> None:
    with torch.no_grad():
        w.mul_(torch.randn(N, 1))


def data_assigned(w: nn.Parameter) -> None:
    w.data = torch.randn(N, K)


def test_a_change_is_seen_and_folded_into_the_same_memory(weight_cache: WeightCache) -> None:
    w = parameter()
    packed = folded(weight_cache, plain(), w, forms=("tiles", DENSE["NK"], DENSE["KN"]))
    tensors = [tensor for made in packed.formats.values() for tensor in made]
    addresses = [tensor.data_ptr() for tensor in tensors]
    for _ in range(3):
        assert packed.is_current([w])
        in_place(w)
        assert not packed.is_current([w])
        assert weight_cache.find(plain(), [w], SHAPE) is packed
        weight_cache.fold(packed, (), [w])  # all the forms that graphs hold, asked for or not
        assert_holds(packed, w)
    now = [tensor for made in packed.formats.values() for tensor in made]
    assert all(new is old for new, old in zip(now, tensors, strict=True))
    assert [tensor.data_ptr() for tensor in now] == addresses


def test_other_memory_is_another_weight_and_the_old_one_is_freed(weight_cache: WeightCache) -> None:
    w = parameter()
    packed = folded(weight_cache, plain(), w)
    data_assigned(w)
    assert packed.formats == {}
    assert_holds(folded(weight_cache, plain(), w), w)
    assert len(weight_cache) == 1


def test_memory_seen_with_other_strides_is_another_weight(weight_cache: WeightCache) -> None:
    """As `layer.weight.data = layer.weight.data.t()` does with a square one."""
    w, shape = nn.Parameter(torch.randn(64, 64)), choose_shape(64, 64, GROUP, n_multiple=16)
    straight = folded(weight_cache, square := weight_of(lambda w: w, (64, 64)), w, shape=shape)
    for change in (torch.t, lambda w: w[:1].expand(64, 64), lambda w: w.flip(0)):
        w.data = change(w.data)
        other = folded(weight_cache, square, w, shape=shape)
        assert other is not straight
        assert_holds(other, w)


def test_aliases_share_one_packed_weight(weight_cache: WeightCache) -> None:
    w = parameter()
    packed = folded(weight_cache, plain(), w)
    for alias in (w.detach(), w.data, nn.Parameter(w.detach()), w.view(N, K)):
        assert weight_cache.find(plain(), [alias], SHAPE) is packed
        assert weight_cache.of(alias) == [packed]


def test_parameters_can_be_swapped(weight_cache: WeightCache) -> None:
    w, v = parameter(), parameter()
    values = v.detach().clone()
    folded(weight_cache, plain(), w)
    torch.utils.swap_tensors(w, v)
    assert torch.equal(w, values)
    assert_holds(folded(weight_cache, plain(), w), w)


def test_adapters_that_are_swapped_leave_nothing_behind(weight_cache: WeightCache) -> None:
    """One callback for each storage, however many weights are made of it."""
    total = weight_of(lambda w, v: w + v, (N, K), (N, K))
    w, finalizers = parameter(), len(weakref.finalize._registry)  # type: ignore[attr-defined]
    for _ in range(20):
        folded(weight_cache, total, w, parameter())
    gc.collect()
    assert len(weight_cache) == 0
    assert weight_cache.of(w) == []
    assert len(weakref.getweakrefs(w.untyped_storage())) <= 1
    assert len(weakref.finalize._registry) == finalizers  # type: ignore[attr-defined]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_fault_and_its_recovery(bad: float, weight_cache: WeightCache) -> None:
    w = parameter()
    packed = folded(weight_cache, plain(), w)
    good = w.detach().clone()
    tiles = packed.formats["tiles"]
    with torch.no_grad():
        w[3, 5:7] = bad
    weight_cache.fold(packed, ("tiles",), [w])
    assert packed.fault == f"2 of the weight's {N * K} values are inf or NaN"
    with torch.no_grad():
        w.copy_(good)
    weight_cache.fold(packed, ("tiles",), [w])
    assert packed.fault is None
    assert packed.formats["tiles"] is tiles
    assert_holds(packed, w)


def test_a_weight_with_a_fault_from_the_start_takes_no_memory(
    weight_cache: WeightCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = parameter()
    w.data[0, 0] = float("nan")
    calls = counted(monkeypatch)
    packed = folded(weight_cache, plain(), w)
    assert packed.fault == f"1 of the weight's {N * K} values are inf or NaN"
    assert (packed.formats, calls) == ({}, [])
    with torch.no_grad():
        w[0, 0] = 1
    weight_cache.fold(packed, ("tiles",), [w])
    assert_holds(packed, w)


def test_a_fold_that_fails_is_done_again(
    weight_cache: WeightCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = parameter()
    copies = (DENSE["NK"], DENSE["KN"])
    packed = folded(weight_cache, plain(), w, forms=copies)
    in_place(w)
    calls = []

    def fails_at_the_second_copy(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return dequantize(*args)

    with monkeypatch.context() as patch:
        patch.setattr(fxint4.quant.blockwise, "dequantize", fails_at_the_second_copy)
        with pytest.raises(torch.OutOfMemoryError):
            weight_cache.fold(packed, (), [w])
    assert not packed.is_current([w])
    weight_cache.fold(packed, (), [w])
    assert_holds(packed, w)


def test_inference_tensors_can_be_folded(weight_cache: WeightCache) -> None:
    with torch.inference_mode():
        w = torch.randn(N, K)
        assert w.is_inference()
        packed = folded(weight_cache, plain(), w)
    assert_holds(packed, w)
    assert packed.is_current([w])
    tiles, scale_and_zero = packed.formats["tiles"]
    assert not tiles.is_inference()  # which could not be updated later
    assert not scale_and_zero.is_inference()


def test_a_parameter_changed_outside_inference_mode_is_folded_again_outside_it(
    weight_cache: WeightCache,
) -> None:
    w = parameter()
    with torch.inference_mode():
        packed = folded(weight_cache, plain(), w)
    in_place(w)
    weight_cache.fold(packed, (), [w])
    assert_holds(packed, w)


def test_packed_tensors_want_no_gradient(weight_cache: WeightCache) -> None:
    w = parameter()
    packed = folded(weight_cache, plain(), w, forms=("tiles", DENSE["NK"]))
    tensors = [tensor for made in packed.formats.values() for tensor in made]
    assert not any(tensor.requires_grad for tensor in tensors)


# --- the end of a parameter ----------------------------------------------------------------------


def test_packed_weights_die_with_their_parameter(weight_cache: WeightCache) -> None:
    w, other = parameter(), parameter()
    packed = folded(weight_cache, plain(), w, forms=("cpu", "tiles", DENSE["NK"]))
    folded(weight_cache, plain(), other)
    made = [weakref.ref(tensor) for tensors in packed.formats.values() for tensor in tensors]
    assert len(made) == 5
    del w
    gc.collect()
    assert [ref() for ref in made] == [None] * 5
    assert len(weight_cache) == 1
    assert packed.formats == {}
    assert weight_cache.of(other)


def test_one_of_several_parameters_that_dies_takes_the_packed_weight_along(
    weight_cache: WeightCache,
) -> None:
    total = weight_of(lambda w, v: w + v, (N, K), (N, K))
    w, v = parameter(), parameter()
    packed = folded(weight_cache, total, w, v)
    tiles = weakref.ref(packed.formats["tiles"][0])
    del w
    gc.collect()
    assert (len(weight_cache), tiles()) == (0, None)
    again = parameter()
    assert_holds(folded(weight_cache, total, again, v), again + v)
    del v
    gc.collect()
    assert len(weight_cache) == 0


def test_the_store_keeps_no_parameter_alive(weight_cache: WeightCache) -> None:
    w = parameter()
    folded(weight_cache, plain(), w, forms=("cpu", "tiles", DENSE["NK"]))
    ref = weakref.ref(w)
    del w
    gc.collect()
    assert ref() is None


def test_a_parameter_that_dies_and_one_at_its_address_are_two(weight_cache: WeightCache) -> None:
    for _ in range(20):
        w = parameter()
        assert_holds(folded(weight_cache, plain(), w), w)
        del w
    gc.collect()
    assert len(weight_cache) == 0


@pytest.mark.gpu
def test_a_parameter_that_moved_is_packed_anew(weight_cache: WeightCache) -> None:
    layer = nn.Linear(K, N, bias=False)
    w = layer.weight
    on_cpu = folded(weight_cache, plain(), w)
    layer.cuda()
    assert layer.weight is w  # the same parameter, on another device
    on_gpu = folded(weight_cache, plain(), w)
    assert on_gpu is not on_cpu
    assert (len(weight_cache), on_cpu.formats) == (1, {})
    assert all(tensor.is_cuda for tensor in on_gpu.formats["tiles"])
    assert_holds(on_gpu, w)


# --- threads -------------------------------------------------------------------------------------


def test_threads_that_fold_one_weight_at_once_make_it_once(
    weight_cache: WeightCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch, seconds=0.05)  # long enough for the others to come in
    w, count = parameter(), 4
    start = threading.Barrier(count)
    found: list[PackedWeight] = []
    errors: list[BaseException] = []

    def work(weight: Weight) -> None:
        try:
            start.wait(timeout=10)
            found.append(folded(weight_cache, weight, w, forms=("tiles", DENSE["NK"])))
        except BaseException as error:
            errors.append(error)

    # Tracing is not for several threads at once.
    threads = [threading.Thread(target=work, args=(plain(),)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert errors == []
    assert len(found) == count
    assert len({id(packed) for packed in found}) == len(weight_cache) == len(calls) == 1
    assert_holds(found[0], w)


def test_gptq_takes_more_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQ takes columns one by one, so its time hardly depends on the number of rows."""
    blocks = fxint4.quant.blockwise.quantized_blocks
    x = torch.randn(300, K)
    statistics = Statistics(x.T @ x, x.abs().mean(0), torch.tensor(len(x)))
    monkeypatch.setattr(fxint4.quant.chunks, "CPU_CHUNK", 64 * K)
    w = torch.randn(256, K)
    shape = choose_shape(256, K, GROUP)
    made = {
        method: list(blocks(w, shape, fxint4.quant.recipe.Recipe(method, statistics)))
        for method in ("mse", "gptq")
    }
    assert [len(block.codes) for block in made["mse"]] == [64, 64, 64, 64]
    [block] = made["gptq"]
    monkeypatch.undo()
    [alone] = blocks(w, shape, fxint4.quant.recipe.Recipe("gptq", statistics))
    assert torch.equal(block.codes, alone.codes)


def test_a_lock_that_no_thread_gives_back_is_made_anew_in_a_child(
    weight_cache: WeightCache,
) -> None:
    w = parameter()
    before = folded(weight_cache, plain(), w)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with weight_cache._lock:
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    weight_cache.after_fork()
    try:
        assert weight_cache._lock.acquire(timeout=0)  # else the next line would wait
        weight_cache._lock.release()
        with torch.no_grad():
            w.mul_(-1)
        assert folded(weight_cache, plain(), w) is before
        assert_holds(before, w)
    finally:
        done.set()
        holder.join(60)
