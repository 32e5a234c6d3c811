"""Let bitsandbytes check its own formats: its CPU codes are ours, and it reads what is stored here."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from quantcache.quant.codec import Status, codec, quantize
from quantcache.quant.codecs.nf4 import NESTED_MAP, TABLE

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
SHAPES = [(1, 64), (3, 128), (64, 512), (33, 640), (5, 1024), (300, 256)]
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def _weights(shape: tuple[int, ...], dtype: np.dtype[Any], seed: int = 0) -> NDArray[Any]:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(0.02)
    values[0, :64] = 0
    return values.astype(dtype)


def _tensor(array: NDArray[Any]) -> Any:
    """Return a torch tensor of the same bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def _array(tensor: Any) -> NDArray[Any]:
    """Return a NumPy array of the same bits, bfloat16 as ml_dtypes has it."""
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())


def _state(codec_id: str, shape: tuple[int, ...], dtype: np.dtype[Any], parts: dict[str, NDArray[Any]]) -> Any:
    """Build bitsandbytes' state from the stored parts under their stored keys, as its own loader does."""
    name = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[str(dtype)]
    encoder = codec(codec_id).encoder("fc.weight", shape, name, "")
    keys = {part.name: part.key for part in encoder.parts}
    stored = {
        keys[part].removeprefix("fc.weight."): _tensor(array) for part, array in parts.items() if part != "codes"
    }
    return functional.QuantState.from_dict(stored, device=torch.device("cpu"))


def test_tables() -> None:
    """The NF4 table and the map for absmax are bitsandbytes' own, bit for bit."""
    assert TABLE.tobytes() == functional.get_4bit_type("nf4", device="cpu").numpy().tobytes()
    assert NESTED_MAP.tobytes() == functional.create_dynamic_map(signed=True).numpy().tobytes()


@of_dtypes
@of_shapes
def test_nf4_codes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Codes and absmax are those of bitsandbytes' CPU quantizer, bit for bit."""
    weights = _weights(shape, dtype)
    status, parts = quantize("nf4", weights)
    assert status == Status.OK
    packed, state = functional.quantize_4bit(_tensor(weights), blocksize=64, quant_type="nf4")
    assert parts["codes"].shape == tuple(packed.shape)
    assert parts["codes"].tobytes() == packed.numpy().tobytes()
    assert parts["absmax"].tobytes() == state.absmax.numpy().tobytes()
    assert parts["quant_map"].tobytes() == state.code.numpy().tobytes()


@of_dtypes
@of_shapes
@pytest.mark.parametrize("codec_id", ["nf4", "nf4-dq"])
def test_bitsandbytes_decodes_what_is_stored(codec_id: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """The stored keys are taken by bitsandbytes, which decodes them to the weights that are decoded here, bit for bit."""
    weights = _weights(shape, dtype)
    _, parts = quantize(codec_id, weights)
    state = _state(codec_id, shape, dtype, parts)
    assert (state.nested, tuple(state.shape), state.blocksize) == (codec_id == "nf4-dq", shape, 64)
    decoded = _array(functional.dequantize_4bit(_tensor(parts["codes"]), state))
    name = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[str(dtype)]
    expected = codec(codec_id).dequantize(parts, shape, name)
    assert decoded.dtype == expected.dtype
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("codec_id", ["nf4", "nf4-dq"])
def test_no_unknown_keys(codec_id: str) -> None:
    """The state that bitsandbytes makes has the keys that are stored here, and its JSON the same entries."""
    weights = _weights((64, 512), np.dtype(np.float16))
    _, state = functional.quantize_4bit(
        _tensor(weights), blocksize=64, quant_type="nf4", compress_statistics=codec_id == "nf4-dq"
    )
    theirs = state.as_dict(packed=True)
    parts = codec(codec_id).encoder("fc.weight", (64, 512), "F16", "").parts
    ours = {part.key.removeprefix("fc.weight.") for part in parts if part.name != "codes"}
    assert ours == set(theirs)
    unpack = pytest.importorskip("bitsandbytes.utils").unpack_tensor_to_dict
    _, stored = quantize(codec_id, weights)
    mine = unpack(_tensor(stored["quant_state"]))
    other = unpack(theirs["quant_state.bitsandbytes__nf4"])
    assert set(mine) == set(other)
    assert {key: value for key, value in mine.items() if key != "nested_offset"} == {
        key: value for key, value in other.items() if key != "nested_offset"
    }


def test_nested_absmax_is_as_close() -> None:
    """Double quantization here is not worse than bitsandbytes' own, which picks codes from a table of 65,536 bins."""
    weights = _weights((300, 256), np.dtype(np.float32), 1)
    _, parts = quantize("nf4-dq", weights)
    ours = codec("nf4-dq").dequantize(parts, weights.shape, "F32")
    packed, state = functional.quantize_4bit(
        _tensor(weights), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    theirs = _array(functional.dequantize_4bit(packed, state))
    errors = [float(np.sqrt(np.mean((decoded - weights) ** 2))) for decoded in (ours, theirs)]
    assert errors[0] <= errors[1] * 1.001


@of_dtypes
@pytest.mark.parametrize("shape", [*SHAPES, (7, 131), (4, 1027)], ids=str)
def test_int8_row(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Codes and scales are those of LLM.int8()'s quantizer, and its decoder gives the decoded weights."""
    weights = _weights(shape, dtype, 2)
    status, parts = quantize("int8-row", weights)
    assert status == Status.OK
    half = _tensor(weights).to(torch.float16)
    codes, scales, _ = functional.int8_vectorwise_quant(half)
    assert parts["codes"].tobytes() == codes.numpy().tobytes()
    assert parts["scales"].tobytes() == scales.float().numpy().tobytes()
    dequantize = functional.int8_vectorwise_dequant(codes, scales).numpy()
    ours = codec("int8-row").dequantize(parts, shape, "F32")
    # theirs multiplies by f32(1 / 127), ours divides as their kernels do: one rounding apart
    np.testing.assert_array_max_ulp(ours, dequantize.astype(np.float32), maxulp=2)
