"""The tensor-core-tiled int4 layout: choose its shape, pack into it, unpack from it.

Everything here is plain tensor code and runs on whatever device its input is on. Vocabulary: N out
features, K in features, *group* = ``group_size`` neighbouring k of one row that share a scale and
a zero, *codes* = the 4-bit numbers 0..15 one a byte, *tiles* = the packed int32 tensor,
*scale_and_zero* = the tensor of both parameters. ``docs/layout.md`` explains why the layout is so.

Word ``tiles[nt, ko, t, j]`` holds eight codes of row ``n = 8*nt + t//4``. With
``b = 16*inner_k_tiles*ko + 32*j + 2*(t % 4)`` its nibbles, least significant first, are those of
``k = b, b+8, b+16, b+24, b+1, b+9, b+17, b+25``.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

#: Group sizes that ``aten._weight_int4pack_mm`` takes.
GROUP_SIZES = (32, 64, 128, 256)
#: Values of inner_k_tiles that ``aten._weight_int4pack_mm`` takes.
INNER_K_TILES = (2, 4, 8)
#: Dtypes of weights that are packed, and of the activations that multiply them.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: The code q at which ``(q - 8) * scale + zero`` is ``zero``. It is also the code of all padding,
#: which dequantizes to 0 because its zero is 0.
MIDDLE_CODE = 8

#: Codes that `pack_for_cpu` widens to int32 at a time.
_CPU_CHUNK = 2**19


@dataclass(frozen=True)
class TileShape:
    """The logical and the packed shape of one weight.

    Attributes:
        n: Out features.
        k: In features.
        group_size: Neighbouring k that share a scale and a zero: 32, 64, 128 or 256.
        inner_k_tiles: 2, 4 or 8; one tile spans ``16 * inner_k_tiles`` values of k.
        n_padded: Out features that are stored.
        k_padded: In features that are stored.
        batch: Sizes of the axes in front, such as the experts of a ``[E, N, K]`` weight.
        pre_scaled: Whether the activation is multiplied, and the weight divided, by a factor for
            each k.
    """

    n: int
    k: int
    group_size: int
    inner_k_tiles: int
    n_padded: int
    k_padded: int
    batch: tuple[int, ...] = ()
    pre_scaled: bool = False

    @property
    def groups(self) -> int:
        """Groups in one row, padding included."""
        return self.k_padded // self.group_size

    @property
    def tiles_shape(self) -> tuple[int, ...]:
        """Shape of the int32 tiles."""
        inner = self.inner_k_tiles
        return (*self.batch, self.n_padded // 8, self.k_padded // (16 * inner), 32, inner // 2)

    @property
    def scale_and_zero_shape(self) -> tuple[int, ...]:
        """Shape of scale_and_zero."""
        return (*self.batch, self.groups, self.n_padded, 2)

    @property
    def packed_bytes(self) -> int:
        """Bytes of int32 tiles, bf16 scale_and_zero and fp32 pre-scale together."""
        matrix = self.n_padded * self.k_padded // 2 + 4 * self.groups * self.n_padded
        return math.prod(self.batch) * matrix + 4 * self.k * self.pre_scaled


def choose_shape(
    n: int,
    k: int,
    group_size: int = 128,
    inner_k_tiles: int = 8,
    n_multiple: int = 8,
    batch: tuple[int, ...] = (),
) -> TileShape:
    """Choose the smallest valid packed shape for a weight ``[*batch, n, k]``.

    Args:
        n: Out features.
        k: In features.
        group_size: An upper bound. The group is the largest one up to it that divides k; if none
            does, the one whose packed row takes the fewest bytes.
        inner_k_tiles: An upper bound. The result has the largest one up to it whose tiles divide
            the padded k.
        n_multiple: n is padded to a multiple of this: 8, or 16 for the CPU op.
        batch: Sizes of the axes in front.

    Raises:
        ValueError: An argument is not one of the valid numbers.
    """
    if n < 1 or k < 1:
        raise ValueError(f"a weight needs at least one row and one column, got n={n}, k={k}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}, it must be one of {GROUP_SIZES}")
    if inner_k_tiles not in INNER_K_TILES:
        raise ValueError(f"inner_k_tiles is {inner_k_tiles}, it must be one of {INNER_K_TILES}")
    if n_multiple < 8 or n_multiple % 8:
        raise ValueError(f"n_multiple is {n_multiple}, it must be a positive multiple of 8")

    allowed = [g for g in reversed(GROUP_SIZES) if g <= group_size]  # largest first

    def row_bytes(group: int) -> int:
        padded = _round_up(k, group)
        return padded // 2 + 4 * padded // group

    group = next((g for g in allowed if k % g == 0), None) or min(allowed, key=row_bytes)
    k_padded = _round_up(k, group)
    inner = largest_inner_k_tiles(k_padded, inner_k_tiles)
    return TileShape(n, k, group, inner, _round_up(n, n_multiple), k_padded, batch)


def largest_inner_k_tiles(k_padded: int, most: int) -> int:
    """The largest inner_k_tiles, not above `most`, whose tiles divide k_padded."""
    return max(i for i in INNER_K_TILES if i <= most and k_padded % (16 * i) == 0)


def pack(codes: Tensor, inner_k_tiles: int) -> Tensor:
    """Pack codes into tiles.

    Args:
        codes: uint8 ``[..., N, K]``, any strides, N a multiple of 8, K a multiple of
            ``16 * inner_k_tiles``. Values must be in 0..15; checking that would wait for the
            device.
        inner_k_tiles: 2, 4 or 8.

    Returns:
        int32 ``[..., N/8, K/(16*inner_k_tiles), 32, inner_k_tiles/2]``, contiguous.

    Raises:
        ValueError: The dtype, the shape or inner_k_tiles is another.
    """
    if inner_k_tiles not in INNER_K_TILES:
        raise ValueError(f"inner_k_tiles is {inner_k_tiles}, it must be one of {INNER_K_TILES}")
    _check_codes(codes)
    *batch, n, k = codes.shape
    span = 16 * inner_k_tiles
    if n % 8 or k % span:
        raise ValueError(
            f"codes are {n}x{k}: inner_k_tiles={inner_k_tiles} needs the rows to be a multiple "
            f"of 8 and the columns a multiple of {span}; pad_codes pads them"
        )
    # n = 8*nt + row and k = 16*inner_k_tiles*ko + 32*j + 16*high + 8*odd + 2*lane + pair
    split = codes.reshape(*batch, n // 8, 8, k // span, inner_k_tiles // 2, 2, 2, 4, 2)
    even, odd = split.unbind(-3)
    octets = (odd << 4).bitwise_or_(even)  # nt, row, ko, j, high, lane, pair
    octets = _permute_last(octets, (0, 2, 1, 5, 3, 6, 4))  # nt, ko, row, lane, j, pair, high
    words = octets.reshape(*batch, n // 8, k // span, 32, inner_k_tiles // 2, 4)
    return _little_endian(words).contiguous().view(torch.int32).squeeze(-1)


def unpack(tiles: Tensor) -> Tensor:
    """Unpack tiles: the inverse of `pack`.

    Args:
        tiles: int32 ``[..., N/8, K/(16*inner_k_tiles), 32, inner_k_tiles/2]``, any strides.

    Returns:
        Codes, uint8 ``[..., N, K]``, contiguous.

    Raises:
        ValueError: The dtype or the shape is another.
    """
    if tiles.dtype != torch.int32:
        raise ValueError(f"tiles have dtype {tiles.dtype}, they must be torch.int32")
    if tiles.ndim < 4 or tiles.shape[-2] != 32 or 2 * tiles.shape[-1] not in INNER_K_TILES:
        raise ValueError(
            f"tiles have shape {tuple(tiles.shape)}, "
            "it must be [..., N/8, K/(16*inner_k_tiles), 32, inner_k_tiles/2]"
        )
    *batch, n_tiles, k_tiles, _, words = tiles.shape
    octets = _octets(tiles).reshape(*batch, n_tiles, k_tiles, 8, 4, words, 2, 2)
    # nt, ko, row, lane, j, pair, high -> nt, row, ko, j, high, lane, pair
    octets = _permute_last(octets, (0, 2, 1, 4, 6, 3, 5))
    codes = octets.new_empty((*batch, n_tiles, 8, k_tiles, words, 2, 2, 4, 2))
    even, odd = codes.unbind(-3)
    torch.bitwise_and(octets, 15, out=even)
    torch.bitwise_right_shift(octets, 4, out=odd)
    return codes.view(*batch, n_tiles * 8, k_tiles * words * 32)


def nibbles(words: Tensor) -> Tensor:
    """The eight 4-bit numbers of each word, least significant first.

    Args:
        words: int32, any shape and strides.

    Returns:
        uint8 ``[..., 8]``, contiguous.
    """
    octets = _octets(words)
    return torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def pack_scale_and_zero(scale: Tensor, zero: Tensor) -> Tensor:
    """Join scales and zeros into the one tensor that the ops read.

    Args:
        scale: ``[..., N, groups]``, any strides. The CUDA op reads bf16 and does not check; the CPU
            op needs the activation's dtype.
        zero: Shape and dtype of scale, any strides.

    Returns:
        ``[..., groups, N, 2]`` of that dtype, contiguous: scale first, then zero.

    Raises:
        ValueError: scale and zero differ in shape or dtype.
    """
    if scale.shape != zero.shape or scale.dtype != zero.dtype or scale.ndim < 2:
        raise ValueError(
            f"scale is {scale.dtype} {tuple(scale.shape)} and zero is {zero.dtype} "
            f"{tuple(zero.shape)}: both must be [..., N, groups] of one dtype"
        )
    *batch, n, groups = scale.shape
    joined = scale.new_empty((*batch, groups, n, 2))
    joined[..., 0].copy_(scale.transpose(-1, -2))
    joined[..., 1].copy_(zero.transpose(-1, -2))
    return joined


def unpack_scale_and_zero(scale_and_zero: Tensor) -> tuple[Tensor, Tensor]:
    """Split scales and zeros: the inverse of `pack_scale_and_zero`.

    Args:
        scale_and_zero: ``[..., groups, N, 2]``, any dtype and strides.

    Returns:
        scale and zero, each ``[..., N, groups]``, contiguous, of the same dtype.

    Raises:
        ValueError: The shape is another.
    """
    if scale_and_zero.ndim < 3 or scale_and_zero.shape[-1] != 2:
        raise ValueError(
            f"scale_and_zero has shape {tuple(scale_and_zero.shape)}, "
            "it must be [..., groups, N, 2]"
        )
    scale, zero = scale_and_zero.transpose(-2, -3).unbind(-1)
    return scale.contiguous(), zero.contiguous()


def pack_for_cpu(codes: Tensor) -> Tensor:
    """Pack codes the way ``aten._weight_int4pack_mm_for_cpu`` reads them on this machine.

    The order of the bytes depends on the instruction set of the processor that runs this (AVX-512,
    AVX2 and others differ), and a wrong pairing gives wrong numbers without an error. So the
    result is a cache for this machine and this process: never write it to a file.

    Args:
        codes: uint8 ``[..., N, K]`` on the CPU, values in 0..15, N a multiple of 16, K even.

    Returns:
        uint8 ``[..., N, K/2]``; the op reads one ``[N, K/2]`` of it at a time.

    Raises:
        ValueError: The dtype, the shape or the device is another.
    """
    _check_codes(codes)
    if codes.shape[-2] % 16 or codes.shape[-1] % 2:
        raise ValueError(
            f"codes have shape {tuple(codes.shape)}: "
            "the CPU op needs [..., N, K] with N a multiple of 16 and K even"
        )
    if codes.device.type != "cpu":
        raise ValueError(f"codes are on {codes.device}, the CPU op needs them on the CPU")
    if codes.ndim > 2:
        return torch.stack([pack_for_cpu(matrix) for matrix in codes])
    n, k = codes.shape
    packed = codes.new_empty((n, k // 2))
    # The op wants int32, eight times the packed size. It packs blocks of at most 64 rows that do
    # not touch each other, so whole blocks can go through it one chunk at a time.
    rows = max(1, _CPU_CHUNK // (64 * max(k, 1))) * 64
    for start in range(0, n, rows):
        chunk = codes[start : start + rows].to(torch.int32, memory_format=torch.contiguous_format)
        packed[start : start + rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(chunk, 1)
    return packed


def pad_codes(codes: Tensor, shape: TileShape) -> Tensor:
    """Pad codes to the stored shape with code 8.

    Args:
        codes: uint8 ``[..., N, K]``, at most ``[..., shape.n_padded, shape.k_padded]``.
        shape: The packed shape.

    Returns:
        uint8 ``[..., shape.n_padded, shape.k_padded]``; codes itself if it has that shape.

    Raises:
        ValueError: codes are larger, or not uint8.
    """
    _check_codes(codes)
    *batch, n, k = codes.shape
    if n > shape.n_padded or k > shape.k_padded:
        raise ValueError(
            f"codes are {n}x{k}, more than the {shape.n_padded}x{shape.k_padded} to be stored"
        )
    if (n, k) == (shape.n_padded, shape.k_padded):
        return codes
    padded = codes.new_empty((*batch, shape.n_padded, shape.k_padded))
    padded[..., :n, :k] = codes
    padded[..., n:, :] = MIDDLE_CODE
    padded[..., :n, k:] = MIDDLE_CODE
    return padded


def pad_parameters(scale: Tensor, zero: Tensor, n_padded: int) -> tuple[Tensor, Tensor]:
    """Append rows of zeros, so that padded rows dequantize to 0.

    Args:
        scale: ``[..., N, groups]`` with N at most n_padded.
        zero: ``[..., N, groups]``.
        n_padded: Rows to store.

    Returns:
        scale and zero, ``[..., n_padded, groups]``; the arguments themselves if N is n_padded.

    Raises:
        ValueError: The shapes differ, or N is above n_padded.
    """
    n = scale.shape[-2]
    if scale.shape != zero.shape or n > n_padded:
        raise ValueError(
            f"scale has shape {tuple(scale.shape)} and zero {tuple(zero.shape)}: "
            f"both must be [..., N, groups] with N at most {n_padded}"
        )
    if n == n_padded:
        return scale, zero
    pad = (0, 0, 0, n_padded - n)
    return torch.nn.functional.pad(scale, pad), torch.nn.functional.pad(zero, pad)


def _permute_last(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """Permute the last axes and leave the batch axes in front of them."""
    batch = tensor.ndim - len(order)
    return tensor.permute(*range(batch), *(batch + axis for axis in order))


def _octets(words: Tensor) -> Tensor:
    """The four bytes of each int32 word, least significant first: uint8 ``[..., 4]``."""
    # Flat: Inductor of torch 2.11 gives an axis of size 1 the stride 0, which no such view takes.
    return _little_endian(words.reshape(-1).view(torch.uint8).view(*words.shape, 4))


def _little_endian(octets: Tensor) -> Tensor:
    """Bytes of words ``[..., 4]`` in this machine's order, least significant first; and back."""
    return octets.flip(-1) if sys.byteorder == "big" else octets


def _check_codes(codes: Tensor) -> None:
    if codes.dtype != torch.uint8 or codes.ndim < 2:
        raise ValueError(
            f"codes are {codes.dtype} {tuple(codes.shape)}, they must be torch.uint8 [..., N, K]"
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
