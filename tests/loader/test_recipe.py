"""Hold recipes to what they say: the first rule counts, and its factor reaches the weights whatever becomes of them."""

from __future__ import annotations

import fnmatch
import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.errors import UsageError
from quantcache.loader.recipe import Decision, Recipe, Rule
from quantcache.quant.codec import quantize
from quantcache.tensor import TensorInfo

Array = NDArray[Any]
Write = Callable[..., Path]
RNG = np.random.default_rng(0)
QUANTIZED = ("int8", "int8-row", "nf4", "nf4-dq")

_WIDE = RNG.standard_normal((64, 128))
_BLOCKS = quants.quantize(_WIDE.astype(np.float32), GGMLQuantizationType.Q8_0)
_ODD = quants.quantize(RNG.standard_normal((256, 32)).astype(np.float32), GGMLQuantizationType.Q8_0)  # 32: no codec's width
#: every kind of weights: the large ones that codecs take, those that are too small, those of a width that none takes
FLOATS: dict[str, Array] = {
    f"{dtype.__name__}.{what}": weights.astype(dtype)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
    for what, weights in (("large", _WIDE), ("small", _WIDE[:2]), ("odd", RNG.standard_normal((70, 67))), ("vector", _WIDE[0]))
}
TENSORS: dict[str, Any] = FLOATS | {
    "q8.large": (8, (64, 128), _BLOCKS.tobytes()),
    "q8.odd": (8, (256, 32), _ODD.tobytes()),
    "ids": np.arange(128 * 64, dtype=np.int32).reshape(64, 128),
}
DECODED = {
    "q8.large": quants.dequantize(_BLOCKS, GGMLQuantizationType.Q8_0), "q8.odd": quants.dequantize(_ODD, GGMLQuantizationType.Q8_0)
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, write_gguf: Write) -> Path:
    """Write a model of every kind of weights."""
    return write_gguf(tmp_path_factory.mktemp("recipe") / "m.gguf", TENSORS, {"general.architecture": "llama"})


def _scaled(name: str, factor: float) -> Array:
    """Return the weights as float32, times the factor."""
    return (DECODED[name] if name in DECODED else FLOATS[name].astype(np.float32)) * np.float32(factor)


def _is(found: Any, expected: Array, name: str) -> None:
    assert isinstance(found, np.ndarray), name
    assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes()), name


def _check(model: Any, codec: str, other: str, factor: float) -> None:
    """Compare every tensor with what NumPy makes of it."""
    for name in (*FLOATS, *DECODED):
        found, scaled = model[name], _scaled(name, factor)
        takes = scaled.ndim == 2 and scaled.size >= 4096 and (scaled.shape[1] % 128 == 0 or codec == "int8-row")
        if codec in QUANTIZED and takes:
            status, expected = quantize(codec, scaled)
            assert not status
            assert found.codec == codec, name
            assert {n: p.tobytes() for n, p in found.parts.items() if n != "quant_state"} == {
                n: p.tobytes() for n, p in expected.items() if n != "quant_state"
            }, name
        elif name in DECODED or codec == "f16" or (codec != "keep" and other == "f16"):
            _is(found, scaled.astype(np.float16), name)
        else:
            # nothing here is float64: what is changed is changed in float32
            own = FLOATS[name].dtype if FLOATS[name].dtype != np.float64 else np.dtype(np.float32)
            _is(found, scaled.astype(own), name)


@pytest.mark.parametrize("native", ["keep", "convert"])
@pytest.mark.parametrize("factor", [0.25, 8.0])
@pytest.mark.parametrize("other", ["f16", "keep", "native"])
@pytest.mark.parametrize("codec", [*QUANTIZED, "f16", "keep", "other"])
def test_factor_of_every_decision(path: Path, tmp_path: Path, codec: str, other: str, factor: float, native: str) -> None:
    """Whatever a rule makes of weights of every type and shape, they are multiplied first, on miss and hit."""
    recipe = Recipe([("ids", "other"), ("*", codec, factor)], other=other, native=native)
    for hit in (False, True):
        with qc.load(path, recipe, cache=tmp_path / "c") as model:
            assert model.hit is hit
            _check(model, codec, other, factor)
            np.testing.assert_array_equal(model["ids"], TENSORS["ids"])


