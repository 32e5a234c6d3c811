"""Hold examples/rwkv7.py to the logits that rwkv.cpp keeps beside a checkpoint: from f32 weights, a GGUF, and the store."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import quantcache as qc

Array = NDArray[Any]

PROMPT = b'"in'
#: The largest logit is 2.6, where one step of float32 is 2.4e-7; NumPy's BLAS may sum in another order.
SAME = 1e-6

#: What may become of a GGUF: (quant, native) -> how many matrices are quantized, and how far the logits may move from those
#: of the gguf package's decoded weights. Twice what was measured, or more: 0, 2.4e-7 (float16 vectors), 3.1e-5 (float16 matrices),
#: 3.7e-4 (int8: the 12 matrices whose width 128 divides), 1.1e-3, 9.9e-3. The largest logit is 2.6.
FROM_GGUF = {
    ("native", "keep"): ({"Q5": 72}, 0.0), ("f16", "keep"): ({"Q5": 72}, SAME), ("f16", "convert"): ({}, 6e-5),
    ("int8", "keep"): ({"Q5": 72}, SAME), ("int8", "convert"): ({"int8": 12}, 8e-4),
    ("int8-row", "convert"): ({"int8-row": 72}, 2.2e-3), ("nf4", "keep"): ({"nf4": 72}, 0.02),
    ("nf4", "convert"): ({"nf4": 72}, 0.02),
}  # fmt: skip
#: How far five bits a weight move the logits by themselves: measured 3.7e-3 (Q5_0) and 4.2e-3 (Q5_1).
FIVE_BITS = 6e-3


@pytest.fixture(scope="module")
def rwkv7() -> ModuleType:
    """Return the example as a module."""
    path = Path(__file__).parents[1] / "examples" / "rwkv7.py"
    spec = importlib.util.spec_from_file_location("rwkv7_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(test_data: Path) -> Path:
    """Return a trained RWKV-7 of 834 K weights, f32."""
    path = test_data / "rwkv7" / "tiny-rwkv7-834K-canonical-f32.st"
    if not path.is_file():
        pytest.skip(f"no checkpoint at {path}: set QUANTCACHE_TEST_DATA")
    return path


@pytest.fixture(scope="module")
def expected_path(checkpoint: Path) -> Path:
    """Return the file of 256 logits that rwkv.cpp keeps beside the checkpoint."""
    path = checkpoint.with_name("expected-logits-7v0-834K.bin")
    if not path.is_file():
        pytest.skip(f"no logits at {path}: set QUANTCACHE_TEST_DATA")
    return path


@pytest.fixture(scope="module")
def expected(expected_path: Path) -> Array:
    """Return those logits, float32[256]."""
    return np.fromfile(expected_path, np.float32)


@pytest.fixture
def uneven(checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy whose weights need all 24 bits: the original's are float16 but for parts below 3e-8."""
    path = tmp_path / "uneven.safetensors"
    save_file({name: weight * np.float32(1.0003) for name, weight in load_file(checkpoint).items()}, path)
    return path


def dense(model: Mapping[str, Any]) -> dict[str, Array]:
    """Return every tensor as float32."""
    return {
        name: tensor.dequantize(np.float32) if isinstance(tensor, qc.QuantTensor) else tensor.astype(np.float32)
        for name, tensor in model.items()
    }


def distance(a: Array, b: Array) -> float:
    """Return the largest absolute difference."""
    return float(np.abs(a - b).max())


def test_f32_weights_give_the_expected_logits(rwkv7: ModuleType, checkpoint: Path, expected: Array) -> None:
    """The forward pass itself is right: without the store, logits agree to rounding."""
    logits = rwkv7.forward(load_file(checkpoint), PROMPT)
    assert (logits.dtype, logits.shape) == (np.float32, (256,))
    assert distance(logits, expected) < 1e-5


def test_f16_is_the_cast_and_a_hit_is_the_miss(rwkv7: ModuleType, uneven: Path, tmp_path: Path) -> None:
    """Through the store, f16 gives the logits of weights that NumPy cast, on a miss and on the hit after it."""
    weights = load_file(uneven)
    cast = rwkv7.forward({name: weight.astype(np.float16) for name, weight in weights.items()}, PROMPT)
    assert distance(cast, rwkv7.forward(weights, PROMPT)) > 10 * SAME  # or the cast could not be told from no cast
    found = []
    for hit in (False, True):
        with qc.load(uneven, quant="f16", mode="auto", cache=tmp_path / "cache") as model:
            assert model.hit is hit
            found.append(rwkv7.forward(dense(model), PROMPT))
    assert distance(found[0], cast) < SAME
    assert distance(found[1], found[0]) < SAME


def test_f16_gives_the_expected_logits(rwkv7: ModuleType, checkpoint: Path, expected: Array, tmp_path: Path) -> None:
    """The trained weights survive the cast but for parts below 3e-8, so the logits do too."""
    with qc.load(checkpoint, quant="f16", mode="auto", cache=tmp_path / "cache") as model:
        assert distance(rwkv7.forward(dense(model), PROMPT), expected) < 1e-5


