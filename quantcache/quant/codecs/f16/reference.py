"""Define the cast to float16 in NumPy. The kernel is checked against this, bit for bit.

Source: IEEE 754-2019, roundTiesToEven; NaN as F16C and NEON convert it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.quant.codec import Status
from quantcache.quant.floats import from_f32


def cast(x: NDArray[np.float32]) -> tuple[Status, NDArray[Any]]:
    """Round to float16.

    Args:
        x: float32[n].

    Returns:
        The status (F16_RANGE if a value became Inf, NONFINITE too if one was so before) and float16[n].
    """
    half = from_f32(x, "F16")
    if np.isfinite(half).all():
        return Status.OK, half
    return (Status.F16_RANGE if np.isfinite(x).all() else Status.NONFINITE | Status.F16_RANGE), half