def test_factor_with_everything_native(path: Path, tmp_path: Path) -> None:
    """quant="native" leaves all but what a rule's factor changes."""
    for hit in (False, True):
        with qc.load(path, "native", rules=[("*.large", "other", 0.5)], cache=tmp_path / "c") as model:
            assert model.hit is hit
            for name in FLOATS:
                if name.endswith(".large"):
                    own = np.float32 if "64" in name else FLOATS[name].dtype
                    _is(model[name], _scaled(name, 0.5).astype(own), name)
                else:
                    _is(model[name], FLOATS[name], name)
            _is(model["q8.large"], _scaled("q8.large", 0.5).astype(np.float16), "q8.large")
            assert model["q8.odd"].codec == "Q8_0"


def test_factor_of_one_is_none(path: Path, tmp_path: Path) -> None:
    """A factor of 1 changes nothing, and is the same entry as no factor."""
    with qc.load(path, Recipe([("*", "int8", 1.0)]), cache=tmp_path / "c") as model:
        assert model["q8.large"].codec == "int8" or model["q8.large"].codec == "Q8_0"
        first = model["q8.large"].codec
    with qc.load(path, Recipe([("*", "int8")]), cache=tmp_path / "c") as model:
        assert model.hit
        assert model["q8.large"].codec == first == "int8"  # 8.5 bits a weight are more than 8.25


def test_factor_is_in_the_key(path: Path, tmp_path: Path) -> None:
    """Another factor is another entry."""
    keys = set()
    for factor in (0.5, 2.0, 0.25):
        with qc.load(path, Recipe([("*", "int8", factor)]), cache=tmp_path / "c") as model:
            assert not model.hit
            list(model.values())
        keys |= set(model.keys_in_store)
    assert len(keys) == 3


