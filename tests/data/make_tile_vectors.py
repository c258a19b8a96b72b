"""Writes what the CUDA packer makes of a few small matrices, for test_quant_tile_layout.py to hold
pack() to.

Run once on a machine with a CUDA GPU (sm_80 or newer):

    python tests/data/make_tile_vectors.py tests/data/tile_vectors.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

# (inner_k_tiles, N, K): one tile, and several in each direction.
CASES = [(2, 8, 32), (2, 16, 256), (4, 8, 64), (4, 16, 256), (8, 8, 128), (8, 24, 256)]


def vector(inner_k_tiles: int, n: int, k: int) -> dict[str, object]:
    """Seeded codes, a hex digit each, one string a row; their tiles, eight digits a word."""
    generator = torch.Generator().manual_seed(1000 * inner_k_tiles + n + k)
    codes = torch.randint(16, (n, k), dtype=torch.uint8, generator=generator)
    pairs = (codes[:, 0::2] << 4) | codes[:, 1::2]  # even k in the high nibble
    tiles = torch.ops.aten._convert_weight_to_int4pack(pairs.cuda(), inner_k_tiles).cpu()
    if tiles.dtype != torch.int32:
        raise SystemExit(f"the packer gave {tiles.dtype}, not int32")
    words = tiles.reshape(-1, tiles.shape[-1])
    return {
        "inner_k_tiles": inner_k_tiles,
        "codes": ["".join(f"{code:x}" for code in row) for row in codes.tolist()],
        "shape": list(tiles.shape),
        "tiles": [" ".join(f"{word & 0xFFFFFFFF:08x}" for word in row) for row in words.tolist()],
    }


def main() -> None:
    """Writes the file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU: the packer has no CPU version")
    document = {
        "made_by": "tests/data/make_tile_vectors.py",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "vectors": [vector(*case) for case in CASES],
    }
    output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
