"""How a compile chooses its kernels: by rule, by option, or by measurement."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """How one compile chooses kernels: of its int4 matmuls, and of what joins their parts.

    Attributes:
        kernel: The kernel that the user asked for, see `Int4Config.kernel`.
        cuda_graphs: Whether kernels are replayed from CUDA graphs, and none launched from Python.
        measured: Whether kernels are chosen by measuring them.
        package: Whether a package launches them, which has no CUDA C++ kernels.
        in_cuda: Whether kernels in CUDA C++ load on the GPU; None asks the GPU.
        one_shot_all_reduce: See `Int4Config.one_shot_all_reduce`.
    """

    kernel: str | None = None
    cuda_graphs: bool = False
    measured: bool = False
    package: bool = False
    in_cuda: bool | None = None
    one_shot_all_reduce: bool = False

    @classmethod
    def now(cls, config: Int4Config) -> Policy:
        """The policy of the compile in progress, by the options of the user and of Inductor."""
        return cls(
            config.kernel,
            inductor.uses_cuda_graphs(),
            inductor.autotunes(),
            one_shot_all_reduce=config.one_shot_all_reduce,
        )

    def on(self, device: torch.device) -> Policy:
        """The policy for one device, which need not be asked again.

        Code that was compiled by it may be cached, and run only where a driver says the same.
        """
        return replace(self, in_cuda=not self.package and cuda.available(device))

    @property
    def of_matmuls(self) -> tuple[str | None, bool, bool, bool, bool | None]:
        """What matmuls are told of it, in the order of the fields."""
        return self.kernel, self.cuda_graphs, self.measured, self.package, self.in_cuda

    def choose(self, shape: MatmulShape, device: torch.device) -> Choice:
        """The kernel for a matmul whose m is known while the graph is compiled.

        Args:
            shape: Of the matmul.
            device: The GPU.
        """
        if self.kernel is not None or not self.measured:
            return self._by_rule(shape, device, "inductor")
        folder = inductor.cache_folder()
        known = self if self.in_cuda is not None else self.on(device)
        with real_tensors(), torch.cuda.device(device):
            return fastest(shape, folder, bool(known.in_cuda), self.cuda_graphs)

    def choose_at_run_time(self, shape: MatmulShape, device: torch.device) -> Choice:
        """The kernel for a matmul whose m is known only when the graph runs. See `choose`."""
        return self._by_rule(shape, device, "python")

    def _by_rule(self, shape: MatmulShape, device: torch.device, usual: Launcher) -> Choice:
        launcher = "package" if self.package else "cuda_graph" if self.cuda_graphs else usual
        return select_kernel(shape, device, launcher, self.kernel, self.in_cuda)
