"""Hold every codec to one contract, at every CPU level: the kernels compute what the references define, bit for bit."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantcache.quant import native
from quantcache.quant.codec import Encoder, Scratch, Status, codec, codec_ids, quantize
from quantcache.quant.codecs.nf4 import MIDDLES
from quantcache.tensor import array_dtype, element_name

Array = NDArray[Any]
Switch = Callable[[str], None]

COMPILED = [level for level in native.available() if level != "reference"] or ["scalar"]
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
OUT = ("F32", "F16", "BF16")
#: whole blocks and groups, rows shorter and longer than a vector, odd widths for the codecs that take them
SHAPES = [(1, 64), (3, 128), (5, 192), (2, 640), (9, 384), (7, 131), (33, 1), (4, 1027)]
#: relative RMS error that a codec may have on Gaussian weights
ACCURACY = {"f16": 0.0003, "int8": 0.0060, "int8-row": 0.0080, "nf4": 0.0925, "nf4-dq": 0.0925}


def _gaussian(rng: np.random.Generator, n: int) -> Array:
    return rng.standard_normal(n) * 0.02


def _wide(rng: np.random.Generator, n: int) -> Array:
    return rng.standard_normal(n) * np.exp2(rng.integers(-20, 12, n))


def _tiny(rng: np.random.Generator, n: int) -> Array:
    return rng.standard_normal(n) * 1e-7


def _denormals(rng: np.random.Generator, n: int) -> Array:
    return rng.integers(-(1 << 22), 1 << 22, n) * 2.0**-149


def _half_denormals(rng: np.random.Generator, n: int) -> Array:
    return rng.integers(-1023, 1024, n) * 2.0**-24


def _zeros(rng: np.random.Generator, n: int) -> Array:
    return np.where(rng.random(n) < 0.5, 0.0, -0.0)


def _zero_runs(rng: np.random.Generator, n: int) -> Array:
    return rng.standard_normal(n) * (np.arange(n) // 64 % 3 != 1)


def _constant_groups(rng: np.random.Generator, n: int) -> Array:
    return np.repeat(rng.standard_normal(-(-n // 128)), 128)[:n]


def _ties(rng: np.random.Generator, n: int) -> Array:
    values = np.concatenate([MIDDLES, np.nextafter(MIDDLES, 2), np.nextafter(MIDDLES, -2), np.arange(-16, 17) / 16])
    picked = rng.choice(values, n)
    picked[::64] = rng.choice([-1.0, 1.0], picked[::64].size)  # absmax 1: the scaled weights are these, exactly
    return picked * np.exp2(rng.integers(-3, 4))


def _half_steps(rng: np.random.Generator, n: int) -> Array:
    steps = rng.integers(0, 511, n) / 2  # with range 255 the affine scale is 1 and every .5 is a tie
    steps[::128] = 0
    steps[1::128] = 255
    return steps


def _rows_of_127(rng: np.random.Generator, n: int) -> Array:
    steps = rng.integers(-254, 255, n) / 2  # ties of the row-wise rounding wherever a row's absmax is 127
    steps[::64] = 127
    return steps


def _max_f16(rng: np.random.Generator, n: int) -> Array:
    return rng.choice([65504.0, -65504.0, 65503.9, 6.1e-5, 0.0, 1.0], n)


def _half_ties(rng: np.random.Generator, n: int) -> Array:
    halves = rng.integers(0, 0x7BFF, n).astype(np.uint16)  # halfway to the next float16, and one float32 to either side
    low, high = (bits.view(np.float16).astype(np.float32) for bits in (halves, halves + np.uint16(1)))
    middle = (low + high) / np.float32(2)
    beside = middle.view(np.int32) + rng.integers(-1, 2, n).astype(np.int32)
    return beside.view(np.float32) * rng.choice([-1.0, 1.0], n)


def _over_f16(rng: np.random.Generator, n: int) -> Array:
    return rng.standard_normal(n) * np.where(np.arange(n) == n // 2, 1e6, 1.0) + np.where(np.arange(n) == n // 2, 7e4, 0)


def _huge(rng: np.random.Generator, n: int) -> Array:
    return rng.standard_normal(n) * 1e30


def _far_from_zero(rng: np.random.Generator, n: int) -> Array:
    return 60000 + rng.integers(0, 4, n) / 128  # a float16 bias is off by more than the whole range


def _outliers(rng: np.random.Generator, n: int) -> Array:
    return rng.standard_t(2, n)


FAMILIES = {
    family.__name__.lstrip("_"): family
    for family in (
        _gaussian, _wide, _tiny, _denormals, _half_denormals, _zeros, _zero_runs, _constant_groups, _ties, _half_steps,
        _rows_of_127, _max_f16, _half_ties, _over_f16, _huge, _far_from_zero, _outliers,
    )
}  # fmt: skip


def _shapes(codec_id: str) -> list[tuple[int, ...]]:
    return [shape for shape in SHAPES if codec(codec_id).refuses(shape) is None]


def _weights(family: str, shape: tuple[int, ...], dtype: np.dtype[Any], seed: int = 0) -> Array:
    values = FAMILIES[family](np.random.default_rng(seed), int(np.prod(shape)))
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(values, np.float64).astype(np.float32).astype(dtype).reshape(shape)


def _flat(weights: Array) -> tuple[str, Array]:
    """Return the element type and what an encoder gets of it: flat, bfloat16 as uint16."""
    name = element_name(weights.dtype)
    flat = weights.reshape(-1)
    return name, flat.view(np.uint16) if name == "BF16" else flat


def _stored(status: Status, arrays: Mapping[str, Array]) -> tuple[Status, dict[str, bytes]]:
    """Return what can be compared: bytes, so that -0, NaN and dtypes count too."""
    return status, {name: array.tobytes() for name, array in arrays.items()} if status == Status.OK else {}


def _encode(encoder: Encoder, tile: Array, start: int = 0) -> tuple[Status, dict[str, bytes]]:
    return _stored(*encoder.encode(tile, start, Scratch()))


def _bits(array: Array) -> bytes:
    """Return the bits with every NaN made the same one: which NaN an operation gives is the CPU's choice."""
    bits = array.view(f"u{array.itemsize}").copy()
    bits[np.isnan(array)] = np.iinfo(bits.dtype).max
    return bits.tobytes()


