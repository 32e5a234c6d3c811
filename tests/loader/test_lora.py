"""Hold merged weights to W + scale * (B @ A), whatever form an adapter has; and adapters to changing all that they name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import quantcache as qc
from quantcache.errors import SourceError, UsageError
from quantcache.loader import plan
from quantcache.loader.changes import resolve
from quantcache.loader.lora import open_adapter
from quantcache.loader.source import open_checkpoint
from quantcache.quant.codec import quantize

Array = NDArray[Any]
Write = Callable[..., Path]
RNG = np.random.default_rng(7)
PREFIX = "base_model.model."
Q, V, UP, EMB, NORM = (
    "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight",
    "model.embed_tokens.weight", "model.norm.weight",
)  # fmt: skip
WEIGHTS: dict[str, Array] = {
    Q: RNG.standard_normal((64, 128)).astype(np.float32), V: RNG.standard_normal((96, 128)).astype(np.float16),
    UP: RNG.standard_normal((256, 128)).astype(np.float32), EMB: RNG.standard_normal((50, 128)).astype(np.float32),
    NORM: RNG.standard_normal(128).astype(np.float32), "model.layers.1.mlp.up_proj.bias": RNG.standard_normal(256).astype(np.float32),
}  # fmt: skip


def _pair(shape: tuple[int, ...], rank: int, seed: int = 0, dtype: Any = np.float32) -> tuple[Array, Array]:
    """Return (A, B): [rank, columns] and [rows, rank]."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rank, shape[1])).astype(dtype), rng.standard_normal((shape[0], rank)).astype(dtype)


def _product(a: Array, b: Array, scale: float) -> Array:
    """Return scale * (B @ A) as it is defined: float32, the rank in order."""
    total = np.zeros((b.shape[0], a.shape[1]), np.float32)
    for k in range(a.shape[0]):
        total += b[:, k, None].astype(np.float32) * a[None, k].astype(np.float32)
    return np.float32(scale) * total


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Write a small checkpoint with the names of a llama."""
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def _peft(folder: Path, tensors: Mapping[str, Array], **config: Any) -> Path:
    folder.mkdir()
    save_file({f"{PREFIX}{name}": array for name, array in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config))
    return folder


def _merged(path: Path, lora: Any, *, other: str = "keep", **options: Any) -> dict[str, Array]:
    """Return all weights of a load that quantizes nothing."""
    with qc.load(path, "f16", lora=lora, other=other, include=[], mode="off", **options) as loaded:
        return {name: np.array(tensor) for name, tensor in loaded.items()}


def _check(found: Mapping[str, Array], changes: Mapping[str, Array], base: Mapping[str, Array] = WEIGHTS) -> None:
    """Hold merged weights to the sum, rounded to the type that they had, and all others to what they were."""
    assert set(found) == set(base)
    for name, weight in base.items():
        wanted = weight
        if name in changes:
            wanted = (weight.astype(np.float32) + changes[name]).astype(weight.dtype)
        assert (found[name].dtype, found[name].shape) == (wanted.dtype, wanted.shape), name
        assert found[name].tobytes() == wanted.tobytes(), name


# ---- PEFT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("given", ["folder", "file"])
def test_peft(model: Path, tmp_path: Path, dtype: Any, given: str) -> None:
    """lora_A and lora_B are multiplied by lora_alpha / r and added; matrices of any type, a folder or its file."""
    (a, b), (c, d) = _pair((64, 128), 4, 1, dtype), _pair((96, 128), 4, 2, dtype)
    names = (Q, a, b), (V, c, d)
    tensors = {name.replace(".weight", f".lora_{x}.weight"): array for name, *ab in names for x, array in zip("AB", ab, strict=True)}
    folder = _peft(tmp_path / "a", {name: array.astype(dtype) for name, array in tensors.items()})
    found = _merged(model, [folder if given == "folder" else folder / "adapter_model.safetensors"])
    _check(found, {Q: _product(a, b, 2.0), V: _product(c, d, 2.0)})


@pytest.mark.parametrize(
    ("config", "ranks", "scales"),
    [
        ({}, (4, 4), (2.0, 2.0)),
        ({"use_rslora": True}, (4, 4), (4.0, 4.0)),
        ({"alpha_pattern": {"q_proj": 2}}, (4, 4), (0.5, 2.0)),
        ({"alpha_pattern": {r"model\.layers\.1\..*": 2}, "rank_pattern": {"v_proj": 16}}, (4, 16), (2.0, 0.125)),
        ({"rank_pattern": {"^model.layers.0.self_attn.q_proj": 1}, "use_rslora": True}, (1, 4), (8.0, 4.0)),
        ({"alpha_pattern": {"proj": 2}}, (4, 4), (2.0, 2.0)),  # only a whole component matches
    ],
    ids=str,
)  # fmt: skip
def test_peft_scales(model: Path, tmp_path: Path, config: dict[str, Any], ranks: tuple[int, int], scales: tuple[float, float]) -> None:
    """Rslora divides by the root of the rank; patterns choose alpha and rank by the end of a module's name."""
    (a, b), (c, d) = _pair((64, 128), ranks[0], 1), _pair((96, 128), ranks[1], 2)
    module = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    tensors = {f"{module[0]}.lora_A.weight": a, f"{module[0]}.lora_B.weight": b, f"{module[1]}.lora_A.weight": c, f"{module[1]}.lora_B.weight": d}
    found = _merged(model, [_peft(tmp_path / "a", tensors, **config)])
    _check(found, {Q: _product(a, b, scales[0]), V: _product(c, d, scales[1])})


