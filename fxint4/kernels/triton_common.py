"""Code that the Triton kernels share: launching, checking arguments, unpacking and multiplying W.

A weight is ``(q - 8) * scale + zero``, rounded once to the dtype of x; products are summed in fp32.
For bf16 the numbers are those of ``aten._weight_int4pack_mm``. For fp16, scale and zero, which are
stored as bf16, are first cast to fp16 and clamped to 65504 in magnitude; a weight that is larger
becomes infinite, as in a cast. ``fxint4.quant.tile_layout`` describes the tiles.

The functions in Triton's language are called by kernels alone. Their `FAST` chooses between two
ways to unpack the same weights: instructions of NVIDIA's GPUs that handle two weights at once, and
plain Triton, which the interpreter can run, too. (Plain Triton rounds twice, to fp32 and then to
bf16 or fp16, so one weight in thousands differs in its last bit.)
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
from torch import Tensor

from fxint4._pytorch.cuda import launcher
from fxint4.quant.tile_layout import GROUP_SIZES, INNER_K_TILES

__all__ = [
    "VARYING",
    "Blocks",
    "Launch",
    "as_pairs",
    "check_devices",
    "check_weight",
    "check_x",
    "direct",
    "fast",
    "in_halves",
    "interpreted",
    "jit",
    "load_step",
    "multiply",
    "need_triton",
    "run",
    "tile_of",
    "tl",
    "triton",
    "unpack",
]

logger = logging.getLogger("fxint4")

triton: Any
tl: Any  # the bodies of the kernels look it up by this name
try:
    # Import statements would give other types where Triton is installed than where it is not.
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
except ImportError:
    triton = tl = None


@dataclass(frozen=True)
class Blocks:
    """The block of y that one program of a Triton kernel computes, and how.

    Stream-K tail: where `rest_splits` is above 1 (then `splits` is 1, and the kernel itself adds
    partial sums), full waves of `at_once` blocks run unsplit, and each block of the last, partial
    wave is split among `rest_splits` programs.

    Attributes:
        rows: Rows of x, a power of two of at least 16.
        features: Out features, ``16 * warps`` times a power of two.
        splits: Programs that share the sum over k of one block.
        warps: Triton's num_warps, at least 4.
        stages: Triton's num_stages.
        step: Columns of k that are multiplied at a time, 128 or 256.
        at_once: Blocks in a full wave; 0 without a tail.
        rest_splits: Programs for each block of the tail.
    """

    rows: int
    features: int
    splits: int = 1
    warps: int = 4
    stages: int = 3
    step: int = 128
    at_once: int = 0
    rest_splits: int = 1


def jit(**options: Any) -> Any:
    """The decorator `triton.jit`; without Triton it replaces every function by None."""
    return (lambda function: triton.jit(function, **options)) if triton else lambda function: None


def interpreted(kernel: Any) -> bool:
    """Whether Triton interprets a kernel on the CPU, as TRITON_INTERPRET=1 makes it do."""
    return not isinstance(kernel, triton.JITFunction)


def fast(kernel: Any) -> bool:
    """Whether a kernel may use NVIDIA's instructions: it is compiled, and not for AMD's GPUs."""
    return torch.version.hip is None and not interpreted(kernel)


@dataclass(frozen=True)
class Launch:
    """A launch of a Triton kernel, without its tensors.

    The order of a kernel's arguments is that of its signature, and is written nowhere else.

    Attributes:
        kernel: The Triton kernel, see `jit`.
        programs: The size of its grid, along the first axis: the others end at 65535.
        arguments: All arguments that are not tensors, by name.
        warps: Triton's num_warps.
        stages: Triton's num_stages.
    """

    kernel: Any
    programs: int
    arguments: dict[str, int | float | bool]
    warps: int
    stages: int

    def tensor_names(self) -> list[str]:
        """The names of the tensors that the kernel takes, in the order of its signature."""
        return [name for name in self.kernel.arg_names if name.endswith("_ptr")]

    def in_order(self, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
        """All arguments of the kernel, in the order of its signature.

        Args:
            tensors: By name, one for each of `tensor_names`.
        """
        every = {**tensors, **self.arguments}
        return tuple([every[name] for name in self.kernel.arg_names])


VARYING = ("M", "row_blocks", "whole")
"""Arguments that change from call to call, so that no variant of a kernel depends on them."""

_compiled: dict[Hashable, Any] = {}


def run(launch: Launch, tensors: Mapping[str, Tensor]) -> None:
    """Launches a kernel on the current stream of the tensors' device.

    Triton looks at each argument of each launch to find the compiled variant, which can cost the
    host more time than the GPU needs for a small matmul. So the variant is cached by all that it
    depends on, if all tensors are aligned: the device, the dtypes, and the arguments that do not
    vary. A Triton whose variants may be launched in another way is asked each time.

    Args:
        launch: Kernel, grid and arguments.
        tensors: By name, one for each of `Launch.tensor_names`, in any order.
    """
    kernel, arguments = launch.kernel, launch.in_order(tensors)
    given = arguments[: len(tensors)]  # every signature begins with the tensors
    # Triton launches on the current device. Device -1 (the CPU, interpreted) is a no-op here.
    with torch.cuda.device(given[0].get_device()):
        key = _variant(launch, arguments, given)
        variant = None if key is None else _compiled.get(key)
        if variant is not None:
            variant[(launch.programs, 1, 1)](*arguments)
            return
        variant = kernel[(launch.programs,)](
            *arguments, num_warps=launch.warps, num_stages=launch.stages
        )
        if key is not None and not interpreted(kernel):
            _compiled[key] = variant


def direct(launch: Launch, tensors: Mapping[str, Tensor]) -> Callable[..., None] | None:
    """What launches a kernel that `run` has launched before, without Triton's Python around it.

    Triton's launch hooks are not called; Inductor's code does not call them either. None if the
    variant is not cached, or asks for more than its arguments and one grid of programs.

    Args:
        launch: As for `run`.
        tensors: As for `run`.

    Returns:
        A function of the tensors' addresses, each a multiple of 16, in the order of the signature,
        and of the address of a stream of the current device, which is the tensors'.
    """
    arguments = launch.in_order(tensors)
    key = _variant(launch, arguments, arguments[: len(tensors)])
    variant = None if key is None else _compiled.get(key)
    launched = launcher()
    if variant is None or launched is None:
        return None
    signature = [variant.src.signature[name] for name in launch.kernel.arg_names]
    letters = ["O" if kind[0] == "*" else _LETTERS.get(kind) for kind in signature]
    metadata = variant.metadata
    scratch = (metadata.global_scratch_size, metadata.profile_scratch_size)
    special = metadata.num_ctas != 1 or metadata.launch_cooperative_grid or metadata.launch_pdl
    if special or any(scratch) or None in letters:
        return None
    passed = [value for value, letter in zip(arguments, letters, strict=True) if letter]
    rest = (*passed[len(tensors) :], *(None for _ in scratch))
    types = "".join(map(str, letters)) + "O" * len(scratch)
    fixed = (variant.function, launch.programs, 1, 1, metadata.num_warps, metadata.shared, types)

    def call(addresses: Sequence[int], stream: int) -> None:
        launched(*fixed, (*addresses, *rest), stream)

    return call


#: What `launcher` calls types by Triton's names; arguments that are constants are not passed.
_LETTERS = {"constexpr": "", "i32": "i", "i64": "l", "fp32": "f"}


def _variant(launch: Launch, arguments: Sequence[Any], given: Sequence[Tensor]) -> Hashable | None:
    """What the compiled variant of a kernel is cached by; None if it is none of the usual ones.

    Args:
        launch: The launch.
        arguments: All arguments.
        given: Those of them that are tensors.
    """
    varying = [launch.arguments[name] for name in VARYING if name in launch.arguments]
    usual = all(t.data_ptr() % 16 == 0 for t in given) and all(v < 2**31 for v in varying)
    if not (usual and _takes_all_arguments()):
        return None
    dtypes = tuple(t.dtype for t in given)
    fixed = arguments[len(given) + len(varying) :]  # after the tensors, and those of VARYING
    device = given[0].get_device()
    return (launch.kernel.__name__, device, dtypes, fixed, launch.warps, launch.stages)


#: The first and the last version of Triton whose compiled kernels were seen to take all arguments
#: of their signature, constants included, as in `run`. Triton documents no way to launch them.
_OLDEST, _NEWEST = (3, 6), (3, 9)


@functools.cache
def _takes_all_arguments() -> bool:
    """Whether a compiled kernel of the installed Triton is launched as in `run`."""
    version = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2])
    known = _OLDEST <= version <= _NEWEST
    if not known:
        logger.debug(
            "Triton %s is none that fxint4 knows how to launch quickly: a launch takes the host "
            "longer",
            triton.__version__,
        )
    return known


def need_triton() -> None:
    """Raises RuntimeError where Triton is missing."""
    if triton is None:
        raise RuntimeError(
            "this int4 matmul needs Triton, which is not installed; torch's CUDA wheels for Linux "
            "bring it, otherwise: pip install triton"
        )


def check_devices(kernel: Any, tensors: Mapping[str, Tensor]) -> None:
    """Checks that tensors are on one CUDA device.

    Args:
        kernel: The Triton kernel that reads them. If Triton interprets it, they may also be on the
            CPU. None without Triton.
        tensors: By name, at least two.

    Raises:
        ValueError: They are not.
    """
    devices = {t.device for t in tensors.values()}
    runs_here = kernel is not None and interpreted(kernel)
    if len(devices) > 1 or not (next(iter(devices)).type == "cuda" or runs_here):
        names = list(tensors)
        raise ValueError(
            f"{', '.join(names[:-1])} and {names[-1]} are on {sorted(map(str, devices))}: "
            "they must be on one CUDA device"
        )


def check_weight(tiles: Tensor, scale_and_zero: Tensor, group_size: int, n: int) -> tuple[int, int]:
    """Checks the buffers of one or several packed weights.

    Args:
        tiles: int32 ``[..., Np/8, Kp/(16*inner_k_tiles), 32, inner_k_tiles/2]``, contiguous.
        scale_and_zero: bf16 ``[..., Kp/group_size, Np, 2]``, contiguous.
        group_size: One of 32, 64, 128, 256.
        n: Out features without padding, at most Np.

    Returns:
        Np and Kp.

    Raises:
        ValueError: An argument is not as described.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}, it must be one of {GROUP_SIZES}")
    axes = "[N/8, K/(16*inner_k_tiles), 32, inner_k_tiles/2]"
    if (
        tiles.dtype != torch.int32
        or tiles.ndim < 4
        or tiles.shape[-2] != 32
        or 2 * tiles.shape[-1] not in INNER_K_TILES
        or not tiles.is_contiguous()
    ):
        raise ValueError(
            f"tiles are {tiles.dtype} {tuple(tiles.shape)}: they must be torch.int32 {axes}, "
            "contiguous"
        )
    *batch, n_tiles, k_tiles, _, half_inner = tiles.shape
    n_padded, k_padded = 8 * n_tiles, 32 * k_tiles * half_inner
    shape = (*batch, k_padded // group_size, n_padded, 2)
    if (
        k_padded % group_size
        or scale_and_zero.shape != shape
        or scale_and_zero.dtype != torch.bfloat16
        or not scale_and_zero.is_contiguous()
    ):
        weights = f"{batch[0]} weights" if batch else "a weight"
        raise ValueError(
            f"scale_and_zero is {scale_and_zero.dtype} {tuple(scale_and_zero.shape)}: for tiles of "
            f"{weights} {n_padded}x{k_padded} in groups of {group_size} it must be "
            f"torch.bfloat16 {shape}, contiguous, and the columns a multiple of the group"
        )
    if not 0 <= n <= n_padded:
        raise ValueError(f"n is {n}, it must be in 0..{n_padded}")
    return n_padded, k_padded


def check_x(x: Tensor, k_padded: int, dtypes: Sequence[torch.dtype] = (torch.bfloat16,)) -> None:
    """Checks an activation.

    Args:
        x: ``[rows, K]``, contiguous, K at most k_padded.
        k_padded: Columns of the weights, padding included.
        dtypes: The dtypes that x may have.

    Raises:
        ValueError: x is not as described.
    """
    if x.dtype not in dtypes or x.ndim != 2 or x.shape[1] > k_padded or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}: it must be {' or '.join(map(str, dtypes))} "
            f"[rows, K] with K at most {k_padded}, contiguous"
        )


