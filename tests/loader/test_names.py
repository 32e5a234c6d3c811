"""Hold the names of RWKV GGUFs to the checkpoints that they were made from: names, shapes, orientation, numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray
from safetensors.numpy import load_file

import quantcache as qc
from quantcache.errors import SourceError, UsageError
from quantcache.loader.names import SCHEMES, from_gguf, to_gguf
from quantcache.loader.source import open_checkpoint

Array = NDArray[Any]
Write = Callable[..., Path]
RNG = np.random.default_rng(0)
PROMPT = b'"in'

#: llama.cpp's names of RWKV-7's vectors and small matrices, by those of the checkpoint (gguf-py, tensor_mapping.py)
SAME = {
    "emb.weight": "token_embd.weight", "head.weight": "output.weight", "ln_out.weight": "output_norm.weight",
    "ln_out.bias": "output_norm.bias", "blocks.0.ln0.weight": "token_embd_norm.weight", "blocks.0.ln0.bias": "token_embd_norm.bias",
}  # fmt: skip
IN_BLOCK = {
    "ln1.weight": "attn_norm.weight", "ln1.bias": "attn_norm.bias", "ln2.weight": "attn_norm_2.weight", "ln2.bias": "attn_norm_2.bias",
    "att.receptance.weight": "time_mix_receptance.weight", "att.key.weight": "time_mix_key.weight",
    "att.value.weight": "time_mix_value.weight", "att.output.weight": "time_mix_output.weight",
    "att.ln_x.weight": "time_mix_ln.weight", "att.ln_x.bias": "time_mix_ln.bias",
    "ffn.key.weight": "channel_mix_key.weight", "ffn.value.weight": "channel_mix_value.weight",
    # RWKV-7
    **{f"att.{x}": f"time_mix_{x}.weight" for x in ("w0", "a0", "v0", "k_k", "k_a", "r_k", *(f"{y}{n}" for y in "wavg" for n in "12"))},
    "ffn.x_k": "channel_mix_lerp_k.weight",
    # RWKV-6
    "att.gate.weight": "time_mix_gate.weight", "ffn.receptance.weight": "channel_mix_receptance.weight",
    "att.time_maa_x": "time_mix_lerp_x.weight", "att.time_decay": "time_mix_decay.weight", "att.time_faaaa": "time_mix_first.weight",
    **{f"att.time_maa_w{n}": f"time_mix_w{n}.weight" for n in "12"},
    **{f"att.time_decay_w{n}": f"time_mix_decay_w{n}.weight" for n in "12"},
    **{f"ffn.time_maa_{x}": f"channel_mix_lerp_{x}.weight" for x in "kr"},
}  # fmt: skip
TURNED = {
    "rwkv7": tuple(f"time_mix_{y}{n}.weight" for y in "wavg" for n in "12"),
    "rwkv6": ("time_mix_w1.weight", "time_mix_w2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight"),
}


def _renamed(name: str) -> str:
    if name in SAME:
        return SAME[name]
    _, number, rest = name.split(".", 2)
    return f"blk.{number}.{IN_BLOCK[rest]}"


def llama_cpp(weights: dict[str, Array], architecture: str) -> dict[str, Array]:
    """Return a checkpoint's tensors as llama.cpp's converter writes them: convert_hf_to_gguf.py, Rwkv6Model and Rwkv7Model."""
    fused, prefix = ("rwkvag", "att.x_") if architecture == "rwkv7" else ("wkvrg", "att.time_maa_")
    made: dict[str, Array] = {}
    for name, weight in weights.items():
        layer = name.split(".")[1] if name.startswith("blocks.") else ""
        if any(name.endswith(f".{prefix}{x}") for x in fused):
            rows = [weights[f"blocks.{layer}.{prefix}{x}"].reshape(1, 1, -1) for x in fused]
            made[f"blk.{layer}.time_mix_lerp_fused.weight"] = np.stack(rows)
            continue
        theirs = _renamed(name)
        if theirs.endswith(TURNED[architecture]):
            made[theirs] = np.ascontiguousarray(weight.swapaxes(-1, -2))
        elif "r_k" in name:
            made[theirs] = weight.reshape(-1)
        elif "time_faaaa" in name:
            made[theirs] = weight
        else:
            made[theirs] = np.squeeze(weight)
    if architecture == "rwkv7":  # the first layer has no v: the converter repeats a, and nothing reads it
        for x in "012":
            made.setdefault(f"blk.0.time_mix_v{x}.weight", made[f"blk.0.time_mix_a{x}.weight"])
    return made


def _rwkv6(layers: int = 2, width: int = 64, head: int = 32, rank: int = 8) -> dict[str, Array]:
    """Return a random RWKV-6 with the names and shapes of BlinkDL's checkpoints."""

    def make(*shape: int) -> Array:
        return RNG.standard_normal(shape).astype(np.float32)

    found = {"emb.weight": make(256, width), "head.weight": make(256, width), "ln_out.weight": make(width), "ln_out.bias": make(width)}
    for n in range(layers):
        block = {f"ln{x}.{y}": make(width) for x in ("12" if n else "012") for y in ("weight", "bias")}
        block |= {f"att.time_maa_{x}": make(1, 1, width) for x in "xwkvrg"}
        block |= {"att.time_maa_w1": make(width, 5 * rank), "att.time_maa_w2": make(5, rank, width)}
        block |= {"att.time_decay": make(1, 1, width), "att.time_faaaa": make(width // head, head)}
        block |= {"att.time_decay_w1": make(width, 2 * rank), "att.time_decay_w2": make(2 * rank, width)}
        block |= {f"att.{x}.weight": make(width, width) for x in ("receptance", "key", "value", "gate", "output")}
        block |= {f"att.ln_x.{y}": make(width) for y in ("weight", "bias")}
        block |= {f"ffn.time_maa_{x}": make(1, 1, width) for x in "kr"}
        block |= {"ffn.key.weight": make(3 * width, width), "ffn.value.weight": make(width, 3 * width)}
        block |= {"ffn.receptance.weight": make(width, width)}
        found |= {f"blocks.{n}.{name}": weight for name, weight in block.items()}
    return found


@pytest.fixture(scope="module")
def checkpoint(test_data: Path) -> Path:
    """Return a trained RWKV-7 of 834 K weights, f32."""
    return test_data / "rwkv7" / "tiny-rwkv7-834K-canonical-f32.st"


@pytest.fixture(scope="module")
def rwkv7() -> ModuleType:
    """Return the example as a module."""
    path = Path(__file__).parents[2] / "examples" / "rwkv7.py"
    spec = importlib.util.spec_from_file_location("rwkv7_example_of_names", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _contiguous(model: Any) -> dict[str, Array]:
    """Return copies that lie in memory as a checkpoint's do: BLAS sums a turned matrix in another order."""
    return {name: np.ascontiguousarray(tensor) for name, tensor in model.items()}


def _same(found: Array, expected: Array, name: str) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    assert found.tobytes() == expected.tobytes(), name


# ---- files of others ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1"])
def test_rwkv_cpp(test_data: Path, checkpoint: Path, kind: str) -> None:
    """A file of rwkv.cpp has the names, the shapes and, where it is not quantized, the very numbers of its checkpoint."""
    expected = load_file(checkpoint)
    (source,) = open_checkpoint(test_data / "rwkv7" / f"tiny-rwkv-7v0-834K-{kind}.gguf")
    assert set(source.tensors) == set(expected)
    exact = 0
    with qc.load(source.path, "native", mode="off") as model:
        for name, weight in expected.items():
            tensor = model[name]
            assert tensor.shape == weight.shape, name
            if isinstance(tensor, qc.QuantTensor):
                assert tensor.codec == kind
                np.testing.assert_allclose(tensor.dequantize(np.float32), weight, atol=np.abs(weight).max() / 15)
            else:
                _same(np.ascontiguousarray(tensor), weight, name)
                exact += 1
    assert exact == 327


def test_rwkv_cpp_in_f16(test_data: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Stored, and from the store, its small matrices stand as the checkpoint's do."""
    expected = load_file(checkpoint)
    for hit in (False, True):
        with qc.load(test_data / "rwkv7" / "tiny-rwkv-7v0-834K-Q5_0.gguf", "f16", cache=tmp_path / "c") as model:
            assert model.hit is hit
            for name, weight in expected.items():
                if not isinstance(model[name], qc.QuantTensor):
                    _same(np.ascontiguousarray(model[name]), weight.astype(np.float16), name)


# ---- llama.cpp's layouts, made here ------------------------------------------------------------------------------


@pytest.fixture
def seven(checkpoint: Path, tmp_path: Path, write_gguf: Write) -> Path:
    """Write the checkpoint as llama.cpp does."""
    keys = {"general.architecture": "rwkv7", "rwkv7.wkv.head_size": 64}
    return write_gguf(tmp_path / "seven.gguf", llama_cpp(load_file(checkpoint), "rwkv7"), keys)


@pytest.fixture
def six(tmp_path: Path, write_gguf: Write) -> tuple[Path, dict[str, Array]]:
    """Write a random RWKV-6 as llama.cpp does, and return it as it was."""
    weights = _rwkv6()
    keys = {"general.architecture": "rwkv6", "rwkv6.wkv.head_size": 32, "rwkv6.rescale_every_n_layers": 0}
    return write_gguf(tmp_path / "six.gguf", llama_cpp(weights, "rwkv6"), keys), weights


def test_rwkv7_of_llama_cpp(seven: Path, checkpoint: Path, rwkv7: ModuleType, tmp_path: Path) -> None:
    """The logits of a llama.cpp file are those of the checkpoint, exactly; every tensor has the checkpoint's name and shape."""
    expected = load_file(checkpoint)
    logits = rwkv7.forward(expected, PROMPT)
    with qc.load(seven, "native", mode="off") as model:
        assert set(model) == {*expected, "blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}
        for name, weight in expected.items():
            _same(np.ascontiguousarray(model[name]), weight, name)
        np.testing.assert_array_equal(rwkv7.forward(_contiguous(model), PROMPT), logits)
        np.testing.assert_allclose(rwkv7.forward(dict(model), PROMPT), logits, atol=2e-6)
    found = []
    for hit in (False, True):
        with qc.load(seven, "f16", cache=tmp_path / "c") as model:
            assert model.hit is hit
            found.append(rwkv7.forward(_contiguous(model), PROMPT))
    np.testing.assert_array_equal(found[0], found[1])
    cast = rwkv7.forward({name: weight.astype(np.float16) for name, weight in expected.items()}, PROMPT)
    np.testing.assert_array_equal(found[0], cast)


@pytest.mark.parametrize("quant", ["native", "f16", "int8", "nf4"])
def test_same_as_the_checkpoint(seven: Path, checkpoint: Path, tmp_path: Path, quant: str) -> None:
    """What a llama.cpp file becomes is what the checkpoint becomes, bit for bit: rules see the same names."""
    with qc.load(checkpoint, quant, mode="off") as model:
        expected = {n: t.parts if isinstance(t, qc.QuantTensor) else {"": t} for n, t in model.items()}
    for _ in range(2):
        with qc.load(seven, quant, cache=tmp_path / "c") as model:
            for name, parts in expected.items():
                tensor = model[name]
                found = tensor.parts if isinstance(tensor, qc.QuantTensor) else {"": tensor}
                assert set(found) == set(parts)
                for key, part in parts.items():
                    _same(np.ascontiguousarray(found[key]), np.ascontiguousarray(part), f"{name} {key}")


@pytest.mark.parametrize("quant", ["native", "f16"])
def test_rwkv6_of_llama_cpp(six: tuple[Path, dict[str, Array]], tmp_path: Path, quant: str) -> None:
    """RWKV-6 has its names, its shapes and its numbers back, a stack of small matrices turned one by one."""
    path, weights = six
    for _ in range(2):
        with qc.load(path, quant, other="keep", rules=[("*", "keep")] if quant == "f16" else (), cache=tmp_path / "c") as model:
            assert set(model) == set(weights)
            for name, weight in weights.items():
                _same(np.ascontiguousarray(model[name]), weight, name)


@pytest.mark.parametrize("fused", [True, False])
def test_rwkv6_before_fusing(tmp_path: Path, write_gguf: Write, fused: bool) -> None:
    """Older files have the five vectors of a layer one by one: the names are the same."""
    weights = _rwkv6(layers=1)
    tensors = llama_cpp(weights, "rwkv6")
    if not fused:
        del tensors["blk.0.time_mix_lerp_fused.weight"]
        tensors |= {f"blk.0.time_mix_lerp_{x}.weight": weights[f"blocks.0.att.time_maa_{x}"].reshape(-1) for x in "wkvrg"}
    path = write_gguf(tmp_path / "m.gguf", tensors, {"general.architecture": "rwkv6", "rwkv6.wkv.head_size": 32})
    with qc.load(path, "native", mode="off") as model:
        assert set(model) == set(weights)
        for x in "wkvrg":
            _same(model[f"blocks.0.att.time_maa_{x}"], weights[f"blocks.0.att.time_maa_{x}"], x)


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", sorted(SCHEMES))
@pytest.mark.parametrize("number", ["0", "7", "23", "100"])
def test_round_trip_of_every_alias(architecture: str, number: str) -> None:
    """Every name of a scheme leads to the checkpoint and back; slices lead back to the tensor that holds them."""
    for alias in SCHEMES[architecture]:
        theirs = alias.gguf.format(number)
        ours = from_gguf(theirs, architecture)
        assert ours == tuple(name.format(number) for name in alias.names)
        for name in ours:
            back = to_gguf(name, architecture)
            # RWKV-6 has two tensors that may hold a vector: its own, or the fused one
            assert back == theirs or name in from_gguf(back, architecture)
            assert "{" not in name + back


def test_aliases_are_unambiguous() -> None:
    """No scheme has a name of the file twice, and no tensor of a file twice the same name of the checkpoint."""
    for architecture, aliases in SCHEMES.items():
        assert len({alias.gguf for alias in aliases}) == len(aliases), architecture
        for alias in aliases:
            assert len(set(alias.names)) == len(alias.names)


@pytest.mark.parametrize(
    ("theirs", "architecture", "ours"),
    [
        ("token_embd_norm.weight", "rwkv7", "blocks.0.ln0.weight"), ("blk.3.time_mix_w1.weight", "rwkv7", "blocks.3.att.w1"),
        ("blk.3.time_mix_w1.weight", "rwkv6", "blocks.3.att.time_maa_w1"), ("output.weight", "rwkv6", "head.weight"),
        ("blk.11.channel_mix_receptance.weight", "rwkv6", "blocks.11.ffn.receptance.weight"),
        ("blocks.2.att.g2", "rwkv", "blocks.2.att.g2"),
    ],
)  # fmt: skip
def test_single_names(theirs: str, architecture: str, ours: str) -> None:
    """Names are those that the converters give."""
    assert from_gguf(theirs, architecture) == (ours,)
    assert to_gguf(ours, architecture) == theirs


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blocks.1.ln0.weight", "x", "", "blk.0.time_mix_w1.weight.lora_a", "{}", "{0}"])
def test_names_of_no_scheme(name: str) -> None:
    """A name that a scheme does not have stays, and so does every name of another architecture."""
    for architecture in (*SCHEMES, "llama", ""):
        assert from_gguf(name, architecture) == (name,)
        assert to_gguf(name, architecture) == name
    assert from_gguf("token_embd.weight", "llama") == ("token_embd.weight",)


def test_llama_keeps_its_names(tmp_path: Path, write_gguf: Write, test_data: Path) -> None:
    """Another architecture's tensors are called as in the file, those that RWKV's share their names with included."""
    tensors = {
        name: np.ones((2, 4), np.float32)
        for name in ("token_embd.weight", "blk.0.attn_norm.weight", "output.weight", "blk.0.time_mix_w1.weight")
    }
    for keys in ({"general.architecture": "llama"}, {}, {"general.architecture": (4, 7)}, {"general.architecture": (9, (8, ["rwkv7"]))}):
        (source,) = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, keys))
        assert list(source.tensors) == list(tensors)
        assert source.names == ""
        assert not any(info.transposed for info in source.tensors.values())
    (source,) = open_checkpoint(test_data / "smol_blk" / "blk-smol-1layer-Q4_K_M.gguf")
    assert list(source.tensors) == [tensor.name for tensor in gguf.GGUFReader(source.path).tensors]


def test_names_of_the_file(seven: Path, checkpoint: Path) -> None:
    """names="file" leaves names, shapes and orientation; anything else but "auto" is refused."""
    expected = llama_cpp(load_file(checkpoint), "rwkv7")
    with qc.load(seven, "native", names="file", mode="off") as model:
        assert set(model) == set(expected)
        for name, weight in expected.items():
            _same(model[name], weight, name)
    for wrong in ("rwkv7", "", "Auto"):
        with pytest.raises(UsageError, match="names="):
            qc.load(seven, names=wrong, mode="off")


def test_names_are_in_the_key(seven: Path, tmp_path: Path) -> None:
    """Both ways of naming have their own entries: one is no hit for the other, and each hits itself."""
    keys: dict[str, list[str]] = {}
    for names in ("auto", "file", "auto", "file"):
        with qc.load(seven, "int8", names=names, cache=tmp_path / "c") as model:
            assert model.hit is (names in keys)
            assert ("emb.weight" in model) is (names == "auto")
            list(model.values())
        assert keys.setdefault(names, model.keys_in_store) == model.keys_in_store
    assert keys["auto"] != keys["file"]


def test_unchanged_names_are_not_in_the_key(tmp_path: Path, write_gguf: Write) -> None:
    """Where the scheme finds nothing to rename, both ways of naming share an entry."""
    path = write_gguf(tmp_path / "m.gguf", {"a.weight": RNG.standard_normal((64, 128)).astype(np.float32)}, {"general.architecture": "rwkv7"})
    assert open_checkpoint(path)[0].names == ""
    with qc.load(path, "int8", cache=tmp_path / "c") as model:
        list(model.values())
    with qc.load(path, "int8", names="file", cache=tmp_path / "c") as model:
        assert model.hit


# ---- slices ------------------------------------------------------------------------------------------------------


def test_slices_are_views(seven: Path, checkpoint: Path) -> None:
    """The slices of a fused tensor, and matrices that are turned, are views of the mapped file, read-only."""
    expected = load_file(checkpoint)
    with qc.load(seven, "native", mode="off") as model:
        mapped = model._shards[0].source.file.bytes
        for name in (*(f"blocks.1.att.x_{x}" for x in "rwkvag"), "blocks.1.att.w1", "blocks.1.att.r_k", "emb.weight"):
            assert np.shares_memory(model[name], mapped), name
            assert not model[name].flags.writeable
            _same(np.ascontiguousarray(model[name]), expected[name], name)
        first, second = (model[f"blocks.1.att.x_{x}"].__array_interface__["data"][0] for x in "rw")
        assert second - first == 64 * 4


def test_report_has_the_shapes_that_are_handed_out(seven: Path, tmp_path: Path) -> None:
    """The report's shapes are those of the tensors, on miss and hit: a matrix that is turned, too."""
    for quant in ("f16", "f16", "native"):
        with qc.load(seven, quant, cache=tmp_path / "c") as model:
            assert {report.name: report.shape for report in model.report()} == {name: tensor.shape for name, tensor in model.items()}


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int16])
def test_slices_of_other_types(tmp_path: Path, write_gguf: Write, dtype: Any) -> None:
    """A fused tensor of any element type is sliced by its own size."""
    fused = np.arange(6 * 8).reshape(6, 1, 1, 8).astype(dtype)
    tensors = {"blk.0.time_mix_lerp_fused.weight": fused, "blk.0.time_mix_w1.weight": np.arange(6).reshape(2, 3).astype(dtype)}
    path = write_gguf(tmp_path / "m.gguf", tensors, {"general.architecture": "rwkv7"})
    for quant in ("native", "f16"):
        with qc.load(path, quant, other="keep", mode="off") as model:
            for place, x in enumerate("rwkvag"):
                np.testing.assert_array_equal(model[f"blocks.0.att.x_{x}"], fused[place])
            np.testing.assert_array_equal(model["blocks.0.att.w1"], tensors["blk.0.time_mix_w1.weight"].T)


@pytest.mark.parametrize("shape", [(5, 1, 1, 8), (7, 8), (1, 6, 8), (), (48,), (8, 1, 1, 6)])
def test_fused_tensor_of_another_shape(tmp_path: Path, write_gguf: Write, shape: tuple[int, ...]) -> None:
    """A tensor with the name of a fused one that is not one row a slice keeps its name, shape and numbers."""
    name = "blk.0.time_mix_lerp_fused.weight"
    weight = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    path = write_gguf(tmp_path / "m.gguf", {name: weight, "token_embd.weight": weight}, {"general.architecture": "rwkv7"})
    with qc.load(path, "native", mode="off") as model:
        assert set(model) == {name, "emb.weight"}
        _same(model[name], weight, name)


def test_fused_tensor_of_blocks(tmp_path: Path, write_gguf: Write) -> None:
    """A fused tensor that was quantized keeps its name: a block may not be cut."""
    weight = RNG.standard_normal((6, 64)).astype(np.float32)
    blocks = quants.quantize(weight, GGMLQuantizationType.Q8_0)
    name = "blk.0.time_mix_lerp_fused.weight"
    path = write_gguf(tmp_path / "m.gguf", {name: (8, (6, 64), blocks.tobytes())}, {"general.architecture": "rwkv7"})
    with qc.load(path, "native", mode="off") as model:
        assert list(model) == [name]
        np.testing.assert_array_equal(model[name].dequantize(np.float32), quants.dequantize(blocks, GGMLQuantizationType.Q8_0))


@pytest.mark.parametrize(("quant", "native"), [("native", "keep"), ("f16", "keep"), ("f16", "convert"), ("int8", "keep"), ("int8", "convert")])
def test_turned_matrix_of_blocks(tmp_path: Path, write_gguf: Write, quant: str, native: str) -> None:
    """A small matrix that was quantized is handed out turned, as float16: blocks cannot be turned."""
    weight = RNG.standard_normal((64, 96)).astype(np.float32)
    blocks = quants.quantize(weight, GGMLQuantizationType.Q8_0)
    path = write_gguf(
        tmp_path / "m.gguf", {"blk.0.time_mix_w1.weight": (8, (64, 96), blocks.tobytes())}, {"general.architecture": "rwkv7"}
    )
    expected = quants.dequantize(blocks, GGMLQuantizationType.Q8_0).astype(np.float16).T
    for hit in (False, True):
        with qc.load(path, quant, native=native, cache=tmp_path / "c") as model:
            assert model.hit is hit
            _same(np.ascontiguousarray(model["blocks.0.att.w1"]), np.ascontiguousarray(expected), "w1")


def test_turned_vector(tmp_path: Path, write_gguf: Write) -> None:
    """A vector under the name of a matrix that is turned has nothing to turn."""
    vector = np.arange(4, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.time_mix_w1.weight": vector}, {"general.architecture": "rwkv7"})
    with qc.load(path, "f16", mode="off") as model:
        np.testing.assert_array_equal(model["blocks.0.att.w1"], vector)


# ---- hostile files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [(10, 0), (10, (1 << 64) - 1), (10, 1 << 63), (11, -64), (4, 7), (4, 128), (8, "64"), (6, 64.0), (7, True), (9, (4, [64]))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("size", [0, 1, 64])
def test_hostile_head_size(tmp_path: Path, write_gguf: Write, given: Any, size: int) -> None:
    """A head size that cannot be is no reason to fail, and changes no number: the vector is cut as it can be, or left."""
    vector = np.arange(size, dtype=np.float32)
    keys = {"general.architecture": "rwkv7", "rwkv7.wkv.head_size": given}
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.time_mix_r_k.weight": vector, "x": np.ones(3, np.float32)}, keys)
    for quant in ("native", "f16"):
        with qc.load(path, quant, mode="off") as model:
            np.testing.assert_array_equal(model["blocks.0.att.r_k"].reshape(-1), vector)


@pytest.mark.parametrize("turned", [False, True])
def test_a_file_with_both_names(tmp_path: Path, write_gguf: Write, turned: bool) -> None:
    """Of a file that has a tensor under both names nothing is lost: each keeps the name that it has there."""
    pairs = {
        "blk.0.time_mix_key.weight": 1, "blocks.0.att.key.weight": 2, "blk.0.time_mix_lerp_fused.weight": 3, "blocks.0.att.x_a": 4,
        "token_embd.weight": 5,
    }  # fmt: skip
    names = sorted(pairs, reverse=turned)
    tensors = {name: np.full((6, 1, 1, 4) if "fused" in name else (4,), pairs[name], np.float32) for name in names}
    path = write_gguf(tmp_path / "m.gguf", tensors, {"general.architecture": "rwkv7"})
    with qc.load(path, "native", mode="off") as model:
        assert {name: tensor.ravel()[0] for name, tensor in model.items()} == {
            ("emb.weight" if name == "token_embd.weight" else name): value for name, value in pairs.items()
        }


def test_two_tensors_for_one_name(tmp_path: Path, write_gguf: Write) -> None:
    """Two tensors that would get one name, a fused one and a slice of it, do not replace each other."""
    tensors = {
        "blk.0.time_mix_lerp_fused.weight": np.zeros((5, 1, 1, 4), np.float32),
        "blk.0.time_mix_lerp_k.weight": np.ones(4, np.float32),
    }
    for names in (list(tensors), list(tensors)[::-1]):
        path = write_gguf(tmp_path / "m.gguf", {name: tensors[name] for name in names}, {"general.architecture": "rwkv6"})
        with qc.load(path, "native", mode="off") as model:
            assert sum(tensor.size for tensor in model.values()) == 24
            assert sum(float(tensor.sum()) for tensor in model.values()) == 4


def test_error_has_the_name_that_was_asked_for(tmp_path: Path, write_gguf: Write) -> None:
    """A tensor that is not there is named as it was asked for; the file's own name is not there any more."""
    path = write_gguf(tmp_path / "m.gguf", {"token_embd.weight": np.ones((2, 4), np.float32)}, {"general.architecture": "rwkv7"})
    (source,) = open_checkpoint(path)
    with pytest.raises(SourceError, match=r"token_embd\.weight"):
        source.view("token_embd.weight")
    with qc.load(path, "native", mode="off") as model, pytest.raises(KeyError, match=r"token_embd\.weight"):
        model["token_embd.weight"]


def test_head_size_is_in_the_key(tmp_path: Path, write_gguf: Write) -> None:
    """What the first part says of the head size shapes the tensors of the second: it is part of the second's identity."""
    shapes = {}
    for head in (64, 32):
        folder = tmp_path / str(head)
        folder.mkdir()
        for part, tensors in enumerate(({"token_embd.weight": np.ones((4, 64), np.float32)}, {"blk.0.time_mix_r_k.weight": np.arange(256, dtype=np.float32)})):
            first = {"general.architecture": "rwkv7", "rwkv7.wkv.head_size": head} if part == 0 else {}
            keys = first | {"split.no": (2, part), "split.count": (2, 2), "split.tensors.count": (5, 2)}
            write_gguf(folder / f"m-{part + 1:05}-of-00002.gguf", tensors, keys)
        with qc.load(folder, "f16", cache=tmp_path / "c") as model:
            shapes[head] = model["blocks.0.att.r_k"].shape
    assert shapes == {64: (4, 64), 32: (8, 32)}
