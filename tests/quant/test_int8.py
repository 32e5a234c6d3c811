"""Hold affine Int8 to its definition by comparisons, and to when it stores float32 scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantcache.quant import native
from quantcache.quant.codec import Scratch, Status, codec, quantize

Switch = Callable[[str], None]
F32 = np.float32
levels = pytest.mark.parametrize("level", native.available())


def _counted(weights: NDArray[Any], parts: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """Count, for every weight, the i in 1..255 with d > (i - 0.5) * scale, as the format's definition says."""
    groups = weights.astype(F32).reshape(-1, 128)
    scale, bias = (parts[name].astype(F32).reshape(-1, 1) for name in ("scales", "biases"))
    d = groups - bias
    thresholds = (np.arange(1, 256, dtype=F32) - F32(0.5)) * scale
    codes = (d[:, :, None] > thresholds[:, None, :]).sum(axis=2)
    return np.where(scale == 0, 0, codes).astype(np.uint8)


def _error(weights: NDArray[Any], parts: dict[str, NDArray[Any]]) -> float:
    decoded = codec("int8").dequantize(parts, weights.shape, "F32").astype(np.float64)
    return float(np.sqrt(np.mean((decoded - weights) ** 2) / np.mean(weights.astype(np.float64) ** 2)))


@levels
@pytest.mark.parametrize("spread", [0.02, 1.0, 100.0, 1e-7, 1e-30, 1e-38, 1e30])
def test_codes_are_the_counted_ones(level: str, spread: float, kernel_level: Switch) -> None:
    """The codes are those that counting thresholds one by one gives."""
    kernel_level(level)
    weights = (np.random.default_rng(0).standard_normal((64, 256)) * spread).astype(F32)
    status, parts = quantize("int8", weights)
    assert status == Status.OK
    np.testing.assert_array_equal(parts["codes"].view(np.uint8).reshape(-1, 128), _counted(weights, parts))


@levels
def test_tie_takes_the_lower_code(level: str, kernel_level: Switch) -> None:
    """A weight exactly between two codes takes the lower one."""
    kernel_level(level)
    weights = np.zeros((1, 128), F32)
    weights[0, :5] = 0, 255, 0.5, 1.5, 254.5
    weights[0, 5:8] = np.nextafter(F32([0.5, 1.5, 254.5]), F32(256))
    _, parts = quantize("int8", weights)
    assert (parts["scales"].dtype, parts["scales"].item(), parts["biases"].item()) == (np.float16, 1, 0)
    assert parts["codes"].view(np.uint8).ravel()[:8].tolist() == [0, 255, 0, 1, 254, 1, 2, 255]


def test_layout() -> None:
    """Four codes stand in a uint32, the first in its lowest byte; keys follow MLX."""
    weights = np.arange(256, dtype=F32).reshape(2, 128)
    _, parts = quantize("int8", weights)
    words = parts["codes"]
    assert (words.dtype, words.shape) == (np.uint32, (2, 32))
    codes = np.stack([words >> shift & 255 for shift in (0, 8, 16, 24)], axis=-1).reshape(2, 128)
    np.testing.assert_array_equal(codes, _counted(weights, parts))
    assert (np.diff(codes.astype(int), axis=1) >= 0).all()
    keys = {part.name: part.key for part in codec("int8").encoder("h.0.fc.weight", (2, 128), "F32", "F16").parts}
    assert keys == {"codes": "h.0.fc.weight", "scales": "h.0.fc.scales", "biases": "h.0.fc.biases"}


@levels
def test_common_weights_have_f16_scales(level: str, kernel_level: Switch) -> None:
    """Scales and biases of ordinary weights are stored as float16."""
    kernel_level(level)
    weights = np.random.default_rng(0).standard_normal((64, 256)).astype(F32)
    _, parts = quantize("int8", weights)
    assert {parts["scales"].dtype, parts["biases"].dtype} == {np.dtype(np.float16)}
    assert _error(weights, parts) < 0.0065


@levels
@pytest.mark.parametrize(("spread", "why"), [(1.8e-7, "subnormal"), (1e-3, "subnormal scale"), (1e6, "overflow")])
def test_f32_scales_where_f16_would_lose(level: str, spread: float, why: str, kernel_level: Switch) -> None:
    """A tensor whose scales or biases float16 cannot hold gets float32 ones, and stays as accurate."""
    kernel_level(level)
    weights = (np.random.default_rng(0).standard_normal((64, 256)) * spread).astype(F32)
    status, parts = quantize("int8", weights)
    assert status == Status.OK
    assert {parts["scales"].dtype, parts["biases"].dtype} == {np.dtype(F32)}, why
    assert _error(weights, parts) < 0.0065


@levels
def test_one_tiny_group_turns_the_whole_tensor(level: str, kernel_level: Switch) -> None:
    """The scales of a tensor have one type: a single group that needs float32 decides."""
    kernel_level(level)
    weights = np.random.default_rng(0).standard_normal((64, 256)).astype(F32)
    assert quantize("int8", weights)[1]["scales"].dtype == np.float16
    weights[40, 128:] *= 1e-6
    assert quantize("int8", weights)[1]["scales"].dtype == F32


@levels
@pytest.mark.parametrize("value", [0.0, -0.0, 0.375, -7.0, 1e30, 1e-44])
def test_constant_group(level: str, value: float, kernel_level: Switch) -> None:
    """A constant group has scale 0 and codes 0 and decodes to itself, -0 to 0."""
    kernel_level(level)
    weights = np.full((2, 128), value, F32)
    status, parts = quantize("int8", weights)
    assert status == Status.OK
    assert not parts["codes"].any()
    assert not parts["scales"].any()
    decoded = codec("int8").dequantize(parts, weights.shape, "F32")
    np.testing.assert_array_equal(decoded, weights)
    assert not np.signbit(decoded[decoded == 0]).any()


@levels
@pytest.mark.parametrize("variant", ["F16", "F32"])
def test_range_overflow(level: str, variant: str, kernel_level: Switch) -> None:
    """A group whose range is beyond float32 is refused as not finite, with either type of scales."""
    kernel_level(level)
    weights = np.zeros(128, F32)
    weights[:2] = -3e38, 3e38
    encoder = codec("int8").encoder("X.weight", (1, 128), "F32", variant)
    assert encoder.encode(weights, 0, Scratch())[0] == Status.NONFINITE
    assert quantize("int8", weights.reshape(1, 128)) == (Status.NONFINITE, {})


@pytest.mark.parametrize("shape", [(128,), (2, 2, 128), (2, 100), (0, 128), (2, 0), ()])
def test_refused_shapes(shape: tuple[int, ...]) -> None:
    """Only matrices of whole groups are taken."""
    assert codec("int8").refuses(shape)
