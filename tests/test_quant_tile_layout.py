from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxint4.quant import tile_layout as tiles
from fxint4.quant.tile_layout import (
    GROUP_SIZES,
    INNER_K_TILES,
    TileShape,
    choose_shape,
    pack,
    pack_for_cpu,
    pack_scale_and_zero,
    pad_codes,
    pad_parameters,
    unpack,
    unpack_scale_and_zero,
)

VECTORS = Path(__file__).parent / "data" / "tile_vectors.json"

BF16_ROUNDOFF = 2.0**-8  # half the distance from 1 to the next bf16
FP32_ROUNDOFF = 2.0**-24

gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(16, shape, dtype=torch.uint8, generator=generator)


def packed_by_loops(codes: Tensor, inner: int) -> list[int]:
    """The words in memory order, unsigned, straight from the formula of the layout."""
    n, k = codes.shape
    code = codes.tolist()
    words = []
    for nt in range(n // 8):
        for ko in range(k // (16 * inner)):
            for t in range(32):
                for j in range(inner // 2):
                    row = 8 * nt + t // 4
                    b = 16 * inner * ko + 32 * j + 2 * (t % 4)
                    word = 0
                    for place, offset in enumerate((0, 8, 16, 24, 1, 9, 17, 25)):
                        word += code[row][b + offset] * 16**place
                    words.append(word)
    return words


def words_of(packed: Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in packed.flatten().tolist()]


# --- pack and unpack -----------------------------------------------------------------------------


@pytest.mark.parametrize("inner", INNER_K_TILES)
@pytest.mark.parametrize("shape", [(8, 128), (24, 256), (40, 128)])
def test_pack_follows_the_formula(inner: int, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape)
    packed = pack(codes, inner)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert packed.shape == (shape[0] // 8, shape[1] // (16 * inner), 32, inner // 2)
    assert words_of(packed) == packed_by_loops(codes, inner)


def test_pack_gives_what_the_cuda_packer_gave() -> None:
    assert VECTORS.exists(), "run tests/data/make_tile_vectors.py on a GPU machine"
    vectors = json.loads(VECTORS.read_text())["vectors"]
    assert {v["inner_k_tiles"] for v in vectors} == set(INNER_K_TILES)
    for vector in vectors:
        rows = [[int(digit, 16) for digit in row] for row in vector["codes"]]
        codes = torch.tensor(rows, dtype=torch.uint8)
        packed = pack(codes, vector["inner_k_tiles"])
        assert list(packed.shape) == vector["shape"]
        assert words_of(packed) == [int(w, 16) for line in vector["tiles"] for w in line.split()]
        assert torch.equal(unpack(packed), codes)


@given(
    inner=st.sampled_from(INNER_K_TILES),
    batch=st.lists(st.integers(0, 3), max_size=2),
    n_tiles=st.integers(0, 5),
    k_tiles=st.integers(0, 5),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_unpack_inverts_pack(
    inner: int, batch: list[int], n_tiles: int, k_tiles: int, transposed: bool, seed: int
) -> None:
    n, k = 8 * n_tiles, 16 * inner * k_tiles
    if transposed:
        codes = random_codes(*batch, k, n, seed=seed).transpose(-1, -2)
    else:
        codes = random_codes(*batch, n, k, seed=seed)
    before = codes.clone()
    packed = pack(codes, inner)
    again = unpack(packed)
    assert packed.shape == (*batch, n_tiles, k_tiles, 32, inner // 2)
    assert again.is_contiguous()
    assert again.dtype == torch.uint8
    assert torch.equal(again, codes)
    assert torch.equal(codes, before)


@given(
    inner=st.sampled_from(INNER_K_TILES),
    n_tiles=st.integers(1, 4),
    k_tiles=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=30)
def test_pack_inverts_unpack(inner: int, n_tiles: int, k_tiles: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (n_tiles, k_tiles, 32, inner // 2)
    packed = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
    assert torch.equal(pack(unpack(packed), inner), packed)


def test_unpack_takes_any_strides() -> None:
    codes = random_codes(24, 256)
    packed = pack(codes, 4)
    scattered = packed.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not scattered.is_contiguous()
    assert torch.equal(unpack(scattered), codes)


def test_the_top_nibble_survives_the_sign_bit() -> None:
    codes = torch.full((8, 32), 15, dtype=torch.uint8)
    packed = pack(codes, 2)
    assert words_of(packed) == [0xFFFFFFFF] * 32
    codes = torch.zeros(8, 32, dtype=torch.uint8)
    codes[3, 25] = 8  # the top nibble of lane 12
    packed = pack(codes, 2)
    assert packed[0, 0, 12, 0].item() == -(2**31)
    assert torch.equal(unpack(packed), codes)


def test_a_batch_packs_as_its_matrices_do() -> None:
    codes = random_codes(2, 3, 16, 128)
    packed = pack(codes, 4)
    for i in range(2):
        for j in range(3):
            assert torch.equal(packed[i, j], pack(codes[i, j], 4))


@pytest.mark.parametrize(
    ("codes", "inner", "message"),
    [
        (torch.zeros(8, 128, dtype=torch.uint8), 3, "inner_k_tiles is 3"),
        (torch.zeros(8, 128, dtype=torch.int32), 8, "torch.int32"),
        (torch.zeros(128, dtype=torch.uint8), 8, r"\(128,\)"),
        (torch.zeros(9, 128, dtype=torch.uint8), 8, "codes are 9x128: .* multiple of 128"),
        (torch.zeros(8, 64, dtype=torch.uint8), 8, "codes are 8x64: .* multiple of 128"),
    ],
)
def test_pack_refuses(codes: Tensor, inner: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(codes, inner)


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(1, 1, 32, 4, dtype=torch.int64),
        torch.zeros(1, 1, 32, 3, dtype=torch.int32),
        torch.zeros(1, 1, 31, 4, dtype=torch.int32),
        torch.zeros(1, 32, 4, dtype=torch.int32),
    ],
)
def test_unpack_refuses(packed: Tensor) -> None:
    with pytest.raises(ValueError, match="tiles have"):
        unpack(packed)


# --- choose_shape --------------------------------------------------------------------------------

REAL_K = {  # K: the group and inner_k_tiles that 128 and 8 come to
    576: (64, 4),
    896: (128, 8),
    960: (64, 4),
    1152: (128, 8),
    1600: (64, 4),
    2624: (64, 4),
    2880: (64, 4),
    4304: (128, 8),  # not even a multiple of 32: padded to 4352
    4544: (64, 4),
    4864: (128, 8),
    5632: (128, 8),
    10944: (64, 4),
    11008: (128, 8),
    18176: (128, 8),
    18944: (128, 8),
    4096: (128, 8),
    14336: (128, 8),
}
REAL_N = [151936, 50257, 50265, 51865, 3352]


@pytest.mark.parametrize("k", REAL_K)
def test_choose_shape_of_real_widths(k: int) -> None:
    shape = choose_shape(3352, k)
    assert (shape.group_size, shape.inner_k_tiles) == REAL_K[k]
    assert shape.k_padded == (4352 if k == 4304 else k)


@pytest.mark.parametrize("n", REAL_N)
@pytest.mark.parametrize("multiple", [8, 16])
def test_choose_shape_of_real_heights(n: int, multiple: int) -> None:
    shape = choose_shape(n, 4096, n_multiple=multiple)
    assert shape.n_padded % multiple == 0
    assert 0 <= shape.n_padded - n < multiple


@given(
    n=st.integers(1, 200_000),
    k=st.integers(1, 40_000),
    group=st.sampled_from(GROUP_SIZES),
    inner=st.sampled_from(INNER_K_TILES),
    multiple=st.sampled_from([8, 16, 64]),
)
@settings(deadline=None, max_examples=300)
def test_choose_shape_keeps_its_promises(
    n: int, k: int, group: int, inner: int, multiple: int
) -> None:
    shape = choose_shape(n, k, group, inner, multiple)
    g, i = shape.group_size, shape.inner_k_tiles
    assert (shape.n, shape.k) == (n, k)
    assert g in GROUP_SIZES
    assert g <= group
    assert i in INNER_K_TILES
    assert i <= inner
    assert shape.k_padded % g == 0
    assert 0 <= shape.k_padded - k < g
    assert shape.k_padded % (16 * i) == 0
    assert shape.n_padded % multiple == 0
    assert 0 <= shape.n_padded - n < multiple
    for larger in INNER_K_TILES:
        assert larger <= i or larger > inner or shape.k_padded % (16 * larger)

    divisors = [c for c in GROUP_SIZES if c <= group and k % c == 0]
    if divisors:
        assert g == max(divisors)
        assert shape.k_padded == k
    else:
        bits = {c: (k + -k % c) * 4 + (k + -k % c) // c * 32 for c in GROUP_SIZES if c <= group}
        assert bits[g] == min(bits.values())
        assert all(b > bits[g] for c, b in bits.items() if c > g)


@given(n=st.integers(1, 40), k=st.integers(1, 400), group=st.sampled_from(GROUP_SIZES))
@settings(deadline=None, max_examples=40)
def test_a_shape_says_what_packing_gives(n: int, k: int, group: int) -> None:
    shape = choose_shape(n, k, group)
    codes = random_codes(n, k)
    packed = pack(pad_codes(codes, shape), shape.inner_k_tiles)
    scale = torch.ones(n, shape.groups, dtype=torch.bfloat16)
    joined = pack_scale_and_zero(*pad_parameters(scale, scale, shape.n_padded))
    assert packed.shape == shape.tiles_shape
    assert joined.shape == shape.scale_and_zero_shape
    assert packed.nbytes + joined.nbytes == shape.packed_bytes
    assert torch.equal(unpack(packed)[:n, :k], codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 128), "n=0, k=128"),
        ((8, 0), "n=8, k=0"),
        ((8, 128, 48), r"group_size is 48, it must be one of \(32, 64, 128, 256\)"),
        ((8, 128, 128, 6), r"inner_k_tiles is 6, it must be one of \(2, 4, 8\)"),
        ((8, 128, 128, 8, 12), "n_multiple is 12, it must be a positive multiple of 8"),
        ((8, 128, 128, 8, 0), "n_multiple is 0"),
    ],
)
def test_choose_shape_refuses(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_shape(*arguments)


# --- scale_and_zero, padding ---------------------------------------------------------------------


@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    n=st.integers(0, 20),
    groups=st.integers(0, 9),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    transposed=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_scale_and_zero_round_trip(
    batch: list[int], n: int, groups: int, dtype: torch.dtype, transposed: bool
) -> None:
    generator = torch.Generator().manual_seed(n)
    if transposed:
        both = torch.randn(2, *batch, groups, n, generator=generator).to(dtype).transpose(-1, -2)
    else:
        both = torch.randn(2, *batch, n, groups, generator=generator).to(dtype)
    scale, zero = both
    joined = pack_scale_and_zero(scale, zero)
    assert joined.shape == (*batch, groups, n, 2)
    assert joined.dtype == dtype
    assert joined.is_contiguous()
    back = unpack_scale_and_zero(joined)
    for given_, got in zip((scale, zero), back, strict=True):
        assert got.is_contiguous()
        assert torch.equal(got, given_)


def test_scale_comes_before_zero_and_groups_before_rows() -> None:
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    joined = pack_scale_and_zero(scale, -scale)
    assert joined.tolist() == [[[1, -1], [3, -3], [5, -5]], [[2, -2], [4, -4], [6, -6]]]


def test_scale_and_zero_refuses() -> None:
    scale = torch.ones(8, 2)
    with pytest.raises(ValueError, match="of one dtype"):
        pack_scale_and_zero(scale, scale.bfloat16())
    with pytest.raises(ValueError, match=r"zero is torch.float32 \(8, 1\)"):
        pack_scale_and_zero(scale, scale[:, :1])
    with pytest.raises(ValueError, match=r"shape \(8, 2\)"):
        unpack_scale_and_zero(scale)


def test_padding_dequantizes_to_zero() -> None:
    shape = choose_shape(5, 40, group_size=32)
    codes = pad_codes(random_codes(5, 40), shape)
    assert codes.shape == (8, 64)
    assert torch.equal(codes[:5, :40], random_codes(5, 40))
    assert (codes[5:] == 8).all()
    assert (codes[:, 40:] == 8).all()
    scale, zero = pad_parameters(torch.ones(5, 2), torch.ones(5, 2), 8)
    assert scale.shape == zero.shape == (8, 2)
    assert (scale[:5] == 1).all()
    assert not scale[5:].any()
    assert not zero[5:].any()


def test_padding_what_fits_is_free() -> None:
    shape = choose_shape(8, 128)
    codes, scale = random_codes(8, 128), torch.ones(8, 1)
    assert pad_codes(codes, shape) is codes
    assert pad_parameters(scale, scale, 8) == (scale, scale)


def test_padding_keeps_a_batch() -> None:
    shape = choose_shape(5, 40, group_size=32)
    codes = random_codes(3, 5, 40)
    padded = pad_codes(codes, shape)
    assert padded.shape == (3, 8, 64)
    for i in range(3):
        assert torch.equal(padded[i], pad_codes(codes[i], shape))
    assert pad_parameters(torch.ones(3, 5, 2), torch.ones(3, 5, 2), 8)[0].shape == (3, 8, 2)


def test_padding_refuses() -> None:
    shape = TileShape(8, 128, 128, 8, 8, 128)
    with pytest.raises(ValueError, match="9x128, more than the 8x128"):
        pad_codes(random_codes(9, 128), shape)
    with pytest.raises(ValueError, match="at most 8"):
        pad_parameters(torch.ones(9, 1), torch.ones(9, 1), 8)


# --- the CPU packing -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [16, 48, 80, 208])
def test_pack_for_cpu_is_the_op_chunk_by_chunk(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(n, 256)
    whole = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    monkeypatch.setattr(tiles, "_CPU_CHUNK", 1)
    assert torch.equal(pack_for_cpu(codes), whole)
    monkeypatch.setattr(tiles, "_CPU_CHUNK", 130 * 256)
    assert torch.equal(pack_for_cpu(codes), whole)


def test_the_cpu_op_reads_what_pack_for_cpu_gives() -> None:
    n, k, group = 80, 256, 64
    codes = random_codes(n, k)
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(n, k // group, generator=generator)
    zero = torch.randn(n, k // group, generator=generator)
    x = torch.randn(5, k, generator=generator)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x, pack_for_cpu(codes), group, pack_scale_and_zero(scale, zero)
    )
    weight = dequantized(codes, scale, zero, group)
    exact = x.double() @ weight.T
    # k products of fp32 numbers, each weight rounded at most twice, added in any order
    bound = (k + 3) * FP32_ROUNDOFF * (x.double().abs() @ magnitude(codes, scale, zero, group).T)
    assert ((y.double() - exact).abs() <= bound).all()


def test_pack_for_cpu_refuses() -> None:
    with pytest.raises(ValueError, match=r"\(24, 64\): .* multiple of 16"):
        pack_for_cpu(random_codes(24, 64))
    with pytest.raises(ValueError, match=r"torch.int32"):
        pack_for_cpu(random_codes(16, 64).int())
    with pytest.raises(ValueError, match="meta"):
        pack_for_cpu(random_codes(16, 64).to("meta"))


def dequantized(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """The dequantized weight in fp64, by its formula."""
    scale = scale.double().repeat_interleave(group, 1)
    zero = zero.double().repeat_interleave(group, 1)
    return (codes.double() - 8) * scale + zero


def magnitude(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """The same with absolute values, the scale of rounding errors."""
    scale = scale.double().abs().repeat_interleave(group, 1)
    zero = zero.double().abs().repeat_interleave(group, 1)
    return (codes.double() - 8).abs() * scale + zero


# --- against the GPU -----------------------------------------------------------------------------


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("inner", INNER_K_TILES)
@pytest.mark.parametrize("shape", [(8, 128), (16, 256), (40, 384), (256, 1024), (3352, 4352)])
def test_pack_equals_the_cuda_packer(inner: int, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape).cuda()
    pairs = (codes[:, 0::2] << 4) | codes[:, 1::2]
    theirs = torch.ops.aten._convert_weight_to_int4pack(pairs, inner)
    ours = pack(codes, inner)
    assert ours.shape == theirs.shape
    assert torch.equal(ours, theirs)
    assert torch.equal(unpack(theirs), codes)
    assert torch.equal(pack(codes.cpu(), inner), theirs.cpu())


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("inner", INNER_K_TILES)
@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("m", [1, 5, 17])
def test_the_cuda_op_reads_what_pack_gives(inner: int, group: int, m: int) -> None:
    n, k = 72, 512
    codes = random_codes(n, k).cuda()
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(n, k // group, generator=generator).bfloat16().cuda()
    zero = torch.randn(n, k // group, generator=generator).bfloat16().cuda()
    x = torch.randn(m, k, generator=generator).bfloat16().cuda()
    y = torch.ops.aten._weight_int4pack_mm(
        x, pack(codes, inner), group, pack_scale_and_zero(scale, zero)
    )
    weight = dequantized(codes, scale, zero, group)
    exact = x.double() @ weight.T
    # The op rounds each weight to bf16 once, adds k products in fp32 (tensor cores may cut off
    # instead of rounding: twice the roundoff) and rounds the sum to bf16.
    term = x.double().abs() @ weight.abs().T
    before = (BF16_ROUNDOFF + 2 * k * FP32_ROUNDOFF * (1 + BF16_ROUNDOFF)) * term
    bound = before + BF16_ROUNDOFF * (exact.abs() + before)
    assert ((y.double() - exact).abs() <= bound).all()
