"""The ops that multiply by packed weights: `linear`, `linears`, `bmm`, `grouped_mm`, `indexed_mm`.

They compute ``x @ W.T``. `linear_t`, `bmm_t` and `grouped_mm_t` compute ``x @ W``, as the gradient
of the others' x does: they dequantize, and multiply densely.

They are `torch.ops.fxint4.*`, opaque to every compiler but ours. Each takes x in bfloat16, float16
or float32 and returns that dtype. In between, products of bfloat16 are summed in fp32 (products of
float16 in `linear` and `linears` on the GPU if x is float16). x may have fewer columns than the
weights; the rest count as zeros. Buffers may be views. On the GPU no op waits for the device.

The overloads `linears.by_policy`, `linear.for_cpu`, `bmm.packaged`, `grouped_mm.packaged` and
`indexed_mm.packaged` are in graphs that `fxint4.lowering` gives to Inductor, and nowhere else. They
have lowerings there; called by themselves they give the same products.

Args:
    tiles: int32 ``[..., N/8, K/(16*inner_k_tiles), 32, inner_k_tiles/2]``; on the CPU also uint8
        ``[..., N, K/2]``, as `fxint4.quant.tile_layout.pack_for_cpu` packs them.
    scale_and_zero: bfloat16 ``[..., K/group_size, N, 2]``.
    group_size: Neighbouring k that share a scale and a zero.
    n: Out features without padding, at most N.
    activations: See `Int4Config.activations`; the CPU's ops never follow.

Those that end in ``_t`` take x ``[..., n]`` with n at most N, and in the place of n:

    k: In features without padding, at most K: the columns of W to multiply by.

Their scratch memory beside x and the result is that of some columns of W: on the GPU at most
`_MOST_COLUMNS_BYTES` in 16 bits (but never fewer columns than tiles and groups allow), in which the
product is computed; on the CPU a sixteenth of that, in fp32.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxint4._pytorch.tensors import aten
from fxint4.kernels import triton_experts, triton_fp8, triton_linear
from fxint4.kernels.cuda import CudaBlocks
from fxint4.kernels.select import (
    Choice,
    MatmulShape,
    experts_in_fp8,
    gpu_of,
    select_kernel,
)
from fxint4.quant.primitives import dequantize
from fxint4.quant.tile_layout import unpack, unpack_scale_and_zero
from fxint4.weights.cache import weight_cache
from fxint4.weights.expression import Prepacked

__all__: list[str] = []

_WEIGHT = "Tensor tiles, Tensor scale_and_zero"
_SCHEMAS = (
    f"linear(Tensor x, {_WEIGHT}, int group_size, int n, *, str? activations=None) -> Tensor",
    f"bmm(Tensor x, {_WEIGHT}, int group_size, int n) -> Tensor",
    f"grouped_mm(Tensor x, {_WEIGHT}, Tensor offs, int group_size, int n, *, "
    "str? activations=None) -> Tensor",
    f"indexed_mm(Tensor x, {_WEIGHT}, Tensor ids, int group_size, int n, *, "
    "str? activations=None) -> Tensor",
    f"linear_t(Tensor x, {_WEIGHT}, int group_size, int k) -> Tensor",
    f"bmm_t(Tensor x, {_WEIGHT}, int group_size, int k) -> Tensor",
    f"grouped_mm_t(Tensor x, {_WEIGHT}, Tensor offs, int group_size, int k) -> Tensor",
    "linears(Tensor x, Tensor[] tiles, Tensor[] scale_and_zero, int group_size, int[] n, "
    "bool replayed=False, str? kernel=None, int[] sizes=[], bool lasting=False, "
    "str? activations=None) -> Tensor",
    "linears.by_policy(Tensor x, Tensor[] tiles, Tensor[] scale_and_zero, int group_size, int[] n, "
    "str? kernel, bool cuda_graphs, bool measured, bool package, bool in_cuda, "
    "str? activations=None) -> Tensor",
    "linear.for_cpu(Tensor x, Tensor tiles, int group_size, Tensor scale_and_zero) -> Tensor",
    f"bmm.packaged(Tensor x, {_WEIGHT}, int group_size, int n) -> Tensor",
    f"grouped_mm.packaged(Tensor x, {_WEIGHT}, Tensor offs, int group_size, int n) -> Tensor",
    f"indexed_mm.packaged(Tensor x, {_WEIGHT}, Tensor ids, int group_size, int n) -> Tensor",
)
#: The most bytes of dequantized columns that ``x @ W`` makes at a time, on the GPU.
_MOST_COLUMNS_BYTES = 2**28

_library: Any = torch.library.Library("fxint4", "FRAGMENT")  # type: ignore[no-untyped-call]


def _linear_cuda(
    x: Tensor,
    tiles: Tensor,
    scale_and_zero: Tensor,
    group_size: int,
    n: int,
    *,
    activations: str | None = None,
) -> Tensor:
    """The product of ``[..., K]`` and one weight: ``[..., n]``."""
    return _linears_cuda(x, [tiles], [scale_and_zero], group_size, [n], activations=activations)


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
    activations: str | None = None,
) -> Tensor:
    """The product of ``[..., K]`` and weights of the same K, side by side: ``[..., sum(n)]``.

    Args:
        x: ``[..., K]``.
        tiles: Of each weight.
        scale_and_zero: Of each weight.
        group_size: Of all weights.
        n: Out features of each weight.
        replayed: Whether kernels are replayed from a CUDA graph.
        kernel: See `Int4Config.kernel`; with sizes, the name of a CUDA kernel.
        sizes: See `fxint4.kernels.cuda.CudaBlocks.of`.
        lasting: See `fxint4.kernels.triton_linear.linears`.
        activations: See `Int4Config.activations`.
    """
    native = x.dtype is torch.float16
    rows = _rows(x, x.shape[-1], torch.float16 if native else torch.bfloat16)
    m, k = rows.shape
    weights = [(t.contiguous(), p.contiguous()) for t, p in zip(tiles, scale_and_zero, strict=True)]
    if kernel is not None and sizes:
        choice = Choice("cuda", CudaBlocks.of(kernel, sizes))
    else:
        inner = 2 * tiles[0].shape[-1]
        of = (m, sum(n), k, group_size, inner, rows.dtype, x.device, replayed, kernel)
        choice = _choice(*of, activations if x.dtype is rows.dtype else None)
    if choice.kernel == "fp8":
        y = triton_fp8.linears(rows, weights, group_size, n)
        return y.view(*x.shape[:-1], sum(n))
    copied = not all(tensor.is_contiguous() for tensor in (*tiles, *scale_and_zero))
    y = triton_linear.linears(rows, weights, group_size, n, choice, lasting and not copied)
    return y.to(x.dtype).view(*x.shape[:-1], sum(n))


@functools.lru_cache(4096)
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
    activations: str | None = None,
) -> Choice:
    """`select_kernel`, cached by numbers: making a `MatmulShape` alone takes a microsecond."""
    shape = MatmulShape(m, n, k, group_size, inner_k_tiles, dtype, activations)
    return select_kernel(shape, device, "cuda_graph" if replayed else "python", kernel)


def _linear_cpu(
    x: Tensor,
    tiles: Tensor,
    scale_and_zero: Tensor,
    group_size: int,
    n: int,
    *,
    activations: str | None = None,
) -> Tensor:
    tiles, scale_and_zero = _cpu_format(tiles, scale_and_zero, group_size, n)
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
    activations: str | None = None,
) -> Tensor:
    weights = zip(tiles, scale_and_zero, n, strict=True)
    return torch.cat([_linear_cpu(x, t, p, group_size, rows) for t, p, rows in weights], -1)


def _by_policy(
    x: Tensor,
    tiles: Sequence[Tensor],
    scale_and_zero: Sequence[Tensor],
    group_size: int,
    n: Sequence[int],
    kernel: str | None,
    cuda_graphs: bool,
    measured: bool,
    package: bool,
    in_cuda: bool,
    activations: str | None = None,
) -> Tensor:
    """`linears`; see `fxint4.kernels.policy.Policy` for the arguments after `n`."""
    given = (x, tiles, scale_and_zero, group_size, n, cuda_graphs, kernel)
    return torch.ops.fxint4.linears(*given, activations=activations)  # type: ignore[no-any-return]


def _for_cpu(x: Tensor, tiles: Tensor, group_size: int, scale_and_zero: Tensor) -> Tensor:
    """`aten._weight_int4pack_mm_for_cpu`, for operands that need not be contiguous."""
    return aten._weight_int4pack_mm_for_cpu(  # type: ignore[no-any-return]
        x.contiguous(), tiles.contiguous(), group_size, scale_and_zero.contiguous()
    )


def _bmm_cuda(x: Tensor, tiles: Tensor, scale_and_zero: Tensor, group_size: int, n: int) -> Tensor:
    """The products of ``[E, M, K]`` and E weights: ``[E, M, n]``."""
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
    x: Tensor,
    tiles: Tensor,
    scale_and_zero: Tensor,
    offs: Tensor,
    group_size: int,
    n: int,
    *,
    activations: str | None = None,
) -> Tensor:
    """Rows ``offs[e-1]`` to ``offs[e]`` of x ``[S, K]`` times weight e: ``[S, n]``.

    offs is int32 ``[E]``, as in `torch.nn.functional.grouped_mm`. Rows from offs[-1] on are 0.
    """
    in_fp8 = activations == "fp8" and x.dtype is torch.bfloat16
    fp8 = in_fp8 and experts_in_fp8(len(x), len(tiles), n, x.shape[-1], gpu_of(x.device))
    y: Tensor = (triton_fp8 if fp8 else triton_experts).grouped_mm(
        _rows(x, x.shape[-1]),
        tiles.contiguous(),
        scale_and_zero.contiguous(),
        offs.to(torch.int32),
        group_size,
        n,
    )
    return y.to(x.dtype)


def _grouped_cpu(
    x: Tensor,
    tiles: Tensor,
    scale_and_zero: Tensor,
    offs: Tensor,
    group_size: int,
    n: int,
    *,
    activations: str | None = None,
) -> Tensor:
    ends = [0, *offs.tolist()]
    spans = [(e, slice(ends[e], ends[e + 1])) for e in range(len(ends) - 1)]
    return _by_expert(x, tiles, scale_and_zero, spans, group_size, n)


def _indexed_cuda(
    x: Tensor,
    tiles: Tensor,
    scale_and_zero: Tensor,
    ids: Tensor,
    group_size: int,
    n: int,
    *,
    activations: str | None = None,
) -> Tensor:
    """Row s of x ``[S, K]`` times weight ``ids[s]``: ``[S, n]``.

    ids is int32 or int64 ``[S]``; negative ids count from the end. An id out of range raises
    IndexError on the CPU. On the GPU, which does not wait to check, its row is NaN or zeros.
    """
    ids = torch.where(ids < 0, ids + len(tiles), ids)
    if triton_experts.better_sorted(len(ids), len(tiles)):
        ordered, order = ids.sort()
        offs = torch.searchsorted(
            ordered, torch.arange(len(tiles), device=ids.device, dtype=ids.dtype), right=True
        )
        of = (x[order], tiles, scale_and_zero, offs, group_size, n)
        y = _grouped_cuda(*of, activations=activations)
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
    x: Tensor,
    tiles: Tensor,
    scale_and_zero: Tensor,
    ids: Tensor,
    group_size: int,
    n: int,
    *,
    activations: str | None = None,
) -> Tensor:
    count = len(tiles)
    ids = torch.where(ids < 0, ids + count, ids)
    used = torch.unique(ids).tolist()
    if used and not 0 <= used[0] <= used[-1] < count:
        raise IndexError(f"ids go from {used[0]} to {used[-1]}; there are {count} weights")
    spans = [(e, (ids == e).nonzero().flatten()) for e in used]
    return _by_expert(x, tiles, scale_and_zero, spans, group_size, n)


def _linear_t(x: Tensor, tiles: Tensor, scale_and_zero: Tensor, group_size: int, k: int) -> Tensor:
    """The product of ``[..., n]`` and the rows of one weight: ``[..., k]``."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y = _bmm_t(rows[None], tiles[None], scale_and_zero[None], group_size, k)
    return y.view(*x.shape[:-1], k)


