"""Which device has which packing format, and for how many rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fxint4.quant.tile_layout import DTYPES
from fxint4.weights import formats
from fxint4.weights.formats import (
    Dense,
    activation_dtype,
    aten_op,
    choose_format,
    device_fault,
    fuses,
    int4_format,
    most_int4_rows,
    rows_multiple,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DENSE = Dense(torch.bfloat16, (128, 64), (64, 1), "NK")


@pytest.fixture
def _forgotten() -> Iterator[None]:
    """Clears the cached facts of devices, so that no test sees those of another."""
    device_fault.cache_clear()
    yield
    device_fault.cache_clear()


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", hip)


def test_the_cpu_is_fine() -> None:
    assert device_fault(CPU) is None


@pytest.mark.parametrize("kind", ["meta", "mps", "xpu"])
def test_other_devices_have_no_int4_matmul(kind: str) -> None:
    fault = f"device {kind} has no int4 matmul (CPU and CUDA have)"
    assert device_fault(torch.device(kind)) == fault


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_an_ampere_gpu_and_newer_is_fine(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, capability, hip=None)
    assert device_fault(CUDA) is None


@pytest.mark.usefixtures("_forgotten")
def test_an_older_gpu_is_named_with_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (7, 5), hip=None)
    assert device_fault(CUDA) == (
        "the GPU has compute capability 7.5; int4 tiles need 8.0 (Ampere) or newer"
    )


@pytest.mark.usefixtures("_forgotten")
def test_each_gpu_of_a_machine_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0), hip=None)
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
    )
    for current, fine in ((0, True), (1, False), (0, True)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        for device in (CUDA, torch.device("cuda", current)):
            assert (device_fault(device) is None) == fine


@pytest.mark.usefixtures("_forgotten")
def test_rocm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 4), hip="6.2")
    assert device_fault(CUDA) == "ROCm lays its int4 tiles out differently"


def test_each_device_has_its_op() -> None:
    assert (int4_format(CPU), rows_multiple(CPU)) == ("cpu", 16)
    assert (int4_format(CUDA), rows_multiple(CUDA)) == ("tiles", 8)


def test_weights_that_share_an_activation_are_multiplied_in_one_matmul_on_a_gpu() -> None:
    assert (fuses(CPU), fuses(CUDA)) == (False, True)


@pytest.mark.parametrize(
    ("form", "dtype", "cast_to", "op"),
    [
        ("tiles", torch.bfloat16, torch.bfloat16, "_weight_int4pack_mm"),
        ("tiles", torch.float16, torch.float16, None),
        ("tiles", torch.float32, torch.bfloat16, "_weight_int4pack_mm"),
        *(("cpu", dtype, torch.bfloat16, "_weight_int4pack_mm_for_cpu") for dtype in DTYPES),
    ],
)
def test_atens_ops_take_one_weight_and_bf16(
    form: str, dtype: torch.dtype, cast_to: torch.dtype, op: str | None
) -> None:
    assert activation_dtype(form, dtype) is cast_to
    expected = getattr(torch.ops.aten, op).default if op else None
    assert aten_op(form, cast_to, 1) is expected
    assert aten_op(form, cast_to, 2) is None


# --- how many rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_uses_the_int4_op_for_any_number_of_rows(dtype: torch.dtype) -> None:
    assert choose_format("tiles", DENSE, most_int4_rows(CUDA, dtype), 10**9) == "tiles"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_without_16_bit_matmuls_uses_the_int4_op_for_any_number_of_rows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "mkldnn_supports", lambda asked: asked is not dtype)
    most = most_int4_rows(CPU, dtype)
    assert choose_format("cpu", DENSE, most, 10**9) == "cpu"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cpu_with_fast_dense_matmuls_has_a_limit_for_every_dtype(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "mkldnn_supports", lambda asked: True)
    most = most_int4_rows(CPU, dtype)
    assert choose_format("cpu", DENSE, most, 1) == "cpu"  # decoding
    assert choose_format("cpu", DENSE, most, 4096) == DENSE  # a prompt


def test_fp32_does_not_ask_for_16_bit_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    before = most_int4_rows(CPU, torch.float32)
    monkeypatch.setattr(formats, "mkldnn_supports", lambda asked: pytest.fail("asked"))
    assert most_int4_rows(CPU, torch.float32) == before


@pytest.mark.parametrize("form", ["cpu", "tiles"])
def test_the_form_is_chosen_by_rows(form: str) -> None:
    chosen = {rows: choose_format(form, DENSE, 8, rows) for rows in (None, 0, 1, 8, 9)}
    assert chosen == {None: DENSE, 0: None, 1: form, 8: form, 9: DENSE}
