"""Low-rank updates of weights in float32, before they are quantized: one definition, whatever the machine.

A BLAS would be as fast, but its sums depend on the CPU, the threads and the shape of a tile; what is stored must not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.quant import native
from quantcache.quant.floats import to_f32
from quantcache.quant.merge import reference

__all__ = ["VERSION", "add_product", "widen"]

Array = NDArray[Any]

#: Raised whenever the merged weights change; it is in the key.
VERSION = 1


def add_product(weights: Array, left: Array, right: Array, scale: float) -> None:
    """Add scale * (left @ right) in place.

    Args:
        weights: float32[rows, columns], columns contiguous, rows at any distance; changed.
        left: float32[rows, rank], contiguous.
        right: float32[rank, columns], contiguous.
        scale: rounded to float32.
    """
    if not weights.size:
        return
    factor = np.array([scale], np.float32)
    if native.level() == "reference":
        weights[...] = reference.add_product(weights, left, right, factor[0])
        return
    rows, columns = weights.shape
    stride = weights.strides[0] // weights.itemsize if rows > 1 else columns
    native.kernel("merge_add_product")(weights, stride, rows, columns, left, right, left.shape[1], factor)


def widen(values: Array, dtype: str, out: Array) -> None:
    """Write values as float32.

    Args:
        values: flat; float32, float16, float64, or bfloat16 as uint16.
        dtype: "F32", "F16", "BF16" or "F64".
        out: float32, as many; written.
    """
    if dtype == "F64":
        with np.errstate(over="ignore", under="ignore"):
            out[...] = values
    elif native.level() == "reference":
        out[...] = to_f32(values, dtype)
    else:
        native.kernel("merge_widen")(native.contiguous(values), values.size, native.ELEMENT[dtype], out)
