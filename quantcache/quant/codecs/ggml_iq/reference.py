"""Define how IQ blocks are decoded, in NumPy. The kernels are checked against this, bit for bit.

Every function takes blocks (structured [n], the fields of `__init__.py`) and returns float32 [n, weights].
Source: ggml's ggml-quants.c; equal to gguf-py 0.19 and libgguf.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.quant.codecs.ggml_iq.grids import GRIDS, VALUES

Array = NDArray[Any]
Weights = NDArray[np.float32]
F32 = np.float32


def _f32(field: Array) -> Weights:
    return field.astype(F32)[:, None]


def _bits(packed: Array, width: int, count: int) -> Array:
    """Return `count` numbers of `width` bits of each integer, lowest first: int64 [..., count]."""
    return packed.astype(np.int64)[..., None] >> (width * np.arange(count)) & ((1 << width) - 1)


def _signs(eight: Array) -> Array:
    """Return -1 where a bit is set, else 1: [..., 8]."""
    return 1 - 2 * _bits(eight, 1, 8)


def _even_signs(seven: Array) -> Array:
    """Return the signs that seven bits name: the eighth makes the number of minuses even."""
    bits = _bits(seven, 1, 7)
    return 1 - 2 * np.concatenate([bits, bits.sum(axis=-1, keepdims=True) & 1], axis=-1)


def _runs(d: Weights, q: Array) -> Weights:
    """Return d * q: one d, [n, runs], for each run of weights."""
    scaled: Weights = d[:, :, None] * q.reshape(*d.shape, -1).astype(F32)
    return scaled.reshape(len(q), 256)


def iq2_xxs(blocks: Array) -> Weights:
    """Per 32: four bytes of indices, 4 times 7 bits of signs and a scale s: d * (s + 1/2) / 4."""
    words = np.ascontiguousarray(blocks["qs"]).view(np.uint32).reshape(-1, 8, 2)
    points = GRIDS["IQ2_XXS"][_bits(words[..., 0], 8, 4)] * _even_signs(_bits(words[..., 1], 7, 4))
    scale = (words[..., 1] >> 28).astype(F32)
    return _runs(_f32(blocks["d"]) * (F32(0.5) + scale) * F32(0.25), points)


def iq2_xs(blocks: Array) -> Weights:
    """Per 16: two words of 9 bits of index and 7 of signs; a scale s of 4 bits: d * (s + 1/2) / 4."""
    words = blocks["qs"]
    points = GRIDS["IQ2_XS"][words & 511] * _even_signs(words >> 9)
    scale = _bits(blocks["scales"], 4, 2).reshape(-1, 16).astype(F32)
    return _runs(_f32(blocks["d"]) * (F32(0.5) + scale) * F32(0.25), points)


def iq2_s(blocks: Array) -> Weights:
    """Per 16: two indices of 10 bits, two bytes of signs; a scale s of 4 bits: d * (s + 1/2) / 4."""
    index = blocks["qs"] | _bits(blocks["qh"], 2, 4).reshape(-1, 32) << 8
    points = GRIDS["IQ2_S"][index] * _signs(blocks["signs"])
    scale = _bits(blocks["scales"], 4, 2).reshape(-1, 16).astype(F32)
    return _runs(_f32(blocks["d"]) * (F32(0.5) + scale) * F32(0.25), points)


def iq3_xxs(blocks: Array) -> Weights:
    """Per 32: eight indices of points of four, 4 times 7 bits of signs and a scale s: d * (s + 1/2) / 2."""
    points = GRIDS["IQ3_XXS"][blocks["qs"]].reshape(-1, 8, 4, 8) * _even_signs(_bits(blocks["signs"], 7, 4))
    scale = (blocks["signs"] >> 28).astype(F32)
    return _runs(_f32(blocks["d"]) * (F32(0.5) + scale) * F32(0.5), points)


def iq3_s(blocks: Array) -> Weights:
    """Per 32: eight indices of 9 bits of points of four, four bytes of signs, a scale s: d * (2 s + 1)."""
    index = blocks["qs"] | _bits(blocks["qh"], 1, 8).reshape(-1, 64) << 8
    points = GRIDS["IQ3_S"][index].reshape(-1, 32, 8) * _signs(blocks["signs"])
    scale = _bits(blocks["scales"], 4, 2).reshape(-1, 8)
    return _runs(_f32(blocks["d"]) * (1 + 2 * scale).astype(F32), points)


def iq1_s(blocks: Array) -> Weights:
    """Per 32: four indices of 11 bits, a scale s of 3, and a sign: d * (2 s + 1) * (point +- 1/8)."""
    high = blocks["qh"]
    index = blocks["qs"] | _bits(high, 3, 4).reshape(-1, 32) << 8
    shift = np.where(high & 0x8000, F32(-0.125), F32(0.125))[:, :, None, None]
    scale = _bits(high >> 12, 3, 1)[..., 0]
    return _runs(_f32(blocks["d"]) * (2 * scale + 1).astype(F32), GRIDS["IQ1_S"][index].reshape(-1, 8, 4, 8) + shift)


def iq1_m(blocks: Array) -> Weights:
    """Per 8: an index of 11 bits and a sign; per 16 a scale s of 3 bits: d * (2 s + 1) * (point +- 1/8).

    The float16 d stands in the four high nibbles of the scales' words.
    """
    words = blocks["scales"]
    d = (words >> 12 << (4 * np.arange(4, dtype=np.uint16))).sum(axis=1).astype(np.uint16).view(np.float16)
    high = _bits(blocks["qh"], 4, 2).reshape(-1, 32)
    index = blocks["qs"] | (high & 7) << 8
    shift = np.where(high & 8, F32(-0.125), F32(0.125))[:, :, None]
    scale = _bits(words, 3, 4).reshape(-1, 16)
    return _runs(_f32(d) * (2 * scale + 1).astype(F32), GRIDS["IQ1_S"][index] + shift)


def _values(qs: Array) -> Weights:
    """Look up bytes [..., w] as [..., 2 w]: all low nibbles, then all high ones."""
    values: Weights = VALUES[np.concatenate([qs & 15, qs >> 4], axis=-1)].astype(F32)
    return values


def iq4_nl(blocks: Array) -> Weights:
    """D * value."""
    return _f32(blocks["d"]) * _values(blocks["qs"])


def iq4_xs(blocks: Array) -> Weights:
    """Per 32: d * (scale - 32) * value, the scale's low four bits in scales_l, its high two in scales_h."""
    scale = _bits(blocks["scales_l"], 4, 2).reshape(-1, 8) | _bits(blocks["scales_h"], 2, 8) << 4
    return _runs(_f32(blocks["d"]) * (scale - 32).astype(F32), _values(blocks["qs"].reshape(-1, 8, 16)))