def test_given_alpha_replaces_the_files(model: Path, tmp_path: Path) -> None:
    """An alpha that is given counts instead of the file's, for all weights or by name; the rest keep the file's."""
    a, b = _pair((64, 128), 4)
    folder = _peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj.lora_A.weight": a, "model.layers.0.self_attn.q_proj.lora_B.weight": b})
    for alpha, scale in (
        (1, 0.25), ([("*q_proj*", 6), ("*", 1)], 1.5), ({"*q_proj*": 6, "*": 1}, 1.5), (iter([("*q_proj*", 6)]), 1.5), (None, 2.0),
        (0, 0.0), (-4, -1.0), (np.float32(1), 0.25), (np.int64(1), 0.25),
    ):  # fmt: skip
        _check(_merged(model, [(folder, alpha)]), {Q: _product(a, b, scale)})


@pytest.mark.parametrize("pattern", ["*v_proj*", "model.layers.0.self_attn.q_proj", "*.nosuch.*"])
def test_alpha_for_no_weight(model: Path, tmp_path: Path, pattern: str) -> None:
    """A pattern that is for none of the weights that the adapter changes is a mistake, and not the file's alpha."""
    adapter = _adapter(tmp_path, {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B})
    with pytest.raises(UsageError, match="is called like"):
        qc.load(model, lora=[(adapter, [("*q_proj.weight", 8), (pattern, 16)])])


@pytest.mark.parametrize("fan", [True, False, None])
def test_fan_in_fan_out(tmp_path: Path, fan: bool | None) -> None:
    """GPT-2 keeps its matrices turned: the products are, too, whatever the one flag says that all layers share, or no config."""
    square, wide = (RNG.standard_normal(shape).astype(np.float32) for shape in ((64, 64), (64, 192)))
    save_file({"h.0.attn.c_proj.weight": square, "h.0.attn.c_attn.weight": wide}, tmp_path / "m.safetensors")
    (a, b), (c, d) = _pair((64, 64), 4, 1), _pair((192, 64), 4, 2)
    tensors = {"transformer.h.0.attn.c_proj.lora_A.weight": a, "transformer.h.0.attn.c_proj.lora_B.weight": b,
               "transformer.h.0.attn.c_attn.lora_A.weight": c, "transformer.h.0.attn.c_attn.lora_B.weight": d}  # fmt: skip
    folder = _peft(tmp_path / "a", tensors, fan_in_fan_out=fan)
    if fan is None:
        (folder / "adapter_config.json").unlink()
    found = _merged(tmp_path / "m.safetensors", [(folder, 8)])
    assert found["h.0.attn.c_proj.weight"].tobytes() == (square + _product(a, b, 2.0).T).tobytes()
    assert found["h.0.attn.c_attn.weight"].tobytes() == (wide + _product(c, d, 2.0).T).tobytes()


def test_square_layers_of_both_kinds(tmp_path: Path) -> None:
    """A square weight whose like are turned here and not there is refused: half of all guesses would be wrong."""
    shapes = {"h.0.a.c_proj": (64, 64), "h.0.b.c_proj": (64, 192), "h.1.b.c_proj": (192, 64)}
    save_file({f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "m.safetensors")
    tensors = {}
    for name, shape in {"h.0.a.c_proj": (64, 64), "h.0.b.c_proj": (192, 64), "h.1.b.c_proj": (192, 64)}.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = _pair(shape, 4)
    with pytest.raises(SourceError, match="either way"):
        qc.load(tmp_path / "m.safetensors", lora=[_peft(tmp_path / "a", tensors)])


def test_a_product_that_fits_only_turned(model: Path, tmp_path: Path) -> None:
    """Of a layer that no model keeps turned, such a product is another model's."""
    _refused(model, _adapter(tmp_path, {f"{MODULE}.lora_A.weight": A[:, :64].copy(), f"{MODULE}.lora_B.weight": np.ones((128, 4), np.float32)}), "128 x 64")


def test_config_of_a_hub_folder(model: Path, tmp_path: Path) -> None:
    """An adapter in a hub's cache folder has its configuration in the snapshot."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    _peft(snapshot, {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B}, use_rslora=True)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("abc")
    _check(_merged(model, [tmp_path / "models--a--b"]), {Q: _product(A, B, 4.0)})


def test_embedding(model: Path, tmp_path: Path) -> None:
    """An embedding's matrices are named otherwise, and their product is turned."""
    a, b = _pair((128, 50), 4)
    tensors = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    _check(_merged(model, [_peft(tmp_path / "a", tensors)]), {EMB: _product(a, b, 2.0).T})


def test_modules_to_save_and_biases(model: Path, tmp_path: Path) -> None:
    """Modules that were trained whole take the place of the weight; a bias of lora_B is scaled and added."""
    a, b = _pair((256, 128), 4)
    norm, bias = RNG.standard_normal(128).astype(np.float32), RNG.standard_normal(256).astype(np.float32)
    module = "model.layers.1.mlp.up_proj"
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b, f"{module}.lora_B.bias": bias, "model.norm.modules_to_save.weight": norm}
    found = _merged(model, [_peft(tmp_path / "a", tensors)])
    assert found.pop(NORM).tobytes() == norm.tobytes()
    base = {name: weight for name, weight in WEIGHTS.items() if name != NORM}
    _check(found, {UP: _product(a, b, 2.0), "model.layers.1.mlp.up_proj.bias": np.float32(2) * bias}, base)


