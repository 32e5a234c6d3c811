"""Define how a low-rank update is added, in NumPy. The kernel is checked against this, bit for bit.

Source: Hu et al. 2021, arXiv:2106.09685; peft's `merge_and_unload` agrees to float32's rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def add_product(weights: Array, left: Array, right: Array, scale: np.float32) -> NDArray[np.float32]:
    """Return weights + scale * (left @ right); each product and each sum is rounded, the rank in order.

    Args:
        weights: float32[rows, columns].
        left: float32[rows, rank].
        right: float32[rank, columns].
        scale: of the update.
    """
    total = np.zeros(weights.shape, np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for k in range(left.shape[1]):
            total += left[:, k, None] * right[None, k, :]
        merged: NDArray[np.float32] = weights + np.float32(scale) * total
    return merged
