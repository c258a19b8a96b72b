"""Runs of a model that leave it as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxint4._pytorch.tensors import map_leaves

__all__ = ["StateGuard", "forked_random_state"]


class StateGuard:
    """Puts back the state of a model after each run.

    The state is: tensors that the graphs write to (buffers, say), the attributes of the modules,
    the arguments, and torch's random state. It is not: tensors that code between two graphs writes
    to, and the contents of lists and objects in attributes.

    Args:
        model: A module, a function, or a method of a module.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
        self._modules = list(owner.modules()) if isinstance(owner, nn.Module) else []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._written: list[Tensor] = []

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Save copies of tensors that the run is about to write to."""
        for tensor in tensors:
            if id(tensor) not in self._before:
                self._before[id(tensor)] = (tensor, tensor.clone())

    @contextlib.contextmanager
    def run(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[tuple[Sequence[Any], Mapping[str, Any]]]:
        """Put back the state at the end of one run.

        Args:
            args: Arguments of the model.
            kwargs: Its keyword arguments.

        Yields:
            Arguments and keyword arguments to call the model with.
        """
        self.keep(self._written)
        namespaces = [
            (names, dict(names))
            for module in self._modules
            for names in (vars(module), module._buffers)
        ]
        try:
            with forked_random_state():
                yield self._copied((tuple(args), dict(kwargs)))
        finally:
            with torch.no_grad():
                for tensor, held in self._before.values():
                    tensor.copy_(held)
            self._written = [tensor for tensor, _ in self._before.values()]
            self._before.clear()
            for names, were in namespaces:
                _put_back(names, were)

    def forget(self) -> None:
        """Release the tensors that runs wrote to."""
        self._written.clear()

    def _copied(self, tree: Any) -> Any:
        """Copies of containers and objects (caches, say) among arguments; the same tensors."""
        shared = (*self._modules, *(p for module in self._modules for p in module.parameters()))
        memo = {id(each): each for each in shared}

        def of_its_own(value: Any) -> Any:
            if isinstance(value, Tensor) or callable(value):
                return value
            try:
                return copy.deepcopy(value, memo)
            except Exception:  # an object that has no copies
                return value

        return map_leaves(of_its_own, tree)


def _put_back(names: dict[str, Any], were: Mapping[str, Any]) -> None:
    """Restore a namespace to what it held."""
    if names.keys() != were.keys() or any(names[name] is not value for name, value in were.items()):
        names.clear()
        names.update(were)


@contextlib.contextmanager
def forked_random_state() -> Iterator[None]:
    """Restore torch's random state on exit, of the CPU and of all GPUs in use."""
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(range(torch.cuda.device_count()) if used else ()):
        yield