def test_a_layer_that_was_saved_too(model: Path, tmp_path: Path) -> None:
    """Peft saves an embedding's own weight beside its pair: it takes the checkpoint's place, and the product is added to it."""
    a, b = _pair((128, 50), 4)
    own = RNG.standard_normal((50, 128)).astype(np.float32)
    module = "model.embed_tokens"
    tensors = {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b, f"{module}.base_layer.weight": own}
    found = _merged(model, [_peft(tmp_path / "a", tensors)])
    assert found[EMB].tobytes() == (own + _product(a, b, 2.0).T).tobytes()


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.lora_A.default.weight", "model.layers.0.self_attn.q_proj.base_layer.lora_A.weight"]
)
def test_spellings_of_peft(model: Path, tmp_path: Path, name: str) -> None:
    """An adapter's own name in the middle, or the layer that it wraps, are no part of the weight's name."""
    a, b = _pair((64, 128), 4)
    _check(_merged(model, [_peft(tmp_path / "a", {name: a, name.replace("lora_A", "lora_B"): b})]), {Q: _product(a, b, 2.0)})


@pytest.mark.parametrize("wrapped", ["model.model.", "base_model.model.model.", "", "model."])
def test_wrapped_modules(model: Path, tmp_path: Path, wrapped: str) -> None:
    """A model that was wrapped once more, or once less, when the adapter was trained is found."""
    a, b = _pair((64, 128), 4)
    module = f"{wrapped}layers.0.self_attn.q_proj"
    _check(_merged(model, [_peft(tmp_path / "a", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b})]), {Q: _product(a, b, 2.0)})


# ---- kohya -------------------------------------------------------------------------------------------------------


def test_kohya(tmp_path: Path) -> None:
    """Flat names, an alpha of their own each, convolutions, and differences."""
    convolution = RNG.standard_normal((64, 32, 3, 3)).astype(np.float32)
    base = {
        "down_blocks.0.attn_1.to_q.weight": RNG.standard_normal((64, 32)).astype(np.float32),
        "down_blocks.0.attn_1.to_out.0.weight": RNG.standard_normal((64, 32)).astype(np.float32),
        "down_blocks.0.attn_1.to_out.0.bias": RNG.standard_normal(64).astype(np.float32),
        "down_blocks.0.conv.weight": convolution,
        "mid.norm.weight": RNG.standard_normal(32).astype(np.float32),
    }
    save_file(base, tmp_path / "unet.safetensors")
    (a, b), (c, d) = _pair((64, 32), 8, 1), _pair((64, 32), 8, 2)
    e, f = RNG.standard_normal((4, 32, 3, 3)).astype(np.float32), RNG.standard_normal((64, 4, 1, 1)).astype(np.float32)
    difference, other = RNG.standard_normal(32).astype(np.float32), RNG.standard_normal(64).astype(np.float32)
    save_file({
        "lora_unet_down_blocks_0_attn_1_to_q.lora_down.weight": a, "lora_unet_down_blocks_0_attn_1_to_q.lora_up.weight": b,
        "lora_unet_down_blocks_0_attn_1_to_q.alpha": np.array(4, np.float32),
        "lora_unet_down_blocks_0_attn_1_to_out_0.lora_down.weight": c, "lora_unet_down_blocks_0_attn_1_to_out_0.lora_up.weight": d,
        "lora_unet_down_blocks_0_conv.lora_down.weight": e, "lora_unet_down_blocks_0_conv.lora_up.weight": f,
        "lora_unet_down_blocks_0_conv.alpha": np.array(2, np.float16),
        "mid.norm.diff": difference, "down_blocks.0.attn_1.to_out.0.diff_b": other,
    }, tmp_path / "lora.safetensors")  # fmt: skip
    product = _product(e.reshape(4, -1), f.reshape(64, 4), 0.5).reshape(convolution.shape)
    _check(_merged(tmp_path / "unet.safetensors", [tmp_path / "lora.safetensors"]), {
        "down_blocks.0.attn_1.to_q.weight": _product(a, b, 0.5), "down_blocks.0.attn_1.to_out.0.weight": _product(c, d, 1.0),
        "down_blocks.0.conv.weight": product, "mid.norm.weight": difference, "down_blocks.0.attn_1.to_out.0.bias": other,
    }, base)  # fmt: skip


