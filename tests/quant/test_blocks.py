"""Hold the decoders of GGML's blocks to libgguf and gguf-py, and every kernel to its reference, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import libgguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantcache.errors import CodecError, UsageError
from quantcache.loader.source import Source
from quantcache.quant import native
from quantcache.quant.blocks import (
    BlockType,
    block_type,
    block_types,
    decode,
    dequantize,
    register_block,
    to_little_endian,
)
from quantcache.quant.floats import from_f32
from quantcache.tensor import BLOCKS

Array = NDArray[Any]
Switch = Callable[[str], None]

COMPILED = [level for level in native.available() if level != "reference"] or ["scalar"]
OUT = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
#: what decodes a type elsewhere: three of them nobody does, for no weights are stored so (or not yet)
BY_HAND = {"Q2_0", "Q8_1", "Q8_K"}
ORACLES = {"gguf-py": set(block_types()) - BY_HAND - {"Q1_0"}, "libgguf": set(block_types()) - BY_HAND}

every_type = pytest.mark.parametrize("name", block_types())


def _random(name: str, count: int, seed: int, *, scales: str = "any") -> Array:
    """Return blocks of random bytes; their float16 fields of any bits, or of a usual size."""
    kind = block_type(name)
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, count * kind.nbytes, dtype=np.uint8)
    if scales == "usual":
        fields = blocks.view(kind.layout)
        for field in kind.layout.names or ():
            if kind.layout[field].kind == "f":
                fields[field] = (rng.standard_normal(fields[field].shape) * 0.01).astype(np.float16)
        if name == "IQ1_M":  # its scale stands in the high nibbles
            fields["scales"][:, 3] = fields["scales"][:, 3] & 0x0FFF | 0x2000
    return blocks


def _decoded(name: str, blocks: Array, dtype: str = "F32") -> Array:
    out = np.full(blocks.size // block_type(name).nbytes * block_type(name).weights, 0xA5, OUT[dtype])
    decode(name, blocks, out.view(np.float32) if dtype == "F32" else out, dtype)
    return out


def _bits(bits: Array, dtype: str) -> bytes:
    """Return the bits with every NaN made the same one: which NaN an operation gives is the CPU's choice."""
    shift, infinity = {"F32": (0, 0x7F800000), "F16": (0, 0x7C00), "BF16": (0, 0x7F80)}[dtype]
    magnitude = bits & (np.iinfo(bits.dtype).max >> 1)
    return np.where(magnitude > infinity, np.iinfo(bits.dtype).max, bits >> shift).astype(bits.dtype).tobytes()


def _oracle(who: str, name: str, blocks: Array) -> Array:
    rows = np.ascontiguousarray(blocks.reshape(4, -1))
    with np.errstate(all="ignore"):
        if who == "gguf-py":
            found = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name])
        else:
            found = libgguf.dequantize_rows(rows, libgguf.GGMLQuantizationType[name])
    return np.ascontiguousarray(found, np.float32).reshape(-1).view(np.uint32)


# ---- the references are the outside implementations --------------------------------------------------------------


def test_every_type_of_the_format_is_decoded() -> None:
    """There is a decoder for every block type that a file can have."""
    assert set(block_types()) == set(BLOCKS)


@pytest.mark.parametrize("scales", ["any", "usual"])
@pytest.mark.parametrize(("who", "name"), [(who, name) for who, names in ORACLES.items() for name in sorted(names)])
def test_reference_equals(who: str, name: str, scales: str, kernel_level: Switch) -> None:
    """On random blocks, scales of any bits among them, the reference gives the outside decoder's float32."""
    kernel_level("reference")
    for seed in range(3):
        blocks = _random(name, 64, seed, scales=scales)
        ours, theirs = _decoded(name, blocks), _oracle(who, name, blocks)
        assert _bits(ours, "F32") == _bits(theirs, "F32"), seed


