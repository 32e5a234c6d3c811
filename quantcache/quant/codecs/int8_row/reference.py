"""Define row-wise Int8, LLM.int8(), in NumPy. The kernel is checked against this, bit for bit.

Source: Dettmers et al. 2022, arXiv:2208.07339; bitsandbytes 0.50.2 (codes and scales are equal to its own).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.quant.codec import Status

Array = NDArray[Any]
F32 = np.float32


def quantize(x: NDArray[np.float32]) -> tuple[Status, Array, Array]:
    """Quantize rows.

    Args:
        x: float32[rows, columns].

    Returns:
        The status, codes int8[rows, columns], scales float32[rows].
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        half = x.astype(np.float16).astype(F32)  # always, whatever the source type
        if not np.isfinite(half).all():
            status = Status.F16_RANGE if np.isfinite(x).all() else Status.NONFINITE | Status.F16_RANGE
            return status, np.empty(0, np.int8), np.empty(0, F32)
        scales = np.abs(half).max(axis=1)
        factor = (F32(1) / scales) * F32(127)  # the reciprocal first, then times 127
        codes = np.rint(half * np.where(scales == 0, F32(0), factor)[:, None])
    return Status.OK, codes.astype(np.int8), scales


def dequantize(codes: Array, scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Decode: f32(f32(code * scale) / 127).

    Args:
        codes: int8[rows, columns].
        scales: float32[rows].

    Returns:
        float32[rows, columns].
    """
    decoded: NDArray[np.float32] = (codes.astype(F32) * scales[:, None]) / F32(127)
    return decoded
