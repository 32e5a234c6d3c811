"""Block types of 4-bit floats (E2M1) under tiny scales: MXFP4 (a power of two per 32) and NVFP4 (E4M3 per 16).

Source: OCP Microscaling Formats 1.0; ggml's ggml-impl.h, which stores the values doubled and halves the scales.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.quant.blocks import Reference, register_family
from quantcache.quant.codecs.ggml_mx import reference


def _tables(name: str) -> NDArray[Any]:
    """Return what kernel.c expects: the scale of every byte, then the value of every code."""
    scales = reference.E8M0_HALF if name == "MXFP4" else reference.UE4M3_HALF
    return np.frombuffer(scales.tobytes() + reference.VALUES.tobytes(), np.uint64)


#: In the order of kernel.c's numbers.
_TYPES: list[tuple[str, list[Any], Reference]] = [
    ("MXFP4", [("e", "u1"), ("qs", "u1", (16,))], reference.mxfp4),
    ("NVFP4", [("e", "u1", (4,)), ("qs", "u1", (32,))], reference.nvfp4),
]
register_family("ggml_mx_decode", _TYPES, _tables)