@pytest.mark.parametrize("level", ["reference", *COMPILED])
@pytest.mark.parametrize("name", sorted(ORACLES["libgguf"]))
def test_published_files(test_data: Path, name: str, level: str, kernel_level: Switch) -> None:
    """Weights of a real model, quantized by ggml itself, decode to what it decodes them to."""
    kernel_level(level)
    source = Source(test_data / "allquant" / f"minilm-ffn-slice.{name}.gguf")
    (info,) = [info for info in source.tensors.values() if info.dtype == name]
    expected = np.load(test_data / "allquant" / f"{name}.expected.npy")
    found = dequantize({"blocks": source.view(info.name)}, name, info.shape, "F32")
    assert found.shape == info.shape
    assert found[: len(expected)].tobytes() == expected.tobytes()


def test_q8_1_is_q8_0_with_a_sum() -> None:
    """Q8_1 has 36 bytes: a scale, a sum that decoding has no use for, and the integers of Q8_0."""
    plain = _random("Q8_0", 40, 0, scales="usual")
    wide = np.zeros((40, 36), np.uint8)
    wide[:, :2], wide[:, 2:4], wide[:, 4:] = plain.reshape(40, 34)[:, :2], 0x3C, plain.reshape(40, 34)[:, 2:]
    assert _decoded("Q8_1", wide.reshape(-1)).tobytes() == _decoded("Q8_0", plain).tobytes()


def test_q8_k_by_hand() -> None:
    """Q8_K: a float32 scale, 256 integers, and sums that decoding has no use for."""
    integers = np.arange(-128, 128).astype(np.int8)
    block = np.float32(0.25).tobytes() + integers.tobytes() + bytes(range(32))
    weights = _decoded("Q8_K", np.frombuffer(block, np.uint8).copy()).view(np.float32)
    assert weights.tolist() == (integers.astype(np.float32) / 4).tolist()


def test_q2_0_by_hand() -> None:
    """Q2_0: float16 scale, then four codes a byte, the first lowest, each less 1."""
    block = np.frombuffer(np.float16(0.5).tobytes() + bytes([0b11_10_01_00]) + bytes(15), np.uint8)
    weights = _decoded("Q2_0", block.copy()).view(np.float32)
    assert weights[:5].tolist() == [-0.5, 0.0, 0.5, 1.0, -0.5]
    assert weights.size == 64


# ---- the kernels are the references ------------------------------------------------------------------------------


@every_type
@pytest.mark.parametrize("level", COMPILED)
@pytest.mark.parametrize("dtype", OUT)
@pytest.mark.parametrize("scales", ["any", "usual"])
def test_kernel_equals_reference(name: str, level: str, dtype: str, scales: str, kernel_level: Switch) -> None:
    """Every kernel gives the reference's bits in every element type, for any number of blocks."""
    for seed, count in enumerate((1, 2, 3, 17, 64)):
        blocks = _random(name, count, seed, scales=scales)
        kernel_level("reference")
        expected = _decoded(name, blocks, dtype)
        kernel_level(level)
        assert _bits(_decoded(name, blocks, dtype), dtype) == _bits(expected, dtype), count


@every_type
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), count=st.integers(1, 40))
def test_kernels_on_fresh_blocks(name: str, kernel_level: Switch, seed: int, count: int) -> None:
    """On new random blocks every run."""
    blocks = _random(name, count, seed)
    kernel_level("reference")
    expected = _decoded(name, blocks)
    for level in COMPILED:
        kernel_level(level)
        assert _bits(_decoded(name, blocks), "F32") == _bits(expected, "F32"), level


@every_type
@pytest.mark.parametrize("fill", [0x00, 0xFF])
def test_extreme_blocks(name: str, fill: int, kernel_level: Switch) -> None:
    """Blocks of nothing but zeros, or ones, are like any other."""
    blocks = np.full(block_type(name).nbytes * 3, fill, np.uint8)
    kernel_level("reference")
    expected = {dtype: _bits(_decoded(name, blocks, dtype), dtype) for dtype in OUT}
    for level in COMPILED:
        kernel_level(level)
        assert {dtype: _bits(_decoded(name, blocks, dtype), dtype) for dtype in OUT} == expected