# --- in Triton's language; annotations are its own, not types ------------------------------------


@jit()
@no_type_check
def tile_of(P: tl.constexpr, WARPS: tl.constexpr):
    """The tile of 8 weight rows, of a block's P tiles, that each row of a load reads: int32 [P].

    The tensor cores want 16 neighbouring weight rows in one warp. So each warp reads a pair of
    neighbouring tiles, the first tile by the first WARPS rows, the second by the next WARPS rows.
    """
    p = tl.arange(0, P)
    return p // (2 * WARPS) * (2 * WARPS) + 2 * (p % WARPS) + p // WARPS % 2


@jit()
@no_type_check
def as_pairs(params_ptr):
    """A pointer to scale_and_zero, bf16 pairs, as a pointer to int32: scale low, zero high."""
    return params_ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@jit()
@no_type_check
def unpack(
    words,  # int32 [P, BK]: the words of P tiles along k
    params,  # int32 [P, 8 * GROUPS]: bf16 scale low, bf16 zero high, see `multiply`
    GROUP: tl.constexpr,
    HALF_INNER: tl.constexpr,
    WARPS: tl.constexpr,
    FAST: tl.constexpr,
    dtype: tl.constexpr,  # bf16 or fp16
    HALVES: tl.constexpr = False,  # whether params are pairs of fp16
):
    """The weights in the words: [8 * P, BK], tiles in the order of W, not in that of the load."""
    P: tl.constexpr = words.shape[0]
    BK: tl.constexpr = words.shape[1]
    REPEATS: tl.constexpr = P // (2 * WARPS)
    GROUPS: tl.constexpr = (BK + GROUP - 1) // GROUP
    # A word lies in 32 neighbouring k, so in one group. The groups of a step are GT sets of k tiles
    # times GJ sets of words in each k tile.
    TILES: tl.constexpr = BK // (32 * HALF_INNER)
    GT: tl.constexpr = TILES if TILES < GROUPS else GROUPS
    GJ: tl.constexpr = GROUPS // GT
    T: tl.constexpr = TILES // GT
    J: tl.constexpr = HALF_INNER // GJ
    # repeat, again, warp, k tile (2 axes), row, lane, j (2 axes): see fxint4.quant.tile_layout
    words = tl.reshape(words, (REPEATS, 2, WARPS, GT, T, 8, 4, GJ, J))
    params = tl.reshape(params, (REPEATS, 2, WARPS, GT, 1, 8, 1, GJ, 1))
    if FAST:
        if dtype == tl.float16 and not HALVES:
            params = _half_params(params)
        scale = (params & 0xFFFF) | (params << 16)
        zero = ((params >> 16) & 0xFFFF) | (params & -65536)
        scale, _ = tl.broadcast(scale, words)
        zero, _ = tl.broadcast(zero, words)
        # Pairs of codes become pairs of numbers 128 + code (fp16: 1024 + code or 1024 + 16 * code).
        # One fma makes code - 8 of them without rounding. Compilers do not find these instructions
        # for two numbers by themselves.
        if dtype == tl.float16:
            a, b, c, d = tl.inline_asm_elementwise(
                """{
                .reg .b32 one, offset, sixteenth, offset16, high;
                mov.b32 one, 0x3c003c00;
                mov.b32 offset, 0xe408e408;
                mov.b32 sixteenth, 0x2c002c00;
                mov.b32 offset16, 0xd480d480;
                shr.u32 high, $4, 8;
                lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
                lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
                lop3.b32 $2, high, 0x000f000f, 0x64006400, 0xea;
                lop3.b32 $3, high, 0x00f000f0, 0x64006400, 0xea;
                fma.rn.f16x2 $0, $0, one, offset;
                fma.rn.f16x2 $1, $1, sixteenth, offset16;
                fma.rn.f16x2 $2, $2, one, offset;
                fma.rn.f16x2 $3, $3, sixteenth, offset16;
                fma.rn.f16x2 $0, $0, $5, $6;
                fma.rn.f16x2 $1, $1, $5, $6;
                fma.rn.f16x2 $2, $2, $5, $6;
                fma.rn.f16x2 $3, $3, $5, $6;
                }""",
                "=&r,=&r,=&r,=&r,r,r,r",
                [words, scale, zero],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                """{
                .reg .b32 one, offset, w1, w2, w3;
                mov.b32 one, 0x3f803f80;
                mov.b32 offset, 0xc308c308;
                shr.u32 w1, $4, 4;
                shr.u32 w2, $4, 8;
                shr.u32 w3, $4, 12;
                lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
                lop3.b32 $1, w1, 0x000f000f, 0x43004300, 0xea;
                lop3.b32 $2, w2, 0x000f000f, 0x43004300, 0xea;
                lop3.b32 $3, w3, 0x000f000f, 0x43004300, 0xea;
                fma.rn.bf16x2 $0, $0, one, offset;
                fma.rn.bf16x2 $1, $1, one, offset;
                fma.rn.bf16x2 $2, $2, one, offset;
                fma.rn.bf16x2 $3, $3, one, offset;
                fma.rn.bf16x2 $0, $0, $5, $6;
                fma.rn.bf16x2 $1, $1, $5, $6;
                fma.rn.bf16x2 $2, $2, $5, $6;
                fma.rn.bf16x2 $3, $3, $5, $6;
                }""",
                "=&r,=&r,=&r,=&r,r,r,r",
                [words, scale, zero],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        pairs = tl.join(tl.join(a, c), tl.join(b, d))  # k // 8 % 4 as two axes
        low = pairs.to(tl.int16).to(dtype, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
        w = tl.join(low, high)
    else:
        words = tl.reshape(words, (REPEATS, 2, WARPS, GT, T, 8, 4, GJ, J, 1, 1, 1))
        params = tl.reshape(params, (REPEATS, 2, WARPS, GT, 1, 8, 1, GJ, 1, 1, 1, 1))
        first = 8 * tl.reshape(tl.arange(0, 2), (1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1))
        second = 4 * tl.reshape(tl.arange(0, 2), (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1))
        pair = 16 * tl.reshape(tl.arange(0, 2), (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2))
        code = ((words >> (first + second + pair)) & 15).to(tl.float32) - 8.0
        scale = (params << 16).to(tl.float32, bitcast=True)
        zero = (params & -65536).to(tl.float32, bitcast=True)
        if HALVES:
            scale = (params & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            zero = (params >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        elif dtype == tl.float16:
            scale = tl.clamp(scale, -65504.0, 65504.0).to(tl.float16).to(tl.float32)
            zero = tl.clamp(zero, -65504.0, 65504.0).to(tl.float16).to(tl.float32)
        w = (code * scale + zero).to(dtype)
    # Three axes more: k // 8 % 4 (2 axes) and k % 2. The lane is k % 8 // 2.
    w = tl.permute(w, (0, 2, 1, 5, 3, 4, 7, 8, 9, 10, 6, 11))
    return tl.reshape(w, (8 * P, BK))


@jit()
@no_type_check
def in_halves(
    params,  # int32 [P, 8 * GROUPS], see `unpack`
    factors_ptr,  # fp32 [n]
    first,  # the first of 8 * P features
    n,
    tiles,  # [P]: the place of each tile among those
    GROUP: tl.constexpr,
    HALF_INNER: tl.constexpr,
    BK: tl.constexpr,
):
    """Pairs of fp16 for `unpack`: parameters over the factor of their feature."""
    GROUPS: tl.constexpr = (BK + GROUP - 1) // GROUP
    TILES: tl.constexpr = BK // (32 * HALF_INNER)
    GJ: tl.constexpr = GROUPS // (TILES if TILES < GROUPS else GROUPS)
    feature = 8 * tiles[:, None] + (tl.arange(0, 8 * GROUPS) // GJ % 8)[None, :]
    inverse = 1.0 / tl.load(factors_ptr + first + feature, first + feature < n, 1.0)
    scale = ((params << 16).to(tl.float32, bitcast=True) * inverse).to(tl.float16)
    zero = ((params & -65536).to(tl.float32, bitcast=True) * inverse).to(tl.float16)
    low = scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (zero.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@jit()
@no_type_check
def _half_params(params):
    """int32 of bf16 scale low and zero high, as int32 of fp16, clamped to 65504 in magnitude."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 scale, zero, most, least;
        mov.b32 most, 0x7bff7bff;
        mov.b32 least, 0xfbfffbff;
        shl.b32 scale, $1, 16;
        and.b32 zero, $1, 0xffff0000;
        cvt.rn.f16x2.f32 $0, zero, scale;
        min.f16x2 $0, $0, most;
        max.f16x2 $0, $0, least;
        }""",
        "=&r,r",
        [params],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@jit()
@no_type_check
def load_step(
    tile_row,  # pointers to the tiles' first words, [P, 1]
    param_row,  # pointers to the tiles' first parameters, [P, 1]
    there,  # whether the weight has the tiles, [P, 1]
    k,
    n_padded,
    k_padded,
    P: tl.constexpr,
    GROUP: tl.constexpr,
    HALF_INNER: tl.constexpr,
    BK: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """The words and parameters of BK columns from column k on, as `unpack` takes them."""
    GROUPS: tl.constexpr = (BK + GROUP - 1) // GROUP
    TILES: tl.constexpr = BK // (32 * HALF_INNER)
    GJ: tl.constexpr = GROUPS // TILES if TILES < GROUPS else 1
    word = k + tl.arange(0, BK)[None, :]
    q = tl.arange(0, 8 * GROUPS)[None, :]  # k tile, row, j
    g = k // GROUP + q // (8 * GJ) * GJ + q % GJ
    param = param_row + (g.to(tl.int64) * n_padded + q // GJ % 8)
    if EVEN_N and EVEN_K:
        words = tl.load(tile_row + word)
        params = tl.load(param)
    else:
        words = tl.load(tile_row + word, mask=there & (word < k_padded), other=0)
        params = tl.load(param, mask=there & (g * GROUP < k_padded), other=0)
    return words, params


@jit()
@no_type_check
def multiply(
    x_ptr,  # bf16 or fp16 [rows, K], the block's first row
    rows,  # rows of x from x_ptr on
    K,
    tiles_ptr,  # int32 [n_padded / 8, k_padded], the last axis as `unpack` describes it
    params_ptr,  # int32 [k_padded / GROUP, n_padded], see `as_pairs`
    n_first,  # rows n_first..n_first+BN-1 of W, a multiple of BN
    k_first,  # columns k_first..k_stop-1 of W and x, k_first a multiple of BK
    k_stop,
    n_padded,
    k_padded,
    one,  # 1.0, unknown to the compiler
    BM: tl.constexpr,
    BN: tl.constexpr,  # a multiple of 16 * WARPS
    BK: tl.constexpr,  # a multiple of 128, so of the columns of a k tile
    GROUP: tl.constexpr,
    HALF_INNER: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN_N: tl.constexpr,  # n_padded is a multiple of BN
    EVEN_K: tl.constexpr,  # k_first, k_stop and k_padded are multiples of BK
    FAST: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """fp32 ``W[n_first:][:BN] @ x.T`` over some columns, W unpacked as the left operand.

    At inner_k_tiles 8 every thread loads just the words that hold its part of that operand, so W
    never passes through shared memory.
    """
    P: tl.constexpr = BN // 8
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # Triton's interpreter would multiply bf16 as if its bits were integers.
    DOT: tl.constexpr = tl.float32 if INTERPRETED else dtype
    tile = n_first // 8 + tile_of(P, WARPS)
    there = (tile < n_padded // 8)[:, None]
    tile_row = tiles_ptr + tile.to(tl.int64)[:, None] * k_padded
    param_row = params_ptr + 8 * tile[:, None]
    # For few rows, loads of rows beyond x are masked. For many, a mask costs more than loading the
    # last row again, whose products are not stored.
    FEW: tl.constexpr = BM < 64
    m = tl.arange(0, BM)[None, :]
    m_there = m < rows
    k_column = tl.arange(0, BK)[:, None]
    x_at = (m if FEW else tl.minimum(m, rows - 1)) * K + k_column
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for k in range(k_first, k_stop, BK):
        words, params = load_step(
            tile_row,
            param_row,
            there,
            k,
            n_padded,
            k_padded,
            P,
            GROUP,
            HALF_INNER,
            BK,
            EVEN_N,
            EVEN_K,
        )
        if EVEN_K and not FEW:
            x = tl.load(x_ptr + k + x_at)
        elif EVEN_K:
            x = tl.load(x_ptr + k + x_at, mask=m_there, other=0.0)
        else:
            x = tl.load(x_ptr + k + x_at, mask=m_there & (k + k_column < k_stop), other=0.0)
        w = unpack(words, params, GROUP, HALF_INNER, WARPS, FAST, dtype)
        acc = tl.dot(w.to(DOT), x.to(DOT), acc)
        # On Hopper this dot runs asynchronously and reads w from registers. If nothing but the next
        # dot needed the sum, Triton (3.6) would start the next step and overwrite these registers
        # while the dot still runs; results would seldom be wrong, but wrong. An operation on the
        # sum that the compiler cannot see through makes it wait. Both below leave every bit as is.
        if FAST:
            acc = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            acc *= one
    return acc
