"""`fxint4.refresh`: fold weights again whose change can't be seen."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fxint4.weights.cache import weight_cache

__all__ = ["refresh"]


def refresh(weights: nn.Module | Tensor | Iterable[Tensor]) -> None:
    """Have the packed copies of weights made again, when they are used next.

    A change in place is seen by itself, and so is another tensor in the place of a parameter. What
    can't be seen is a write through an alias with a version of its own: a tensor from numpy or
    another library on the same memory, shared memory that another process writes to, `x.data` of a
    parameter, `torch.autograd._unsafe_preserve_version_counter`.

    Args:
        weights: A module, whose parameters and buffers are meant, or tensors.

    Raises:
        TypeError: Something else.
    """
    if isinstance(weights, nn.Module):
        tensors: list[Tensor] = [*weights.parameters(), *weights.buffers()]
    else:
        tensors = [weights] if isinstance(weights, Tensor) else list(weights)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"got a {type(tensor).__name__}, need a module, a tensor, or several tensors"
            )
    for tensor in tensors:
        for part in _parts(tensor):
            weight_cache.doubt(part)


def _parts(tensor: Tensor) -> list[Tensor]:
    """The tensors whose memory a tensor has: its own, or that of its inner tensors."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    names, _ = flatten()
    return [part for name in names for part in _parts(getattr(tensor, name))]