def test_flat_names_under_a_wrapper(tmp_path: Path) -> None:
    """A flat name is found under modules around the model, by whole words only."""
    weight = RNG.standard_normal((64, 32)).astype(np.float32)
    base = {"model.diffusion_model.blocks.0.to_q.weight": weight, "model.xblocks.0.to_q.weight": weight}
    save_file(base, tmp_path / "m.safetensors")
    a, b = _pair((64, 32), 4)
    save_file({"lora_unet_blocks_0_to_q.lora_down.weight": a, "lora_unet_blocks_0_to_q.lora_up.weight": b}, tmp_path / "l.safetensors")
    _check(_merged(tmp_path / "m.safetensors", [tmp_path / "l.safetensors"]), {"model.diffusion_model.blocks.0.to_q.weight": _product(a, b, 1.0)}, base)


def test_a_published_adapter_is_parsed_whole(test_data: Path, tmp_path: Path) -> None:
    """Of a Stable Diffusion LoRA from the wild every pair is a product: 386 tensors, none of them left over."""
    path = test_data / "sdlora" / "lora_disney.safetensors"
    with safe_open(path, "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
    assert len(shapes) == 386
    adapter = open_adapter(path, 1.0)
    pairs = [module.roles for module in adapter.modules.values()]
    assert all(set(roles) == {"down", "up"} for roles in pairs)
    taken = [name for roles in pairs for name in roles.values()]
    assert sorted(taken + list(adapter.replaced.values())) == sorted(shapes)
    # a checkpoint whose weights have the names and sizes that the adapter asks for
    base = {}
    for spelled, module in adapter.modules.items():
        down, up = (shapes[module.roles[role]] for role in ("down", "up"))
        base[f"{spelled}.weight"] = np.zeros((up[0], down[1]), np.float16)
    for weight, name in adapter.replaced.items():
        base[weight] = np.ones(shapes[name], np.float32)
    save_file(base, tmp_path / "m.safetensors")
    changes = resolve([adapter], open_checkpoint(tmp_path / "m.safetensors"))
    assert sorted(name for found in changes.values() for change in found for name in change.tensors) == sorted(shapes)


# ---- RWKV --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("spelled", ["blocks.0.att.key.lora.{}", "blocks.0.att.key.weight.lora.{}", "blocks.0.att.key.lora_{}"])
def test_rwkv(tmp_path: Path, spelled: str, turned: bool) -> None:
    """lora.0 and lora.1, with or without "weight"; web-rwkv's converter turns the first; vectors replace."""
    base = {"blocks.0.att.key.weight": RNG.standard_normal((64, 128)).astype(np.float16), "blocks.0.att.time_mix_k": np.zeros(64, np.float32)}
    save_file(base, tmp_path / "m.st")
    a, b = _pair((64, 128), 8)
    ends = "AB" if spelled.endswith("lora_{}") else "01"
    if turned and ends == "AB":
        pytest.skip("no converter turns these")
    vector = RNG.standard_normal(64).astype(np.float16)
    first = np.ascontiguousarray(a.T) if turned else a
    save_file({spelled.format(ends[0]): first, spelled.format(ends[1]): b, "blocks.0.att.time_mix_k": vector}, tmp_path / "l.st")
    found = _merged(tmp_path / "m.st", [(tmp_path / "l.st", 16)])
    assert found.pop("blocks.0.att.time_mix_k").tobytes() == vector.astype(np.float32).tobytes()
    _check(found, {"blocks.0.att.key.weight": _product(a, b, 2.0)}, {"blocks.0.att.key.weight": base["blocks.0.att.key.weight"]})


def test_rwkv_needs_an_alpha(tmp_path: Path) -> None:
    """Nothing in the file says how strong it is: the error says how to."""
    save_file({"blocks.0.att.key.weight": np.zeros((64, 128), np.float16)}, tmp_path / "m.st")
    a, b = _pair((64, 128), 8)
    save_file({"blocks.0.att.key.lora.0": a, "blocks.0.att.key.lora.1": b}, tmp_path / "l.st")
    with pytest.raises(UsageError, match="alpha") as caught:
        qc.load(tmp_path / "m.st", lora=[tmp_path / "l.st"])
    assert "FILE:ALPHA" in (caught.value.hint or "")


def test_rwkv_names_of_a_gguf(tmp_path: Path, write_gguf: Write) -> None:
    """An adapter with a GGUF's names finds the weights under RWKV's; and the other way round with names="file"."""
    weight = RNG.standard_normal((64, 128)).astype(np.float32)
    turned = RNG.standard_normal((128, 64)).astype(np.float32)
    path = write_gguf(
        tmp_path / "m.gguf", {"blk.0.time_mix_key.weight": weight, "blk.0.time_mix_w1.weight": turned}, {"general.architecture": "rwkv7"}
    )
    (a, b), (c, d) = _pair((64, 128), 8, 1), _pair((64, 128), 8, 2)
    ours = {"blocks.0.att.key.lora.0": a, "blocks.0.att.key.lora.1": b, "blocks.0.att.w1.lora.0": c, "blocks.0.att.w1.lora.1": d}
    theirs = {"blk.0.time_mix_key.weight.lora_a": a, "blk.0.time_mix_key.weight.lora_b": b}
    save_file(ours, tmp_path / "ours.st")
    save_file(theirs, tmp_path / "theirs.st")
    found = _merged(path, [(tmp_path / "ours.st", 8)])
    assert found["blocks.0.att.key.weight"].tobytes() == (weight + _product(a, b, 1.0)).tobytes()
    # this one stands in the file the other way round than its name says
    np.testing.assert_array_equal(found["blocks.0.att.w1"], turned.T + _product(c, d, 1.0))
    found = _merged(path, [(tmp_path / "theirs.st", 8)])
    assert found["blocks.0.att.key.weight"].tobytes() == (weight + _product(a, b, 1.0)).tobytes()


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("base", ["gguf", "safetensors"])
def test_an_adapter_in_a_ggufs_orientation(tmp_path: Path, write_gguf: Write, base: str, square: bool) -> None:
    """What is named as in a GGUF stands as in a GGUF: products and whole matrices of those that a checkpoint has turned."""
    file_shape = (64, 64) if square else (64, 96)  # of w2 in a GGUF; the checkpoint's is its transpose
    inside = RNG.standard_normal(file_shape).astype(np.float32)
    if base == "gguf":
        path = write_gguf(tmp_path / "m.gguf", {"blk.0.time_mix_w2.weight": inside}, {"general.architecture": "rwkv7"})
    else:
        path = tmp_path / "m.safetensors"
        save_file({"blocks.0.att.w2": np.ascontiguousarray(inside.T)}, path)
    a, b = _pair(file_shape, 8)
    keys = {"general.architecture": "rwkv7", "adapter.lora.alpha": (6, 8.0)}
    product = write_gguf(tmp_path / "p.gguf", {"blk.0.time_mix_w2.weight.lora_a": a, "blk.0.time_mix_w2.weight.lora_b": b}, keys)
    np.testing.assert_array_equal(_merged(path, [product])["blocks.0.att.w2"], (inside + _product(a, b, 1.0)).T)
    other = RNG.standard_normal(file_shape).astype(np.float32)
    whole = write_gguf(tmp_path / "w.gguf", {"blk.0.time_mix_w2.weight": other}, keys)
    np.testing.assert_array_equal(_merged(path, [whole])["blocks.0.att.w2"], other.T)
    with qc.load(path, "f16", other="keep", include=[], names="file", lora=[product], mode="off") as loaded:
        name = "blk.0.time_mix_w2.weight" if base == "gguf" else "blocks.0.att.w2"
        expected = inside + _product(a, b, 1.0)
        np.testing.assert_array_equal(loaded[name], expected if base == "gguf" else expected.T)


def test_gguf_adapter(tmp_path: Path, write_gguf: Write) -> None:
    """llama.cpp's own adapters: lora_a, lora_b, alpha in the header."""
    weight = RNG.standard_normal((64, 128)).astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.attn_q.weight": weight}, {"general.architecture": "llama"})
    a, b = _pair((64, 128), 8)
    keys = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": (6, 4.0)}
    adapter = write_gguf(tmp_path / "a.gguf", {"blk.0.attn_q.weight.lora_a": a, "blk.0.attn_q.weight.lora_b": b}, keys)
    assert _merged(path, [adapter])["blk.0.attn_q.weight"].tobytes() == (weight + _product(a, b, 0.5)).tobytes()


def test_gguf_adapter_of_the_embedding(tmp_path: Path, write_gguf: Write) -> None:
    """llama.cpp keeps the pair of its token embedding the other way round: a is [tokens, rank], b [width, rank]."""
    weight = RNG.standard_normal((96, 64)).astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", {"token_embd.weight": weight}, {"general.architecture": "llama"})
    a, b = RNG.standard_normal((96, 4)).astype(np.float32), RNG.standard_normal((64, 4)).astype(np.float32)
    keys = {"general.architecture": "llama", "adapter.lora.alpha": (6, 4.0)}
    adapter = write_gguf(tmp_path / "a.gguf", {"token_embd.weight.lora_a": a, "token_embd.weight.lora_b": b}, keys)
    assert _merged(path, [adapter])["token_embd.weight"].tobytes() == (weight + _product(np.ascontiguousarray(b.T), a, 1.0)).tobytes()


# ---- nothing is dropped ------------------------------------------------------------------------------------------


def _refused(model: Path, adapter: Path, match: str, tensor: str | None = None, alpha: Any = 8) -> SourceError:
    with pytest.raises(SourceError, match=match) as caught:
        qc.load(model, lora=[(adapter, alpha)])
    if tensor is not None:
        assert caught.value.tensor == tensor
        assert tensor in str(caught.value)
    return caught.value


def _adapter(folder: Path, tensors: Mapping[str, Array]) -> Path:
    save_file(dict(tensors), folder / "lora.safetensors")
    return folder / "lora.safetensors"


A, B = _pair((64, 128), 4)
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "match", "named"),
    [
        ({"model.layers.9.q_proj.lora_A.weight": A, "model.layers.9.q_proj.lora_B.weight": B}, "finds no weight", "model.layers.9.q_proj.lora_A.weight"),
        ({f"{MODULE}.lora_A.weight": A}, "other half", f"{MODULE}.lora_A.weight"),
        ({f"{MODULE}.lora_B.weight": B}, "other half", f"{MODULE}.lora_B.weight"),
        ({f"{MODULE}.alpha": np.float32(1).reshape(1)}, "belongs to no product", f"{MODULE}.alpha"),
        ({f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B[:63]}, "63 x 128", f"{MODULE}.lora_B.weight"),
        ({f"{MODULE}.lora_A.weight": A[:3], f"{MODULE}.lora_B.weight": B}, "no product", f"{MODULE}.lora_B.weight"),
        ({f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B.astype(np.int32)}, "floats", f"{MODULE}.lora_B.weight"),
        ({f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B, "something.else": A}, "finds no weight", "something.else"),
        ({f"{MODULE}.diff": B}, "has shape", f"{MODULE}.diff"),
        ({f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_down.weight": A, f"{MODULE}.lora_B.weight": B}, "says the same", None),
        ({f"{MODULE}.lora_A.weight": A[:0], f"{MODULE}.lora_B.weight": B[:, :0]}, "no rank", f"{MODULE}.lora_A.weight"),
        ({f"{MODULE}.diff": WEIGHTS[Q], f"{MODULE}.alpha": np.float32(7).reshape(1)}, "belongs to no product", f"{MODULE}.alpha"),
        ({f"{MODULE}.diff": WEIGHTS[Q], f"{MODULE}.lora_B.bias": A[:, 0].copy()}, "belongs to no product", f"{MODULE}.lora_B.bias"),
        ({"vision.layers.0.self_attn.q_proj.lora_A.weight": A, "vision.layers.0.self_attn.q_proj.lora_B.weight": B}, "finds no weight", None),
        ({"lora_unet_proj.lora_down.weight": A, "lora_unet_proj.lora_up.weight": B}, "finds no weight", None),
        ({"self_attn.q_proj.lora_A.weight": A, "self_attn.q_proj.lora_B.weight": B}, "finds no weight", "self_attn.q_proj.lora_A.weight"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value),
)  # fmt: skip
def test_nothing_is_dropped(model: Path, tmp_path: Path, tensors: dict[str, Array], match: str, named: str | None) -> None:
    """A tensor that cannot be applied fails the load, and is named."""
    _refused(model, _adapter(tmp_path, tensors), match, named)


def test_one_weight_twice(model: Path, tmp_path: Path) -> None:
    """Two tensors of one adapter for one weight are refused; both are named."""
    tensors = {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B, Q: WEIGHTS[Q]}
    error = _refused(model, _adapter(tmp_path, tensors), "changes")
    assert "lora_B" in str(error)


def test_two_weights_for_one_name(tmp_path: Path) -> None:
    """A name that could mean two weights is refused with both; none is guessed."""
    names = [f"{part}.model.layers.0.self_attn.q_proj.weight" for part in ("text_model", "transformer")]
    save_file(dict.fromkeys(names, WEIGHTS[Q]), tmp_path / "m.safetensors")
    error = _refused(tmp_path / "m.safetensors", _adapter(tmp_path, {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B}), "2 weights")
    assert all(name in str(error) for name in names)


@pytest.mark.parametrize(
    ("end", "what"),
    [("lora_magnitude_vector.weight", "DoRA"), ("dora_scale", "DoRA"), ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("lora_mid.weight", "Tucker"),
     ("oft_blocks", "OFT"), ("ia3_l", "IA3")],
)  # fmt: skip
def test_other_kinds_are_refused_by_name(model: Path, tmp_path: Path, end: str, what: str) -> None:
    """What is no sum of low-rank products is called by its name."""
    tensors = {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B, f"{MODULE}.{end}": A}
    _refused(model, _adapter(tmp_path, tensors), what, f"{MODULE}.{end}")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"use_dora": True}, "DoRA"), ({"init_lora_weights": "pissa_niter_4"}, "pissa"), ({"peft_type": "LOHA"}, "LOHA"), ({"layer_replication": [[0, 4]]}, "replication"),
        ({"r": 8}, "has rank 4, adapter_config.json says 8"), ({"r": "4"}, "numbers"), ({"lora_alpha": True}, "numbers"),
        ({"lora_alpha": 1e999}, "numbers"), ({"alpha_pattern": [1]}, "objects"), ({"alpha_pattern": {"(": 1}}, "no pattern"),
        ({"rank_pattern": {"(a|a)*b": 4}}, "for ever"), ({"rank_pattern": {"a{99999999999}": 4}}, "no pattern"),
        ({"rank_pattern": {".*.*.*.*x": 4}}, "for ever"),
        ({"lora_alpha": 10**400}, "numbers"),
    ],
    ids=str,
)  # fmt: skip
def test_configurations_that_are_refused(model: Path, tmp_path: Path, config: dict[str, Any], match: str) -> None:
    """A configuration that means something else, or nothing, fails the load."""
    folder = _peft(tmp_path / "a", {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B}, **config)
    _refused(model, folder, match, alpha=None)