@every_type
@pytest.mark.parametrize("level", COMPILED)
def test_blocks_at_any_address(name: str, level: str, kernel_level: Switch) -> None:
    """Blocks lie where the file has them: at odd addresses, too; and nothing behind the output is written."""
    kernel_level(level)
    blocks = _random(name, 5, 0, scales="usual")
    shifted = np.empty(blocks.size + 1, np.uint8)[1:]
    shifted[...] = blocks
    n = 5 * block_type(name).weights
    memory = np.full(n + 64, 7.0, np.float32)
    decode(name, shifted, memory[:n], "F32")
    assert memory[:n].tobytes() == _decoded(name, blocks).tobytes()
    assert (memory[n:] == 7).all()


@every_type
def test_smaller_types_round_once(name: str, kernel_level: Switch) -> None:
    """float16 and bfloat16 are the float32 weights, rounded to nearest even."""
    kernel_level(COMPILED[-1])
    blocks = _random(name, 32, 1, scales="usual")
    wide = _decoded(name, blocks).view(np.float32)
    for dtype in ("F16", "BF16"):
        assert _bits(_decoded(name, blocks, dtype), dtype) == _bits(from_f32(wide, dtype).view(np.uint16), dtype)


# ---- whole tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_dequantize_into_given_memory(dtype: Any) -> None:
    """Weights are written where the caller says, and only if they fit there."""
    blocks = {"blocks": _random("Q4_K", 8, 0, scales="usual")}
    element = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[np.dtype(dtype).name]
    out = np.zeros((2, 1024), dtype)
    assert dequantize(blocks, "Q4_K", (2, 1024), element, out) is out
    assert out.tobytes() == dequantize(blocks, "Q4_K", (2, 1024), element).tobytes()
    for wrong in (np.zeros((1024, 2), dtype), np.zeros((2, 1024), np.int32), np.zeros((2, 2048), dtype)[:, ::2]):
        with pytest.raises(UsageError, match="out"):
            dequantize(blocks, "Q4_K", (2, 1024), element, wrong)


@pytest.mark.parametrize("level", ["reference", *COMPILED])
def test_sizes_that_do_not_agree(level: str, kernel_level: Switch) -> None:
    """A block that is not whole, or another number of weights, is refused before a byte is read."""
    kernel_level(level)
    with pytest.raises(CodecError, match="are not"):
        decode("Q4_0", np.zeros(17, np.uint8), np.zeros(32, np.float32), "F32")
    with pytest.raises(CodecError, match="are not"):
        decode("Q4_0", np.zeros(18, np.uint8), np.zeros(64, np.float32), "F32")


def test_unknown_type() -> None:
    """A type that nothing decodes is named."""
    with pytest.raises(CodecError, match="Q9_9"):
        decode("Q9_9", np.zeros(18, np.uint8), np.zeros(32, np.float32), "F32")


def test_registry_keeps_what_it_has() -> None:
    """A second decoder of a type, or a layout of another size than files have, is refused."""
    kind = block_type("Q4_0")
    with pytest.raises(CodecError, match="two block types"):
        register_block(kind)
    with pytest.raises(CodecError, match="has 24 bytes, its layout 18"):
        register_block(BlockType("Q5_1", "x", 0, kind.layout, kind.reference))


@every_type
def test_big_endian_blocks(name: str) -> None:
    """Turning every field round twice gives the blocks back, and once what a big-endian file has."""
    blocks = _random(name, 6, 0)
    layout = block_type(name).layout
    turned = blocks.view(layout).astype(layout.newbyteorder(">")).view(np.uint8)
    assert to_little_endian(name, turned).tobytes() == blocks.tobytes()
    wide = [field for field in layout.names or () if layout[field].base.itemsize > 1]
    assert (turned.tobytes() != blocks.tobytes()) == bool(wide)