def _bmm_t(x: Tensor, tiles: Tensor, scale_and_zero: Tensor, group_size: int, k: int) -> Tensor:
    """The products of ``[E, M, n]`` and the rows of E weights: ``[E, M, k]``."""
    y = x.new_empty((*x.shape[:-1], k))
    x = x.to(_dense_dtype(x))
    for start, stop in _column_blocks(tiles, group_size, k, x.dtype):
        w = _columns(tiles, scale_and_zero, group_size, start, stop, x.dtype)
        part = y[..., start:stop]
        part.copy_(torch.bmm(x, w[:, : x.shape[-1]])[..., : part.shape[-1]])
        del w  # before the next columns' is made
    return y


def _grouped_t_cuda(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, offs: Tensor, group_size: int, k: int
) -> Tensor:
    """Rows ``offs[e-1]`` to ``offs[e]`` of x ``[S, n]`` times weight e: ``[S, k]``.

    Rows from offs[-1] on are 0.
    """
    y = x.new_empty((len(x), k))
    offs = offs.to(torch.int32)
    # What `aten._grouped_mm` leaves unwritten.
    behind = torch.arange(len(x), device=x.device)[:, None] >= offs[-1]
    # It wants rows of whole 16 bytes, so all that is padded takes part.
    rows = _rows(x, scale_and_zero.shape[-2])
    for start, stop in _column_blocks(tiles, group_size, k, rows.dtype):
        w = _columns(tiles, scale_and_zero, group_size, start, stop, rows.dtype)
        part = y[:, start:stop]
        part.copy_(aten._grouped_mm(rows, w, offs)[:, : part.shape[-1]])
        del w
    return y.masked_fill_(behind, 0)