@pytest.mark.parametrize("text", ["", "[", "[]", "1", '{"r": ' + "[" * 100_000])
def test_configurations_that_cannot_be_read(model: Path, tmp_path: Path, text: str) -> None:
    """A configuration that is not JSON is an error of the source."""
    folder = _peft(tmp_path / "a", {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B})
    (folder / "adapter_config.json").write_text(text)
    assert _refused(model, folder, "cannot be read|not a JSON object", alpha=None).path == folder / "adapter_config.json"


def test_a_missing_adapter(model: Path, tmp_path: Path) -> None:
    """A path that is not there, or holds no adapter, is an error of the source."""
    with pytest.raises(qc.SourceNotFoundError, match=r"nothing\.safetensors"):
        qc.load(model, lora=[tmp_path / "nothing.safetensors"])
    save_file({}, tmp_path / "empty.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match="no tensors"):
        qc.load(model, lora=[tmp_path / "empty.safetensors"])


@pytest.mark.parametrize("alpha", ["16", True, [], [("a",)], [("a", "x")], [("a", None)], [(3, 16)], [("", 8)], {1: 2}, float("inf"), float("nan"), 10**400], ids=lambda alpha: str(alpha)[:9])
def test_alpha_that_is_no_number(model: Path, tmp_path: Path, alpha: Any) -> None:
    """What is neither a number nor pairs of pattern and number is refused."""
    adapter = _adapter(tmp_path, {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B})
    with pytest.raises(UsageError):
        qc.load(model, lora=[(adapter, alpha)])


# ---- merged, then quantized --------------------------------------------------------------------------------------


def _stored(loaded: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {key: part.tobytes() for key, part in tensor.parts.items()} if isinstance(tensor, qc.QuantTensor) else tensor.tobytes()
        for name, tensor in loaded.items()
    }  # fmt: skip


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "int8", "int8-row"])
def test_merged_before_quantizing(model: Path, tmp_path: Path, quant: str) -> None:
    """What is stored are the codes of the merged weight; the hit has the same bytes."""
    adapter = _adapter(tmp_path, {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B})
    status, parts = quantize(quant, WEIGHTS[Q] + _product(A, B, 2.0))
    assert not status
    stored = []
    for hit in (False, True):
        with qc.load(model, quant, lora=[(adapter, 8)], cache=tmp_path / "c") as loaded:
            assert loaded.hit is hit
            found = loaded[Q]
            assert found.codec == quant
            assert all(found.parts[key].tobytes() == parts[key].tobytes() for key in parts if key != "quant_state")
            stored.append(_stored(loaded))
    assert stored[0] == stored[1]