contract = pytest.mark.parametrize("codec_id", codec_ids())
at_levels = pytest.mark.parametrize("level", COMPILED)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@contract
@at_levels
@of_dtypes
@pytest.mark.parametrize("family", FAMILIES)
def test_kernel_equals_reference(
    codec_id: str, level: str, dtype: np.dtype[Any], family: str, kernel_level: Switch
) -> None:
    """A kernel returns the reference's status and parts, and decodes them to the same bits in every element type."""
    for seed, shape in enumerate(_shapes(codec_id)):
        weights = _weights(family, shape, dtype, seed)
        kernel_level("reference")
        status, parts = quantize(codec_id, weights)
        kernel_level(level)
        assert _stored(*quantize(codec_id, weights)) == _stored(status, parts), f"{family} {shape}"
        if status != Status.OK:
            continue
        for out in OUT:
            kernel_level("reference")
            expected = codec(codec_id).dequantize(parts, shape, out)
            kernel_level(level)
            assert _bits(codec(codec_id).dequantize(parts, shape, out)) == _bits(expected), f"{family} {shape} {out}"


@contract
@at_levels
@of_dtypes
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "-inf"])
def test_nonfinite_found_everywhere(
    codec_id: str, level: str, dtype: np.dtype[Any], bad: float, kernel_level: Switch
) -> None:
    """One NaN or Inf, wherever it stands in the tensor, gives the reference's status in every variant."""
    shape = _shapes(codec_id)[-1]
    weights = _weights("gaussian", shape, dtype)
    name, flat = _flat(weights)
    for variant in codec(codec_id).variants:
        encoder = codec(codec_id).encoder("X.weight", shape, name, variant)
        rng = np.random.default_rng(1)
        places = {0, flat.size - 1, *range(130), *rng.integers(0, flat.size, 60).tolist()}
        for place in sorted(place for place in places if place < flat.size):
            kept = flat[place]
            weights.reshape(-1)[place] = bad
            kernel_level("reference")
            expected = _encode(encoder, flat)
            kernel_level(level)
            assert _encode(encoder, flat) == expected, place
            if not (codec_id == "f16" and name == "F16"):  # a copy looks at nothing
                assert Status.NONFINITE in expected[0], place
            flat[place] = kept