def test_fewer_bits_move_the_logits_further(
    rwkv7: ModuleType, checkpoint: Path, expected: Array, tmp_path: Path
) -> None:
    """Quantized weights move the logits, nf4 by more than int8 and int8 by more than f16, and none beyond bounds."""
    moved = {}
    for quant in ("f16", "int8", "nf4"):
        with qc.load(checkpoint, quant=quant, mode="auto", cache=tmp_path / "cache") as model:
            codecs = {tensor.codec for tensor in model.values() if isinstance(tensor, qc.QuantTensor)} - {"f16"}
            assert codecs == {quant} - {"f16"}
            logits = rwkv7.forward(dense(model), PROMPT)
        assert np.isfinite(logits).all()
        moved[quant] = distance(logits, expected)
    assert moved["f16"] < moved["int8"] < moved["nf4"] < np.abs(expected).max()


@pytest.fixture(scope="module", params=["Q5_0", "Q5_1"])
def quantized(request: pytest.FixtureRequest, checkpoint: Path) -> Path:
    """Return the same model as rwkv.cpp quantized it: its names and its layout."""
    return checkpoint.with_name(f"tiny-rwkv-7v0-834K-{request.param}.gguf")


@pytest.fixture(scope="module")
def decoded(quantized: Path, checkpoint: Path) -> dict[str, Array]:
    """Return the checkpoint with the matrices that the gguf package decodes from the file."""
    weights = dict(load_file(checkpoint))
    blocks = [tensor for tensor in gguf.GGUFReader(quantized).tensors if tensor.tensor_type.name.startswith("Q5")]
    assert len(blocks) == 72
    for tensor in blocks:
        assert weights[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        weights[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return weights


@pytest.mark.parametrize(("quant", "native"), FROM_GGUF)
def test_gguf_gives_the_logits_of_its_weights(
    rwkv7: ModuleType, quantized: Path, decoded: Mapping[str, Array], expected: Array, tmp_path: Path, quant: str, native: str
) -> None:
    """A GGUF gives the logits of its decoded weights, native ones exactly; converted, it moves them within bounds."""
    codecs, bound = FROM_GGUF[quant, native]
    reference = rwkv7.forward(decoded, PROMPT)
    assert 1e-3 < distance(reference, expected) < FIVE_BITS
    found = []
    for hit in (False, True):
        with qc.load(quantized, quant, native=native, cache=tmp_path / "cache") as model:
            assert model.hit is (hit or quant == "native")
            used = [tensor.codec[:2] if tensor.codec.startswith("Q5") else tensor.codec for tensor in model.values() if isinstance(tensor, qc.QuantTensor)]
            assert {codec: used.count(codec) for codec in used} == codecs
            # copies, for BLAS sums a matrix that lies the other way round in another order
            weights = {name: np.ascontiguousarray(weight) for name, weight in dense(model).items()}
            assert set(weights) == set(decoded)
            found.append(rwkv7.forward(weights, PROMPT))
    np.testing.assert_array_equal(found[0], found[1])
    assert distance(found[0], reference) <= bound
    if "nf4" in codecs or "int8-row" in codecs or native == "convert":
        assert distance(found[0], reference) > 2 * SAME  # or nothing was converted
    assert distance(found[0], expected) < FIVE_BITS + bound


def test_main_takes_a_gguf(
    rwkv7: ModuleType, quantized: Path, expected_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program runs on a GGUF as it does on the checkpoint."""
    rwkv7.main([str(quantized), "--quant", "native,int8,nf4", "--expected", str(expected_path)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [["native", "hit"], ["int8", "miss"], ["nf4", "miss"]]
    native, int8, nf4 = (float(line[-1]) for line in lines)
    assert abs(native - int8) < 1e-5 < native < FIVE_BITS < nf4 < FIVE_BITS + 0.02


def test_main_reports_misses_and_then_hits(
    rwkv7: ModuleType, checkpoint: Path, expected_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program prints a line per codec, with the distance to the expected logits: first misses, then hits."""
    reports = []
    for word in ("miss", "hit"):
        rwkv7.main([str(checkpoint), "--quant", "f16,int8,nf4", "--expected", str(expected_path)])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [line[:2] for line in lines] == [["f16", word], ["int8", word], ["nf4", word]]
        reports.append([float(line[-1]) for line in lines])
    np.testing.assert_allclose(reports[0], reports[1], atol=SAME)
    assert reports[0][0] < 1e-5 < reports[0][2]


def test_main_compares_with_the_first_codec(
    rwkv7: ModuleType, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without expected logits the first codec is what the others are compared with."""
    rwkv7.main([str(checkpoint), "--quant", "f16,nf4"])
    first, second = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert first == 0 < second
