"""GGML's IQ block types: weights are points of a grid, or values of a table of 16. IQ1_S to IQ4_XS.

Source: ggml's ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.quant.blocks import Reference, register_family
from quantcache.quant.codecs.ggml_iq import reference
from quantcache.quant.codecs.ggml_iq.grids import GRIDS, VALUES

#: Byte i of entry b is -1 where bit i of b is set.
_SIGNS = (-np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.int8)).view(np.uint64)


def _tables(name: str) -> NDArray[Any]:
    """Return what kernel.c expects: the signs, then a grid of 8 bytes a point (four and zeros for IQ3)."""
    if name.startswith("IQ4"):
        return VALUES.view(np.uint64)
    grid = GRIDS["IQ1_S" if name == "IQ1_M" else name]
    wide = np.zeros((len(grid), 8), np.int8)
    wide[:, : grid.shape[1]] = 8 * (grid + 1) if name.startswith("IQ1") else grid
    return np.concatenate([_SIGNS.reshape(-1), wide.view(np.uint64).reshape(-1)])


_D = ("d", "<f2")

#: In the order of kernel.c's numbers.
_TYPES: list[tuple[str, list[Any], Reference]] = [
    ("IQ1_S", [_D, ("qs", "u1", (32,)), ("qh", "<u2", (8,))], reference.iq1_s),
    ("IQ1_M", [("qs", "u1", (32,)), ("qh", "u1", (16,)), ("scales", "<u2", (4,))], reference.iq1_m),
    ("IQ2_XXS", [_D, ("qs", "<u2", (32,))], reference.iq2_xxs),
    ("IQ2_XS", [_D, ("qs", "<u2", (32,)), ("scales", "u1", (8,))], reference.iq2_xs),
    ("IQ2_S", [_D, ("qs", "u1", (32,)), ("signs", "u1", (32,)), ("qh", "u1", (8,)), ("scales", "u1", (8,))], reference.iq2_s),
    ("IQ3_XXS", [_D, ("qs", "u1", (64,)), ("signs", "<u4", (8,))], reference.iq3_xxs),
    ("IQ3_S", [_D, ("qs", "u1", (64,)), ("qh", "u1", (8,)), ("signs", "u1", (32,)), ("scales", "u1", (4,))], reference.iq3_s),
    ("IQ4_NL", [_D, ("qs", "u1", (16,))], reference.iq4_nl),
    ("IQ4_XS", [_D, ("scales_h", "<u2"), ("scales_l", "u1", (4,)), ("qs", "u1", (128,))], reference.iq4_xs),
]  # fmt: skip
register_family("ggml_iq_decode", _TYPES, _tables)
