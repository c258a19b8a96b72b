"""How a compile chooses its kernels: by rule, by option, or by measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxint4._pytorch import inductor
from fxint4._pytorch.tensors import real_tensors
from fxint4.config.int4_config import Int4Config
from fxint4.kernels import cuda
from fxint4.kernels.autotune import fastest
from fxint4.kernels.select import Choice, at_run_time, by_rule

__all__ = ["Policy"]


@dataclass(frozen=True)
class Policy:
    """What a compile asks of the kernels of its int4 matmuls.

    Attributes:
        kernel: the way to multiply that the user asked for, see `Int4Config.kernel`.
        cuda_graphs: whether kernels are replayed from CUDA graphs, and none launched from Python.
        measured: whether kernels are chosen by measuring them.
        package: whether a package launches them, which has no CUDA C++ kernels.
    """

    kernel: str | None = None
    cuda_graphs: bool = False
    measured: bool = False
    package: bool = False

    @classmethod
    def now(cls, config: Int4Config) -> Policy:
        """That of the compile that runs, by the options of the user and of Inductor."""
        return cls(config.kernel, inductor.uses_cuda_graphs(), inductor.autotunes())

    def choose(
        self,
        m: int,
        n: int,
        k: int,
        group_size: int,
        half_inner: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Choice:
        """How to multiply x ``[m, k]`` where m is known while the graph is compiled.

        Args:
            m: at least 1.
            n: out features, of all weights that are multiplied together.
            k: in features.
            group_size: of the weights.
            half_inner: inner_k_tiles / 2.
            dtype: of x, bf16 or fp16.
            device: the GPU.
        """
        if self.kernel is not None or not self.measured:
            return by_rule(m, n, k, device, self.kernel, self.cuda_graphs, self.package)
        folder = inductor.cache_folder()
        in_cuda = not self.package and cuda.available(device)
        with real_tensors(), torch.cuda.device(device):
            return fastest(
                m, n, k, group_size, half_inner, dtype, folder, in_cuda, self.cuda_graphs
            )

    def choose_at_run_time(
        self, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device
    ) -> Choice:
        """How x ``[m, k]`` is multiplied where m is known when the graph runs."""
        if self.package:
            return by_rule(m, n, k, device, self.kernel, replayed=True, package=True)
        return at_run_time(m, n, k, dtype, device, self.cuda_graphs, self.kernel)
