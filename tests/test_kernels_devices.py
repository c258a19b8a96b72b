"""Facts about GPUs are asked of each GPU of a machine, also where a device has no index."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxint4.kernels import cuda, nvrtc
from fxint4.kernels.devices import PerDevice, with_index
from fxint4.kernels.select import Gpu, gpu_of
from fxint4.kernels.triton_experts import shared_of

CUDA = torch.device("cuda")

#: An H100 and an L40S.
_GPUS = [
    SimpleNamespace(
        major=9, minor=0, multi_processor_count=114, shared_memory_per_block_optin=232448
    ),
    SimpleNamespace(
        major=8, minor=9, multi_processor_count=142, shared_memory_per_block_optin=101376
    ),
]


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes one of two unlike GPUs the current one."""

    def properties(device: torch.device) -> Any:
        return _GPUS[device.index]

    def kernel(name: str, macros: Any, device: torch.device, **_: int) -> None:
        if device.index == 1:
            raise RuntimeError("CUDA_ERROR_INVALID_IMAGE")

    monkeypatch.setattr("torch.cuda.get_device_properties", properties)
    monkeypatch.setattr(
        "torch.cuda.get_device_capability",
        lambda device: (properties(device).major, properties(device).minor),
    )
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "Kernel", kernel)
    return lambda index: monkeypatch.setattr("torch.cuda.current_device", lambda: index)


@pytest.mark.parametrize(
    ("fact", "cached", "expected"),
    [
        (gpu_of, gpu_of, [Gpu(114, wgmma=True), Gpu(142, wgmma=False)]),
        (shared_of, shared_of, [232448, 101376]),
        (cuda.available, cuda._loads, [True, False]),
    ],
)
def test_unlike_gpus_of_a_machine(
    fact: Callable[[torch.device], Any],
    cached: PerDevice[Any],
    expected: list[Any],
    current: Callable[[int], None],
) -> None:
    cached.cache_clear()
    try:
        for index in (0, 1, 0):
            current(index)
            assert fact(CUDA) == fact(torch.device("cuda", index)) == expected[index]
            assert fact(torch.device("cuda", 1 - index)) == expected[1 - index]
    finally:
        cached.cache_clear()


def test_each_device_is_asked_once(current: Callable[[int], None]) -> None:
    asked: list[torch.device] = []

    @PerDevice
    def fact(device: torch.device) -> str:
        """What a device is called."""
        asked.append(device)
        return str(device)

    current(1)
    for device in (CUDA, torch.device("cuda", 1), torch.device("cpu"), CUDA):
        assert fact(device) == str(with_index(device))
    assert asked == [torch.device("cuda", 1), torch.device("cpu")]
    assert fact.__doc__ == "What a device is called."
    fact.cache_clear()
    fact(CUDA)
    assert len(asked) == 3
