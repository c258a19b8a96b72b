"""How a compile chooses its kernels: by rule, by option, or by measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxint4._pytorch import inductor
from fxint4._pytorch.tensors import real_tensors
from fxint4.config.int4_config import Int4Config
from fxint4.kernels import cuda
from fxint4.kernels.autotune import fastest
from fxint4.kernels.select import Choice, Launcher, MatmulShape, select_kernel

__all__ = ["Policy"]


@dataclass(frozen=True)
class Policy:
    """How one compile chooses the kernels of its int4 matmuls.

    Attributes:
        kernel: The kernel that the user asked for, see `Int4Config.kernel`.
        cuda_graphs: Whether kernels are replayed from CUDA graphs, and none launched from Python.
        measured: Whether kernels are chosen by measuring them.
        package: Whether a package launches them, which has no CUDA C++ kernels.
    """

    kernel: str | None = None
    cuda_graphs: bool = False
    measured: bool = False
    package: bool = False

    @classmethod
    def now(cls, config: Int4Config) -> Policy:
        """The policy of the compile in progress, by the options of the user and of Inductor."""
        return cls(config.kernel, inductor.uses_cuda_graphs(), inductor.autotunes())

    def choose(self, shape: MatmulShape, device: torch.device) -> Choice:
        """The kernel for a matmul whose m is known while the graph is compiled.

        Args:
            shape: Of the matmul.
            device: The GPU.
        """
        if self.kernel is not None or not self.measured:
            return select_kernel(shape, device, self._launcher("inductor"), self.kernel)
        folder = inductor.cache_folder()
        in_cuda = not self.package and cuda.available(device)
        with real_tensors(), torch.cuda.device(device):
            return fastest(shape, folder, in_cuda, self.cuda_graphs)

    def choose_at_run_time(self, shape: MatmulShape, device: torch.device) -> Choice:
        """The kernel for a matmul whose m is known only when the graph runs. See `choose`."""
        return select_kernel(shape, device, self._launcher("python"), self.kernel)

    def _launcher(self, usual: Launcher) -> Launcher:
        return "package" if self.package else "cuda_graph" if self.cuda_graphs else usual
