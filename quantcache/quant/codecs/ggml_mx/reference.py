"""Define how blocks of 4-bit floats are decoded, in NumPy. The kernels are checked against this, bit for bit.

Every function takes blocks (structured [n], the fields of `__init__.py`) and returns float32 [n, weights].
Source: ggml's ggml-quants.c; equal to gguf-py 0.19 and libgguf.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = NDArray[np.float32]

#: The sixteen E2M1 values, doubled so that they are integers; the second zero is positive, too.
VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)

#: Half of 2^(e - 127) for every byte e; the two smallest are denormal.
E8M0_HALF = np.ldexp(np.ones(256, np.float32), np.arange(256) - 128).astype(np.float32)


def _ue4m3_half() -> Weights:
    """Return half of every E4M3 value without its sign; NaN (0x7f) counts as 0, as in ggml (0xff does not)."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    value = np.where(exponent == 0, np.ldexp(mantissa / 1.0, -9), np.ldexp(1 + mantissa / 8, exponent - 7))
    value[0x7F] = 0
    return (value / 2).astype(np.float32)


UE4M3_HALF = _ue4m3_half()


def _values(qs: Array) -> Array:
    """Look up bytes [..., w] as [..., 2 w]: all low nibbles, then all high ones."""
    values: Weights = VALUES[np.concatenate([qs & 15, qs >> 4], axis=-1)].astype(np.float32)
    return values


def mxfp4(blocks: Array) -> Weights:
    """Half a power of two, times the doubled value."""
    scaled: Weights = E8M0_HALF[blocks["e"]][:, None] * _values(blocks["qs"])
    return scaled


def nvfp4(blocks: Array) -> Weights:
    """Four runs of 16 with a scale each."""
    scaled: Weights = UE4M3_HALF[blocks["e"]][:, :, None] * _values(blocks["qs"].reshape(-1, 4, 8))
    return scaled.reshape(len(blocks), -1)
