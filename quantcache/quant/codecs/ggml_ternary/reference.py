"""Define how ternary blocks are decoded, in NumPy. The kernels are checked against this, bit for bit.

Every function takes blocks (structured [n], the fields of `__init__.py`) and returns float32 [n, 256].
Source: ggml's ggml-quants.c; equal to gguf-py 0.19 and libgguf.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = NDArray[np.float32]


def _digits(packed: Array, count: int) -> Array:
    """Return the first `count` base-3 digits of bytes [n, w], most significant first: int32 [n, count * w].

    A byte holds a fraction of 256; times 3^k it wraps, and three times what is left carries the digit.
    """
    shifted = packed[:, None, :] * np.array([1, 3, 9, 27, 81], np.uint8)[None, :count, None]
    return (shifted.astype(np.int32) * 3 >> 8).reshape(len(packed), -1)


def _scaled(blocks: Array, digits: Array) -> Weights:
    return blocks["d"].astype(np.float32)[:, None] * (digits - 1).astype(np.float32)


def tq1_0(blocks: Array) -> Weights:
    """D * (digit - 1): 32 bytes of five digits, 16 bytes of five, 4 bytes of four; the same digit of all bytes stands together."""
    qs = blocks["qs"]
    return _scaled(blocks, np.concatenate([_digits(qs[:, :32], 5), _digits(qs[:, 32:], 5), _digits(blocks["qh"], 4)], axis=1))


def tq2_0(blocks: Array) -> Weights:
    """D * (q - 1): two runs of 32 bytes, the lowest two bits of all of them first."""
    qs = blocks["qs"].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return _scaled(blocks, qs.astype(np.int32).reshape(len(blocks), -1))