def test_the_key(model: Path, tmp_path: Path) -> None:
    """Another alpha, order, file or none is another entry; the same alpha is a hit, wherever it was written."""
    first = _peft(tmp_path / "a", {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B})
    second = _adapter(tmp_path, {f"{MODULE}.lora_A.weight": A[::-1].copy(), f"{MODULE}.lora_B.weight": B})
    moved = tmp_path / "elsewhere" / "x.safetensors"
    moved.parent.mkdir()
    moved.write_bytes(second.read_bytes())
    kinds: list[Any] = [
        [], [first], [(first, 9)], [(second, 8)], [(first, 8), (second, 8)], [(second, 8), (first, 8)], [(first, [("*q_proj*", 1)])],
    ]  # fmt: skip
    keys = []
    for lora in kinds:
        with qc.load(model, lora=lora, cache=tmp_path / "c") as loaded:
            assert not loaded.hit, lora
        keys.append(loaded.keys_in_store)
    assert len({key for (key,) in keys}) == len(kinds)
    for lora, same in (([(first, 8)], 1), ([(first, 8.0)], 1), ([(first, [("*", 8)])], 1), ([(moved, 8)], 3), ([str(first)], 1)):
        with qc.load(model, lora=lora, cache=tmp_path / "c") as loaded:
            assert loaded.hit, lora
            assert loaded.keys_in_store == keys[same]


