"""Hold NF4 to its layout: table, nibble order, the map for absmax, the JSON beside the codes."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from quantcache.quant import native
from quantcache.quant.codec import Scratch, Status, codec, quantize
from quantcache.quant.codecs import nf4
from quantcache.quant.codecs.nf4 import MIDDLES, NESTED_MAP, NESTED_MIDDLES, TABLE, reference

Switch = Callable[[str], None]
F32 = np.float32
levels = pytest.mark.parametrize("level", native.available())
both = pytest.mark.parametrize("codec_id", ["nf4", "nf4-dq"])


def test_table() -> None:
    """The table has 16 rising values from -1 to 1, an exact zero at 7, and more above it than below."""
    assert (TABLE.dtype, TABLE.shape) == (np.float32, (16,))
    assert (np.diff(TABLE) > 0).all()
    assert (TABLE[0], TABLE[7], TABLE[15]) == (-1, 0, 1)
    assert (MIDDLES.dtype, MIDDLES.shape) == (np.float32, (15,))
    assert ((TABLE[:-1] < MIDDLES) & (TABLE[1:] > MIDDLES)).all()


def test_table_follows_from_the_normal_distribution() -> None:
    """The values are the published quantiles: of 8 positive and 7 negative parts, scaled to 1."""
    from statistics import NormalDist

    offset = 0.9677083
    above = [NormalDist().inv_cdf(q) for q in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-NormalDist().inv_cdf(q) for q in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.sort(np.array([*above, 0.0, *below]))
    np.testing.assert_allclose(TABLE, values / values.max(), atol=1e-6)


@levels
def test_every_value_keeps_its_code(level: str, kernel_level: Switch) -> None:
    """The table's own values get codes 0 to 15, and a tie between two takes the lower code."""
    kernel_level(level)
    row = np.zeros((1, 64), F32)
    row[0, :16] = TABLE
    row[0, 16:31] = MIDDLES
    row[0, 32:47] = np.nextafter(MIDDLES, F32(2))
    _, parts = quantize("nf4", row * F32(4))
    high, low = parts["codes"].ravel() >> 4, parts["codes"].ravel() & 15
    codes = np.stack([high, low], axis=1).ravel()
    assert codes[:16].tolist() == list(range(16))
    assert codes[16:31].tolist() == list(range(15))
    assert codes[32:47].tolist() == list(range(1, 16))
    assert parts["absmax"].tolist() == [4.0]


@levels
def test_first_weight_in_the_high_nibble(level: str, kernel_level: Switch) -> None:
    """Byte i holds weight 2i above weight 2i + 1."""
    kernel_level(level)
    row = np.zeros((1, 64), F32)
    row[0, 0], row[0, 3] = 1, -1
    _, parts = quantize("nf4", row)
    assert parts["codes"].shape == (32, 1)
    assert parts["codes"].ravel()[:3].tolist() == [0xF7, 0x70, 0x77]


@levels
@both
def test_zero_block(codec_id: str, level: str, kernel_level: Switch) -> None:
    """A block of zeros has codes 7 and decodes to zeros."""
    kernel_level(level)
    weights = np.zeros((2, 64), F32)
    status, parts = quantize(codec_id, weights)
    assert status == Status.OK
    assert (parts["codes"] == 0x77).all()
    np.testing.assert_array_equal(codec(codec_id).dequantize(parts, (2, 64), "F32"), weights)


@levels
def test_odd_tail_is_padded_with_a_zero(level: str, kernel_level: Switch) -> None:
    """The unused low nibble of an odd length holds code 7, a zero."""
    kernel_level(level)
    encoder = codec("nf4").encoder("X.weight", (1, 3), "F32", "")
    _, arrays = encoder.encode(F32([1, -1, 1]), 0, Scratch())
    assert arrays["codes"].tolist() == [0xF0, 0xF7]


@levels
def test_blocks_are_independent(level: str, kernel_level: Switch) -> None:
    """Each 64 weights have their own absmax: its place is the block's."""
    kernel_level(level)
    weights = np.random.default_rng(0).standard_normal((3, 192)).astype(F32)
    _, parts = quantize("nf4", weights)
    np.testing.assert_array_equal(parts["absmax"], np.abs(weights.reshape(-1, 64)).max(axis=1))


def test_nested_map() -> None:
    """The map for absmax has 256 sorted values in [-1, 1] with an exact 0 and 1, and no value twice."""
    values, middles = NESTED_MAP, NESTED_MIDDLES
    assert (values.dtype, values.shape, middles.shape) == (np.float32, (256,), (255,))
    assert (np.diff(values) > 0).all()
    assert (values[127], values[255]) == (0, 1)
    np.testing.assert_array_equal(values[:127], -values[128:255][::-1])
    assert ((values[:-1] <= middles) & (middles <= values[1:])).all()
    np.testing.assert_array_equal(values, reference.nested_map())


