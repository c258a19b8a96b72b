"""The ops that multiply by packed weights: `linear`, `linears`, `bmm`, `grouped_mm`, `indexed_mm`.

They are `torch.ops.fxint4.*`, opaque to every compiler but ours. Each takes x in bfloat16, float16
or float32 and returns that dtype, with fp32 sums of bfloat16 products (of float16 ones in `linear`
and `linears` on the GPU, where x is float16) in between. x may have fewer
columns than are stored; the rest count as zeros. Buffers may be views. On the GPU none of them
waits for the device.

tiles: int32 ``[..., N/8, K/(16*inner_k_tiles), 32, inner_k_tiles/2]``; on the CPU they may also be
    uint8 ``[..., N, K/2]`` as `fxint4.quant.tile_layout.pack_for_cpu` packs them.
scale_and_zero: bfloat16 ``[..., K/group_size, N, 2]``.
n: rows of the weight that are meant, at most N.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxint4._pytorch.tensors import aten
from fxint4.kernels import triton_experts, triton_linear
from fxint4.kernels.cuda import CudaBlocks
from fxint4.kernels.select import Choice, MatmulShape, select_kernel
from fxint4.weights.cache import weight_cache
from fxint4.weights.expression import Prepacked

__all__: list[str] = []

_WEIGHT = "Tensor tiles, Tensor scale_and_zero"
_SCHEMAS = (
    f"linear(Tensor x, {_WEIGHT}, int group_size, int n) -> Tensor",
    f"bmm(Tensor x, {_WEIGHT}, int group_size, int n) -> Tensor",
    f"grouped_mm(Tensor x, {_WEIGHT}, Tensor offs, int group_size, int n) -> Tensor",
    f"indexed_mm(Tensor x, {_WEIGHT}, Tensor ids, int group_size, int n) -> Tensor",
    "linears(Tensor x, Tensor[] tiles, Tensor[] scale_and_zero, int group_size, int[] n, "
    "bool replayed=False, str? kernel=None, int[] sizes=[], bool lasting=False) -> Tensor",
)
_library: Any = torch.library.Library("fxint4", "FRAGMENT")  # type: ignore[no-untyped-call]


def _linear_cuda(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, group_size: int, n: int
) -> Tensor:
    """``[..., K]`` times one weight: ``[..., n]``."""
    return _linears_cuda(x, [tiles], [scale_and_zero], group_size, [n])


def _linears_cuda(
    x: Tensor,
    tiles: Sequence[Tensor],
    scale_and_zero: Sequence[Tensor],
    group_size: int,
    n: Sequence[int],
    replayed: bool = False,
    kernel: str | None = None,
    sizes: Sequence[int] = (),
    lasting: bool = False,
) -> Tensor:
    """``[..., K]`` times several weights of the same K, side by side: ``[..., sum(n)]``.

    replayed, kernel: see `fxint4.kernels.select.at_run_time`.
    sizes: with them kernel is the name of a CUDA kernel, see `fxint4.kernels.cuda.CudaBlocks.of`.
    lasting: see `fxint4.kernels.triton_linear.linears`.
    """
    native = x.dtype is torch.float16
    rows = _rows(x, x.shape[-1], torch.float16 if native else torch.bfloat16)
    m, k = rows.shape
    weights = [(t.contiguous(), p.contiguous()) for t, p in zip(tiles, scale_and_zero, strict=True)]
    if kernel is not None and sizes:
        choice = Choice("cuda", CudaBlocks.of(kernel, sizes))
    else:
        inner = 2 * tiles[0].shape[-1]
        choice = _choice(m, sum(n), k, group_size, inner, rows.dtype, x.device, replayed, kernel)
    written = not all(tensor.is_contiguous() for tensor in (*tiles, *scale_and_zero))
    y = triton_linear.linears(rows, weights, group_size, n, choice, lasting and not written)
    return y.to(x.dtype).view(*x.shape[:-1], sum(n))


@functools.lru_cache(4096)  # to choose takes longer than the rest of a call
def _choice(
    m: int,
    n: int,
    k: int,
    group_size: int,
    inner_k_tiles: int,
    dtype: torch.dtype,
    device: torch.device,
    replayed: bool,
    kernel: str | None,
) -> Choice:
    """`select_kernel` of an op. The key is numbers: to make a `MatmulShape` costs as much."""
    shape = MatmulShape(m, n, k, group_size, inner_k_tiles, dtype)
    return select_kernel(shape, device, "cuda_graph" if replayed else "python", kernel)


def _linear_cpu(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, group_size: int, n: int
) -> Tensor:
    tiles, scale_and_zero = _cpu_form(tiles, scale_and_zero, group_size, n)
    rows = _rows(x, scale_and_zero.shape[-3] * group_size)
    return _times_cpu(rows, tiles, scale_and_zero, group_size, n, x.dtype).view(*x.shape[:-1], n)


def _linears_cpu(
    x: Tensor,
    tiles: Sequence[Tensor],
    scale_and_zero: Sequence[Tensor],
    group_size: int,
    n: Sequence[int],
    replayed: bool = False,
    kernel: str | None = None,
    sizes: Sequence[int] = (),
    lasting: bool = False,
) -> Tensor:
    weights = zip(tiles, scale_and_zero, n, strict=True)
    return torch.cat([_linear_cpu(x, t, p, group_size, rows) for t, p, rows in weights], -1)


def _bmm_cuda(x: Tensor, tiles: Tensor, scale_and_zero: Tensor, group_size: int, n: int) -> Tensor:
    """``[E, M, K]`` times ``E`` weights: ``[E, M, n]``."""
    count, rows, k = x.shape
    offs = torch.arange(1, count + 1, dtype=torch.int32, device=x.device) * rows
    y = _grouped_cuda(x.reshape(-1, k), tiles, scale_and_zero, offs, group_size, n)
    return y.view(count, rows, n)


def _bmm_cpu(x: Tensor, tiles: Tensor, scale_and_zero: Tensor, group_size: int, n: int) -> Tensor:
    count, rows, k = x.shape
    spans = [(e, slice(e * rows, (e + 1) * rows)) for e in range(count)]
    y = _by_expert(x.reshape(-1, k), tiles, scale_and_zero, spans, group_size, n)
    return y.view(count, rows, n)


def _grouped_cuda(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, offs: Tensor, group_size: int, n: int
) -> Tensor:
    """Rows ``offs[e-1]`` to ``offs[e]`` of ``[S, K]`` times weight e: ``[S, n]``, else 0.

    offs: int32 ``[E]``, as `torch.nn.functional.grouped_mm` takes them.
    """
    y = triton_experts.grouped_mm(
        _rows(x, x.shape[-1]),
        tiles.contiguous(),
        scale_and_zero.contiguous(),
        offs.to(torch.int32),
        group_size,
        n,
    )
    return y.to(x.dtype)


def _grouped_cpu(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, offs: Tensor, group_size: int, n: int
) -> Tensor:
    ends = [0, *offs.tolist()]
    spans = [(e, slice(ends[e], ends[e + 1])) for e in range(len(ends) - 1)]
    return _by_expert(x, tiles, scale_and_zero, spans, group_size, n)


def _indexed_cuda(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, ids: Tensor, group_size: int, n: int
) -> Tensor:
    """Row s of ``[S, K]`` times weight ``ids[s]``: ``[S, n]``.

    ids: int32 or int64 ``[S]``; negative ones count from the end. One beyond the weights raises
        IndexError on the CPU; the GPU, which does not wait to look, gives a row of NaN or of zeros.
    """
    ids = torch.where(ids < 0, ids + len(tiles), ids)
    if triton_experts.better_sorted(len(ids), len(tiles)):
        ordered, order = ids.sort()
        offs = torch.searchsorted(
            ordered, torch.arange(len(tiles), device=ids.device, dtype=ids.dtype), right=True
        )
        y = _grouped_cuda(x[order], tiles, scale_and_zero, offs, group_size, n)
        return torch.empty_like(y).index_copy_(0, order, y)
    y = triton_experts.indexed_mm(
        _rows(x, x.shape[-1]),
        tiles.contiguous(),
        scale_and_zero.contiguous(),
        ids,
        group_size,
        n,
    )
    return y.to(x.dtype)


def _indexed_cpu(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, ids: Tensor, group_size: int, n: int
) -> Tensor:
    count = len(tiles)
    ids = torch.where(ids < 0, ids + count, ids)
    used = torch.unique(ids).tolist()
    if used and not 0 <= used[0] <= used[-1] < count:
        raise IndexError(f"ids go from {used[0]} to {used[-1]}; there are {count} weights")
    spans = [(e, (ids == e).nonzero().flatten()) for e in used]
    return _by_expert(x, tiles, scale_and_zero, spans, group_size, n)


def _by_expert(
    x: Tensor,
    tiles: Tensor,
    scale_and_zero: Tensor,
    spans: list[tuple[int, Any]],
    group_size: int,
    n: int,
) -> Tensor:
    """Each span of rows times its weight."""
    tiles, scale_and_zero = _cpu_form(tiles, scale_and_zero, group_size, n)
    rows = _rows(x, scale_and_zero.shape[-3] * group_size)
    y = x.new_zeros((len(rows), n))
    for e, span in spans:
        part = rows[span]
        if len(part):
            y[span] = _times_cpu(part, tiles[e], scale_and_zero[e], group_size, n, x.dtype)
    return y


def _times_cpu(
    rows: Tensor, tiles: Tensor, scale_and_zero: Tensor, group_size: int, n: int, dtype: torch.dtype
) -> Tensor:
    if not len(rows):
        return rows.new_empty((0, n), dtype=dtype)
    y = aten._weight_int4pack_mm_for_cpu(rows, tiles, group_size, scale_and_zero)
    return y[:, :n].to(dtype).contiguous()  # type: ignore[no-any-return]


def _cpu_form(
    tiles: Tensor, scale_and_zero: Tensor, group_size: int, n: int
) -> tuple[Tensor, Tensor]:
    """The bytes that this machine's CPU op reads, made once for a pair of buffers."""
    if tiles.dtype is torch.uint8:
        return tiles, scale_and_zero
    given = Prepacked(n, group_size)
    roots = (tiles, scale_and_zero)
    packed = weight_cache.find(given, roots, given.shape_of(roots, 16))
    weight_cache.fold(packed, ("cpu",), roots)
    cpu_tiles, parameters = packed.formats["cpu"]
    return cpu_tiles, parameters


def _rows(x: Tensor, k_padded: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``[..., K]`` as contiguous ``[M, k_padded]``, zeros behind column K."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(dtype)
    if rows.shape[-1] < k_padded:
        rows = F.pad(rows, (0, k_padded - rows.shape[-1]))
    return rows.contiguous()


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], arguments[-1]))


def _fake_linears(
    x: Tensor,
    tiles: Sequence[Tensor],
    scale_and_zero: Sequence[Tensor],
    group_size: int,
    n: Sequence[int],
    replayed: bool = False,
    kernel: str | None = None,
    sizes: Sequence[int] = (),
    lasting: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(n)))


for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name, _cpu, _cuda, _shape in (
    ("linear", _linear_cpu, _linear_cuda, _fake),
    ("linears", _linears_cpu, _linears_cuda, _fake_linears),
    ("bmm", _bmm_cpu, _bmm_cuda, _fake),
    ("grouped_mm", _grouped_cpu, _grouped_cuda, _fake),
    ("indexed_mm", _indexed_cpu, _indexed_cuda, _fake),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"fxint4::{_name}", _shape, lib=_library)