def test_adapters_are_applied_in_order(model: Path, tmp_path: Path) -> None:
    """Several adapters add up; one that replaces counts from its place on."""
    product = {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B}
    save_file(product, tmp_path / "p.safetensors")
    save_file({Q: np.ones((64, 128), np.float32)}, tmp_path / "r.safetensors")
    change = _product(A, B, 2.0)
    twice = WEIGHTS[Q] + change + change
    assert _merged(model, [(tmp_path / "p.safetensors", 8)] * 2)[Q].tobytes() == twice.tobytes()
    after = _merged(model, [tmp_path / "r.safetensors", (tmp_path / "p.safetensors", 8)])[Q]
    assert after.tobytes() == (np.ones((64, 128), np.float32) + change).tobytes()
    # the first would be lost without a trace
    with pytest.raises(SourceError, match=r"takes the place of .*p\.safetensors"):
        qc.load(model, lora=[(tmp_path / "p.safetensors", 8), tmp_path / "r.safetensors"])


@pytest.mark.parametrize("tile", [256, 1024, 1 << 20])
def test_tiles_do_not_show(model: Path, tmp_path: Path, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a weight is cut, the merged bytes are the same."""
    adapter = _adapter(tmp_path, {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B})
    monkeypatch.setattr(plan, "TILE", tile)
    _check(_merged(model, [(adapter, 8)]), {Q: _product(A, B, 2.0)})
    with qc.load(model, "nf4", lora=[(adapter, 8)], mode="off") as loaded:
        _, parts = quantize("nf4", WEIGHTS[Q] + _product(A, B, 2.0))
        assert loaded[Q].parts["codes"].tobytes() == parts["codes"].tobytes()


@pytest.mark.parametrize("quant", ["native", "nf4", "int8", "f16"])
def test_merged_on_gguf(tmp_path: Path, write_gguf: Write, quant: str) -> None:
    """A block tensor that an adapter changes is converted, decoded first; all others pass through."""
    import gguf

    weights = {name: RNG.standard_normal((64, 128)).astype(np.float32) for name in ("blk.0.attn_q.weight", "blk.0.attn_v.weight")}
    blocks = {name: gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_0) for name, weight in weights.items()}
    path = write_gguf(tmp_path / "m.gguf", {name: (2, (64, 128), block.tobytes()) for name, block in blocks.items()})
    adapter = _adapter(tmp_path, {"blk.0.attn_q.lora_A.weight": A, "blk.0.attn_q.lora_B.weight": B})
    decoded = gguf.quants.dequantize(blocks["blk.0.attn_q.weight"], gguf.GGMLQuantizationType.Q4_0)
    merged = decoded + _product(A, B, 2.0)
    with qc.load(path, quant, lora=[(adapter, 8)], cache=tmp_path / "c") as loaded:
        assert loaded["blk.0.attn_v.weight"].codec == "Q4_0"
        found = loaded["blk.0.attn_q.weight"]
        if quant in ("native", "f16"):
            assert found.tobytes() == merged.astype(np.float16).tobytes()
        else:
            _, parts = quantize(quant, merged)
            assert found.codec == quant
            assert all(found.parts[key].tobytes() == parts[key].tobytes() for key in parts if key != "quant_state")


def test_merged_beyond_float16(tmp_path: Path) -> None:
    """A merged weight that float16 cannot hold is kept in float32, with a warning that names it."""
    save_file({"a.weight": np.full((2, 64), 60000, np.float16)}, tmp_path / "m.safetensors")
    save_file({"a.diff": np.full((2, 64), 60000, np.float32)}, tmp_path / "l.safetensors")
    with pytest.warns(qc.QuantcacheWarning, match="'a.weight'"), qc.load(tmp_path / "m.safetensors", lora=[tmp_path / "l.safetensors"], mode="off") as loaded:
        np.testing.assert_array_equal(loaded["a.weight"], np.full((2, 64), 120000, np.float32))


def test_a_source_is_never_written(model: Path, tmp_path: Path) -> None:
    """Neither the checkpoint nor the adapter changes by a merge."""
    adapter = _adapter(tmp_path, {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B})
    before = model.read_bytes(), adapter.read_bytes()
    with qc.load(model, lora=[(adapter, 8)], cache=tmp_path / "c") as loaded:
        list(loaded.values())
    assert (model.read_bytes(), adapter.read_bytes()) == before
    assert load_file(model)[Q].tobytes() == WEIGHTS[Q].tobytes()
