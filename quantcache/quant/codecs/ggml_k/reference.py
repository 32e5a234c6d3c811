"""Define how K blocks are decoded, in NumPy. The kernels are checked against this, bit for bit.

Every function takes blocks (structured [n], the fields of `__init__.py`) and returns float32 [n, 256]. A scale is
multiplied out first and rounded, then the product with the weight's integer, then a difference: the order of ggml.
Source: ggml's ggml-quants.c; equal to gguf-py 0.19 and libgguf.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = NDArray[np.float32]
F32 = np.float32


def _f32(field: Array) -> Weights:
    return field.astype(F32)[:, None]


def _pairs_of_bits(packed: Array) -> Array:
    """Split bytes [n, 64] into [n, 2, 4, 32]: per run of 32 bytes the lowest two bits of all of them first."""
    return packed.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3


def _runs(d: Weights, q: Array, length: int, m: Weights | None = None) -> Weights:
    """Return d * q, less m: one d, and m, [n, 256 / length], for each run."""
    scaled: Weights = d[:, :, None] * q.reshape(len(q), -1, length).astype(F32)
    return (scaled if m is None else scaled - m[:, :, None]).reshape(len(q), 256)


def _pairs_of_six(scales: Array) -> tuple[Weights, Weights]:
    """Unpack 8 scales and 8 minima of 6 bits from 12 bytes."""
    low, middle, high = scales[:, 0:4], scales[:, 4:8], scales[:, 8:12]
    scale = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=1)
    minimum = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=1)
    return scale.astype(F32), minimum.astype(F32)


def q2_k(blocks: Array) -> Weights:
    """Runs of 16: d * (low nibble) * q - dmin * (high nibble)."""
    scales = blocks["scales"]
    m = _f32(blocks["dmin"]) * (scales >> 4).astype(F32)
    return _runs(_f32(blocks["d"]) * (scales & 15).astype(F32), _pairs_of_bits(blocks["qs"]), 16, m)


def q3_k(blocks: Array) -> Weights:
    """Runs of 16: d * (scale - 32) * (q - 4), the third bit of q in hmask."""
    packed = blocks["scales"]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = (packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(-1, 16)
    scale = (low | high << 4).astype(np.int32) - 32
    third = blocks["hmask"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    q = _pairs_of_bits(blocks["qs"]).reshape(-1, 8, 32).astype(np.int32) + (third.astype(np.int32) << 2) - 4
    return _runs(_f32(blocks["d"]) * scale.astype(F32), q, 16)


def _q45_k(blocks: Array, fifth: Array | int) -> Weights:
    """Runs of 32: d * scale * q - dmin * minimum; of each 32 bytes all low nibbles, then all high ones."""
    scale, minimum = _pairs_of_six(blocks["scales"])
    qs = blocks["qs"].reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None] & 15
    q = qs.reshape(-1, 8, 32) + fifth
    return _runs(_f32(blocks["d"]) * scale, q, 32, _f32(blocks["dmin"]) * minimum)


def q4_k(blocks: Array) -> Weights:
    """Four bits."""
    return _q45_k(blocks, 0)


def q5_k(blocks: Array) -> Weights:
    """Four bits and a fifth: bit j of qh[i] belongs to weight i of run j."""
    return _q45_k(blocks, (blocks["qh"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4)


def q6_k(blocks: Array) -> Weights:
    """Runs of 16: d * scale * (q - 32), four bits of q in ql, two in qh."""
    ql = blocks["ql"].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    high = _pairs_of_bits(blocks["qh"]).reshape(-1, 2, 2, 64)
    q = (ql | high << 4).astype(np.int32) - 32
    return _runs(_f32(blocks["d"]) * blocks["scales"].astype(F32), q, 16)


def q8_k(blocks: Array) -> Weights:
    """D * q."""
    return _f32(blocks["d"]) * blocks["qs"].astype(F32)
