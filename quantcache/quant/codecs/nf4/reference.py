"""Define NF4, plain and with double quantization, in NumPy. The kernels are checked against this, bit for bit.

Source: bitsandbytes 0.50.2, CPU back end (codes and absmax are equal to its own, bit for bit).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.quant.codec import Status

Array = NDArray[Any]
F32 = np.float32

BLOCK = 64
NESTED = 256


def _inverse(absmax: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = np.divide(F32(1), np.maximum(absmax, F32(1e-38)), dtype=F32)
    return found


def _blocks(flat: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    padded = np.zeros(-(-flat.size // length) * length, F32)
    padded[: flat.size] = flat
    return padded.reshape(-1, length)


def quantize(x: NDArray[np.float32], middles: NDArray[np.float32]) -> tuple[Status, Array, Array]:
    """Quantize flat weights.

    Args:
        x: float32[n].
        middles: float32[15], the values halfway between the table's.

    Returns:
        The status, codes uint8[(n + 1) / 2], absmax float32[ceil(n / 64)].
    """
    if not np.isfinite(x).all():
        return Status.NONFINITE, np.empty(0, np.uint8), np.empty(0, F32)
    blocks = _blocks(x, BLOCK)
    absmax = np.abs(blocks).max(axis=1, initial=F32(0))
    with np.errstate(over="ignore", under="ignore"):
        scaled = blocks * _inverse(absmax)[:, None]
    codes = np.searchsorted(middles, scaled.reshape(-1), side="left").astype(np.uint8)
    packed = codes[0::2] << 4 | codes[1::2]
    return Status.OK, packed[: (x.size + 1) // 2], absmax


def dequantize(
    codes: Array, absmax: NDArray[np.float32], n: int, table: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Decode n weights.

    Args:
        codes: uint8[(n + 1) / 2].
        absmax: float32[ceil(n / 64)].
        n: number of weights.
        table: float32[16].

    Returns:
        float32[n].
    """
    index = np.empty(codes.size * 2, np.uint8)
    index[0::2] = codes >> 4
    index[1::2] = codes & 15
    with np.errstate(under="ignore"):
        decoded: NDArray[np.float32] = table[index[:n]] * np.repeat(absmax, BLOCK)[:n]
    return decoded


def mean(absmax: NDArray[np.float32]) -> np.float32:
    """Return the mean in float64 over eight lanes, lanes added in order: the same on every machine.

    Args:
        absmax: float32[n], n > 0.
    """
    lanes = _blocks(absmax, 8).astype(np.float64)
    total = np.zeros(8)
    for start in range(0, len(lanes), 1 << 16):  # np.add.reduce over axis 0 adds row after row
        total = np.add.reduce(np.vstack([total[None], lanes[start : start + (1 << 16)]]), axis=0)
    whole = 0.0
    for lane in total.tolist():  # not sum(): since Python 3.12 that compensates, and gives other bits
        whole += lane
    return F32(whole / absmax.size)


def encode_absmax(
    absmax: NDArray[np.float32], offset: np.float32, middles: NDArray[np.float32]
) -> tuple[Array, NDArray[np.float32]]:
    """Quantize absmax to 8 bits.

    Args:
        absmax: float32[n].
        offset: subtracted first; the mean.
        middles: float32[255], halfway between the values of the map.

    Returns:
        codes uint8[n], nested float32[ceil(n / 256)].
    """
    centred = _blocks(absmax - offset, NESTED)
    nested = np.abs(centred).max(axis=1)
    with np.errstate(over="ignore", under="ignore"):
        scaled = centred * _inverse(nested)[:, None]
    codes = np.searchsorted(middles, scaled.reshape(-1), side="left").astype(np.uint8)
    return codes[: absmax.size], nested


def decode_absmax(
    codes: Array, nested: NDArray[np.float32], offset: np.float32, values: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Decode absmax.

    Args:
        codes: uint8[n].
        nested: float32[ceil(n / 256)].
        offset: added last.
        values: float32[256], the map.

    Returns:
        float32[n].
    """
    decoded: NDArray[np.float32] = values[codes] * np.repeat(nested, NESTED)[: codes.size] + offset
    return decoded


def nested_map() -> NDArray[np.float32]:
    """Build the 256 values of bitsandbytes' signed dynamic map.

    Source: bitsandbytes 0.50.2 functional.create_dynamic_map(signed=True); Dettmers 2016, arXiv:1511.04561.
    """
    start = float(F32(0.1))
    values: list[np.float32] = []
    for i in range(7):
        k = 2**i + 1
        step = float(F32((1 - start) / (k - 1)))
        edges = np.array([start + step * j if j < k // 2 else 1 - step * (k - 1 - j) for j in range(k)], np.float64)
        bounds = edges.astype(F32)
        centres = ((bounds[:-1] + bounds[1:]) / F32(2)).astype(F32)
        scaled = centres * F32(10.0 ** (i - 6))
        values += [*scaled, *(-scaled)]
    return np.sort(np.array([*values, 0, 1], F32))
