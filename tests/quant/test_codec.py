"""Hold the registry and the shared half of every codec: names, shapes, the `out` argument, the records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantcache.errors import CodecError, UsageError
from quantcache.quant import codec as codec_module
from quantcache.quant.codec import Codec, Encoder, Part, Scratch, Status, codec, codec_ids, quantize, register

Array = NDArray[Any]


def _codec_class(codec_id: str) -> type[Codec]:
    class Toy(Codec):
        id = codec_id

        def bits_per_weight(self) -> float:
            return 32.0

        def refuses(self, shape: tuple[int, ...]) -> str | None:
            return None

        def multiple(self, shape: tuple[int, ...]) -> int:
            return 1

        def encoder(self, name: str, shape: tuple[int, ...], source_dtype: str, variant: str) -> Encoder:
            raise NotImplementedError

        def dequantize_into(self, parts: Mapping[str, Array], out: Array, dtype: str, *, fresh: bool = False) -> None:
            out[...] = parts["values"]

    return Toy


def test_ids_are_sorted_and_complete() -> None:
    """Importing the package finds every codec folder."""
    assert codec_ids() == tuple(sorted(codec_ids()))
    assert {"f16", "int8", "int8-row", "nf4", "nf4-dq"} <= set(codec_ids())


@pytest.mark.parametrize("codec_id", codec_ids())
def test_codec_describes_itself(codec_id: str) -> None:
    """Every codec answers to its id, has a version, variants, and a size below that of float32."""
    found = codec(codec_id)
    assert found.id == codec_id
    assert found.version >= 1
    assert found.variants
    assert 0 < found.bits_per_weight() < 32
    assert isinstance(found.parameters(), dict)


def test_duplicate_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second codec of the same id is refused and the first stays."""
    before = codec("nf4")
    monkeypatch.setattr(codec_module, "_registry", dict(codec_module._registry))
    with pytest.raises(CodecError, match="two codecs are called 'nf4'"):
        register(_codec_class("nf4"))
    assert codec("nf4") is before


def test_new_codec_needs_only_to_register(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered class is found under its id at once."""
    codec_ids()
    monkeypatch.setattr(codec_module, "_registry", dict(codec_module._registry))
    toy = register(_codec_class("toy"))
    assert isinstance(codec("toy"), toy)
    assert "toy" in codec_ids()


@pytest.mark.parametrize("name", ["nf5", "", "NF4", "int4"])
def test_unknown_codec(name: str) -> None:
    """An unknown id is a usage error whose hint lists the known ones."""
    with pytest.raises(UsageError, match="is not a codec") as caught:
        codec(name)
    assert caught.value.exit_code == 2
    assert all(known in (caught.value.hint or "") for known in (*codec_ids(), "native"))


@pytest.mark.parametrize("codec_id", [name for name in codec_ids() if name != "f16"])
def test_refused_shape_is_named(codec_id: str) -> None:
    """Quantizing a tensor of a wrong shape names the codec and the tensor."""
    with pytest.raises(CodecError, match=rf"{codec_id} cannot store h\.0\.bias"):
        quantize(codec_id, np.zeros(64, np.float32), "h.0.bias")


@pytest.mark.parametrize("codec_id", codec_ids())
@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int32])
def test_other_dtypes_are_refused(codec_id: str, dtype: type) -> None:
    """Weights of a type that kernels do not read are a usage error, never a KeyError."""
    with pytest.raises(UsageError):
        quantize(codec_id, np.zeros((2, 128), dtype))


@pytest.mark.parametrize("codec_id", codec_ids())
def test_out_is_filled_and_returned(codec_id: str) -> None:
    """A given array is written whole and is what comes back."""
    weights = np.random.default_rng(0).standard_normal((2, 128)).astype(np.float32)
    _, parts = quantize(codec_id, weights)
    out = np.full((2, 128), np.nan, np.float16)
    assert codec(codec_id).dequantize(parts, (2, 128), "F16", out) is out
    np.testing.assert_array_equal(out, codec(codec_id).dequantize(parts, (2, 128), "F16"))
    assert np.isfinite(out).all()


@pytest.mark.parametrize("codec_id", codec_ids())
def test_out_of_another_shape_or_type(codec_id: str) -> None:
    """An output array that does not fit is refused before anything is written."""
    _, parts = quantize(codec_id, np.ones((2, 128), np.float32))
    read_only = np.empty((2, 128), np.float16)
    read_only.flags.writeable = False
    wrong = {
        "shape": np.zeros((128, 2), np.float16),
        "size": np.zeros((2, 64), np.float16),
        "type": np.zeros((2, 128), np.float32),
        "bits": np.zeros((2, 128), np.uint16),
        "order": np.zeros((128, 2), np.float16).T,
        "stride": np.zeros((2, 256), np.float16)[:, ::2],
        "read-only": read_only,
    }
    for why, out in wrong.items():
        before = out.tobytes()
        with pytest.raises(UsageError, match="out"):
            codec(codec_id).dequantize(parts, (2, 128), "F16", out)
        assert out.tobytes() == before, why


def test_refused_values_give_no_parts() -> None:
    """A status other than OK comes with no arrays."""
    weights = np.full((2, 128), np.nan, np.float32)
    assert quantize("nf4", weights) == (Status.NONFINITE, {})


def test_part_size() -> None:
    """A part knows its bytes, a scalar's too."""
    assert Part("codes", "w", "U32", (3, 5), 4).nbytes == 60
    assert Part("weight_format", "w", "U8", (), 0).nbytes == 1
    assert Part("codes", "w", "U8", (1 << 20, 1 << 20), 1).nbytes == 1 << 40


def test_scratch_keeps_slots_apart() -> None:
    """Two slots never share memory, and one slot grows and is given out again."""
    scratch = Scratch()
    first, second = scratch.array("a", np.float32, 10), scratch.array("b", np.float32, 10)
    assert not np.shares_memory(first, second)
    assert np.shares_memory(first, scratch.array("a", np.uint8, 4))
    assert scratch.array("a", np.float64, 100).shape == (100,)


def test_status_numbers_are_those_of_the_kernels() -> None:
    """The status bits have the numbers that kernel.h gives them."""
    from pathlib import Path

    header = (Path(codec_module.__file__).parent / "kernel.h").read_text()
    for status in Status:
        assert f"QC_{status.name} = {status.value}" in header


@pytest.mark.parametrize("codec_id", codec_ids())
def test_parts_of_another_shape_are_refused(codec_id: str) -> None:
    """Decoding checks what it is given: a kernel would read behind the end of parts that are too small."""
    _, parts = quantize(codec_id, np.ones((1, 128), np.float32))
    with pytest.raises(CodecError, match="not the parts"):
        codec(codec_id).dequantize(parts, (64, 128), "F32")
    with pytest.raises(CodecError, match="not the parts"):
        codec(codec_id).dequantize({name: part.astype(np.float64) for name, part in parts.items()}, (1, 128), "F32")