@pytest.mark.parametrize("codec", [*QUANTIZED, "f16", "keep", "other"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("what", ["nan", "inf", "beyond"])
def test_factor_of_what_no_codec_takes(tmp_path: Path, write_gguf: Write, codec: str, dtype: Any, what: str) -> None:
    """Weights that are refused for their values are kept, times the factor, in a type that holds them."""
    weights = _WIDE.astype(np.float32)
    weights[3, 5] = {"nan": np.nan, "inf": -np.inf, "beyond": 60000}[what]
    weights = weights.astype(dtype)
    path = write_gguf(tmp_path / "m.gguf", {"a.weight": weights, "b.weight": _WIDE.astype(np.float32)})
    scaled = weights.astype(np.float32) * np.float32(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qc.QuantcacheWarning)
        for hit in (False, True):
            with qc.load(path, Recipe([("*", codec, 4.0)]), cache=tmp_path / "c") as model:
                assert model.hit is hit
                found = model["a.weight"]
                if isinstance(found, qc.QuantTensor):
                    assert what == "beyond"
                    assert codec in ("int8", "nf4", "nf4-dq")
                    status, expected = quantize(codec, scaled)
                    assert not status
                    assert all(expected[n].tobytes() == p.tobytes() for n, p in found.parts.items() if n != "quant_state")
                    continue
                assert found.dtype != np.float16 or what != "beyond"
                np.testing.assert_array_equal(found.astype(np.float32), scaled.astype(found.dtype).astype(np.float32))
                assert found.dtype in (np.float32, np.float16, dtype)


def test_factor_of_blocks_beyond_float16(tmp_path: Path, write_gguf: Write) -> None:
    """Blocks whose weights a factor takes beyond float16 become float32."""
    blocks = quants.quantize((_WIDE * 10_000).astype(np.float32), GGMLQuantizationType.Q8_0)
    path = write_gguf(tmp_path / "m.gguf", {"a": (8, (64, 128), blocks.tobytes())})
    with pytest.warns(qc.QuantcacheWarning, match="float16"), qc.load(path, Recipe([("*", "f16", 4.0)]), mode="off") as model:
        _is(model["a"], quants.dequantize(blocks, GGMLQuantizationType.Q8_0) * np.float32(4), "a")


def test_factor_where_a_name_is_taken(tmp_path: Path, write_gguf: Write) -> None:
    """A tensor that is kept because its parts' names are taken is multiplied as well."""
    weights = _WIDE.astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", {"a.weight": weights, "a.scales": weights[0], "a.biases": weights[1]})
    with qc.load(path, Recipe([("a.weight", "int8", 0.5)], other="keep"), cache=tmp_path / "c") as model:
        _is(model["a.weight"], weights * np.float32(0.5), "a.weight")
        _is(model["a.scales"], weights[0], "a.scales")
        assert "already" in {report.name: report.reason for report in model.report()}["a.weight"]


def test_factor_of_a_transposed_matrix(tmp_path: Path, write_gguf: Write) -> None:
    """A matrix that a file has the other way round is turned and multiplied."""
    weights = RNG.standard_normal((64, 96)).astype(np.float32)
    blocks = quants.quantize(weights, GGMLQuantizationType.Q8_0)
    tensors = {
        "blk.0.time_mix_w1.weight": weights, "blk.0.time_mix_w2.weight": (8, (64, 96), blocks.tobytes()),
        "blk.0.time_mix_lerp_fused.weight": np.arange(24, dtype=np.float32).reshape(6, 1, 1, 4),
    }  # fmt: skip
    path = write_gguf(tmp_path / "m.gguf", tensors, {"general.architecture": "rwkv7"})
    rules = [("*.w?", "int8", 0.5), ("*.x_k", "other", 4.0)]
    for quant in ("native", "int8"):
        for _ in range(2):
            with qc.load(path, quant, rules=rules, other="keep", cache=tmp_path / "c") as model:
                np.testing.assert_array_equal(model["blocks.0.att.w1"], weights.T * np.float32(0.5))
                decoded = quants.dequantize(blocks, GGMLQuantizationType.Q8_0) * np.float32(0.5)
                np.testing.assert_array_equal(model["blocks.0.att.w2"], decoded.astype(np.float16).T)
                np.testing.assert_array_equal(model["blocks.0.att.x_k"].ravel(), np.arange(8, 12) * 4)
                np.testing.assert_array_equal(model["blocks.0.att.x_v"].ravel(), np.arange(12, 16))


# ---- decisions ---------------------------------------------------------------------------------------------------


def _info(dtype: str = "F32", shape: tuple[int, ...] = (64, 128), name: str = "a.weight", **more: Any) -> TensorInfo:
    return TensorInfo(name, dtype, shape, 0, 64 * 128 // 32 * 34 if dtype == "Q8_0" else 100, **more)


@pytest.mark.parametrize(
    "info",
    [_info(d, s, transposed=t) for d in ("F32", "F16", "BF16", "F64", "Q8_0") for s in ((64, 128), (2, 64), (128,)) for t in (False, True)],
    ids=lambda info: f"{info.dtype}-{len(info.shape)}{info.shape[0]}{'T' * info.transposed}",
)
def test_no_decision_drops_a_factor_or_an_adapter(info: TensorInfo) -> None:
    """What is multiplied, or changed by an adapter, is never passed through, and its factor stands in the decision."""
    codecs, others, natives = ("int8", "nf4", "f16", "keep", "other"), ("f16", "keep", "native"), ("keep", "convert")
    for codec, other, native in itertools.product(codecs, others, natives):
        for rule, merged in ((("*", codec, 0.5), False), (("*", codec, 0.5), True), (("*", codec), True)):
            decision = Recipe([rule], other=other, native=native).decide(info, merged=merged)
            assert decision.codec != "native", (rule, other, native)
            assert decision.exponent == (-1 if len(rule) == 3 else 0), (rule, other, native)


@given(st.lists(st.text("ab*?[]!-.\n|()", max_size=6), max_size=6), st.text("ab.-\n|()", max_size=8), st.sampled_from([0, 1, 253, 256, 600]))
def test_rules_match_as_fnmatch_does(patterns: list[str], name: str, before: int) -> None:
    """Of any patterns the first counts that fnmatch finds to match, whatever regular expressions make of its characters.

    Also behind rules that match nothing, more than go into one expression.
    """
    recipe = Recipe([("zz", "int8")] * before + [(pattern, "keep", 2.0**n) for n, pattern in enumerate(patterns)])
    decided = recipe.decide(TensorInfo(name, "F32", (64, 64), 0, 64 * 64 * 4))
    expected = next((n for n, pattern in enumerate(patterns) if fnmatch.fnmatchcase(name, pattern)), None)
    assert (decided.codec, decided.exponent) == (("f16", 0) if expected is None else ("keep", expected))


infos = st.builds(
    lambda name, dtype, shape, nbytes, transposed: TensorInfo(name, dtype, shape, 0, nbytes, transposed),
    st.text("abcx", max_size=2), st.sampled_from(["F32", "F16", "F64", "I32", "Q8_0", "Q4_0", "type 99"]),
    st.sampled_from([(64, 128), (64, 2), (8192,), ()]), st.sampled_from([100, 64 * 128]), st.booleans(),
)  # fmt: skip


@given(st.lists(infos, max_size=6), st.booleans(), st.sampled_from(["nf4", "int8-row", "f16"]))
def test_decisions_do_not_depend_on_earlier_ones(tensors: list[TensorInfo], merged: bool, quant: str) -> None:
    """What was decided for one tensor is remembered for those that are alike, and for no other."""

    def recipe() -> Recipe:
        return Recipe([("*a*", quant), ("*b*", "int8", 2.0), ("*c*", "keep")])

    one = recipe()
    for info in tensors:
        for changed in (merged, not merged):
            assert one.decide(info, merged=changed) == recipe().decide(info, merged=changed)


@pytest.mark.parametrize(
    "change",
    [{"shape": (8192,)}, {"shape": (64, 2)}, {"dtype": "Q4_0"}, {"dtype": "F16"}, {"nbytes": 100}, {"transposed": True}, {"name": "b"}, {"name": "z"}],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["F32", "Q8_0"])
def test_what_a_decision_depends_on(dtype: str, change: dict[str, Any]) -> None:
    """After a tensor, one that differs in anything is decided for as if it were the first."""

    def recipe() -> Recipe:
        return Recipe([("a", "nf4"), ("b", "keep")])

    first, one = TensorInfo("a", dtype, (64, 128), 0, 64 * 128), recipe()
    one.decide(first)
    assert one.decide(replace(first, **change)) == recipe().decide(replace(first, **change))


def test_recipe_that_is_changed_between_loads(tmp_path: Path) -> None:
    """What a recipe has decided is forgotten where it says something else by now: no entry is stored under the key of another."""
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": np.ones((64, 128), np.float32), "b": np.ones(100, np.float32)}, path)
    recipe = Recipe([("*.weight", "nf4")])
    for other, dtype in (("f16", np.float16), ("keep", np.float32)):
        recipe.other = other
        for quant in (recipe, Recipe([("*.weight", "nf4")], other=other)):
            with qc.load(path, quant, cache=tmp_path / "c") as model:
                assert model["b"].dtype == dtype
    blocks = TensorInfo("b", "Q8_0", (64, 128), 0, 64 * 128 // 32 * 34)
    for native, codec in (("keep", "native"), ("convert", "f16")):
        recipe.native = native
        assert recipe.decide(blocks).codec == codec


def test_first_rule_counts() -> None:
    """Of two rules that match the first counts, its factor too."""
    recipe = Recipe([("a.*", "nf4", 2.0), ("*", "int8", 4.0)])
    assert recipe.decide(_info()) == Decision("nf4", 1)
    assert recipe.decide(_info(name="b.weight")) == Decision("int8", 2)
    assert Recipe([("A.*", "nf4")]).decide(_info()).codec == "f16"  # upper case is another letter


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("rule", [("*", "int8", 0.5), ("*", "keep"), ("*", "other", 2.0)])
def test_unknown_type_passes(rule: Any, merged: bool) -> None:
    """Nothing can be decided about a type that nobody knows: it stays, and raises when it is asked for."""
    assert Recipe([rule], native="convert").decide(_info("GGML type 99"), merged=merged).codec == "native"


@pytest.mark.parametrize("dtype", ["I8", "I32", "I64", "U8", "BOOL"])
def test_integers_are_left_alone(dtype: str) -> None:
    """Integers are no weights: neither quantized nor multiplied; where all is native, they are too."""
    for codec in ("int8", "keep", "f16", "other"):
        assert Recipe([("*", codec, 0.5)]).decide(_info(dtype)).codec == "keep"
        assert Recipe([("*", codec, 0.5)]).decide(_info(dtype)).exponent == 0
    assert Recipe([], other="native").decide(_info(dtype)).codec == "native"
    assert Recipe([("*", "keep")], other="native").decide(_info(dtype)).codec == "keep"


@pytest.mark.parametrize(
    ("quant", "native", "expected"),
    [("int8", "keep", "int8"), ("nf4", "keep", "nf4"), ("f16", "keep", "native"), ("f16", "convert", "f16"), ("nf4", "convert", "nf4")],
)
def test_blocks_pass_if_they_are_not_larger(quant: str, native: str, expected: str) -> None:
    """Q8_0 has 8.5 bits a weight: smaller than float16, larger than int8."""
    assert Recipe.of(quant, native=native).decide(_info("Q8_0")).codec == expected
    assert Recipe.of("native").decide(_info("Q8_0")).codec == "native"


@pytest.mark.parametrize("factor", [0, -1, 3, 0.3, float("nan"), float("inf"), 2.0**101, 2.0**-102])
def test_factor_that_is_no_power_of_two(factor: float) -> None:
    """A factor that is no power of two, or beyond any use, is refused with its rule."""
    with pytest.raises(UsageError, match=re.escape("'a.*'")):
        Recipe([("a.*", "int8", factor)])


@pytest.mark.parametrize("rule", [("a",), ("a", "int8", 2.0, 1), ("a", 4), (4, "int8"), (), "ab"], ids=str)
def test_what_is_no_rule(rule: Any) -> None:
    """Anything but two texts and perhaps a number is refused."""
    with pytest.raises(UsageError):
        Recipe([rule])


@pytest.mark.parametrize("factor", ["x", None, [2], 1j], ids=str)
def test_factor_that_is_no_number(factor: Any) -> None:
    """A factor that is no number is refused."""
    with pytest.raises(UsageError):
        Recipe([("a", "int8", factor)])


@pytest.mark.parametrize("options", [{"other": "int8"}, {"native": "off"}])
def test_settings_that_cannot_be(options: dict[str, str]) -> None:
    """Other settings than the documented ones are refused."""
    with pytest.raises(UsageError):
        Recipe([], **options)
    with pytest.raises(UsageError, match="not a codec"):
        Recipe([("*", "int9")])
    with pytest.raises(UsageError):
        Recipe.of(Recipe([]), include=["*"])


def test_rules_in_both_forms_are_one_recipe() -> None:
    """A Rule is what a tuple means."""
    assert Recipe([("a", "int8", 0.5)]).canonical() == Recipe([Rule("a", "int8", -1)]).canonical()
