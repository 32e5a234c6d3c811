"""Hold a GGUF with a tensor of a type that nobody here knows to its promise: the other tensors work, in every mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantcache as qc
from quantcache.cli import main
from quantcache.errors import SourceError
from quantcache.loader.source import Source, open_checkpoint
from quantcache.quant.codec import quantize

Write = Callable[..., Path]
RNG = np.random.default_rng(0)
A, C = (RNG.standard_normal((64, 128)).astype(np.float32) for _ in range(2))
UNKNOWN = (99, (64, 128), bytes(range(250)) * 4)
BETWEEN, LAST = "a u c", "a c u"


def _tensors(order: str) -> dict[str, Any]:
    found = {"a": ("blocks.0.a.weight", A), "c": ("blocks.0.c.weight", C), "u": ("blocks.0.u.weight", UNKNOWN)}
    return dict(found[letter] for letter in order.split())


def _refused(act: Callable[[], Any], path: Path, tensor: str = "blocks.0.u.weight") -> SourceError:
    """Check that the tensor is refused by name and type, and the file is named."""
    with pytest.raises(SourceError, match="GGML type 99") as caught:
        act()
    assert (caught.value.path, caught.value.tensor) == (path, tensor)
    assert caught.value.offset is not None
    return caught.value


@pytest.mark.parametrize("order", [BETWEEN, LAST, "u a c"])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_the_others_are_read(tmp_path: Path, write_gguf: Write, order: str, byte_order: str) -> None:
    """Wherever it stands, the tensors before and behind it are found, and it reaches to the next one or to the end."""
    path = write_gguf(tmp_path / "m.gguf", _tensors(order), order=byte_order)
    (source,) = open_checkpoint(path)
    np.testing.assert_array_equal(source.view("blocks.0.a.weight"), A)
    np.testing.assert_array_equal(source.view("blocks.0.c.weight"), C)
    info = source.tensors["blocks.0.u.weight"]
    assert (info.dtype, info.shape, info.is_known, info.is_block, info.is_float) == ("GGML type 99", (64, 128), False, True, False)
    assert source.raw(info)[:1000].tobytes() == UNKNOWN[2]
    assert info.nbytes == 1024  # with the padding behind it: nobody knows where it ends
    assert _refused(lambda: source.view("blocks.0.u.weight"), path).offset == info.offset


@pytest.mark.parametrize("order", [BETWEEN, LAST])
@pytest.mark.parametrize("native", ["keep", "convert"])
@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "int8", "int8-row", "f16"])
def test_the_others_are_quantized(tmp_path: Path, write_gguf: Write, quant: str, native: str, order: str) -> None:
    """The others become what they would be without it, on miss and hit; asked for, it raises, and is in the report."""
    path = write_gguf(tmp_path / "m.gguf", _tensors(order))
    for hit in (False, True):
        with qc.load(path, quant, native=native, cache=tmp_path / "c") as model:
            assert model.hit is hit
            assert set(model) == set(_tensors(order))
            for name, weights in (("blocks.0.a.weight", A), ("blocks.0.c.weight", C)):
                tensor = model[name]
                if quant == "f16":
                    np.testing.assert_array_equal(tensor, weights.astype(np.float16))
                    continue
                _, expected = quantize(quant, weights)
                assert {key: part.tobytes() for key, part in tensor.parts.items() if key != "quant_state"} == {
                    key: part.tobytes() for key, part in expected.items() if key != "quant_state"
                }
            for _ in range(2):
                _refused(lambda model=model: model["blocks.0.u.weight"], path)
            (report,) = [one for one in model.report() if one.name == "blocks.0.u.weight"]
            assert (report.codec, report.dtype, report.shape, report.nbytes) == ("native", "GGML type 99", (64, 128), 1024)
            assert "unknown" in report.reason
            assert model.nbytes > 1024
        assert not model.unsaved


@pytest.mark.parametrize("order", [BETWEEN, LAST])
def test_native(tmp_path: Path, write_gguf: Write, order: str) -> None:
    """With everything passed through, the others are views of the file."""
    path = write_gguf(tmp_path / "m.gguf", _tensors(order))
    with qc.load(path, "native", cache=tmp_path / "c") as model:
        assert model.hit
        np.testing.assert_array_equal(model["blocks.0.a.weight"], A)
        np.testing.assert_array_equal(model["blocks.0.c.weight"], C)
        _refused(lambda: model["blocks.0.u.weight"], path)
        _refused(lambda: list(model.layers()), path)


@pytest.mark.parametrize("rule", [("*.u.*", "int8"), ("*.u.*", "keep"), ("*.u.*", "other", 0.5), ("*", "f16")])
def test_rules_change_nothing(tmp_path: Path, write_gguf: Write, rule: Any) -> None:
    """No rule can make anything of it."""
    path = write_gguf(tmp_path / "m.gguf", _tensors(BETWEEN))
    with qc.load(path, "nf4", rules=[rule], cache=tmp_path / "c") as model:
        _refused(lambda: model["blocks.0.u.weight"], path)
        assert model["blocks.0.a.weight"].shape == (64, 128)


def test_info(tmp_path: Path, write_gguf: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """`info` lists it with its number, and says why it stays."""
    path = write_gguf(tmp_path / "m.gguf", _tensors(BETWEEN))
    for options in ([], ["--native", "convert"], ["--quant", "native"]):
        assert main(["info", str(path), "--json", *options]) == 0
        rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["tensors"]}
        row = rows["blocks.0.u.weight"]
        assert (row["type"], row["becomes"], row["shape"], row["size"]) == ("GGML type 99", "native", [64, 128], 1024)
        assert "unknown" in row["reason"]
        assert rows["blocks.0.a.weight"]["becomes"] == ("native" if "native" in options else "nf4")
    assert main(["info", str(path)]) == 0
    assert "GGML type 99" in capsys.readouterr().out


def test_warm(tmp_path: Path, write_gguf: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """`warm` stores the others, and the second time says so."""
    path = write_gguf(tmp_path / "m.gguf", _tensors(BETWEEN))
    for word in ("built", "hit"):
        assert main(["warm", str(path), "--quant", "int8"]) == 0
        assert capsys.readouterr().out.startswith(word)


def test_two_kinds(tmp_path: Path, write_gguf: Write) -> None:
    """Two unknown tensors side by side are told apart by where they start."""
    tensors = {"a": (99, (3,), bytes(40)), "b": (1 << 31, (5,), b"\1" * 70), "c": A}
    (source,) = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    assert [(source.tensors[name].dtype, source.tensors[name].nbytes) for name in "ab"] == [
        ("GGML type 99", 64), ("GGML type 2147483648", 96)
    ]  # fmt: skip
    np.testing.assert_array_equal(source.view("c"), A)


def test_only_unknown_types(tmp_path: Path, write_gguf: Write) -> None:
    """A file in which no tensor can be read is refused."""
    path = write_gguf(tmp_path / "m.gguf", {"blocks.0.u.weight": UNKNOWN, "v": (98, (4,), bytes(32))})
    _refused(lambda: open_checkpoint(path), path)


def test_a_part_of_unknown_types(tmp_path: Path, write_gguf: Write) -> None:
    """A split model opens if one of its parts has nothing else: the other parts have tensors that can be read."""
    parts = [{"blocks.0.a.weight": A}, {"blocks.0.u.weight": UNKNOWN}]
    for part, tensors in enumerate(parts):
        keys = {"split.no": (2, part), "split.count": (2, 2), "split.tensors.count": (5, 2)}
        write_gguf(tmp_path / f"m-{part + 1:05}-of-00002.gguf", tensors, keys)
    with qc.load(tmp_path, "nf4", cache=tmp_path / "c") as model:
        assert model["blocks.0.a.weight"].shape == (64, 128)
        _refused(lambda: model["blocks.0.u.weight"], tmp_path / "m-00002-of-00002.gguf")


def test_size_that_nothing_shows(tmp_path: Path, write_gguf: Write) -> None:
    """A tensor behind it that starts before it does is refused: its size cannot be told."""
    path = write_gguf(tmp_path / "m.gguf", _tensors("a u c"))
    raw = path.read_bytes()
    # the offset stands behind the name, the number of axes, two sizes and the type
    place = raw.index(b"blocks.0.c.weight") + len("blocks.0.c.weight") + 4 + 16 + 4
    assert int.from_bytes(raw[place : place + 8], "little") == A.nbytes + 1024
    path.write_bytes(raw[:place] + (A.nbytes - 32).to_bytes(8, "little") + raw[place + 8 :])
    _refused(lambda: open_checkpoint(path), path)


def test_last_behind_the_end(tmp_path: Path, write_gguf: Write) -> None:
    """The last one in a file that ends before it starts is refused, and named."""
    path = write_gguf(tmp_path / "m.gguf", _tensors(LAST))
    path.write_bytes(path.read_bytes()[: -(1024 + 32)])
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    assert caught.value.tensor in ("blocks.0.u.weight", "blocks.0.c.weight")


@pytest.mark.parametrize("sizes", [(1 << 40, 1 << 40), ((1 << 63) - 1, 2), (0, (1 << 62), 2)])
def test_shape_overflow(tmp_path: Path, write_gguf: Write, sizes: tuple[int, ...]) -> None:
    """Sizes whose product wraps in 64 bits are refused of an unknown type as well."""
    path = write_gguf(tmp_path / "m.gguf", {"u": (99, sizes, bytes(32)), "a": A})
    with pytest.raises(SourceError, match="overflow") as caught:
        open_checkpoint(path)
    assert caught.value.tensor == "u"


def test_renamed(tmp_path: Path, write_gguf: Write) -> None:
    """One that has an RWKV name is listed, and refused, by its name in the checkpoint."""
    tensors = {
        "blk.0.time_mix_key.weight": UNKNOWN, "blk.0.time_mix_value.weight": A, "blk.0.time_mix_w1.weight": (99, (4, 8), bytes(32)),
        "blk.0.time_mix_lerp_fused.weight": (99, (6, 1, 1, 64), bytes(64)),
    }  # fmt: skip
    path = write_gguf(tmp_path / "m.gguf", tensors, {"general.architecture": "rwkv7"})
    with qc.load(path, "nf4", mode="off") as model:
        _refused(lambda: model["blocks.0.att.key.weight"], path, "blocks.0.att.key.weight")
        _refused(lambda: model["blocks.0.att.w1"], path, "blocks.0.att.w1")
        # how it is cut cannot be known
        _refused(lambda: model["blk.0.time_mix_lerp_fused.weight"], path, "blk.0.time_mix_lerp_fused.weight")
        assert model["blocks.0.att.value.weight"].codec == "nf4"


@pytest.mark.parametrize("name", ["14_TENSORS_BAD_NAME_SIZE", "21_TENSORS_BAD_TYPE"])
def test_published_files_are_still_refused(test_data: Path, name: str) -> None:
    """The tolerance does not change llama.cpp's verdict on its own files."""
    with pytest.raises(SourceError):
        Source(test_data / "gguf_llamacpp_test" / f"{name}.gguf")
