"""How compiled Triton kernels are launched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxint4.kernels import triton_common
from fxint4.kernels.triton_common import Launch, direct, run


class Kernel:
    """A kernel that notes how it was launched: by Triton's public way, or as a compiled variant."""

    arg_names = ("x_ptr", "M", "BLOCK")

    def __init__(self) -> None:
        self.__name__ = "kernel"
        self.launched: list[tuple[str, Any, tuple[Any, ...]]] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, num_warps: int, num_stages: int) -> Variant:
            assert (num_warps, num_stages) == (4, 3)
            self.launched.append(("public", grid, args[1:]))
            return Variant(self)

        return launch


class Variant:
    function = 1234

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        types = ("*fp32", "i32", "constexpr")
        self.src = SimpleNamespace(signature=dict(zip(kernel.arg_names, types, strict=True)))
        self.metadata = SimpleNamespace(
            num_warps=4,
            shared=512,
            num_ctas=1,
            global_scratch_size=0,
            profile_scratch_size=0,
            launch_cooperative_grid=False,
            launch_pdl=False,
        )

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args: self.kernel.launched.append(("variant", grid, args[1:]))


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_common, "_compiled", {})
    triton_common._takes_all_arguments.cache_clear()
    yield
    triton_common._takes_all_arguments.cache_clear()


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("3.5.1", False),
        ("3.6.0", True),
        ("3.7.1", True),
        ("3.9.0+git1234abcd", True),
        ("3.10.0", False),
        ("4.0.0", False),
    ],
)
def test_variants_are_launched_where_their_arguments_are_known(
    version: str, known: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        triton_common, "triton", SimpleNamespace(__version__=version, JITFunction=Kernel)
    )
    kernel, x = Kernel(), torch.zeros(16)
    with caplog.at_level(logging.DEBUG, "fxint4"):
        for rows in (1, 2, 3):
            run(Launch(kernel, rows, {"M": rows, "BLOCK": 64}, 4, 3), {"x_ptr": x})
    later = ("variant", lambda rows: (rows, 1, 1)) if known else ("public", lambda rows: (rows,))
    ways = [("public", lambda rows: (rows,)), later, later]
    assert kernel.launched == [
        (way, grid(rows), (rows, 64)) for rows, (way, grid) in enumerate(ways, 1)
    ]
    told = [text for text in caplog.messages if f"Triton {version} is none that" in text]
    assert len(told) == (not known)


@pytest.mark.skipif(triton_common.triton is None, reason="needs Triton")
def test_the_installed_triton_is_known() -> None:
    assert triton_common._takes_all_arguments()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> tuple[Launch, dict[str, torch.Tensor], Variant]:
    """A launch that has been made, its tensors, and the variant that Triton compiled for it."""
    known = SimpleNamespace(__version__="3.6.0", JITFunction=Kernel)
    monkeypatch.setattr(triton_common, "triton", known)
    launch, tensors = Launch(Kernel(), 5, {"M": 3, "BLOCK": 64}, 4, 3), {"x_ptr": torch.zeros(16)}
    run(launch, tensors)
    (variant,) = triton_common._compiled.values()
    return launch, tensors, variant


def test_direct_launches_pass_what_the_kernel_takes(
    launched: tuple[Launch, dict[str, torch.Tensor], Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(triton_common, "launcher", lambda: lambda *args: calls.append(args))
    launch, tensors, _ = launched
    launch_by = direct(launch, tensors)
    assert launch_by is not None
    launch_by([4096], 77)
    launch_by([8192], 78)
    fixed = (1234, 5, 1, 1, 4, 512, "OiOO")  # an address, M, and Triton's two scratch buffers
    assert calls == [
        (*fixed, (4096, 3, None, None), 77),
        (*fixed, (8192, 3, None, None), 78),
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_ctas", 2),
        ("global_scratch_size", 64),
        ("profile_scratch_size", 64),
        ("launch_cooperative_grid", True),
        ("launch_pdl", True),
    ],
)
def test_what_asks_for_more_is_not_launched_directly(
    launched: tuple[Launch, dict[str, torch.Tensor], Variant],
    name: str,
    value: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_common, "launcher", lambda: print)
    launch, tensors, variant = launched
    assert direct(launch, tensors) is not None
    setattr(variant.metadata, name, value)
    assert direct(launch, tensors) is None


def test_no_direct_launch(
    launched: tuple[Launch, dict[str, torch.Tensor], Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, tensors, variant = launched
    monkeypatch.setattr(triton_common, "launcher", lambda: None)
    assert direct(launch, tensors) is None
    monkeypatch.setattr(triton_common, "launcher", lambda: print)
    assert direct(launch, {"x_ptr": torch.zeros(17)[1:]}) is None, "no variant for its address"
    variant.src.signature["M"] = "tensordesc<fp16[64, 64]>"
    assert direct(launch, tensors) is None