@contract
@at_levels
@of_dtypes
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_nonfinite_beside_anything(
    codec_id: str, level: str, dtype: np.dtype[Any], kernel_level: Switch, draw: st.DataObject
) -> None:
    """NaN and Inf planted at random between values of two families give the reference's status."""
    shape = draw.draw(st.sampled_from(_shapes(codec_id)))
    first, second = (draw.draw(st.sampled_from(sorted(FAMILIES))) for _ in range(2))
    weights = _weights(first, shape, dtype)
    half = shape[0] // 2
    weights[half:] = _weights(second, shape, dtype, 1)[half:]
    for _ in range(draw.draw(st.integers(1, 3))):
        weights.reshape(-1)[draw.draw(st.integers(0, weights.size - 1))] = draw.draw(
            st.sampled_from([np.nan, np.inf, -np.inf])
        )
    kernel_level("reference")
    expected = _stored(*quantize(codec_id, weights))
    kernel_level(level)
    assert _stored(*quantize(codec_id, weights)) == expected


@contract
@at_levels
@of_dtypes
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bits=st.binary(min_size=4 * 128, max_size=4 * 128), seed=st.integers(0, 1 << 16))
def test_any_bits(
    codec_id: str, level: str, dtype: np.dtype[Any], kernel_level: Switch, bits: bytes, seed: int
) -> None:
    """Weights made of arbitrary bits are coded or refused as the reference does it."""
    weights = np.frombuffer(bits, dtype).copy()
    with np.errstate(invalid="ignore"):
        if seed % 4:  # most draws hold a NaN or an Inf otherwise, and are refused
            weights[~np.isfinite(weights)] = seed / 7
    weights = weights.reshape(-1, 128)
    kernel_level("reference")
    expected = _stored(*quantize(codec_id, weights))
    kernel_level(level)
    assert _stored(*quantize(codec_id, weights)) == expected


