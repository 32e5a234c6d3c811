"""Define how GGML's simple blocks are decoded, in NumPy. The kernels are checked against this, bit for bit.

Every function takes blocks (structured [n], the fields of `__init__.py`) and returns float32 [n, weights].
Source: ggml's ggml-quants.c; equal to gguf-py 0.19 and libgguf.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = NDArray[np.float32]


def _f32(field: Array) -> Weights:
    """Return one number a block as float32 [n, 1]."""
    return field.astype(np.float32)[:, None]


def _nibbles(qs: Array) -> Array:
    """Split bytes [n, 16] into [n, 32]: all low nibbles, then all high ones."""
    return np.concatenate([qs & 15, qs >> 4], axis=1).astype(np.int32)


def _five_bits(blocks: Array) -> Array:
    fifth: Array = (blocks["qh"][:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(np.int32) << 4
    return _nibbles(blocks["qs"]) | fifth


def q4_0(blocks: Array) -> Weights:
    """D * (q - 8)."""
    return _f32(blocks["d"]) * (_nibbles(blocks["qs"]) - 8).astype(np.float32)


def q4_1(blocks: Array) -> Weights:
    """D * q + m."""
    return _f32(blocks["d"]) * _nibbles(blocks["qs"]).astype(np.float32) + _f32(blocks["m"])


def q5_0(blocks: Array) -> Weights:
    """D * (q - 16)."""
    return _f32(blocks["d"]) * (_five_bits(blocks) - 16).astype(np.float32)


def q5_1(blocks: Array) -> Weights:
    """D * q + m."""
    return _f32(blocks["d"]) * _five_bits(blocks).astype(np.float32) + _f32(blocks["m"])


def q8(blocks: Array) -> Weights:
    """D * q."""
    return _f32(blocks["d"]) * blocks["qs"].astype(np.float32)


def q1_0(blocks: Array) -> Weights:
    """D or -d; bit i % 8 of byte i / 8."""
    bits = np.unpackbits(blocks["qs"], axis=1, bitorder="little").astype(np.int32)
    return _f32(blocks["d"]) * (2 * bits - 1).astype(np.float32)


def q2_0(blocks: Array) -> Weights:
    """D * (q - 1); four weights a byte, the first in the lowest bits."""
    q = (blocks["qs"][:, :, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(len(blocks), -1)
    return _f32(blocks["d"]) * (q.astype(np.int32) - 1).astype(np.float32)
