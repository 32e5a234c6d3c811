"""Hold row-wise Int8 to its definition: float16 first, one scale a row, halves to even."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from quantcache.quant import native
from quantcache.quant.codec import Scratch, Status, codec, quantize

Switch = Callable[[str], None]
F32 = np.float32
levels = pytest.mark.parametrize("level", native.available())


@levels
def test_halves_go_to_even(level: str, kernel_level: Switch) -> None:
    """With absmax 127 the codes are the weights, rounded half to even."""
    kernel_level(level)
    weights = F32([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5]])
    _, parts = quantize("int8-row", weights)
    assert parts["codes"].tolist() == [[127, 0, 2, 2, 0, -2, -126, 126]]
    assert parts["scales"].tolist() == [127.0]


@levels
def test_weights_pass_through_f16(level: str, kernel_level: Switch) -> None:
    """Float32 weights are rounded to float16 before anything else, as the published method does."""
    kernel_level(level)
    weights = np.random.default_rng(0).standard_normal((3, 70)).astype(F32)
    _, parts = quantize("int8-row", weights)
    _, rounded = quantize("int8-row", weights.astype(np.float16))
    assert parts["scales"].tobytes() == rounded["scales"].tobytes()
    assert parts["scales"].tolist() == np.abs(weights.astype(np.float16)).max(axis=1).tolist()
    assert parts["codes"].tobytes() == rounded["codes"].tobytes()


@levels
def test_zero_row(level: str, kernel_level: Switch) -> None:
    """A row of zeros has scale 0 and codes 0 and decodes to zeros."""
    kernel_level(level)
    weights = np.ones((3, 65), F32)
    weights[1] = 0
    status, parts = quantize("int8-row", weights)
    assert status == Status.OK
    assert parts["scales"].tolist() == [1, 0, 1]
    np.testing.assert_array_equal(codec("int8-row").dequantize(parts, weights.shape, "F32"), weights)


@levels
def test_beyond_f16_is_refused(level: str, kernel_level: Switch) -> None:
    """A weight that float16 cannot hold refuses the tensor: 65519.99 still rounds down, 65520 does not."""
    kernel_level(level)
    weights = np.ones((2, 64), F32)
    weights[1, 63] = 65519.99
    assert quantize("int8-row", weights)[0] == Status.OK
    weights[1, 63] = 65520
    assert quantize("int8-row", weights) == (Status.F16_RANGE, {})


@levels
def test_nan_anywhere_outweighs_range(level: str, kernel_level: Switch) -> None:
    """A NaN is reported whichever row stands first, at every level."""
    kernel_level(level)
    weights = np.ones((2, 64), F32)
    weights[0, 0], weights[1, 0] = 1e6, np.nan
    assert quantize("int8-row", weights)[0] == Status.NONFINITE | Status.F16_RANGE
    assert quantize("int8-row", weights[::-1])[0] == Status.NONFINITE | Status.F16_RANGE


@levels
def test_decoding_divides_last(level: str, kernel_level: Switch) -> None:
    """Every code, -128 included, decodes to f32(f32(code * scale) / 127)."""
    kernel_level(level)
    codes = np.arange(-128, 128).astype(np.int8).reshape(1, 256)
    scale = F32([0.7371])
    parts = {"codes": codes, "scales": scale, "weight_format": np.zeros((), np.uint8)}
    expected = (codes.astype(F32) * scale) / F32(127)
    assert codec("int8-row").dequantize(parts, (1, 256), "F32").tobytes() == expected.tobytes()


def test_keys() -> None:
    """The stored arrays have the names that transformers looks for."""
    encoder = codec("int8-row").encoder("h.0.fc.weight", (2, 3), "F32", "")
    keys = {part.name: (part.key, part.dtype, part.shape) for part in encoder.parts}
    assert keys == {
        "codes": ("h.0.fc.weight", "I8", (2, 3)),
        "scales": ("h.0.fc.SCB", "F32", (2,)),
        "weight_format": ("h.0.fc.weight_format", "U8", ()),
    }
    status, _ = encoder.encode(np.ones(6, F32), 0, Scratch())
    assert status == Status.OK
    assert encoder.finish()["weight_format"] == 0


@pytest.mark.parametrize("shape", [(128,), (2, 2, 128), (0, 128), (2, 0), (1, (1 << 21) + 1)])
def test_refused_shapes(shape: tuple[int, ...]) -> None:
    """Only matrices whose rows fit a tile are taken."""
    assert codec("int8-row").refuses(shape)