def _grouped_t_cpu(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, offs: Tensor, group_size: int, k: int
) -> Tensor:
    y = x.new_zeros((len(x), k))
    ends = [0, *offs.tolist()]
    for e, (start, stop) in enumerate(itertools.pairwise(ends)):
        if start < stop:
            weight = (tiles[e], scale_and_zero[e])
            y[start:stop] = _linear_t(x[start:stop], *weight, group_size, k)
    return y


def _dense_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which ``x @ W`` is computed: that of ``x @ W.T`` on the GPU, fp32 on the CPU."""
    if x.device.type == "cpu":
        return torch.float32
    return torch.float16 if x.dtype is torch.float16 else torch.bfloat16


def _column_blocks(
    tiles: Tensor, group_size: int, k: int, dtype: torch.dtype
) -> Iterator[tuple[int, int]]:
    """Split the columns of E weights, so that a block of all of them is of bounded size.

    Args:
        tiles: Of E weights.
        group_size: Of all weights.
        k: Columns that are needed, at most K. The last block may have a few more.
        dtype: In which a block will be dequantized.

    Yields:
        (start, stop) of each block, in whole tiles and groups.
    """
    count, n_tiles, _, _, words = tiles.shape
    unit = math.lcm(32 * words, group_size)
    most = _MOST_COLUMNS_BYTES // (16 if tiles.device.type == "cpu" else 1)
    step = max(1, most // max(1, count * 8 * n_tiles * dtype.itemsize * unit)) * unit
    for start in range(0, k, step):
        yield start, min(start + step, -(-k // unit) * unit)


def _columns(
    tiles: Tensor,
    scale_and_zero: Tensor,
    group_size: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dequantize a block of columns of E weights: ``[E, N, columns]``, on the GPU of 16 bits."""
    count, n_tiles, _, _, words = tiles.shape
    rows, span = count * 8 * n_tiles, 32 * words
    # One matrix of the rows of all weights.
    part = tiles[:, :, start // span : stop // span].flatten(0, 1)
    groups = scale_and_zero[:, start // group_size : stop // group_size]
    groups = groups.transpose(0, 1).flatten(1, 2)
    if tiles.device.type == "cpu":
        w = dequantize(unpack(part), *unpack_scale_and_zero(groups), group_size, dtype)
    else:
        operands = (part.contiguous(), groups.contiguous())
        w = triton_linear.dequantize(*operands, group_size, rows, dtype=dtype)
    return w.view(count, 8 * n_tiles, stop - start)


def _by_expert(
    x: Tensor,
    tiles: Tensor,
    scale_and_zero: Tensor,
    spans: list[tuple[int, Any]],
    group_size: int,
    n: int,
) -> Tensor:
    """Each span of rows of x ``[S, K]`` times its weight, by the CPU's op; other rows are 0.

    Args:
        x: ``[S, K]``.
        tiles: Of E weights.
        scale_and_zero: Of E weights.
        spans: Pairs of a weight's number and the index, a slice or a tensor, of its rows.
        group_size: Of all weights.
        n: Out features of each weight.
    """
    tiles, scale_and_zero = _cpu_format(tiles, scale_and_zero, group_size, n)
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


def _cpu_format(
    tiles: Tensor, scale_and_zero: Tensor, group_size: int, n: int
) -> tuple[Tensor, Tensor]:
    """Tiles and scale_and_zero as this machine's CPU op reads them, made once for each pair."""
    if tiles.dtype is torch.uint8:
        return tiles, scale_and_zero
    weight = Prepacked(n, group_size)
    roots = (tiles, scale_and_zero)
    part = tiles.nbytes < tiles.untyped_storage().nbytes()
    shape = weight.shape_of(roots, 16)
    packed = weight_cache.find(weight, roots, shape, view=tiles if part else None)
    weight_cache.fold(packed, ("cpu",), roots)
    cpu_tiles, parameters = packed.formats["cpu"]
    return cpu_tiles, parameters


def _rows(x: Tensor, k_padded: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The rows of ``[..., K]`` as contiguous ``[M, k_padded]``, with zeros behind column K."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(dtype)
    if rows.shape[-1] < k_padded:
        rows = F.pad(rows, (0, k_padded - rows.shape[-1]))
    return rows.contiguous()


def _fake(x: Tensor, *arguments: Any, activations: str | None = None) -> Tensor:
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
    activations: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(n)))


def _fake_by_policy(
    x: Tensor,
    tiles: Sequence[Tensor],
    scale_and_zero: Sequence[Tensor],
    group_size: int,
    n: Sequence[int],
    *_: Any,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(n)))


