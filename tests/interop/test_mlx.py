"""Let mlx read affine Int8 as it is stored here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantcache.quant.codec import Status, codec, quantize

mx = pytest.importorskip("mlx.core")

SHAPES = [(1, 128), (3, 256), (64, 512), (5, 1024)]


@pytest.fixture(autouse=True)
def _on_the_cpu() -> None:
    """Compare on the CPU: a GPU may fuse the product and the sum."""
    mx.set_default_device(mx.cpu)


def _decoded(parts: dict[str, NDArray[Any]]) -> NDArray[Any]:
    found = mx.dequantize(
        mx.array(parts["codes"]), mx.array(parts["scales"]), mx.array(parts["biases"]), group_size=128, bits=8
    )
    return np.array(found)


def _ulps(found: NDArray[Any], expected: NDArray[Any], products: NDArray[Any]) -> NDArray[Any]:
    """Return the distance in units of the last place of the greatest number that the sum has."""
    assert found.dtype == expected.dtype
    magnitude = np.maximum(np.abs(expected), products.astype(expected.dtype))
    return np.abs(found.astype(np.float64) - expected.astype(np.float64)) / np.spacing(magnitude).astype(np.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [1e-7, 0.02, 100.0])
def test_mlx_decodes_what_is_stored(shape: tuple[int, ...], spread: float) -> None:
    """mlx decodes stored codes, scales and biases, of either type, to the weights decoded here."""
    weights = (np.random.default_rng(0).standard_normal(shape) * spread).astype(np.float32)
    status, parts = quantize("int8", weights)
    assert status == Status.OK
    found = _decoded(parts)
    name = "F16" if parts["scales"].dtype == np.float16 else "F32"
    print(name, np.abs(found.astype(np.float64) - codec("int8").dequantize(parts, shape, name)).max(),
        (found != codec("int8").dequantize(parts, shape, name)).mean())
    assert found.shape == shape
