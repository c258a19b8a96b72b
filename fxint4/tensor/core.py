"""`Int4TileTensor`, the class of packed weights, and how it is made and dequantized."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from operator import index
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxint4._pytorch.distributed import local_of
from fxint4._pytorch.dynamo import never_compiled
from fxint4._pytorch.tensors import (
    MATMULS,
    aten,
    disabled_torch_function,
    make_wrapper,
    map_tensors,
    share_storage,
    view_like,
)
from fxint4.config.int4_config import ACTIVATIONS, Int4Config
from fxint4.errors import (
    PackedFormatError,
    RequantizedWarning,
    UnsupportedOpError,
    UntrainedWarning,
    WriteError,
)
from fxint4.quant.blockwise import Block, pack_block, quantize_by_blocks
from fxint4.quant.primitives import dequantize
from fxint4.quant.recipe import RTN, WITHOUT_DATA, Recipe
from fxint4.quant.tile_layout import (
    DTYPES,
    GROUP_SIZES,
    INNER_K_TILES,
    MIDDLE_CODE,
    TileShape,
    choose_shape,
    largest_inner_k_tiles,
    pack,
    pack_scale_and_zero,
    pad_codes,
    pad_parameters,
    unpack,
    unpack_scale_and_zero,
)

__all__ = [
    "NEW_AXIS",
    "Int4TileTensor",
    "answers",
    "check_dense_copies",
    "checked",
    "dequantizing",
    "implements",
    "is_dequantizing",
    "is_packed",
    "quickly",
    "without_dense_copies",
]

#: In `Int4TileTensor.axes`: an axis of size 1 that the stored weight does not have.
NEW_AXIS = -1

#: Dtypes of codes that `from_plain` takes.
_CODES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

#: What accelerate's disk offload is told, which reads weights by NumPy, bfloat16 as int16.
_OFFLOAD = (
    "accelerate's disk offload reads weights so, and can't hold packed ones: use 'cpu' in place of "
    "'disk' in the device map, or offload to disk before fxint4.pack_"
)

#: (start, stop) of runs of stored columns.
Columns = tuple[tuple[int, int], ...]

_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}
#: What is tried before those, in a few microseconds: the ops of eager `nn.Linear`.
_QUICK: dict[Any, Callable[..., Any]] = {}
#: The same for functions of PyTorch, before autograd and all else that looks at ops.
_QUICK_FUNCTIONS: list[tuple[Any, Callable[..., Any]]] = []
#: Those of `_IMPLEMENTATIONS` that take a dense copy of a weight.
_DENSE: set[Any] = set()
#: Methods that need no statistics of activations.
_REPEATABLE = ("rtn", "mse", "hqq")
#: What an error says where values can't be quantized into a weight.
_INSTEAD = (
    "call fxint4.dequantize_(model) first, change the plain weights and pack them again; or merge "
    "before pack_"
)
_dequantizing: ContextVar[bool] = ContextVar("fxint4_dequantizing", default=False)
_no_dense_copies: ContextVar[bool] = ContextVar("fxint4_no_dense_copies", default=False)


def implements(
    *ops: Any, dense: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the implementation of aten ops for `Int4TileTensor`.

    Args:
        *ops: The ops.
        dense: Whether it dequantizes a weight, or quantizes it again; see `without_dense_copies`.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _IMPLEMENTATIONS.update(dict.fromkeys(ops, function))
        _DENSE.update(ops if dense else ())
        return function

    return register


def quickly(*ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that `Int4TileTensor` tries before what `implements` registered.

    It takes the op's positional arguments, below autograd, and returns NotImplemented for whatever
    is unusual.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _QUICK.update(dict.fromkeys(ops, function))
        return function

    return register


def answers(asked: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that may answer a call of a function of `torch.nn.functional`.

    It takes the positional arguments as its caller gave them: gradients, autocast and modes are its
    to notice. It returns NotImplemented where PyTorch is to go its way.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _QUICK_FUNCTIONS.append((asked, function))
        return function

    return register


@contextlib.contextmanager
def without_dense_copies() -> Iterator[None]:
    """Refuse operators that training and merging need, at the cost of a dense copy of a weight.

    Whether a weight is worth packing is tried out within. Applies to the current thread.
    """
    token = _no_dense_copies.set(True)
    try:
        yield
    finally:
        _no_dense_copies.reset(token)


def check_dense_copies(what: str) -> None:
    """Raise UnsupportedOpError within `without_dense_copies`.

    Args:
        what: What needs a dense copy, for the message.
    """
    if _no_dense_copies.get():
        raise UnsupportedOpError(f"{what} takes a dense copy of the weight")


@contextlib.contextmanager
def dequantizing() -> Iterator[None]:
    """Dequantize packed weights for operators that do not support them.

    Each such call makes a whole weight in its logical dtype. Applies to the current thread.
    """
    token = _dequantizing.set(True)
    try:
        yield
    finally:
        _dequantizing.reset(token)


def is_dequantizing() -> bool:
    """Whether this is within `dequantizing`."""
    return _dequantizing.get()


class _MadeAsAnother(type(Tensor)):  # type: ignore[misc]
    """Lets `Int4TileTensor` be called as accelerate calls the type of any parameter."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a packed weight of buffers, or a parameter of a packed weight.

        accelerate puts a parameter in another's place by ``type(old)(value, requires_grad=...)``,
        or with all attributes of the old one in place of ``requires_grad``. The type of a packed
        parameter is `Int4TileTensor`.
        """
        if args and isinstance(args[0], Int4TileTensor):
            return nn.Parameter(args[0], requires_grad=False)
        if len(args) == 1 and isinstance(args[0], Tensor) and kwargs.keys() <= {"requires_grad"}:
            raise TypeError(
                f"a {args[0].dtype} tensor {tuple(args[0].shape)} can't take the place of a packed "
                "parameter as it is: load float weights before fxint4.pack_, or quantize it with "
                "Int4TileTensor.from_float"
            )
        return super().__call__(*args, **kwargs)


class Int4TileTensor(Tensor, metaclass=_MadeAsAnother):
    """An int4 weight in tensor-core tiles, with the shape and dtype of the weight it stands for.

    The stored weight is ``[N, K]``, or ``[E, N, K]`` with any number of axes in front. The logical
    weight may be a part of it and may have its axes in another order; neither copies anything.
    The value is ``(code - 8) * scale + zero``, see docs/layout.md. With a pre-scale (AWQ, Lin et
    al. 2023; torchao's act_pre_scale) each column of that is multiplied by its own factor; a matmul
    multiplies x by the factors instead.

    Make one with `from_float`, `from_plain` or `from_tiles`. It never requires grad; gradients of
    what it multiplies pass through it, see `fxint4.tensor.matmul`.

    Args:
        tiles: int32 ``[..., N/8, K/(16*inner_k_tiles), 32, inner_k_tiles/2]``.
        scale_and_zero: bfloat16 ``[..., K/group_size, N, 2]``.
        n: The number of logical rows; they are the first stored ones.
        columns: (start, stop) of each run of stored columns that is logical, in order.
        group_size: Neighbouring stored columns that share a scale and a zero.
        dtype: The logical dtype: bfloat16, float16 or float32.
        axes: The stored axis of each logical axis, or `NEW_AXIS`.
        is_part: Whether stored values outside the logical part belong to another tensor.
        pre_scale: float32 ``[K]``, a factor for each stored column, the same for all rows and
            matrices, 1 in the padding; None for no factors.
        activations: See `Int4Config.activations`; what compiled code does unless its options say
            something else, and what eager code does.

    Attributes:
        metadata: All but the buffers: dtype, n, columns, group_size, axes, is_part, activations.
        method: How the codes were chosen ("rtn", ...), to do the same when values are written to
            the weight; None where it is not known. Files do not hold it, and it is no part of what
            compiled code depends on.
    """

    tiles: Tensor
    scale_and_zero: Tensor
    pre_scale: Tensor | None
    n: int
    columns: Columns
    group_size: int
    axes: tuple[int, ...]
    is_part: bool
    activations: str | None
    metadata: tuple[torch.dtype, int, Columns, int, tuple[int, ...], bool, str | None]
    method: str | None = None
    _views: _Views | None = None
    #: Cached, because Dynamo's guards ask in every call of compiled code; with the tiles and the
    #: metadata of then.
    _flattened: tuple[list[str], Any] = ([], None)
    _flattened_of: tuple[Any, Any] = (None, None)
    #: See `fxint4.tensor.quick`.
    _made: Any = None
    _plans: Any = None

    @staticmethod
    def __new__(
        cls,
        tiles: Tensor,
        scale_and_zero: Tensor,
        n: int,
        columns: Columns,
        group_size: int,
        dtype: torch.dtype,
        axes: tuple[int, ...],
        is_part: bool = False,
        pre_scale: Tensor | None = None,
        activations: str | None = None,
    ) -> Int4TileTensor:
        """Wrap buffers without checking them; `from_tiles` checks."""
        stored = (*tiles.shape[:-4], n, sum(stop - start for start, stop in columns))
        strides = [math.prod(stored[axis + 1 :]) for axis in range(len(stored))]
        size = [1 if axis == NEW_AXIS else stored[axis] for axis in axes]
        stride = [1 if axis == NEW_AXIS else strides[axis] for axis in axes]
        return cast("Int4TileTensor", make_wrapper(cls, size, stride, dtype, tiles.device))

    def __init__(
        self,
        tiles: Tensor,
        scale_and_zero: Tensor,
        n: int,
        columns: Columns,
        group_size: int,
        dtype: torch.dtype,
        axes: tuple[int, ...],
        is_part: bool = False,
        pre_scale: Tensor | None = None,
        activations: str | None = None,
    ) -> None:
        self.tiles = tiles
        self.scale_and_zero = scale_and_zero
        self.pre_scale = pre_scale
        self.n = n
        self.columns = columns
        self.group_size = group_size
        self.axes = axes
        self.is_part = is_part
        self.activations = activations
        self.metadata = (self.dtype, n, columns, group_size, axes, is_part, activations)

    # --- constructors ----------------------------------------------------------------------------

    @classmethod
    def from_float(cls, weight: Tensor, config: Int4Config | None = None) -> Int4TileTensor:
        """Quantize a weight.

        Args:
            weight: ``[..., N, K]``, bfloat16, float16 or float32, any strides, finite.
            config: Its group_size, inner_k_tiles, method and activations are read; the defaults if
                None.

        Raises:
            TypeError: weight is no tensor, or config no `Int4Config`.
            ValueError: The weight has another dtype or fewer than two axes, is packed already, has
                no values, or holds inf or NaN.
        """
        _check_float(weight, config)
        config = config or Int4Config()
        *batch, n, k = weight.shape
        shape = choose_shape(n, k, config.group_size, config.inner_k_tiles, batch=tuple(batch))
        return cls.quantized(weight, shape, Recipe(config.method), config.activations)[0]

    @classmethod
    def from_plain(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        *,
        group_size: int | None = None,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        inner_k_tiles: int = 8,
        pre_scale: Tensor | None = None,
    ) -> Int4TileTensor:
        """Pack codes, scales and zeros that were chosen elsewhere.

        Args:
            codes: uint8 or a signed integer dtype, ``[..., N, K]``, values 0..15.
            scale: ``[..., N, groups]``, any float dtype; stored rounded to bfloat16.
            zero: ``[..., N, groups]``. A float dtype means the float zero of
                ``(code - 8) * scale + zero``; an integer dtype means the zero point of
                ``(code - zero_point) * scale``.
            group_size: 32, 64, 128 or 256; K / groups if None.
            shape: The logical shape, if codes, scale and zero are padded.
            dtype: The logical dtype.
            inner_k_tiles: 2, 4 or 8, an upper bound.
            pre_scale: ``[K]``, any float dtype, stored as float32: the factor of each dequantized
                column.

        Raises:
            ValueError: Shapes, dtypes or values do not fit together.
        """
        codes = _checked_codes(codes)
        _check_plain(codes, scale, zero)
        _check_dtype(dtype)
        if inner_k_tiles not in INNER_K_TILES:
            raise ValueError(f"inner_k_tiles is {inner_k_tiles}; it must be one of {INNER_K_TILES}")
        columns, groups = codes.shape[-1], scale.shape[-1]
        if group_size is None:
            group_size = columns // max(groups, 1)
        if group_size not in GROUP_SIZES or -(-columns // group_size) != groups:
            raise ValueError(
                f"codes have {columns} columns and scale has {groups} groups: with group_size="
                f"{group_size} (one of {GROUP_SIZES}) there must be columns / group_size of them"
            )
        logical = tuple(codes.shape if shape is None else shape)
        if len(logical) != codes.ndim or logical[:-2] != codes.shape[:-2]:
            raise ValueError(
                f"shape is {logical}, codes are {tuple(codes.shape)}: other batch axes"
            )
        if not all(0 < want <= have for want, have in zip(logical, codes.shape, strict=True)):
            raise ValueError(f"shape is {logical}, codes {tuple(codes.shape)} cannot hold it")
        if not zero.is_floating_point():
            zero = (MIDDLE_CODE - zero.to(torch.float32)) * scale.to(torch.float32)
        scale, zero = scale.to(torch.bfloat16), zero.to(torch.bfloat16)
        if not bool((scale.isfinite() & zero.isfinite()).all()):
            raise ValueError("scale or zero holds inf or NaN, or numbers beyond bfloat16")
        _check_pre_scale(pre_scale, logical[-1], codes.device)
        if pre_scale is not None and not bool(pre_scale.isfinite().all()):
            raise ValueError("pre_scale holds inf or NaN")
        made = cls.of_codes(codes, scale, zero, group_size, inner_k_tiles, dtype, pre_scale)
        return made.like(n=logical[-2], columns=((0, logical[-1]),))

    @classmethod
    def from_tiles(
        cls,
        tiles: Tensor,
        scale_and_zero: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype = torch.bfloat16,
        pre_scale: Tensor | None = None,
    ) -> Int4TileTensor:
        """Wrap buffers in the layout of ``aten._weight_int4pack_mm``, without a copy.

        Args:
            tiles: int32 ``[..., N/8, K/(16*inner_k_tiles), 32, inner_k_tiles/2]``, contiguous.
            scale_and_zero: bfloat16 ``[..., K/group_size, N, 2]``, contiguous, on the same device.
            shape: The logical shape ``[..., N, K]``.
            dtype: The logical dtype.
            pre_scale: ``[K]``, any float dtype, on the same device: the factor of each dequantized
                column; copied.

        Raises:
            PackedFormatError: The buffers have another dtype or layout, or do not fit each other or
                the shape. The op does not check; it would return garbage.
        """
        shape = tuple(shape)
        if len(shape) < 2 or tiles.ndim < 4 or tiles.shape[:-4] != shape[:-2]:
            raise PackedFormatError(
                f"shape is {shape} and tiles are {tuple(tiles.shape)}; they must be [..., N, K] "
                "and [..., N/8, K/(16*inner_k_tiles), 32, inner_k_tiles/2]"
            )
        groups = scale_and_zero.shape[-3] if scale_and_zero.ndim >= 3 else 0
        k_padded = tiles.shape[-3] * 32 * tiles.shape[-1]
        group_size = k_padded // groups if groups else 0
        metadata = (
            dtype,
            shape[-2],
            ((0, shape[-1]),),
            group_size,
            tuple(range(len(shape))),
            False,
        )
        try:
            _check_pre_scale(pre_scale, shape[-1], tiles.device)
        except ValueError as error:
            raise PackedFormatError(str(error)) from error
        if pre_scale is not None:
            pre_scale = padded_pre_scale(pre_scale, k_padded)
        return checked(tiles, scale_and_zero, metadata, pre_scale)

    # --- back to plain tensors -------------------------------------------------------------------

    def get_plain(self) -> tuple[Tensor, Tensor, Tensor]:
        """The codes, scales and float zeros of the logical part, exactly as stored.

        The inverse of `from_plain`. They do not include `plain_pre_scale`.

        Returns:
            codes, uint8 ``[..., N, K]``, and scale and zero, bfloat16 ``[..., N, ceil(K/g)]``, with
            the axes in stored order (not transposed). g is `plain_group`: `group_size`, or a
            divisor of it if the logical columns start or are joined in the middle of a group;
            then scales and zeros are repeated.
        """
        codes = self.logical_columns(unpack(self.tiles)[..., : self.n, :])
        scale, zero = unpack_scale_and_zero(self.scale_and_zero[..., : self.n, :])
        group = self.plain_group
        if group != self.group_size:
            times = self.group_size // group
            scale, zero = (part.repeat_interleave(times, -1) for part in (scale, zero))
        scale, zero = (self.logical_columns(part, group) for part in (scale, zero))
        return codes.contiguous(), scale.contiguous(), zero.contiguous()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as an ordinary tensor, computed in fp32 and rounded once.

        Args:
            dtype: The dtype of the result; the logical dtype if None.

        Returns:
            A contiguous tensor of the logical shape.
        """
        scale, zero = unpack_scale_and_zero(self.scale_and_zero)
        codes = unpack(self.tiles)
        dtype = dtype or self.dtype
        # One matrix of all rows: `dequantize` takes a few at a time, to bound scratch memory.
        weight = dequantize(
            codes.flatten(0, -2),
            scale.flatten(0, -2),
            zero.flatten(0, -2),
            self.group_size,
            dtype if self.pre_scale is None else torch.float32,
            self.columns[-1][1] if len(self.columns) == 1 else None,
        ).view(*codes.shape[:-1], -1)
        if self.pre_scale is not None:
            weight = weight.mul_(self.pre_scale[: weight.shape[-1]]).to(dtype)
        weight = self.logical_columns(weight[..., : self.n, :])
        kept = [axis for axis in self.axes if axis != NEW_AXIS]
        weight = weight.permute(kept)
        for position, axis in enumerate(self.axes):
            if axis == NEW_AXIS:
                weight = weight.unsqueeze(position)
        return weight.contiguous()

    # --- properties ------------------------------------------------------------------------------

    @property
    def inner_k_tiles(self) -> int:
        """The number of 16-wide k tiles that one thread's words hold: 2, 4 or 8."""
        return 2 * self.tiles.shape[-1]

    @property
    def batch_axes(self) -> int:
        """The number of stored axes in front of N and K."""
        return self.tiles.ndim - 4

    @property
    def stored(self) -> TileShape:
        """The packed shape; its n and k are the logical numbers of rows and columns."""
        *batch, n_tiles, k_tiles, _, words = self.tiles.shape
        k = sum(stop - start for start, stop in self.columns)
        padded = (n_tiles * 8, k_tiles * words * 32)
        pre_scaled = self.pre_scale is not None
        return TileShape(self.n, k, self.group_size, 2 * words, *padded, tuple(batch), pre_scaled)

    @property
    def is_whole(self) -> bool:
        """Whether the logical columns are one run that starts at stored column 0."""
        return len(self.columns) == 1 and self.columns[0][0] == 0

    @property
    def packed_bytes(self) -> int:
        """Bytes of tiles, scale_and_zero and pre_scale together."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    @property
    def plain_pre_scale(self) -> Tensor | None:
        """The factor of each logical column, float32 ``[K]``; None without a pre-scale."""
        if self.pre_scale is None:
            return None
        return self.logical_columns(self.pre_scale).clone()

    @property
    def block_size(self) -> tuple[int, ...]:
        """How many values along each logical axis share a scale and a zero."""
        k_axis = self.batch_axes + 1
        return tuple(self.group_size if axis == k_axis else 1 for axis in self.axes)

    def check(self) -> None:
        """Raise PackedFormatError if the ops cannot read the buffers."""
        tiles, parameters, stored = self.tiles, self.scale_and_zero, self.stored
        pre_scale = self.pre_scale
        if tiles.dtype is not torch.int32 or parameters.dtype is not torch.bfloat16:
            raise PackedFormatError(
                f"tiles are {tiles.dtype} and scale_and_zero is {parameters.dtype}; they must be "
                "torch.int32 and torch.bfloat16"
            )
        if not (tiles.is_contiguous() and parameters.is_contiguous()):
            raise PackedFormatError(
                "tiles and scale_and_zero must be contiguous; call .contiguous() on them first"
            )
        if tiles.device != parameters.device:
            raise PackedFormatError(
                f"tiles are on {tiles.device} and scale_and_zero is on {parameters.device}"
            )
        if tiles.ndim < 4 or tiles.shape[-2] != 32 or stored.inner_k_tiles not in INNER_K_TILES:
            raise PackedFormatError(
                f"tiles have shape {tuple(tiles.shape)}; it must be "
                "[..., N/8, K/(16*inner_k_tiles), 32, inner_k_tiles/2]"
            )
        wanted = stored.scale_and_zero_shape if self.group_size else ()
        if (
            self.group_size not in GROUP_SIZES
            or stored.k_padded % self.group_size
            or tuple(parameters.shape) != wanted
        ):
            raise PackedFormatError(
                f"scale_and_zero has shape {tuple(parameters.shape)}; tiles {tuple(tiles.shape)} "
                f"hold {stored.n_padded} rows of {stored.k_padded} columns, so it must be "
                f"[..., {stored.k_padded} / group_size, {stored.n_padded}, 2] with group_size one "
                f"of {GROUP_SIZES}"
            )
        if pre_scale is not None and (
            pre_scale.dtype is not torch.float32
            or tuple(pre_scale.shape) != (stored.k_padded,)
            or not pre_scale.is_contiguous()
            or pre_scale.device != tiles.device
        ):
            raise PackedFormatError(
                f"pre_scale is {pre_scale.dtype} {tuple(pre_scale.shape)} on {pre_scale.device}; "
                f"it must be torch.float32 ({stored.k_padded},), contiguous, on {tiles.device}"
            )
        edges = [edge for run in self.columns for edge in run]
        rising = all(a < b for a, b in self.columns) and edges == sorted(edges)
        inside = bool(edges) and edges[0] >= 0 and edges[-1] <= stored.k_padded
        if not (0 < stored.n <= stored.n_padded and rising and inside):
            raise PackedFormatError(
                f"{stored.n} rows and columns {self.columns} were asked for; the tiles hold "
                f"{stored.n_padded} rows and {stored.k_padded} columns"
            )
        if sorted(axis for axis in self.axes if axis != NEW_AXIS) != list(range(tiles.ndim - 2)):
            raise PackedFormatError(f"axes {self.axes} are no order of {tiles.ndim - 2} axes")
        if self.dtype not in DTYPES:
            raise PackedFormatError(f"dtype is {self.dtype}; it must be one of {DTYPES}")

    def check_values(self) -> None:
        """Raise PackedFormatError if scales, zeros or the pre-scale hold inf or NaN.

        Waits for the device.
        """
        for name in ("scale_and_zero", "pre_scale"):
            values = self.buffers.get(name)
            if values is not None and not bool(values.isfinite().all()):
                raise PackedFormatError(f"{name} holds inf or NaN")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape, dtype, device, packing format, bytes, and whether there is a pre-scale."""
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device='{self.device}', group_size={self.group_size}, "
            f"inner_k_tiles={self.inner_k_tiles}, "
            f"{'' if self.pre_scale is None else 'pre-scaled, '}"
            f"{'' if self.activations is None else f'{self.activations} activations, '}"
            f"{self.packed_bytes} bytes)"
        )

    # --- for the views and matmuls ---------------------------------------------------------------

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers by name: tiles, scale_and_zero, and pre_scale if there is one."""
        buffers = {"tiles": self.tiles, "scale_and_zero": self.scale_and_zero}
        if self.pre_scale is not None:
            buffers["pre_scale"] = self.pre_scale
        return buffers

    def like(self, **changes: Any) -> Int4TileTensor:
        """A copy with other values for the named constructor arguments; buffers are shared."""
        values: dict[str, Any] = {
            "tiles": self.tiles,
            "scale_and_zero": self.scale_and_zero,
            "pre_scale": self.pre_scale,
            "n": self.n,
            "columns": self.columns,
            "group_size": self.group_size,
            "dtype": self.dtype,
            "axes": self.axes,
            "is_part": self.is_part,
            "activations": self.activations,
        }
        values.update(changes)
        if torch.compiler.is_compiling():
            return Int4TileTensor(**values)
        if self._views is None:
            self._views = _Views()
        for name, buffer in self.buffers.items():
            if _is_view(values[name], buffer):
                values[name] = self._views.find(buffer, values[name])
        made = Int4TileTensor(**values)
        made.method = self.method
        if share_storage(made.tiles, self.tiles):
            made._views = self._views
        return made

    def on_buffers(self, function: Callable[[Tensor], Tensor], **changes: Any) -> Int4TileTensor:
        """`like` this one, with a function applied to each buffer."""
        made = {name: function(buffer) for name, buffer in self.buffers.items()}
        return self.like(**made, **changes)

    def on_batch(self, function: Callable[[Tensor], Tensor], **changes: Any) -> Int4TileTensor:
        """`like` this one, with a function applied to tiles and scale_and_zero (not pre_scale)."""
        return self.like(
            tiles=function(self.tiles), scale_and_zero=function(self.scale_and_zero), **changes
        )

    @classmethod
    def quantized(
        cls, weight: Tensor, shape: TileShape, recipe: Recipe, activations: str | None = None
    ) -> tuple[Int4TileTensor, float]:
        """Quantize a weight without checking it; `from_float` checks.

        Args:
            weight: ``[..., N, K]``, bfloat16, float16 or float32, any strides.
            shape: The packed shape.
            recipe: How codes are chosen, and the pre-scale.
            activations: See `Int4Config.activations`.

        Returns:
            The packed weight, and its signal-to-quantization-noise ratio in dB.

        Raises:
            ValueError: The weight holds inf or NaN.
        """
        made = cls.empty(shape, weight.dtype, weight.device)
        if activations is not None:
            made = made.like(activations=activations)
        if recipe.pre_scale is not None:
            factors = recipe.pre_scale.to(weight.device)
            made = made.like(pre_scale=padded_pre_scale(factors, shape.k_padded))
        made.method = recipe.method
        return made, made._quantize(weight, recipe)

    @classmethod
    def empty(cls, shape: TileShape, dtype: torch.dtype, device: torch.device) -> Int4TileTensor:
        """A weight with uninitialized buffers and without a pre-scale."""
        tiles = torch.empty(shape.tiles_shape, dtype=torch.int32, device=device)
        parameters = torch.empty(shape.scale_and_zero_shape, dtype=torch.bfloat16, device=device)
        axes = tuple(range(len(shape.batch) + 2))
        return cls(tiles, parameters, shape.n, ((0, shape.k),), shape.group_size, dtype, axes)

    def _quantize(self, weight: Tensor, recipe: Recipe = RTN) -> float:
        """Quantize a weight into the buffers, which must be contiguous.

        Args:
            weight: ``[..., N, K]`` in the order of the stored axes, any float dtype and strides.
            recipe: How codes are chosen; its pre-scale must be that of this tensor.

        Returns:
            The signal-to-quantization-noise ratio in dB.

        Raises:
            ValueError: The weight holds inf or NaN. The buffers may be written in part.
        """
        shape = self.stored
        tiles, parameters, weight = self.tiles, self.scale_and_zero, weight.detach()
        if shape.batch:
            weight = weight.reshape(-1, *weight.shape[-2:])
            tiles = tiles.view(-1, *tiles.shape[-4:])
            parameters = parameters.view(-1, *parameters.shape[-3:])
        pack_rows = partial(pack, inner_k_tiles=shape.inner_k_tiles)

        def write(block: Block) -> None:
            pack_block(tiles, parameters, block, shape, pack_rows, 8)

        return quantize_by_blocks(weight, shape, recipe, write)

    @classmethod
    def of_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        group_size: int,
        inner_k_tiles: int,
        dtype: torch.dtype,
        pre_scale: Tensor | None = None,
    ) -> Int4TileTensor:
        """`from_plain` with a float zero and without checks."""
        *batch, n, k = codes.shape
        k_padded = scale.shape[-1] * group_size
        inner = largest_inner_k_tiles(k_padded, inner_k_tiles)
        shape = TileShape(n, k, group_size, inner, -(-n // 8) * 8, k_padded, tuple(batch))
        return cls(
            pack(pad_codes(codes, shape), inner),
            pack_scale_and_zero(*pad_parameters(scale, zero, shape.n_padded)),
            n,
            ((0, k),),
            group_size,
            dtype,
            tuple(range(codes.ndim)),
            pre_scale=None if pre_scale is None else padded_pre_scale(pre_scale, k_padded),
        )

    def copy_from(self, other: Tensor) -> None:
        """Implement `copy_`: write into the same buffers. A float tensor is quantized.

        Quantizing keeps the group size, the pre-scale if there is one, and the method, see
        `method_again`.

        Args:
            other: A packed weight or a float tensor of the same shape.

        Raises:
            ValueError: Shapes differ, both are packed but differently, or `other` holds inf or NaN
                or no floats. Then nothing is changed.
        """
        if other.shape != self.shape:
            raise ValueError(
                f"cannot copy {other.dtype} {tuple(other.shape)} into {self!r}: shapes differ"
            )
        packed = isinstance(other, Int4TileTensor)
        if not (packed or other.is_floating_point()):
            raise ValueError(f"cannot copy {other.dtype} {tuple(other.shape)} into {self!r}")
        stored = self.stored
        exact = (stored.n, stored.k) == (stored.n_padded, stored.k_padded)
        if self.is_part and not exact:
            raise ValueError(
                f"cannot copy {other.dtype} {tuple(other.shape)} into a part of a packed weight, "
                f"{self!r}: the tiles at its edge hold more than it; copy into the whole weight, "
                f"or into a clone of the part; or {_INSTEAD}"
            )
        if isinstance(other, Int4TileTensor):
            if other.metadata[1:5] != self.metadata[1:5] or other.stored != stored:
                raise ValueError(
                    f"cannot copy {other!r} into {self!r}: they are packed differently; copy "
                    "other.dequantize() to quantize it again, or assign the tensor itself"
                )
            if self._shares_pre_scale() and not self.multiplies_alike(other):
                raise ValueError(
                    f"cannot copy {other!r} into {self!r}, a part of a packed weight that has "
                    "another pre-scale; copy other.dequantize() to quantize it again"
                )
            for name, buffer in self.buffers.items():
                buffer.copy_(other.buffers[name])
            self.method = other.method
            return
        if not self.is_whole:
            raise ValueError(
                f"cannot quantize {other.dtype} {tuple(other.shape)} into {self!r}, whose columns "
                f"lie apart; assign Int4TileTensor.from_float(other) instead, or {_INSTEAD}"
            )
        for position in reversed([p for p, axis in enumerate(self.axes) if axis == NEW_AXIS]):
            other = other.squeeze(position)
        kept = [axis for axis in self.axes if axis != NEW_AXIS]
        other = other.permute([kept.index(axis) for axis in range(len(kept))])
        if self.pre_scale is not None:
            other = other.float() / self.pre_scale[: stored.k].to(other.device)
        # Quantized in full before anything is written: the last block may hold the only NaN.
        made = Int4TileTensor.empty(stored, self.dtype, other.device)
        made._quantize(other, Recipe(self.method_again))
        self.tiles.copy_(made.tiles)
        self.scale_and_zero.copy_(made.scale_and_zero)

    @property
    def method_again(self) -> str:
        """The method by which values are quantized into the weight: its own, or "mse".

        The latter if its own is not known, or needs statistics of activations, which are not kept.
        """
        return self.method if self.method in _REPEATABLE else WITHOUT_DATA

    def write(self, values: Tensor, cause: str) -> None:
        """Quantize values into the weight for code that may not know that it is packed.

        Takes two float32 copies of the weight.

        Args:
            values: Float values of the weight's shape.
            cause: What the code did, for the warning.

        Raises:
            ValueError: As `copy_from`. Then nothing is changed.

        Warns:
            RequantizedWarning: Always, with the relative error. Its text has only rounded numbers,
                so that Python shows it a few times for a model, not once for each weight.
        """
        values = values.detach().to(self.device)
        with torch.no_grad():
            self.copy_(values)
            off = self.dequantize(torch.float32).sub_(values)
            whole = float(torch.linalg.vector_norm(values, dtype=torch.float32))
            error = float(torch.linalg.vector_norm(off)) / whole if whole else 0.0
        method = self.method_again
        if self.method not in (None, method):
            method += f" (there are no statistics any more for {self.method}, its own method)"
        warnings.warn(
            f"{cause} a packed int4 weight: the values were quantized again, with a relative error "
            f"of {error:.0%}, by method {method}. To lose nothing, call fxint4.dequantize_(model) "
            "first, or merge before pack_",
            RequantizedWarning,
            stacklevel=_level_of_caller(),
        )

    def multiplies_alike(self, other: Int4TileTensor) -> bool:
        """Whether both have the same pre-scale; False if values are unknown, as on meta."""
        if self.pre_scale is other.pre_scale and self.columns == other.columns:
            return True
        ours, theirs = self.plain_pre_scale, other.plain_pre_scale
        if ours is None or theirs is None or ours.is_meta or theirs.is_meta:
            return ours is theirs
        return torch.equal(ours, theirs.to(ours.device))

    def _shares_pre_scale(self) -> bool:
        """Whether other parts (rows or matrices) of the stored weight may use this pre-scale."""
        whole = self.tiles.untyped_storage().nbytes() == self.tiles.nbytes
        return self.pre_scale is not None and not whole

    def logical_columns(self, tensor: Tensor, step: int = 1) -> Tensor:
        """Pick the logical columns of a tensor whose last axis is the stored columns.

        Args:
            tensor: ``[..., K / step]``.
            step: Columns for each entry of the last axis; it divides `plain_group`.
        """
        runs = [tensor[..., start // step : -(-stop // step)] for start, stop in self.columns]
        return runs[0] if len(runs) == 1 else torch.cat(runs, -1)

    @property
    def described(self) -> tuple[Any, ...]:
        """`metadata` as files hold it: without activations that are None, which older ones lack."""
        return self.metadata if self.activations is not None else self.metadata[:-1]

    @property
    def plain_group(self) -> int:
        """The group size of `get_plain`: it divides the places where runs start or are joined."""
        places = [start for start, _ in self.columns]
        places += [stop for _, stop in self.columns[:-1]]
        return math.gcd(self.group_size, *places)

    # --- for PyTorch -----------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """For torch.compile and torch.export.

        The context is `metadata` and how the buffers lie: all that compiled code depends on, but
        for the device. So guards of the buffers themselves may be dropped, as
        `fxint4._pytorch.dynamo.without_guards_of_buffers` does.
        """
        tiles, metadata = self._flattened_of
        if tiles is not self.tiles or metadata is not self.metadata:
            self._flattened_of = (self.tiles, self.metadata)
            pre_scaled = self.pre_scale is not None
            buffers = (self.tiles, self.scale_and_zero)
            lie = [(tuple(buffer.shape), buffer.stride()) for buffer in buffers]
            self._flattened = (list(self.buffers), (*self.metadata, *lie, pre_scaled))
        return self._flattened

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], metadata: Any, outer_size: Any, outer_stride: Any
    ) -> Int4TileTensor:
        """The inverse of `__tensor_flatten__`."""
        dtype, n, columns, group_size, axes, is_part, activations, *_ = metadata
        return Int4TileTensor(
            **inner,
            n=n,
            columns=columns,
            group_size=group_size,
            dtype=dtype,
            axes=axes,
            is_part=is_part,
            activations=activations,
        )

    # `torch.distributed.fsdp.fully_shard` (FSDP2) calls two methods of a tensor subclass. That is
    # private to PyTorch, and was run on torch 2.11, 2.13 and 2.15.

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, Tensor], None]:
        """What is gathered of this process's rows, or matrices: packed bytes, no floats.

        Returns:
            tiles and scale_and_zero, and None.
        """
        return (self.tiles.contiguous(), self.scale_and_zero.contiguous()), None

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: None,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Int4TileTensor, tuple[Tensor, ...]] | None:
        """Make the whole weight of the gathered buffers of all processes.

        Args:
            all_gather_outputs: tiles and scale_and_zero, joined along their first axis.
            metadata: None.
            param_dtype: The logical dtype of the whole weight.
            out: The whole weight that an earlier call returned, to write to; its memory may have
                been freed and allocated again.

        Returns:
            Without `out` the whole weight, and its buffers that are no views of the gathered ones.
        """
        # A process alone gathers nothing, and is given its own tiles and nothing else.
        tiles, parameters = (*all_gather_outputs, self.scale_and_zero)[:2]
        count = tiles.shape[0] // self.tiles.shape[0]
        parts: list[Any] = [
            self.like(tiles=t, scale_and_zero=p, dtype=param_dtype, is_part=False)
            for t, p in zip(tiles.chunk(count), parameters.chunk(count), strict=True)
        ]
        made: Any = torch.cat(parts)
        buffers = (made.tiles, made.scale_and_zero)
        if out is None:
            return made, buffers
        whole = cast("Int4TileTensor", local_of(out))
        for old, new in zip((whole.tiles, whole.scale_and_zero), buffers, strict=True):
            old.copy_(new)
        return None

    def _stable_hash_for_caching(self) -> str:
        """A hash of all that compiled code may depend on, for AOTAutograd's cache."""
        described = (*self.__tensor_flatten__(), tuple(self.tiles.shape), str(self.device))
        return hashlib.sha256(repr(described).encode()).hexdigest()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For torch.save and pickle."""
        is_parameter = isinstance(self, nn.Parameter)
        # `check` needs contiguous buffers when the file is loaded; those of a part may not be.
        tiles, scale_and_zero, *further = (b.contiguous() for b in self.buffers.values())
        return _rebuild, (tiles, scale_and_zero, self.described, is_parameter, *further)

    def requires_grad_(self, mode: bool = True) -> Int4TileTensor:
        """Do nothing: an int4 weight has no gradient.

        It is no error because `nn.Parameter(weight)` and ``load_state_dict(..., assign=True)`` call
        it by default.

        Warns:
            UntrainedWarning: A parameter of a model is to get one, as PEFT's `modules_to_save` do.
        """
        if mode and isinstance(self, nn.Parameter):
            warnings.warn(
                "a packed int4 weight has no gradient and is not trained. To train its layer, call "
                "fxint4.dequantize_(layer) before, or leave it out when you pack (skip, "
                "modules_to_not_convert)",
                UntrainedWarning,
                stacklevel=_level_of_caller(),
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Int4TileTensor:
        """A copy with its own buffers; views of one memory stay views of one memory."""
        if id(self) not in memo:
            made = memo[id(self)] = self.detach()
            made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return memo[id(self)]  # type: ignore[no-any-return]

    def data_ptr(self) -> int:
        """A number of the memory that the weight lies in, to tell weights apart; 0 on meta.

        accelerate knows tied parameters by it. It is negative, so that it is no address: whatever
        would read memory there as floats fails.
        """
        return 0 if self.tiles.is_meta else -self.tiles.data_ptr()

    def element_size(self) -> float:  # type: ignore[override]
        """Bytes of a value, scales and zeros included: `nbytes` / `numel()`, often no integer.

        transformers and diffusers compute a model's memory of it.
        """
        return self.nbytes / self.numel()

    @property
    def itemsize(self) -> float:  # type: ignore[override]
        """As `element_size`."""
        return self.element_size()

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """As `packed_bytes`."""
        return self.packed_bytes

    def storage(self) -> Any:
        """Raise WriteError: values lie in the buffers' storages, which only fxint4 writes.

        Savers of other libraries ask for it, safetensors among them.
        """
        # safetensors would take an UnsupportedOpError, a NotImplementedError, for "no values".
        raise WriteError(
            f"{self!r} has no storage that another library could write. To save it, call "
            "fxint4.save_file(model.state_dict(), path), or model.save_pretrained(folder) for a "
            "model of transformers or diffusers that fxint4 packed or loaded; to offload it, "
            "choose the CPU, not the disk"
        )

    def numpy(self, *, force: bool = False) -> Any:
        """Raise UnsupportedOpError: NumPy can't hold packed values."""
        raise self._unreadable("numpy()")

    def tolist(self) -> Any:
        """Raise UnsupportedOpError: a list can't hold packed values."""
        raise self._unreadable("tolist()")

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        """Raise UnsupportedOpError: NumPy can't hold packed values."""
        raise self._unreadable("a NumPy array")

    def __dlpack__(self, **_: Any) -> Any:
        """Raise UnsupportedOpError: DLPack can't describe packed values."""
        raise self._unreadable("DLPack")

    @property
    def __cuda_array_interface__(self) -> Any:
        """Raise AttributeError, so that others see none."""
        raise AttributeError(str(self._unreadable("__cuda_array_interface__")))

    def _unreadable(self, way: str) -> UnsupportedOpError:
        return UnsupportedOpError(
            f"{self!r} can't be read by {way}: call .dequantize() on it first. {_OFFLOAD}"
        )

    @property
    def data(self) -> Tensor:
        """As for any tensor.

        To assign a packed weight puts its buffers, dtype and shape in the place of this one's. To
        assign float values quantizes them into the buffers, as `copy_` does, and warns.
        """
        return super().data

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Int4TileTensor):
            self.write(value, "float values were assigned to")
            return
        new = cast("Int4TileTensor", value.detach())
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self._views, self.method = new._views, new.method
        self._made = self._plans = None
        self.__dict__.update(new.__dict__)

    def __setitem__(self, place: Any, value: Any) -> None:
        """Write to a part if it is a view; a write to a copy, such as a row, would be lost."""
        part = self[place]
        if not isinstance(part, Int4TileTensor) or not share_storage(part.tiles, self.tiles):
            raise UnsupportedOpError(
                f"cannot write to a part of {self!r} that is no view of its tiles; "
                "change a dequantized copy, and weight.copy_(it)"
            )
        super().__setitem__(place, value)

    def share_memory_(self) -> Int4TileTensor:
        """Move the buffers to shared memory; the tensor itself has no storage."""
        for buffer in self.buffers.values():
            buffer.share_memory_()  # type: ignore[no-untyped-call]
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of PyTorch as if this class did not ask for it.

        PyTorch takes `F.linear` apart into two ops, and calls Python for each. So what `answers`
        registered may answer it. Dynamo does not look in here: for classes with
        `__tensor_flatten__` it traces the ops.
        """
        if len(types) > 1:  # a class of another library, which knows nothing of this one
            others = tuple(other for other in types if not issubclass(other, Int4TileTensor))
            for other in others:
                result = other.__torch_function__(func, others, args, kwargs or {})
                if result is not NotImplemented:
                    return result
            if others:
                return NotImplemented
        elif not kwargs:
            for asked, function in _QUICK_FUNCTIONS:
                if func is asked:
                    result = function(*args)
                    if result is not NotImplemented:
                        return result
        return disabled_torch_function(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an aten op by the function that `implements` registered."""
        quick = _QUICK.get(func)
        if quick is not None and not kwargs:
            result = quick(*args)
            if result is not NotImplemented:
                return result
        kwargs = kwargs or {}
        function = _IMPLEMENTATIONS.get(func)
        if func in _DENSE:
            check_dense_copies(str(func))
        # In inference mode composite functions arrive here without being decomposed.
        for attempt in (function, func.decompose):
            if attempt is not None:
                with _views_of_normal_tensors(func):
                    result = attempt(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        if not is_dequantizing() or _writes_packed(func, args, kwargs):
            raise UnsupportedOpError(_unsupported(func, (args, kwargs)))
        args, kwargs = map_tensors(
            lambda value: value.dequantize() if isinstance(value, Int4TileTensor) else value,
            (args, kwargs),
        )
        return func(*args, **kwargs)


never_compiled(Int4TileTensor.__torch_function__.__code__)
never_compiled(Int4TileTensor.__torch_dispatch__.__code__)


def is_packed(tensor: object) -> bool:
    """Whether a tensor is packed, or the part of it that this process has."""
    return isinstance(tensor, Tensor) and isinstance(local_of(tensor), Int4TileTensor)


def _level_of_caller() -> int:
    """The `stacklevel` for a warning that names the code which called into this package."""
    level, frame = 1, sys._getframe(1)
    package = __name__.partition(".")[0] + "."
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(package):
        level, frame = level + 1, frame.f_back
    return level


@contextlib.contextmanager
def _views_of_normal_tensors(func: Any) -> Iterator[None]:
    """Leave inference mode for a view op: a view of a normal tensor must be a normal tensor."""
    if not (torch.is_inference_mode_enabled() and func.is_view):
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Views:
    """Views of the buffers of one weight, so that two views of one place are one tensor.

    What the CPU's op reads is made from a view once, and kept as long as the tensor lives. Without
    this, `experts[0]` would be packed for it at each call. The views that were used last are kept
    alive, as many as hold the buffers twice.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._alive: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()
        self._last: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
        self._most_bytes = 0

    def find(self, base: Tensor, view: Tensor) -> Tensor:
        """The tensor that stands for a view of `base`; `base` itself if it is one of all of it."""
        with self._lock:
            self._alive.setdefault(_place(base), base)
            place = _place(view)
            found = self._alive.get(place)
            if found is None:
                found = self._alive[place] = view_like(base, view)
            if place in self._last:
                self._last.move_to_end(place)
            elif found is not base:
                # Of the tiles: scales have less.
                self._most_bytes = max(self._most_bytes, 2 * base.untyped_storage().nbytes())
                self._keep(place, found)
            return found

    def _keep(self, place: tuple[Any, ...], view: Tensor) -> None:
        if view.nbytes > self._most_bytes:  # it repeats an axis, with stride 0
            return
        self._last[place] = view
        held = sum(kept.nbytes for kept in self._last.values())
        while held > self._most_bytes:
            held -= self._last.popitem(last=False)[1].nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> _Views:
        """None: a copy of the weight has its own buffers."""
        return _Views()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tensor.size(), tensor.stride(), tensor.dtype)


def _is_view(tensor: Any, base: Tensor) -> bool:
    """Whether a tensor is another view of the same memory, on the CPU and with values."""
    return (
        tensor is not base
        and type(tensor) is type(base) is Tensor
        and tensor.device.type == "cpu"
        and share_storage(tensor, base)
    )


def checked(
    tiles: Tensor, scale_and_zero: Tensor, metadata: Any, pre_scale: Tensor | None = None
) -> Int4TileTensor:
    """Build a weight from untrusted buffers and metadata; PackedFormatError if they are wrong."""
    try:
        dtype, n, columns, group_size, axes, is_part, *further = metadata
        activations, *more = further or (None,)
        if more or activations not in (None, *ACTIVATIONS):
            raise PackedFormatError(f"activations are {further}; they must be 'fp8', or none")
        made = Int4TileTensor(
            tiles,
            scale_and_zero,
            index(n),
            tuple((index(start), index(stop)) for start, stop in columns),
            index(group_size),
            dtype,
            tuple(index(axis) for axis in axes),
            bool(is_part),
            pre_scale,
            activations,
        )
        made.check()
    except PackedFormatError:
        raise
    except Exception as error:
        raise PackedFormatError(
            f"this is no packed weight: {type(error).__name__}: {error}"
        ) from error
    return made


def _rebuild(
    tiles: Tensor,
    scale_and_zero: Tensor,
    metadata: Any,
    is_parameter: bool,
    pre_scale: Tensor | None = None,
) -> Int4TileTensor:
    """Called by `torch.load`; it checks all that the file holds."""
    made = checked(tiles, scale_and_zero, metadata, pre_scale)
    if type(tiles) is Tensor and not tiles.is_meta:  # no fake tensor
        made.check_values()
    return nn.Parameter(made, requires_grad=False) if is_parameter else made  # type: ignore[return-value]


torch.serialization.add_safe_globals([_rebuild])


def _writes_packed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an op writes to a packed weight; in a dequantized copy the write would be lost."""
    # By name, because Dynamo may trace this and cannot read an op's schema.
    written = [value for name, value in kwargs.items() if name.startswith("out")]
    if func.overloadpacket.__name__.endswith("_"):
        written.append(args[0])
    return bool(_packed_in(written))


def _packed_in(tree: Any) -> list[Int4TileTensor]:
    return [value for value in _tensors_in(tree) if isinstance(value, Int4TileTensor)]


def _tensors_in(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


def _unsupported(func: Any, operands: Any) -> str:
    shapes = ", ".join(
        f"{_kind(value)}{value.dtype} {tuple(value.shape)}" for value in _tensors_in(operands)
    )
    known = sorted({op.overloadpacket.__name__ for op in _IMPLEMENTATIONS})
    form = ""
    if func in MATMULS:
        form = " in this form, or of two of them"
    elif func in _IMPLEMENTATIONS:
        form = " with these arguments"
    offload = f". {_OFFLOAD}" if func is aten.view.dtype else ""
    return (
        f"{func} is not supported for packed int4 weights{form} (here {shapes}). Supported: "
        f"{', '.join(known)}. Call .dequantize() on the weight, or run the code within `with "
        "fxint4.dequantizing():` where it does not write to the weight. Where it does, "
        f"{_INSTEAD}{offload}"
    )


def _kind(value: Tensor) -> str:
    if not isinstance(value, Int4TileTensor):
        return ""
    return "packed " if value.pre_scale is None else "packed, pre-scaled "


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be one of {DTYPES}")


def padded_pre_scale(pre_scale: Tensor, k_padded: int) -> Tensor:
    """A copy of the factors, padded with ones: float32 ``[k_padded]``."""
    # Always a copy: weights that share x share factors, and `copy_` may change those of one.
    return F.pad(pre_scale.to(torch.float32), (0, k_padded - len(pre_scale)), value=1.0)


def _check_pre_scale(pre_scale: Tensor | None, k: int, device: torch.device) -> None:
    if pre_scale is not None and not (
        pre_scale.is_floating_point() and pre_scale.shape == (k,) and pre_scale.device == device
    ):
        raise ValueError(
            f"pre_scale is {pre_scale.dtype} {tuple(pre_scale.shape)} on {pre_scale.device}; it "
            f"must be float ({k},) on {device}"
        )


def _check_float(weight: object, config: object) -> None:
    if not isinstance(weight, Tensor) or not isinstance(config, (Int4Config, type(None))):
        raise TypeError(
            f"got a {type(weight).__name__} and {config!r}; they must be a Tensor, and an "
            "Int4Config or None"
        )
    packed = isinstance(weight, Int4TileTensor)
    if packed or weight.is_meta or weight.layout is not torch.strided:
        kind = "packed already" if packed else f"{weight.layout} on {weight.device}"
        raise ValueError(
            f"the weight {tuple(weight.shape)} is {kind}; it must be a dense tensor with values"
        )
    _check_dtype(weight.dtype)
    if weight.ndim < 2 or not weight.numel():
        raise ValueError(
            f"the weight is {tuple(weight.shape)}; it must be [..., N, K], no axis of it empty"
        )


def _checked_codes(codes: Tensor) -> Tensor:
    """Codes of any integer dtype as uint8; ValueError if they are no int4 codes."""
    if codes.dtype not in _CODES or codes.ndim < 2 or 0 in codes.shape:
        raise ValueError(
            f"codes are {codes.dtype} {tuple(codes.shape)}; they must be [..., N, K] of one of "
            f"{_CODES}"
        )
    low, high = (int(end) for end in torch.aminmax(codes))
    if low < 0 or high > 15:
        raise ValueError(f"codes go from {low} to {high}; they must be in 0..15")
    return codes.to(torch.uint8)


def _check_plain(codes: Tensor, scale: Tensor, zero: Tensor) -> None:
    if not scale.is_floating_point() or scale.shape[:-1] != codes.shape[:-1]:
        raise ValueError(
            f"scale is {scale.dtype} {tuple(scale.shape)} and codes are {tuple(codes.shape)}; "
            "scale must be float [..., N, groups]"
        )
    if zero.shape != scale.shape:
        raise ValueError(f"scale is {tuple(scale.shape)} and zero {tuple(zero.shape)}")
    if not codes.device == scale.device == zero.device:
        raise ValueError(
            f"codes, scale and zero are on {codes.device}, {scale.device} and {zero.device}"
        )
