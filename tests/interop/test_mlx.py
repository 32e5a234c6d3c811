"""Let mlx read affine Int8 as it is stored here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantcache.quant.codec import Status, codec, quantize

mx = pytest.importorskip("mlx.core")

SHAPES = [(1, 128), (3, 256), (64, 512), (5, 1024)]
of_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
spreads = pytest.mark.parametrize("spread", [1e-7, 0.02, 100.0])


@pytest.fixture(autouse=True)
def _on_the_cpu() -> None:
    """Compare on the CPU: a GPU may fuse the product and the sum."""
    mx.set_default_device(mx.cpu)


def _stored(shape: tuple[int, ...], spread: float) -> dict[str, NDArray[Any]]:
    weights = (np.random.default_rng(0).standard_normal(shape) * spread).astype(np.float32)
    weights[0, :128] = np.float32(spread)  # a constant group
    status, parts = quantize("int8", weights)
    assert status == Status.OK
    return parts


def _decoded(codes: NDArray[Any], scales: NDArray[Any], biases: NDArray[Any]) -> NDArray[Any]:
    """Return what mlx makes of the stored arrays, in the type of the scales."""
    found = np.array(mx.dequantize(mx.array(codes), mx.array(scales), mx.array(biases), group_size=128, bits=8))
    assert found.dtype == scales.dtype
    return found


@of_shapes
@spreads
def test_float32_is_equal(shape: tuple[int, ...], spread: float) -> None:
    """With float32 scales, stored or widened, mlx decodes to the weights decoded here, bit for bit."""
    parts = _stored(shape, spread)
    found = _decoded(parts["codes"], parts["scales"].astype(np.float32), parts["biases"].astype(np.float32))
    assert found.shape == shape
    assert found.tobytes() == codec("int8").dequantize(parts, shape, "F32").tobytes()


@of_shapes
def test_float16_is_one_rounding_apart(shape: tuple[int, ...]) -> None:
    """With float16 scales mlx rounds the product to float16 too: at most one unit of the larger of the two."""
    parts = _stored(shape, 0.02)
    assert parts["scales"].dtype == np.float16
    found = _decoded(**parts)
    expected = codec("int8").dequantize(parts, shape, "F16")
    products = parts["codes"].view(np.uint8).reshape(-1, 128) * parts["scales"].astype(np.float32).reshape(-1, 1)
    larger = np.maximum(np.abs(products.reshape(shape)), np.abs(expected.astype(np.float32))).astype(np.float16)
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    assert (difference <= np.spacing(larger).astype(np.float64)).all()


@of_shapes
def test_shapes_and_types_are_those_of_mlx(shape: tuple[int, ...]) -> None:
    """The stored arrays have the shapes and the types that mlx's own quantizer gives for float16 weights."""
    parts = _stored(shape, 0.02)
    theirs = mx.quantize(mx.ones(shape, dtype=mx.float16), group_size=128, bits=8)
    for name, other in zip(("codes", "scales", "biases"), theirs, strict=True):
        other = np.array(other)
        assert (parts[name].shape, parts[name].dtype) == (other.shape, other.dtype), name


@of_shapes
@spreads
def test_error_is_not_above_that_of_mlx(shape: tuple[int, ...], spread: float) -> None:
    """The weights decoded here are as close to the originals as those that mlx quantizes from float32 itself."""
    weights = (np.random.default_rng(1).standard_normal(shape) * spread).astype(np.float32)
    _, parts = quantize("int8", weights)
    ours = codec("int8").dequantize(parts, shape, "F32")
    theirs = _decoded(*(np.array(part) for part in mx.quantize(mx.array(weights), group_size=128, bits=8)))
    errors = [float(np.sqrt(np.mean((decoded.astype(np.float64) - weights) ** 2))) for decoded in (ours, theirs)]
    assert errors[0] <= errors[1] * 1.05
