"""Int4 matmuls of other projects, for gemm.py; each where it is installed.

torchao 0.18 and newer
    The linear of its `Int4TilePackedTo4dTensor`, over our own tiles: the layout is the same. It is
    aten's op, after x was padded to a multiple of 1024.
GemLite 0.6
    Weight-only int4 with bf16 activations. Its kernels want to be tuned for each shape, which takes
    minutes; so they run as GemLite's own file says for H100s, the nearest GPU it has one for. A
    shape or a number of rows that the file lacks takes what the nearest one has. Where GemLite has
    several kernels for a number of rows, all of these run, and the fastest counts.
"""

from __future__ import annotations

import ast
import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class TorchAO:
    """Int4 linears of torchao.

    Raises:
        ImportError: Torchao is not installed, or too old.
    """

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of GemLite
            self._tensor: Any = importlib.import_module(
                "torchao.quantization"
            ).Int4TilePackedTo4dTensor

    def linears(
        self, x: Tensor, weights: Sequence[tuple[Tensor, Tensor]], group_size: int, n: int
    ) -> list[Callable[[], Tensor]]:
        """A call for each weight.

        Args:
            x: Bf16 ``[M, K]``.
            weights: Tiles and scale_and_zero of each.
            group_size: Group size of the weights.
            n: Their out features.
        """
        shape = torch.Size((n, x.shape[1]))
        made = [self._tensor(*weight, [1, group_size], shape) for weight in weights]
        return [lambda w=w: F.linear(x, w) for w in made]


class GemLite:
    """Int4 linears of GemLite.

    Args:
        shapes: N and K of every weight that will be used.
        rows: Every M that will be used.
        group_size: Group size of every weight.

    Raises:
        ImportError: GemLite is not installed.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], rows: Sequence[int], group_size: int
    ) -> None:
        self._gemlite: Any = importlib.import_module("gemlite")
        self._core: Any = importlib.import_module("gemlite.core")
        self._group_size = group_size
        configs = Path(self._gemlite.__file__).parent / "configs" / "h100.json"
        if not self._gemlite.load_config(str(configs)):
            raise ImportError(f"GemLite has no {configs.name}, whose settings are to be used")
        self._kernels = {m: self._kernels_for(m) for m in rows}
        for m, kernels in self._kernels.items():
            for kernel in kernels:
                for n, k in shapes:
                    self._settle(kernel, m, n, k)

    def _known(self, kernel: str) -> dict[tuple[int, int, int], Any]:
        """Settings of a kernel, by M, N, K."""
        entries = self._core.GEMLITE_TRITON_CONFIG_CACHE.get(kernel, {})
        keys = {key: ast.literal_eval(key) for key in entries}
        return {parts[:3]: entries[key] for key, parts in keys.items() if parts[3:] == self._kind}

    @property
    def _kind(self) -> tuple[int, int, int]:
        """Group, weights a word, and GemLite's number for 16-bit activations and int4 weights."""
        return (self._group_size, 8, 104)

    def _kernels_for(self, m: int) -> list[str]:
        """The kernels that GemLite would use, and those that its file has settings for."""
        default = self._core.get_matmul_type(m, 4)
        names = self._core.GEMLITE_MATMUL_TYPES
        return [
            name for name in names if name == default or any(m == k[0] for k in self._known(name))
        ]

    def _settle(self, kernel: str, m: int, n: int, k: int) -> None:
        known = self._known(kernel)
        if (m, n, k) not in known:
            nearest = min(known, key=lambda key: math.dist(_logs(key), _logs((m, n, k))))
            entries = self._core.GEMLITE_TRITON_CONFIG_CACHE[kernel]
            entries[str((m, n, k, *self._kind))] = known[nearest]

    def weight(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Any, list[Tensor]]:
        """A weight ``(code - zero_point) * scale`` of GemLite: meta data, and tensors.

        Args:
            codes: Uint8 ``[N, K]``, values 0..15.
            scale: Bf16 ``[N, K / group_size]``.
            zero_point: Bf16 ``[N, K / group_size]``.
        """
        packer = self._gemlite.helper.A16Wn(device=codes.device, dtype=torch.bfloat16)
        layer = packer.from_weights(codes, scale, zero_point, 4, self._group_size)
        return layer.get_meta_args(), list(layer.get_tensor_args())

    def linears(
        self, x: Tensor, weights: Sequence[tuple[Any, list[Tensor]]]
    ) -> dict[str, list[Callable[[], Tensor]]]:
        """For each kernel, a call for each weight.

        Args:
            x: Bf16 ``[M, K]``.
            weights: From `weight`, or copies of these.
        """
        run, names = self._gemlite.forward_functional, self._core.GEMLITE_MATMUL_TYPES
        return {
            kernel: [
                partial(run, x, None, tensors, meta, names.index(kernel))
                for meta, tensors in weights
            ]
            for kernel in self._kernels[len(x)]
        }


def _logs(key: tuple[int, int, int]) -> list[float]:
    return [math.log(size) for size in key]