@levels
def test_nested_absmax_decodes_closely(level: str, kernel_level: Switch) -> None:
    """Every decoded absmax is the nearest that the map, the block's scale and the offset allow."""
    kernel_level(level)
    weights = np.random.default_rng(0).standard_normal((300, 640)).astype(F32)
    _, parts = quantize("nf4-dq", weights)
    absmax = np.abs(weights.reshape(-1, 64)).max(axis=1)
    state = json.loads(parts["quant_state"].tobytes())
    offset = F32(state["nested_offset"])
    assert abs(float(offset) - float(absmax.astype(np.float64).mean())) < 1e-6
    values = NESTED_MAP
    scale = np.repeat(parts["nested_absmax"], 256)[: absmax.size]
    assert parts["nested_absmax"].shape == (-(-absmax.size // 256),)
    allowed = values[None, :].astype(np.float64) * scale[:, None] + float(offset)
    nearest = np.abs(allowed - absmax[:, None]).min(axis=1)
    decoded = values[parts["absmax"]].astype(np.float64) * scale + float(offset)
    np.testing.assert_allclose(np.abs(decoded - absmax), nearest, atol=1e-6)


def test_mean_is_the_mean() -> None:
    """The offset is the correctly rounded mean, also where float32 sums would lose it."""
    rng = np.random.default_rng(0)
    for n in (1, 7, 8, 9, 1000, 8 * 65536 + 3):
        absmax = rng.random(n, F32) + F32(1000)
        assert abs(float(reference.mean(absmax)) - float(absmax.astype(np.float64).mean())) <= float(np.spacing(F32(1000)))


@both
@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "float32"), (np.float16, "float16")])
@pytest.mark.parametrize("shape", [(1, 64), (12, 320), (100000, 64)])
def test_quant_state(codec_id: str, dtype: type, name: str, shape: tuple[int, int]) -> None:
    """The JSON names type, block, dtype and shape, is padded with spaces to a multiple of 64, and as long as declared."""
    weights = np.full(shape, 1 / 3, dtype)
    _, parts = quantize(codec_id, weights)
    raw = parts["quant_state"].tobytes()
    assert len(raw) % 64 == 0
    assert raw.rstrip(b" ").endswith(b"}")
    state = json.loads(raw)
    expected = {"quant_type": "nf4", "blocksize": 64, "dtype": name, "shape": list(shape)}
    if codec_id == "nf4-dq":
        offset = state.pop("nested_offset")
        assert offset == float(np.float32(dtype(1 / 3)))
        expected |= {"nested_blocksize": 256, "nested_dtype": "float32"}
    assert state == expected


def test_quant_state_has_room_for_any_offset() -> None:
    """The JSON has the length that was declared before the offset was known, however many characters that takes."""
    shapes = [(10**rows, 64 * 10**columns) for rows in range(8) for columns in range(9)]  # every remainder of 64
    lengths = set()
    for shape in shapes:
        declared = nf4._quant_state(shape, "F32", 0.0).size
        assert declared % 64 == 0
        for scale in (1e-45, 1.2345678e-38, 3.3333333e-20, 1.0, 1.2345678e37, 3.4e38):
            offset = float(F32(scale))
            state = nf4._quant_state(shape, "F32", offset)
            assert state.size == declared
            assert json.loads(state.tobytes())["nested_offset"] == offset
        lengths.add(declared)
    assert len(lengths) > 1


def test_quant_state_of_an_encoder() -> None:
    """What finish() returns has the declared length and holds the mean."""
    encoder = codec("nf4-dq").encoder("X.weight", (2, 64), "F32", "")
    declared = {part.name: part.nbytes for part in encoder.parts}
    status, _ = encoder.encode(np.full(128, 1.2345678e-38, F32), 0, Scratch())
    assert status == Status.OK
    state = encoder.finish()["quant_state"]
    assert state.nbytes == declared["quant_state"]
    assert json.loads(state.tobytes())["nested_offset"] == float(F32(1.2345678e-38))


@both
def test_keys(codec_id: str) -> None:
    """The stored arrays have the names that bitsandbytes looks for, and no other starts with the weight's."""
    parts = codec(codec_id).encoder("fc.weight", (2, 64), "F16", "").parts
    keys = {part.key.removeprefix("fc.weight") for part in parts}
    plain = {"", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"}
    assert keys == (plain if codec_id == "nf4" else plain | {".nested_absmax", ".nested_quant_map"})


@pytest.mark.parametrize("shape", [(64,), (2, 2, 64), (2, 96), (0, 64), (64, 0)])
@both
def test_refused_shapes(codec_id: str, shape: tuple[int, ...]) -> None:
    """Only matrices with whole blocks in the last axis are taken."""
    assert codec(codec_id).refuses(shape)
