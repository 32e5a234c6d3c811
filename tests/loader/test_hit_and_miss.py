"""A load is a miss, then a hit; damage, refusing disks and odd values change nothing of what a caller gets."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.quant import native
from quantcache.quant.codec import quantize

CODECS = ["nf4", "nf4-dq", "int8", "int8-row"]
WEIGHT = "blocks.0.att.key.weight"


def tensors(seed: int = 0) -> dict[str, Any]:
    """Return a small model: embedding, two layers, a norm, a head, integers."""
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {"emb.weight": rng.standard_normal((64, 128)).astype(np.float32)}
    for n in range(2):
        for name, shape in (("att.key", (256, 128)), ("ffn.value", (65, 256))):
            found[f"blocks.{n}.{name}.weight"] = (rng.standard_normal(shape) * 0.02).astype(np.float32)
        found[f"blocks.{n}.ln.weight"] = np.ones(129, np.float32)
    found["head.weight"] = rng.standard_normal((64, 128)).astype(np.float32)
    found["steps"] = np.arange(3)
    found["empty"] = np.empty((0, 4), np.float32)
    return found


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    """Write the small model."""
    path = tmp_path / "a model.safetensors"
    save_file(tensors(), path)
    return path


def snapshot(model: qc.Model) -> dict[str, dict[str, bytes]]:
    """Copy every byte of every tensor."""
    return {
        name: {part: a.tobytes() for part, a in t.parts.items()} if isinstance(t, qc.QuantTensor) else {"": t.tobytes()}
        for name, t in model.items()
    }


def load_all(path: Path, cache: Path, **options: Any) -> tuple[bool, dict[str, dict[str, bytes]]]:
    """Load, copy all bytes, close."""
    with qc.load(path, cache=cache, **options) as model:
        return model.hit, snapshot(model)


def entries(cache: Path) -> list[Path]:
    """Return the entry files."""
    return sorted((cache / "v1" / "entries").glob("*/*.safetensors"))


@pytest.mark.parametrize("quant", CODECS)
def test_miss_then_hit(model_path: Path, tmp_path: Path, quant: str) -> None:
    """Both give the bytes that the codec gives for the whole tensor; the second quantizes nothing."""
    hit, first = load_all(model_path, tmp_path / "c", quant=quant)
    again, second = load_all(model_path, tmp_path / "c", quant=quant)
    assert (hit, again) == (False, True)
    assert first == second
    expected = quantize(quant, tensors()[WEIGHT])[1]
    assert first[WEIGHT] == {name: array.tobytes() for name, array in expected.items()}
    assert first["emb.weight"][""] == tensors()["emb.weight"].astype(np.float16).tobytes()
    assert first["steps"][""] == tensors()["steps"].tobytes()


def test_entry_opens_with_the_library(model_path: Path, tmp_path: Path) -> None:
    """Safetensors opens an entry and reads the same codes, under bitsandbytes' names."""
    load_all(model_path, tmp_path / "c")
    (entry,) = entries(tmp_path / "c")
    expected = quantize("nf4", tensors()[WEIGHT])[1]
    with safe_open(entry, "numpy") as file:
        assert file.metadata()["format"] == "pt"
        assert file.get_tensor(WEIGHT).tobytes() == expected["codes"].tobytes()
        assert file.get_tensor(f"{WEIGHT}.absmax").tobytes() == expected["absmax"].tobytes()


def test_path_name_and_time_do_not_matter(model_path: Path, tmp_path: Path) -> None:
    """A renamed copy with another time is a hit; other content, a codec or a rule is not."""
    load_all(model_path, tmp_path / "c")
    copy = tmp_path / "other" / "copy.st"
    copy.parent.mkdir()
    shutil.copyfile(model_path, copy)
    os.utime(copy, (1, 1))
    assert load_all(copy, tmp_path / "c")[0]
    assert not load_all(copy, tmp_path / "c", quant="int8")[0]
    assert not load_all(copy, tmp_path / "c", rules=[("blocks.0.*", "int8")])[0]
    save_file(tensors(1), copy)
    assert not load_all(copy, tmp_path / "c")[0]


