"""Pieces of Inductor's IR, in graphs that run on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor import aoti_load_package

from fxint4._pytorch import inductor as _inductor
from fxint4._pytorch.tensors import aten

pytestmark = pytest.mark.compiles

#: With this many rows or more a matmul is by W, with fewer rows by -W.
MANY = 5
K = 8


@torch.library.custom_op("fxint4_tests::mm", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def mm(x: Tensor, w: Tensor) -> Tensor:
    raise AssertionError("called, though it has a lowering")


@mm.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


def lowered_mm(x: Any, w: Any) -> Any:
    """A lowering that writes y in one of two ways."""
    x = _inductor.contiguous(x)
    rows = x.get_size()[0]
    y = _inductor.empty([rows, w.get_size()[1]], x, x.get_dtype())
    negated = _inductor.call(aten.neg.default, w)
    _inductor.matmul_into(y, x, w, _inductor.indicator(rows, MANY, None))
    _inductor.matmul_into(y, x, negated, _inductor.indicator(rows, 1, MANY - 1))
    return y


class Layers(nn.Module):
    """Matmuls of equal sizes, of views; something before, between and after."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(K, K, bias=False), nn.Linear(K, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        return mm(torch.relu(mm(x, self.first.weight.T)) + 1, self.second.weight.T) + x

    def expected(self, x: Tensor) -> Tensor:
        sign = 1 if len(x) >= MANY else -1
        x = torch.relu(x)
        hidden = torch.relu(sign * x @ self.first.weight.T) + 1
        return sign * hidden @ self.second.weight.T + x


def compiled(model: nn.Module, x: Tensor, folder: Path) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, dynamic=True)


def packaged(model: nn.Module, x: Tensor, folder: Path) -> Callable[[Tensor], Tensor]:
    dims = ({0: torch.export.Dim("m", min=0, max=2**20)},)
    program = torch.export.export(model, (x,), dynamic_shapes=dims)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "m.pt2"))
    return aoti_load_package(path)


@pytest.mark.parametrize("make", [compiled, packaged])
def test_a_matmul_for_some_numbers_of_rows(make: Callable[..., Any], tmp_path: Path) -> None:
    model = Layers().double().eval()
    _inductor.register_lowerings({torch.ops.fxint4_tests.mm.default: lowered_mm})
    with torch.no_grad():
        run = make(model, torch.randn(7, K, dtype=torch.float64), tmp_path)
        for rows in (7, MANY, MANY - 1, 1, 100, 0):
            x = torch.randn(rows, K, dtype=torch.float64)
            torch.testing.assert_close(run(x), model.expected(x))


def test_what_a_kernel_writes_is_told_in_its_own_thread_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another thread may compile a Triton kernel of the user's meanwhile."""
    old = hasattr(triton_kernel_wrap, "identify_mutated_tensors")
    name = "identify_mutated_tensors" if old else "identify_accessed_tensors"
    monkeypatch.setattr(triton_kernel_wrap, name, lambda *_: "Inductor's own answer")
    _inductor._tell_written.cache_clear()

    def asked() -> str:
        return str(getattr(triton_kernel_wrap, name)(None, {}, {}))

    try:
        with ThreadPoolExecutor(1) as another, _inductor._mutated_arguments(["y_ptr"]):
            assert "y_ptr" in asked()
            assert another.submit(asked).result() == "Inductor's own answer"
        assert asked() == "Inductor's own answer"
    finally:
        _inductor._tell_written.cache_clear()
