"""Define affine Int8, groups of 128, in NumPy. The kernel is checked against this, bit for bit.

Every decision is a comparison, never an inexact division, so that all back ends agree.
Source: the layout of mlx 0.32's affine quantization (decoded values are equal to its own).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.quant.codec import Status

Array = NDArray[Any]
F32 = np.float32

GROUP = 128


def _fits_f16(values: NDArray[np.float32]) -> bool:
    """Return whether every value is 0 or rounds to a normal, finite float16."""
    half = np.abs(values.astype(np.float16))
    return bool(((values == 0) | ((half >= np.finfo(np.float16).smallest_normal) & np.isfinite(half))).all())


def quantize(x: NDArray[np.float32], *, scales_f16: bool) -> tuple[Status, Array, Array, Array]:
    """Quantize flat weights.

    Args:
        x: float32[n], n a multiple of 128.
        scales_f16: store scales and biases as float16.

    Returns:
        The status, codes uint8[n], scales and biases float16 or float32[n / 128].
    """
    none = np.empty(0, np.uint8), np.empty(0, F32), np.empty(0, F32)
    groups = x.reshape(-1, GROUP)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        lo, hi = groups.min(axis=1), groups.max(axis=1)
        scale = (hi - lo) * F32(1 / 255)
        bias = lo + F32(0)  # of -0 and 0 either may be the minimum
        if not (np.isfinite(groups).all() and np.isfinite(scale).all()):
            return Status.NONFINITE, *none
        stored = np.float16 if scales_f16 else np.float32
        if scales_f16 and not (_fits_f16(scale) and _fits_f16(bias)):
            return Status.F32_SCALES, *none
        scales, biases = scale.astype(stored), bias.astype(stored)
        scale, bias = scales.astype(F32)[:, None], biases.astype(F32)[:, None]
        d = groups - bias
        code = np.zeros(groups.shape, np.int32)  # the number of i in 1..255 with d > (i - 0.5) * scale, by halving
        for step in (128, 64, 32, 16, 8, 4, 2, 1):
            code += np.where(d > ((code + step).astype(F32) - F32(0.5)) * scale, step, 0)
    return Status.OK, np.where(scale == 0, 0, code).astype(np.uint8).reshape(-1), scales, biases


def dequantize(codes: Array, scales: Array, biases: Array) -> NDArray[np.float32]:
    """Decode: f32(f32(code * scale) + bias).

    Args:
        codes: uint8[n].
        scales: float16 or float32[n / 128].
        biases: the same.

    Returns:
        float32[n].
    """
    with np.errstate(under="ignore"):
        products = codes.reshape(-1, GROUP).astype(F32) * scales.astype(F32)[:, None]
        decoded: NDArray[np.float32] = products + biases.astype(F32)[:, None]
    return decoded.reshape(-1)
