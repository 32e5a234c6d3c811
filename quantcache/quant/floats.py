"""Convert between float32, float16 and bfloat16 in plain NumPy, bit for bit as the kernels do.

For the references: NumPy's own casts differ from the hardware's in what they do to a NaN, and NumPy has no
bfloat16. Arrays of bfloat16 are passed as uint16 here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["from_f32", "to_f32"]

Array = NDArray[Any]


def to_f32(values: Array, dtype: str) -> NDArray[np.float32]:
    """Widen to float32, exactly.

    Args:
        values: float32, float16, or bfloat16 as uint16.
        dtype: "F32", "F16" or "BF16".
    """
    if dtype == "BF16":
        return (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def from_f32(values: NDArray[np.float32], dtype: str) -> Array:
    """Round to the element type, to nearest even; a NaN keeps its sign and upper payload and becomes quiet.

    Args:
        values: float32.
        dtype: "F32", "F16" or "BF16" (returned as uint16).
    """
    if dtype == "F32":
        return values
    bits = np.ascontiguousarray(values).view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    nan = magnitude > np.uint32(0x7F800000)
    if dtype == "BF16":
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
        return np.where(nan, quiet, rounded).astype(np.uint16)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        half: Array = values.astype(np.float16)
    if nan.any():
        sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
        quiet = sign | np.uint32(0x7E00) | ((magnitude >> np.uint32(13)) & np.uint32(0x3FF))
        half = np.where(nan, quiet.astype(np.uint16), half.view(np.uint16)).view(np.float16)
    return half