def _fake_for_cpu(x: Tensor, tiles: Tensor, group_size: int, scale_and_zero: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], tiles.shape[0]))


for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name, _cpu, _cuda, _shape in (
    ("linear", _linear_cpu, _linear_cuda, _fake),
    ("linears", _linears_cpu, _linears_cuda, _fake_linears),
    ("bmm", _bmm_cpu, _bmm_cuda, _fake),
    ("grouped_mm", _grouped_cpu, _grouped_cuda, _fake),
    ("indexed_mm", _indexed_cpu, _indexed_cuda, _fake),
    ("linear_t", _linear_t, _linear_t, _fake),
    ("bmm_t", _bmm_t, _bmm_t, _fake),
    ("grouped_mm_t", _grouped_t_cpu, _grouped_t_cuda, _fake),
    ("linears.by_policy", _by_policy, _by_policy, _fake_by_policy),
    ("linear.for_cpu", _for_cpu, None, _fake_for_cpu),
    ("bmm.packaged", _bmm_cpu, _bmm_cuda, _fake),
    ("grouped_mm.packaged", _grouped_cpu, _grouped_cuda, _fake),
    ("indexed_mm.packaged", _indexed_cpu, _indexed_cuda, _fake),
):
    _library.impl(_name, _cpu, "CPU")
    if _cuda is not None:
        _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"fxint4::{_name}", _shape, lib=_library)
