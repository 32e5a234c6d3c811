"""Vary each factor of a load alone: another key; vary what must not matter: the same key, the same bytes, a hit."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.cache.explain import explain
from quantcache.loader.why import explain_load

RNG = np.random.default_rng(3)
WEIGHTS = {"blocks.0.key.weight": RNG.standard_normal((64, 128)).astype(np.float32), "blocks.0.ln.weight": np.ones(64, np.float32)}
A, B = np.ones((2, 128), np.float32), np.ones((64, 2), np.float32)

#: one factor each: what differs from the plain load
FACTORS: dict[str, dict[str, Any]] = {
    "codec": {"quant": "int8"}, "double quantization": {"quant": "nf4-dq"}, "a rule": {"rules": [("blocks.*", "int8")]},
    "a factor": {"rules": [("*.key.weight", "nf4", 0.5)]}, "include": {"include": ["*"]}, "exclude": {"exclude": ["*key*"]},
    "other": {"other": "keep"}, "native": {"native": "convert"}, "adapter": {"lora": 2}, "alpha": {"lora": 4},
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Write a small checkpoint, and an adapter beside it; both old enough to be trusted."""
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    save_file({"blocks.0.key.lora.0": A, "blocks.0.key.lora.1": B}, tmp_path / "lora.st")
    _age(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def _age(path: Path) -> None:
    os.utime(path, ns=(time.time_ns(), time.time_ns() - 10**10))


def _load(path: Path, root: Path, **options: Any) -> tuple[bool, list[str], dict[str, bytes]]:
    if "lora" in options:
        options["lora"] = [(path.with_name("lora.st"), options["lora"])]
    with qc.load(path, cache=root, **options) as loaded:
        content = {
            f"{name} {part}": array.tobytes()
            for name, tensor in loaded.items()
            for part, array in (tensor.parts.items() if isinstance(tensor, qc.QuantTensor) else [("", tensor)])
        }
    return loaded.hit, loaded.keys_in_store, content


def test_every_factor_is_another_key(model: Path, tmp_path: Path) -> None:
    """Each factor alone makes a miss and an entry of its own; afterwards every one of them is a hit."""
    keys = {}
    for factor, options in {"plain": {}, **FACTORS}.items():
        hit, keys[factor], _ = _load(model, tmp_path / "c", **options)
        assert not hit, factor
    assert len({tuple(found) for found in keys.values()}) == len(keys)
    for factor, options in {"plain": {}, **FACTORS}.items():
        assert _load(model, tmp_path / "c", **options)[:2] == (True, keys[factor]), factor


def test_content_is_a_factor(model: Path, tmp_path: Path) -> None:
    """One bit of one weight is another key, whatever the size and the times say."""
    _, first, _ = _load(model, tmp_path / "c")
    found = model.stat()
    raw = bytearray(model.read_bytes())
    raw[-1] ^= 1
    model.write_bytes(raw)
    os.utime(model, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert model.stat().st_size == found.st_size
    hit, second, _ = _load(model, tmp_path / "c")
    assert not hit
    assert second != first


def test_replaced_within_the_grain_of_the_clock(tmp_path: Path) -> None:
    """A file that is written again and again, as fast as it goes, is never served what it was before."""
    path = tmp_path / "m.safetensors"
    for number in range(25):
        weights = WEIGHTS | {"blocks.0.ln.weight": np.full(64, number, np.float32)}
        save_file(weights, path)
        _, _, content = _load(path, tmp_path / "c", other="keep")
        assert content["blocks.0.ln.weight "] == weights["blocks.0.ln.weight"].tobytes(), number


def test_moved_over_within_the_grain(tmp_path: Path) -> None:
    """The same for files that are moved over one another, with the times of the first."""
    paths = []
    for number in range(2):
        path = tmp_path / f"{number}.safetensors"
        save_file(WEIGHTS | {"blocks.0.ln.weight": np.full(64, number, np.float32)}, path)
        os.utime(path, ns=(10**18, 10**18))
        paths.append(path)
    target = tmp_path / "m.safetensors"
    for turn in range(6):
        shutil.copy2(paths[turn % 2], tmp_path / "new")
        os.replace(tmp_path / "new", target)
        _, _, content = _load(target, tmp_path / "c", other="keep")
        assert content["blocks.0.ln.weight "] == np.full(64, turn % 2, np.float32).tobytes()


@pytest.mark.parametrize("level", ["reference", "scalar"])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_does_not_matter(model: Path, tmp_path: Path, level: str, threads: int, kernel_level: Any) -> None:
    """Path, name, times, links, the order of names in the file, threads and the CPU's level: one key, the same bytes."""
    _, key, content = _load(model, tmp_path / "c")
    other = tmp_path / "Else Where" / "MODEL.safetensors"
    other.parent.mkdir()
    shutil.copyfile(model, other)
    shutil.copyfile(model.with_name("lora.st"), other.with_name("lora.st"))
    os.link(model, tmp_path / "hard.safetensors")
    (tmp_path / "soft.safetensors").symlink_to(model)
    (tmp_path / "folder").symlink_to(other.parent, target_is_directory=True)
    kernel_level(level)
    for number, path in enumerate((other, tmp_path / "hard.safetensors", tmp_path / "soft.safetensors", tmp_path / "folder" / "MODEL.safetensors")):
        assert _load(path, tmp_path / "c", threads=threads) == (True, key, content), path
        assert _load(path, tmp_path / f"c{number}", threads=threads) == (False, key, content), path
    os.utime(model, ns=(1, 1))
    assert _load(model, tmp_path / "c") == (True, key, content)


def test_names_that_differ_in_case(tmp_path: Path) -> None:
    """Sources whose names differ in case only do not share an entry unless they share their bytes."""
    keys = []
    for name, value in (("Model.safetensors", 1.0), ("model.safetensors", 2.0)):
        save_file(WEIGHTS | {"blocks.0.ln.weight": np.full(64, value, np.float32)}, tmp_path / name)
        if name == "model.safetensors" and (tmp_path / "Model.safetensors").samefile(tmp_path / name):
            pytest.skip("the file system does not tell them apart")
        keys.append(_load(tmp_path / name, tmp_path / "c")[1])
    assert keys[0] != keys[1]
    assert all(key == key.lower() for (key,) in keys)


# ---- explain -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "named"),
    [("codec", "codecs int8"), ("a rule", "recipe rules: blocks.* int8 0"), ("a factor", "nf4 -1"), ("other", "recipe other"),
     ("native", "recipe native"), ("exclude", "*key*"), ("adapter", "adapters 1")],
)  # fmt: skip
def test_explain_names_the_factor(model: Path, tmp_path: Path, factor: str, named: str) -> None:
    """What is asked for differs from the nearest entry in that factor, and in nothing of the source."""
    _, (key,), _ = _load(model, tmp_path / "c")
    options = dict(FACTORS[factor])
    if "lora" in options:
        options["lora"] = [(model.with_name("lora.st"), options["lora"])]
    with qc.Cache(tmp_path / "c") as store:
        (file,) = explain_load(store, model, **options)
        found = file.explanation
        assert found is not None
        assert (found.state, found.nearest) == ("miss", key)
        differing = [f.name for f in found.factors if not f.same]
        assert any(named in name for name in differing), differing
        assert not any("source" in name or "order" in name for name in differing)
        (plain,) = explain_load(store, model)
        assert plain.explanation is not None
        assert (plain.explanation.state, plain.explanation.key) == ("hit", key)


def test_explain_compares_with_the_same_source(model: Path, tmp_path: Path) -> None:
    """An entry of the same model is nearer than one of another with the same settings."""
    _, (key,), _ = _load(model, tmp_path / "c")
    save_file(WEIGHTS | {"blocks.0.ln.weight": np.zeros(64, np.float32)}, tmp_path / "other.safetensors")
    _load(tmp_path / "other.safetensors", tmp_path / "c", quant="int8")
    with qc.Cache(tmp_path / "c") as store:
        (file,) = explain_load(store, model, "int8")
        assert file.explanation is not None
        assert file.explanation.nearest == key


def test_explain_damage_and_nothing(model: Path, tmp_path: Path) -> None:
    """A damaged entry is called that; an empty store has nothing to compare with."""
    with qc.Cache(tmp_path / "c") as store:
        found = explain(store, {"any": "document", "list": [], "nested": [{"a": 1}]})
        assert (found.state, found.nearest) == ("miss", None)
        _, (key,), _ = _load(model, tmp_path / "c")
        store.path_of(key).write_bytes(b"garbage")
        (file,) = explain_load(store, model)
        assert file.explanation is not None
        assert file.explanation.state == "damaged"


def test_explain_native(model: Path, tmp_path: Path) -> None:
    """What passes through needs no entry."""
    with qc.Cache(tmp_path / "c") as store:
        (file,) = explain_load(store, model, "native")
        assert file.explanation is None
        assert file.notes