def test_replaced_content_with_restored_time(model_path: Path, tmp_path: Path) -> None:
    """The same size and modification time with other content is never a stale hit."""
    _, first = load_all(model_path, tmp_path / "c")
    before = model_path.stat()
    raw = bytearray(model_path.read_bytes())
    value = tensors()[WEIGHT][7, 7].tobytes()
    at = raw.index(value)
    raw[at : at + 4] = np.float32(9.0).tobytes()
    model_path.write_bytes(raw)
    os.utime(model_path, ns=(before.st_atime_ns, before.st_mtime_ns))
    hit, second = load_all(model_path, tmp_path / "c")
    assert not hit
    assert first != second


@pytest.mark.parametrize("verify", ["touch", "open"])
def test_flipped_byte_never_reaches_the_caller(model_path: Path, tmp_path: Path, verify: str) -> None:
    """Whichever tensor is damaged, the caller gets the right bytes and one warning, and the entry is rebuilt."""
    _, right = load_all(model_path, tmp_path / "c")
    (entry,) = entries(tmp_path / "c")
    clean = entry.read_bytes()
    with qc.Cache(tmp_path / "c") as store:
        header = store.open(entry.stem).header
    for key, slot in header.slots.items():
        if not slot.nbytes:
            continue
        raw = bytearray(clean)
        raw[header.offsets[key] + slot.nbytes // 2] ^= 1
        entry.write_bytes(raw)
        with pytest.warns(qc.QuantcacheWarning, match="damaged") as caught:
            _, got = load_all(model_path, tmp_path / "c", verify=verify)
        assert got == right, key
        assert len(caught) == 1
        assert any((tmp_path / "c" / "v1" / "quarantine").iterdir())
        assert load_all(model_path, tmp_path / "c", verify=verify) == (True, right)


def test_every_byte_of_the_header(model_path: Path, tmp_path: Path) -> None:
    """A flip anywhere in the header is damage, never another tensor or an exception."""
    _, right = load_all(model_path, tmp_path / "c")
    (entry,) = entries(tmp_path / "c")
    clean = entry.read_bytes()
    with qc.Cache(tmp_path / "c") as store:
        start = min(store.open(entry.stem).header.offsets.values())
    for position in [*range(9), *range(9, start, 97)]:
        raw = bytearray(clean)
        raw[position] ^= 0x21
        entry.write_bytes(raw)
        with pytest.warns(qc.QuantcacheWarning, match="damaged"):
            assert load_all(model_path, tmp_path / "c") == (False, right)


@pytest.mark.parametrize("keep", [0, 7, 100, 4096, -1])
def test_truncated_entry(model_path: Path, tmp_path: Path, keep: int) -> None:
    """An entry that was cut anywhere is damage."""
    _, right = load_all(model_path, tmp_path / "c")
    (entry,) = entries(tmp_path / "c")
    entry.write_bytes(entry.read_bytes()[:keep])
    with pytest.warns(qc.QuantcacheWarning, match="damaged"):
        assert load_all(model_path, tmp_path / "c") == (False, right)


def test_values_that_refuse(tmp_path: Path) -> None:
    """NaN and Inf are kept and named, float16's range too; scales that float16 cannot hold are float32."""
    content = tensors()
    content[WEIGHT][3, 5] = np.nan
    content["blocks.1.att.key.weight"] *= np.float32(1e-7)
    content["emb.weight"][0, 0] = 1e6
    path = tmp_path / "m.safetensors"
    save_file(content, path)
    for expected in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with qc.load(path, quant="int8", cache=tmp_path / "c") as model:
                assert model.hit is expected
                np.testing.assert_array_equal(model[WEIGHT], content[WEIGHT])
                np.testing.assert_array_equal(model["emb.weight"], content["emb.weight"])
                tiny = model["blocks.1.att.key.weight"]
                assert isinstance(tiny, qc.QuantTensor)
                assert tiny.parts["scales"].dtype == np.float32
                error = tiny.dequantize(np.float32) - content["blocks.1.att.key.weight"]
                assert np.sqrt(np.square(error).mean() / np.square(content["blocks.1.att.key.weight"]).mean()) < 0.006
                reasons = {report.name: report.reason for report in model.report()}
        named = [str(w.message) for w in caught]
        assert sum(WEIGHT in text for text in named) == (0 if expected else 1)
        assert "NaN" in reasons[WEIGHT]
        assert "float16" in reasons["emb.weight"]
    (entry,) = entries(tmp_path / "c")
    with safe_open(entry, "numpy") as file:  # the file was rearranged: still one that the library accepts
        assert file.get_tensor(WEIGHT).dtype == np.float32


def sharded(folder: Path) -> Path:
    """Write three shards and their index."""
    import json

    folder.mkdir()
    content = tensors()
    names = sorted(content)
    weight_map = {}
    for n in range(3):
        shard = f"model-{n + 1:05d}-of-00003.safetensors"
        save_file({name: content[name] for name in names[n::3]}, folder / shard)
        weight_map |= dict.fromkeys(names[n::3], shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_resume(tmp_path: Path) -> None:
    """A sharded checkpoint is an entry a shard; what is missing is built, the rest is served."""
    folder = sharded(tmp_path / "sharded")
    hit, first = load_all(folder, tmp_path / "c")
    assert not hit
    assert first.keys() == tensors().keys()
    found = entries(tmp_path / "c")
    assert len(found) == 3
    kept = {path: path.stat().st_ino for path in found[1:]}
    found[0].unlink()
    hit, second = load_all(folder, tmp_path / "c")
    assert (hit, second) == (False, first)
    assert {path: path.stat().st_ino for path in kept} == kept
    assert load_all(folder, tmp_path / "c") == (True, first)


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "rename", "fsync", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_refusing_disk(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pwrite: Any, call: str, code: int
) -> None:
    """A disk that refuses costs one warning and the saving, never the load; nothing is left behind."""
    _, right = load_all(model_path, tmp_path / "warm")
    qc.Cache(tmp_path / "c").close()
    real = getattr(os, call)

    def refuse(*arguments: Any, **named: Any) -> Any:
        if call == "open" and not (str(arguments[0]).endswith(".tmp") and arguments[1] & os.O_CREAT):
            return real(*arguments, **named)
        raise OSError(code, os.strerror(code))

    with pwrite(refuse if call == "pwrite" else os.pwrite), monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.warns(qc.QuantcacheWarning, match="not saved") as caught:
            hit, got = load_all(model_path, tmp_path / "c")
    assert (hit, got) == (False, right)
    assert len(caught) == 1
    assert not entries(tmp_path / "c")
    assert not list((tmp_path / "c" / "v1" / "tmp").iterdir())
    assert load_all(model_path, tmp_path / "c") == (False, right)


def test_full_disk_halfway(model_path: Path, tmp_path: Path, pwrite: Any) -> None:
    """A disk that fills up in the middle leaves the tensors before and after it right."""
    _, right = load_all(model_path, tmp_path / "warm")
    real, calls = os.pwrite, []

    def refuse(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "full")
        return real(*arguments)

    with pwrite(refuse), pytest.warns(qc.QuantcacheWarning, match="not saved"):
        assert load_all(model_path, tmp_path / "c") == (False, right)


def test_modes(model_path: Path, tmp_path: Path) -> None:
    """Off neither looks nor stores, readonly looks, refresh builds again."""
    cache = tmp_path / "c"
    _, right = load_all(model_path, cache, mode="off")
    assert not cache.exists()
    assert load_all(model_path, cache, mode="readonly") == (False, right)
    assert not cache.exists()
    load_all(model_path, cache)
    assert load_all(model_path, cache, mode="readonly") == (True, right)
    assert load_all(model_path, cache, mode="off") == (False, right)
    (entry,) = entries(cache)
    before = entry.stat().st_ino
    assert load_all(model_path, cache, mode="refresh") == (False, right)
    assert entry.stat().st_ino != before


def test_source_that_changes_is_not_stored(model_path: Path, tmp_path: Path) -> None:
    """What was read while the file changed is handed over, and not saved under anybody's key."""
    with pytest.warns(qc.QuantcacheWarning, match="changed"), qc.load(
        model_path, cache=tmp_path / "c", progress=lambda _: os.utime(model_path)
    ) as model:
        model.report()
    assert not entries(tmp_path / "c")


def test_cancelled_load_leaves_nothing(model_path: Path, tmp_path: Path) -> None:
    """A progress callback that says no stops the load; the store holds nothing of it."""
    with pytest.raises(qc.QuantcacheError), qc.load(model_path, cache=tmp_path / "c", progress=lambda _: False) as model:
        snapshot(model)
    assert not entries(tmp_path / "c")
    assert not list((tmp_path / "c" / "v1" / "tmp").iterdir())


def test_data_is_the_same_for_threads_and_levels(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the number of threads nor the CPU level changes a stored byte."""
    seen = set()
    for number, level in enumerate(native.available()):
        monkeypatch.setenv("QUANTCACHE_KERNEL", level)
        native.level.cache_clear()
        native.kernel.cache_clear()
        for threads in (1, 2):
            cache = tmp_path / f"c{number}{threads}"
            load_all(model_path, cache, quant="nf4-dq", threads=threads)
            (entry,) = entries(cache)
            with qc.Cache(cache) as store:
                start = min(store.open(entry.stem).header.offsets.values())
            seen.add((entry.stem, entry.read_bytes()[start:]))
    monkeypatch.undo()
    native.level.cache_clear()
    native.kernel.cache_clear()
    assert len(seen) == 1


def test_layers_and_mapping(model_path: Path, tmp_path: Path) -> None:
    """Layers come in order, embeddings first; the mapping knows its names; parts cannot be written."""
    for _ in range(2):
        with qc.load(model_path, cache=tmp_path / "c") as model:
            layers = [set(layer) for layer in model.layers()]
            assert layers[0] == {"emb.weight"}
            assert layers[1] == {name for name in tensors() if name.startswith("blocks.0.")}
            assert layers[2] == {name for name in tensors() if name.startswith("blocks.1.")}
            assert set(model) == set(tensors())
            assert "nothing" not in model
            with pytest.raises(KeyError):
                model["nothing"]
            tensor = model[WEIGHT]
            assert isinstance(tensor, qc.QuantTensor)
            for part in tensor.parts.values():
                with pytest.raises(ValueError, match="read-only"):
                    part[...] = 0


def test_factor_and_rules(model_path: Path, tmp_path: Path) -> None:
    """The first rule counts; a power of two is folded in exactly; another factor is refused."""
    recipe = qc.Recipe([("blocks.0.*", "int8"), ("blocks.1.ffn.*", "nf4", 0.25), ("*.weight", "nf4")])
    with qc.load(model_path, recipe, cache=tmp_path / "c") as model, qc.load(model_path, cache=tmp_path / "c") as plain:
        codecs = {name: t.codec for name, t in model.items() if isinstance(t, qc.QuantTensor)}
        assert codecs[WEIGHT] == "int8"
        name = "blocks.1.ffn.value.weight"
        scaled, whole = model[name], plain[name]
        assert isinstance(scaled, qc.QuantTensor)
        assert isinstance(whole, qc.QuantTensor)
        np.testing.assert_array_equal(scaled.parts["codes"], whole.parts["codes"])
        np.testing.assert_array_equal(scaled.parts["absmax"], whole.parts["absmax"] * np.float32(0.25))
    with pytest.raises(qc.UsageError, match="power of two"):
        qc.Recipe([("*", "nf4", 0.3)])


def test_native_touches_no_store(model_path: Path, tmp_path: Path) -> None:
    """quant="native" gives views of the source and stores nothing."""
    with qc.load(model_path, quant="native", cache=tmp_path / "c") as model:
        assert model.hit
        for name, array in tensors().items():
            np.testing.assert_array_equal(model[name], array)
    assert not entries(tmp_path / "c")


def test_damage_in_a_read_only_store(model_path: Path, tmp_path: Path) -> None:
    """A damaged entry that cannot be moved away is built again in memory, however often."""
    _, right = load_all(model_path, tmp_path / "c")
    (entry,) = entries(tmp_path / "c")
    raw = bytearray(entry.read_bytes())
    with qc.Cache(tmp_path / "c") as store:
        raw[store.open(entry.stem).header.offsets[WEIGHT]] ^= 1
    entry.write_bytes(raw)
    for _ in range(2):
        with pytest.warns(qc.QuantcacheWarning, match="left where it is"):
            assert load_all(model_path, tmp_path / "c", mode="readonly")[1] == right
    assert entry.exists()


def test_disk_fills_up_between_the_tiles_of_one_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles that are in the staged file already are not lost when another tensor finds the disk full."""
    rng = np.random.default_rng(0)
    path = tmp_path / "m.safetensors"
    content = {f"blocks.{n}.a.weight": rng.standard_normal((3072, 1024)).astype(np.float32) for n in range(3)}
    save_file(content, path)
    _, right = load_all(path, tmp_path / "warm", quant="int8")
    from quantcache.cache.blobs import StagedEntry
    from quantcache.errors import CacheError

    real = StagedEntry.place

    def refuse(self: StagedEntry, key: str, position: int) -> tuple[int, int]:
        if key.startswith("blocks.2"):
            raise CacheError("full")
        return real(self, key, position)

    monkeypatch.setattr(StagedEntry, "place", refuse)
    for name in content:  # whichever is asked for first, in whatever state the others are
        with pytest.warns(qc.QuantcacheWarning, match="not saved"), qc.load(
            path, quant="int8", cache=tmp_path / "c"
        ) as model:
            model["blocks.2.a.weight"]
            model[name]
            assert snapshot(model) == right


def test_failed_build_gives_its_lock_back(model_path: Path, tmp_path: Path) -> None:
    """A load that was stopped, and never closed, does not make the next one wait."""
    stopped = qc.load(model_path, cache=tmp_path / "c", progress=lambda _: False)
    with pytest.raises(qc.QuantcacheError):
        snapshot(stopped)
    with qc.Cache(tmp_path / "c", lock_timeout_s=60) as cache, qc.load(model_path, cache=cache) as model:
        assert not model.hit
    assert len(entries(tmp_path / "c")) == 1
    stopped.cancel()


def test_path_that_is_not_utf8(tmp_path: Path) -> None:
    """A name that is no text is stored, listed and found again like any other."""
    path = tmp_path / os.fsdecode(b"m\xff.safetensors")
    try:
        path.touch()
    except OSError:
        pytest.skip("this file system takes no such names")
    save_file(tensors(), path)
    load_all(path, tmp_path / "c")
    (tmp_path / "c" / "v1" / "index.sqlite3").unlink()
    assert load_all(path, tmp_path / "c")[0]
    with qc.Cache(tmp_path / "c") as cache:
        assert len(cache.keys_of_model(path.resolve())) == 1


def test_what_cannot_fit_evicts_nothing(model_path: Path, tmp_path: Path) -> None:
    """An entry that is larger than the whole limit costs no other entry."""
    with qc.Cache(tmp_path / "c", max_size=1 << 30, keep_free=0) as cache:
        qc.load(model_path, cache=cache).close()
    with qc.Cache(tmp_path / "c", max_size=1000, keep_free=0) as cache, pytest.warns(qc.QuantcacheWarning, match="fit"):
        qc.load(model_path, quant="int8", cache=cache).close()
    assert len(entries(tmp_path / "c")) == 1


def test_documents_of_other_loaders(tmp_path: Path) -> None:
    """get_or_build takes any JSON; a strange one does not spoil the store for others; a failure leaves nothing."""
    from quantcache.cache.container import Slot

    def build(stage: Any) -> Any:
        staged = stage({"x": Slot("U8", (3,), 3)})
        staged.write("x", 0, b"abc")
        return staged, []

    with qc.Cache(tmp_path / "c") as cache:
        document = {"source": "hf:somebody/model", "size": 1 << 70}
        assert bytes(cache.get_or_build(document, build).view("x")) == b"abc"
        (tmp_path / "c" / "v1" / "index.sqlite3").unlink()
    with qc.Cache(tmp_path / "c") as cache:
        assert bytes(cache.get_or_build(document, lambda stage: 1 / 0).view("x")) == b"abc"
        with pytest.raises(ZeroDivisionError):
            cache.get_or_build({"other": 1}, lambda stage: (build(stage), 1 / 0))
        assert not list((tmp_path / "c" / "v1" / "tmp").iterdir())
        assert len(cache.entries()) == 1


def test_a_hit_imports_nothing_slow(model_path: Path, tmp_path: Path) -> None:
    """What a hit does not need is not imported: others' readers, a GPU, progress bars, codecs' peers."""
    load_all(model_path, tmp_path / "c")
    slow = {"gguf", "safetensors", "wgpu", "rich", "typer", "torch", "ml_dtypes", "concurrent.futures.process", "asyncio", "multiprocessing"}
    slow |= {"hmac", "tomllib", "quantcache.cache.explain"}
    code = (
        "import sys, quantcache as qc\n"
        "with qc.load(sys.argv[1], cache=sys.argv[2]) as model:\n"
        "    assert model.hit\n"
        "    for layer in model.layers(): pass\n"
        f"print(sorted(set({sorted(slow)!r}) & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model_path), str(tmp_path / "c")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