@contract
@at_levels
@of_dtypes
@pytest.mark.parametrize("family", ["gaussian", "wide", "zero_runs"])
def test_tiles_equal_the_whole(
    codec_id: str, level: str, dtype: np.dtype[Any], family: str, kernel_level: Switch
) -> None:
    """Tiles of any size, encoded out of order by several threads, give the bytes of one tile."""
    kernel_level(level)
    shape = (33, 640)
    weights = _weights(family, shape, dtype)
    name, flat = _flat(weights)
    status, whole = quantize(codec_id, weights)
    assert status == Status.OK
    variant = next(  # the one that took the tensor
        v for v in codec(codec_id).variants
        if codec(codec_id).encoder("X.weight", shape, name, v).encode(flat, 0, Scratch())[0] == Status.OK
    )  # fmt: skip
    step = codec(codec_id).multiple(shape)
    rng = np.random.default_rng(7)
    for _ in range(3):
        encoder = codec(codec_id).encoder("X.weight", shape, name, variant)
        inner = sorted({int(cut) * step for cut in rng.integers(1, flat.size // step, 4)} - {0, flat.size})
        cuts = [0, *inner, flat.size]
        tiles = list(itertools.pairwise(cuts))
        found: dict[str, Array] = {
            part.name: np.empty(int(np.prod(part.shape)), array_dtype(part.dtype)) for part in encoder.parts
        }

        def work(tile: tuple[int, int], encoder: Encoder = encoder, found: dict[str, Array] = found) -> None:
            begin, end = tile
            tile_status, arrays = encoder.encode(flat[begin:end], begin, Scratch())
            assert tile_status == Status.OK
            for part in encoder.parts:
                if part.weights:
                    per = part.weights
                    into = found[part.name][begin // per : end // per]
                    into[...] = arrays[part.name].view(into.dtype)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, rng.permutation(tiles).tolist()))
        found.update({key: np.asarray(value) for key, value in encoder.finish().items()})
        assert {key: array.tobytes() for key, array in found.items()} == _stored(status, whole)[1]


@contract
@at_levels
@of_dtypes
def test_scratch_is_reused(codec_id: str, level: str, dtype: np.dtype[Any], kernel_level: Switch) -> None:
    """What a thread's buffers held before does not show in the next tile."""
    kernel_level(level)
    shape = (4, 640)
    scratch = Scratch()
    for family in ("wide", "gaussian", "zeros", "ties"):
        name, flat = _flat(_weights(family, shape, dtype))
        for variant in codec(codec_id).variants:
            encoder = codec(codec_id).encoder("X.weight", shape, name, variant)
            assert _stored(*encoder.encode(flat, 0, scratch)) == _encode(encoder, flat)


@contract
@at_levels
@of_dtypes
def test_unaligned_input(codec_id: str, level: str, dtype: np.dtype[Any], kernel_level: Switch) -> None:
    """Weights and parts at odd addresses, as a file's views may be, are read as aligned ones are."""
    kernel_level(level)
    shape = _shapes(codec_id)[-1]
    weights = _weights("gaussian", shape, dtype)

    def odd(array: Array) -> Array:
        return np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)

    status, parts = quantize(codec_id, weights)
    name, flat = _flat(weights)
    for variant in codec(codec_id).variants:
        encoder = codec(codec_id).encoder("X.weight", shape, name, variant)
        assert _encode(encoder, odd(flat)) == _encode(encoder, flat)
    assert status == Status.OK
    for out in OUT:
        expected = codec(codec_id).dequantize(parts, shape, out)
        found = codec(codec_id).dequantize({key: odd(part) for key, part in parts.items()}, shape, out)
        assert _bits(found) == _bits(expected)


@contract
@of_dtypes
def test_parts_are_as_declared(codec_id: str, dtype: np.dtype[Any]) -> None:
    """The stored arrays have the declared names, order, types, shapes and sizes, under keys that differ."""
    for shape in _shapes(codec_id):
        weights = _weights("gaussian", shape, dtype)
        status, parts = quantize(codec_id, weights, "blocks.0.key.weight")
        assert status == Status.OK
        declared = {}
        for variant in reversed(codec(codec_id).variants):  # the first variant takes Gaussian weights
            encoder = codec(codec_id).encoder("blocks.0.key.weight", shape, element_name(dtype), variant)
            declared = {part.name: part for part in encoder.parts}
        assert list(parts) == list(declared)
        for name, part in declared.items():
            assert (parts[name].dtype, parts[name].shape) == (array_dtype(part.dtype), part.shape), name
            assert parts[name].nbytes == part.nbytes
            assert part.key.startswith("blocks.0.key.")
        assert len({part.key for part in declared.values()}) == len(declared)


@contract
def test_bits_per_weight(codec_id: str) -> None:
    """The promised size is the stored size of a large matrix, to a thousandth."""
    shape = (1024, 4096)
    parts = codec(codec_id).encoder("X.weight", shape, "F16", codec(codec_id).variants[0]).parts
    stored = sum(part.nbytes for part in parts) * 8 / (shape[0] * shape[1])
    assert stored == pytest.approx(codec(codec_id).bits_per_weight(), rel=2e-3)


@contract
@pytest.mark.parametrize("level", native.available())
def test_accuracy(codec_id: str, level: str, kernel_level: Switch) -> None:
    """The relative RMS error on Gaussian weights stays within the documented one."""
    kernel_level(level)
    weights = np.random.default_rng(3).standard_normal((512, 1024)).astype(np.float32)
    status, parts = quantize(codec_id, weights)
    assert status == Status.OK
    difference = codec(codec_id).dequantize(parts, weights.shape, "F32").astype(np.float64) - weights
    error = float(np.sqrt(np.mean(difference**2) / np.mean(weights.astype(np.float64) ** 2)))
    assert 0 < error <= ACCURACY[codec_id]


# ---- odd lengths: whole tensors never have them in the blocked codecs, the kernels take them anyway ----------------

LENGTHS = [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 127, 129, 191, 200, 255, 257, 331]


@pytest.mark.parametrize("codec_id", ["nf4", "nf4-dq", "f16"])
@at_levels
@of_dtypes
@pytest.mark.parametrize("family", ["gaussian", "wide", "zeros", "ties", "max_f16"])
def test_odd_tail(codec_id: str, level: str, dtype: np.dtype[Any], family: str, kernel_level: Switch) -> None:
    """A tile that ends inside a block is coded and decoded as the reference does it."""
    for n in LENGTHS:
        name, flat = _flat(_weights(family, (1, n), dtype, n))
        found: list[tuple[Any, list[bytes]]] = []
        for each in ("reference", level):
            kernel_level(each)
            encoder = codec(codec_id).encoder("X.weight", (1, n), name, "")
            status, arrays = encoder.encode(flat, 0, Scratch())
            if status != Status.OK:
                found.append((_stored(status, arrays), []))
                continue
            arrays = {key: array.copy() for key, array in {**arrays, **encoder.finish()}.items()}
            decoded = [_bits(codec(codec_id).dequantize(arrays, (1, n), out)) for out in OUT]
            found.append((_stored(status, arrays), decoded))
        assert found[0] == found[1], n


@pytest.mark.parametrize("kernel", ["nf4_quantize", "f16_cast"])
@at_levels
@of_dtypes
def test_kernel_writes_inside_its_arrays(kernel: str, level: str, dtype: np.dtype[Any]) -> None:
    """A kernel writes exactly the bytes that its comment states, whatever the length."""
    if kernel == "f16_cast" and dtype == np.float16:
        pytest.skip("a copy has no kernel")
    call = native.kernel(kernel, level)
    for n in LENGTHS:
        name, flat = _flat(_weights("gaussian", (1, n), dtype))
        flat, guard = flat.copy(), 64
        sizes = [2 * n] if kernel == "f16_cast" else [(n + 1) // 2, 4 * -(-n // 64)]
        found = []
        for fill in (0xA5, 0x5A):
            buffers = [np.full(size + guard, fill, np.uint8) for size in sizes]
            before = [] if kernel == "f16_cast" else [MIDDLES]
            assert call(flat, n, native.ELEMENT[name], *before, *buffers) == Status.OK
            for size, buffer in zip(sizes, buffers, strict=True):
                assert (buffer[size:] == fill).all(), n
            found.append([buffer[:size].tobytes() for size, buffer in zip(sizes, buffers, strict=True)])
        assert found[0] == found[1], n


@pytest.mark.parametrize(("codec_id", "width"), [("nf4", 1 << 14), ("int8", 1 << 14), ("int8-row", 1 << 14), ("int8-row", (1 << 14) + 8), ("int8-row", (1 << 14) + 3)])
@pytest.mark.parametrize(("offset", "fresh"), [(0, False), (0, True), (16, False)], ids=["aligned", "fresh", "not aligned"])
@at_levels
def test_what_no_cache_holds(codec_id: str, width: int, offset: int, fresh: bool, level: str, kernel_level: Switch) -> None:
    """A large output, which is written past the caches if it is aligned and was touched before, is what smaller ones are."""
    kernel_level(level)
    rng, few, times = np.random.default_rng(), 41, 25
    parts = quantize(codec_id, rng.standard_normal((few, width)).astype(np.float32))[1]
    whole = {name: np.tile(part.reshape(few, -1), (times, 1)) for name, part in parts.items() if part.size % few == 0}
    for dtype in OUT:
        kind = array_dtype(dtype)
        nbytes = few * times * width * kind.itemsize
        raw = np.full(nbytes + 256, 0xA5, np.uint8)
        start = 64 - native.address(raw) % 64 + offset
        found = raw[start : start + nbytes].view(kind).reshape(few * times, width)
        codec(codec_id).dequantize_into(parts | whole, found, dtype, fresh=fresh)
        assert (raw[:start] == 0xA5).all()
        assert (raw[start + nbytes :] == 0xA5).all()
        for row in (0, 1, few - 1):
            one = np.empty((1, width), kind)
            codec(codec_id).dequantize_into(parts | {name: part[row] for name, part in whole.items()}, one, dtype)
            assert all(again.tobytes() == one.tobytes() for again in found[row::few]), (dtype, row)


@at_levels
def test_wrong_call_is_refused(level: str) -> None:
    """A kernel refuses an element type that it does not know, and a length that is not whole groups."""
    x, out = np.zeros(256, np.float32), [np.zeros(1024, np.uint8) for _ in range(3)]
    assert native.kernel("nf4_quantize", level)(x, 64, 3, MIDDLES, *out[:2]) == Status.BAD_CALL
    assert native.kernel("f16_cast", level)(x, 64, native.ELEMENT["F16"], out[0]) == Status.BAD_CALL
    assert native.kernel("int8_quantize", level)(x, 100, 0, 1, *out) == Status.BAD_CALL
    assert native.kernel("int8_row_quantize", level)(x, 2, 64, 9, *out[:2]) == Status.BAD_CALL


# ---- the process's floating-point environment --------------------------------------------------------------------

#: <fenv.h>: upward, downward, towards zero
ROUNDING = {"x86_64": (0x800, 0x400, 0xC00), "aarch64": (0x400000, 0x800000, 0xC00000)}.get(platform.machine(), ())


def _libm() -> ctypes.CDLL:
    if sys.platform != "linux" or not ROUNDING:
        pytest.skip("fesetround's constants are known here for Linux on x86-64 and arm64 only")
    return ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")


@contextmanager
def _rounding(mode: int) -> Iterator[None]:
    libm = _libm()
    saved = libm.fegetround()
    assert libm.fesetround(mode) == 0
    try:
        yield
    finally:
        libm.fesetround(saved)


@contextmanager
def _flush_to_zero() -> Iterator[None]:
    """Set FTZ and DAZ in MXCSR, as a library linked with -ffast-math does when it is loaded."""
    libm = _libm()
    if platform.machine() != "x86_64":
        pytest.skip("sets MXCSR")
    saved, changed = (ctypes.c_uint8 * 32)(), (ctypes.c_uint8 * 32)()
    assert libm.fegetenv(saved) == 0
    changed[:] = saved[:]
    control = int.from_bytes(bytes(saved[28:32]), "little") | 0x8040  # glibc: 28 bytes for x87, then MXCSR
    changed[28:32] = list(control.to_bytes(4, "little"))
    assert libm.fesetenv(changed) == 0
    try:
        yield
    finally:
        libm.fesetenv(saved)


@contract
@at_levels
@pytest.mark.parametrize("mode", range(3), ids=["upward", "downward", "towards-zero"])
def test_rounding_mode_does_not_matter(codec_id: str, level: str, mode: int, kernel_level: Switch) -> None:
    """Another rounding mode, left behind by another library, changes no stored and no decoded byte."""
    if codec_id == "nf4-dq":
        pytest.skip("its state is JSON, and Python itself writes and reads numbers in the mode of the moment")
    kernel_level(level)
    for dtype in DTYPES:
        for seed in range(6):
            weights = _weights("gaussian", (16, 1024), dtype, seed)
            status, parts = quantize(codec_id, weights)
            decoded = [codec(codec_id).dequantize(parts, weights.shape, out).tobytes() for out in OUT]
            _libm()
            with _rounding(ROUNDING[mode]):
                again = quantize(codec_id, weights)
                decoded_again = [codec(codec_id).dequantize(parts, weights.shape, out).tobytes() for out in OUT]
            assert _stored(*again) == _stored(status, parts)
            assert decoded_again == decoded


@contract
@at_levels
@pytest.mark.parametrize("family", ["denormals", "half_denormals", "tiny"])
def test_flush_to_zero_does_not_matter(codec_id: str, level: str, family: str, kernel_level: Switch) -> None:
    """Flush-to-zero, left behind by another library, changes no stored and no decoded byte."""
    kernel_level(level)
    for dtype in DTYPES:
        weights = _weights(family, (4, 1024), dtype)
        status, parts = quantize(codec_id, weights)
        decoded = [codec(codec_id).dequantize(parts, weights.shape, out).tobytes() for out in OUT]
        with _flush_to_zero():
            again = quantize(codec_id, weights)
            decoded_again = [codec(codec_id).dequantize(parts, weights.shape, out).tobytes() for out in OUT]
        assert _stored(*again) == _stored(status, parts)
        assert decoded_again == decoded


@at_levels
def test_environment_is_put_back(level: str) -> None:
    """A kernel leaves the process's rounding mode as it found it."""
    libm = _libm()
    x, out = np.ones(64, np.float32), [np.zeros(64, np.uint8) for _ in range(2)]
    call = native.kernel("nf4_quantize", level)
    with _rounding(ROUNDING[0]):
        call(x, 64, 0, MIDDLES, *out)
        left = libm.fegetround()
    assert left == ROUNDING[0]
