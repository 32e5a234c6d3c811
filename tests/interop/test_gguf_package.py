"""Let the gguf package and libgguf decode what the GGUF reader views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantcache.loader.source import Source

gguf = pytest.importorskip("gguf")

TYPES = [
    "IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S", "IQ3_XXS", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "Q1_0",
    "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "TQ1_0", "TQ2_0",
]  # fmt: skip
#: the package has no decoder for these
UNDECODED = {"Q1_0"}


def _only_block_tensor(path: Path, name: str) -> tuple[Source, str]:
    source = Source(path)
    (tensor,) = [key for key, info in source.tensors.items() if info.dtype == name]
    return source, tensor


def _same(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", [name for name in TYPES if name not in UNDECODED])
def test_the_package_decodes_views(test_data: Path, name: str) -> None:
    """The gguf package decodes a view, rows of blocks as bytes, to what libgguf gave for the file."""
    source, tensor = _only_block_tensor(test_data / "allquant" / f"minilm-ffn-slice.{name}.gguf", name)
    decoded = gguf.quants.dequantize(source.view(tensor), gguf.GGMLQuantizationType[name])
    assert decoded.shape == source.tensors[tensor].shape
    expected = np.load(test_data / "allquant" / f"{name}.expected.npy")
    np.testing.assert_allclose(decoded[: len(expected)], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", TYPES)
def test_libgguf_decodes_views(test_data: Path, name: str) -> None:
    """A view decodes in libgguf to what it gave for the file, bit for bit."""
    libgguf = pytest.importorskip("libgguf")
    source, tensor = _only_block_tensor(test_data / "allquant" / f"minilm-ffn-slice.{name}.gguf", name)
    expected = np.load(test_data / "allquant" / f"{name}.expected.npy")
    rows = np.ascontiguousarray(source.view(tensor)[: len(expected)])
    _same(libgguf.dequantize_rows(rows, libgguf.GGMLQuantizationType[name]), expected)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"])
def test_what_the_package_quantizes_is_viewed(tmp_path: Path, name: str) -> None:
    """Weights quantized and written by the gguf package are viewed as the blocks that it made."""
    weights = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    blocks = gguf.quants.quantize(weights, kind)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = Source(tmp_path / "m.gguf")
    assert source.tensors["blk.0.ffn_up.weight"].shape == weights.shape
    _same(source.view("blk.0.ffn_up.weight"), blocks)
