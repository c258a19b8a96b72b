"""How compiled Triton kernels are launched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxint4.kernels import triton_common
from fxint4.kernels.triton_common import Launch, run


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
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

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
