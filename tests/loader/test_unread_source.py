"""A hit of a file that has not changed reads no byte of it; whatever only its bytes could tell is refused or asked for all the same."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.cache import key
from quantcache.loader import mapping, shards
from quantcache.loader import model as loader_model
from quantcache.loader.formats.gguf import Gguf
from quantcache.loader.formats.safetensors import Safetensors
from quantcache.loader.source import Source

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust files that have just been written."""
    monkeypatch.setattr(key, "RACY_NS", -(10**9))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have every attempt to read a source noted."""
    read: list[str] = []
    for known in (Safetensors, Gguf):
        real = known.parse
        monkeypatch.setattr(known, "parse", lambda self, file, real=real: (read.append("parse"), real(self, file))[1])
    for name in ("populate", "will_need"):
        real_call = getattr(mapping, name)
        monkeypatch.setattr(mapping, name, lambda *given, name=name, real=real_call: (read.append(name), real(*given))[1])
    return read


def weight(seed: int) -> Any:
    """Return a weight that is quantized."""
    return np.random.default_rng(seed).standard_normal((64, 128)).astype(np.float32)


def sharded(folder: Path, names: list[str], *, index: bool) -> Path:
    """Write a checkpoint with one weight a file."""
    folder.mkdir()
    files = {name: f"model-{n + 1:05d}-of-{len(names):05d}.safetensors" for n, name in enumerate(names)}
    for n, (name, file) in enumerate(files.items()):
        save_file({name: weight(n)}, folder / file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def codes(tensor: Any) -> bytes:
    """Return a tensor's codes, or all of its bytes."""
    found: bytes = (tensor.parts["codes"] if isinstance(tensor, qc.QuantTensor) else tensor).tobytes()
    return found


def load(path: Path, cache: Path, **options: Any) -> tuple[bool, dict[str, bytes]]:
    """Load all tensors; return whether it was a hit, and their codes."""
    with qc.load(path, "int8", cache=cache, **options) as model:
        return model.hit, {name: codes(tensor) for name, tensor in model.items()}


@pytest.mark.parametrize("options", [{}, {"mode": "readonly"}, {"verify": "open"}, {"verify": "off"}, {"names": "file"}], ids=str)
def test_one_file(tmp_path: Path, unread: list[str], options: dict[str, Any]) -> None:
    """A file that was stored is served without being read, in whichever way."""
    save_file({"a.weight": weight(0), "b": np.ones(3, np.float32)}, tmp_path / "m.safetensors")
    missed = load(tmp_path / "m.safetensors", tmp_path / "c")
    assert unread
    unread.clear()
    assert load(tmp_path / "m.safetensors", tmp_path / "c", **options) == (True, missed[1])
    with qc.load(tmp_path / "m.safetensors", "int8", cache=tmp_path / "c", **options) as model:
        assert {report.name: report.source_nbytes for report in model.report()} == {"a.weight": 64 * 128 * 4, "b": 12}
    assert not unread


@pytest.mark.parametrize("index", [False, True])
def test_many_files(tmp_path: Path, unread: list[str], index: bool) -> None:
    """So is a checkpoint of many."""
    folder = sharded(tmp_path / "m", ["a.weight", "b.weight", "c.weight"], index=index)
    missed = load(folder, tmp_path / "c")
    unread.clear()
    assert load(folder, tmp_path / "c") == (True, missed[1])
    assert not unread


def test_one_of_many_is_missing(tmp_path: Path) -> None:
    """Files that are stored are served beside those that are quantized again."""
    folder = sharded(tmp_path / "m", ["a.weight", "b.weight", "c.weight"], index=False)
    missed = load(folder, tmp_path / "c")
    with qc.load(folder, "int8", cache=tmp_path / "c") as model, qc.Cache(tmp_path / "c") as cache:
        cache.path_of(model.keys_in_store[1]).unlink()
    assert load(folder, tmp_path / "c") == (False, missed[1])
    assert load(folder, tmp_path / "c") == (True, missed[1])


def test_index_that_has_become_wrong(tmp_path: Path) -> None:
    """An index that puts a tensor elsewhere is refused, however well each file is known."""
    folder = sharded(tmp_path / "m", ["a.weight", "b.weight"], index=True)
    load(folder, tmp_path / "c")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("b.weight", "z.weight"))
    with pytest.raises(qc.SourceError, match="puts it here, but it is not"):
        load(folder, tmp_path / "c")


def test_index_that_changes_meanwhile(tmp_path: Path) -> None:
    """An index that names another file than was opened is refused as one that is wrong."""
    folder = sharded(tmp_path / "m", ["a.weight", "b.weight"], index=True)
    first, _ = sorted(folder.glob("*.safetensors"))
    with pytest.raises(qc.SourceError, match="puts it here, but it is not"):
        Safetensors().check_names(folder, {first: ["a.weight"]})


def test_tensor_that_stands_twice(tmp_path: Path) -> None:
    """Two known files with a tensor of one name are no checkpoint."""
    folder = sharded(tmp_path / "m", ["a.weight", "b.weight"], index=False)
    first, second = sorted(folder.iterdir())
    save_file({"a.weight": weight(5)}, second)
    for file in (first, second):
        os.rename(file, tmp_path / "alone.safetensors")
        assert load(tmp_path / "alone.safetensors", tmp_path / "c")[0] is False
        assert load(tmp_path / "alone.safetensors", tmp_path / "c")[0] is True
        os.rename(tmp_path / "alone.safetensors", file)
    with pytest.raises(qc.SourceError, match="stands in"):
        load(folder, tmp_path / "c")


def test_changed_file_is_read(tmp_path: Path, unread: list[str]) -> None:
    """A file that changed is another one, whatever its name."""
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": weight(0)}, path)
    load(path, tmp_path / "c")
    save_file({"a.weight": weight(1)}, path)
    unread.clear()
    hit, found = load(path, tmp_path / "c")
    assert (hit, "parse" in unread) == (False, True)
    assert found == load(path, tmp_path / "d")[1]


@pytest.mark.parametrize("mode", ["auto", "readonly"])
def test_gguf_says_itself_what_it_is(tmp_path: Path, write_gguf: Write, unread: list[str], mode: str) -> None:
    """A GGUF's tensors may have other names than the file gives them: it is read, and is a hit."""
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.attn_output.weight": weight(0)}, {"general.architecture": "llama"})
    missed = load(path, tmp_path / "c")
    unread.clear()
    assert load(path, tmp_path / "c", mode=mode) == (True, missed[1])
    assert "parse" in unread


def test_recipes_that_let_tensors_pass(tmp_path: Path) -> None:
    """Of a recipe by which tensors are views of the file, some are not in the entry: the file is read, and all are there."""
    save_file({"a.weight": weight(0), "b.weight": weight(1)}, tmp_path / "m.safetensors")
    recipe = qc.Recipe([("a.*", "int8")], other="native")
    found = []
    for _ in range(2):
        with qc.load(tmp_path / "m.safetensors", recipe, cache=tmp_path / "c") as model:
            found.append((model.hit, sorted(model), [report.codec for report in model.report()]))
    assert found == [(False, ["a.weight", "b.weight"], ["int8", "native"]), (True, ["a.weight", "b.weight"], ["int8", "native"])]


@pytest.mark.parametrize("mode", ["auto", "readonly"])
def test_damage_is_said_once(tmp_path: Path, mode: str) -> None:
    """An entry that is damaged is found out, said once, and the file is read after all."""
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": weight(0)}, path)
    missed = load(path, tmp_path / "c")
    (entry,) = (tmp_path / "c").glob("v1/entries/*/*.safetensors")
    for at, verify in ((-1, "open"), (20, "touch")):
        load(path, tmp_path / "c")
        raw = bytearray(entry.read_bytes())
        raw[at] ^= 1
        entry.write_bytes(raw)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert load(path, tmp_path / "c", mode=mode, verify=verify) == (False, missed[1])
        assert len(said) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(path, tmp_path / "c")  # so that there is one again


def damage(cache: Path) -> None:
    """Flip a bit of the last stored tensor, of the only entry."""
    (entry,) = cache.glob("v1/entries/*/*.safetensors")
    raw = bytearray(entry.read_bytes())
    raw[-1] ^= 1
    entry.write_bytes(raw)


@pytest.mark.parametrize("mode", ["auto", "readonly"])
@pytest.mark.parametrize("change", ["cut", "emptied", "other shapes", "other names", "other values"])
def test_damage_after_the_file_was_written_to(tmp_path: Path, mode: str, change: str) -> None:
    """What cannot be had from the store, nor of the file as it was, is an error, however often it is asked for; nothing is mixed."""
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": weight(0), "b.weight": weight(1)}, path)
    _, right = load(path, tmp_path / "c")
    save_file(
        {f"{name}.weight{'.other' * (change == 'other names')}": weight(n + 2).reshape((128, 64) if change == "other shapes" else (64, 128))
         for n, name in enumerate("ab")},
        tmp_path / "other",
    )  # fmt: skip
    damage(tmp_path / "c")
    with warnings.catch_warnings(), qc.load(path, "int8", cache=tmp_path / "c", mode=mode) as model:
        warnings.simplefilter("ignore")
        assert model.hit
        first = model["a.weight"]
        with path.open("r+b") as file:
            file.write((tmp_path / "other").read_bytes() if change.startswith("other") else b"")
            file.truncate({"cut": 1000, "emptied": 0}.get(change, (tmp_path / "other").stat().st_size))
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        for _ in range(2):
            with pytest.raises(qc.SourceError, match="shorter" if change in ("cut", "emptied") else "was written to since it was opened"):
                model["b.weight"]
        assert isinstance(first, qc.QuantTensor)
        assert first.parts["codes"].tobytes() == right["a.weight"]


def test_damage_after_an_adapter_was_written_to(tmp_path: Path) -> None:
    """Neither is an adapter mixed in that is not any more what it was; one that was touched is what it was."""
    save_file({"a.weight": weight(0), "b.weight": weight(1)}, tmp_path / "m.safetensors")
    adapter = tmp_path / "adapter.safetensors"

    def write(seed: int) -> None:
        drawn = np.random.default_rng(seed)
        save_file(
            {f"base_model.model.{name}.lora_{side}.weight": drawn.standard_normal(shape).astype(np.float32)
             for name in "ab" for side, shape in (("A", (4, 128)), ("B", (64, 4)))},
            tmp_path / "new",
        )  # fmt: skip
        with adapter.open("r+b" if adapter.exists() else "wb") as file:
            file.write((tmp_path / "new").read_bytes())

    write(0)
    _, right = load(tmp_path / "m.safetensors", tmp_path / "c", lora=[(adapter, 8)])
    for change in ("touched", "written to"):
        damage(tmp_path / "c")
        with warnings.catch_warnings(), qc.load(tmp_path / "m.safetensors", "int8", cache=tmp_path / "c", lora=[(adapter, 8)]) as model:
            warnings.simplefilter("ignore")
            assert model.hit
            if change == "touched":
                os.utime(adapter)
                assert {name: codes(tensor) for name, tensor in model.items()} == right
            else:
                write(1)
                with pytest.raises(qc.SourceError, match="was written to since it was opened"):
                    model["b.weight"]
        write(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(tmp_path / "m.safetensors", tmp_path / "c", lora=[(adapter, 8)])  # so that there is an entry again


def test_another_entry_is_there_by_now(tmp_path: Path) -> None:
    """If somebody else has built the damaged entry again, nobody asks the file."""
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": weight(0), "b.weight": weight(1)}, path)
    _, right = load(path, tmp_path / "c")
    (entry,) = (tmp_path / "c").glob("v1/entries/*/*.safetensors")
    whole = entry.read_bytes()
    damage(tmp_path / "c")
    with qc.load(path, "int8", cache=tmp_path / "c") as model:
        entry.unlink()
        entry.write_bytes(whole)
        path.write_bytes(bytes(path.stat().st_size))
        assert {name: codes(tensor) for name, tensor in model.items()} == right
        assert model.hit


@pytest.mark.parametrize("where", ["digest", "plan", "threads"])
@pytest.mark.parametrize("what", [KeyboardInterrupt, MemoryError])
def test_interrupted_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, what: type[BaseException]) -> None:
    """Whatever interrupts it, the next who asks gets the tensor, and no lock or temp file stays."""
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": weight(0), "b.weight": weight(1)}, path)
    _, right = load(path, tmp_path / "c")
    damage(tmp_path / "c")

    def interrupted(*_: object, **__: object) -> None:
        raise what

    with warnings.catch_warnings(), qc.load(path, "int8", cache=tmp_path / "c") as model:
        warnings.simplefilter("ignore")
        os.utime(path)
        with monkeypatch.context() as patched:
            patched.setattr(*{
                "digest": (shards, "source_digest"), "plan": (shards, "plan"), "threads": (loader_model, "Pipeline"),
            }[where], interrupted)  # fmt: skip
            with pytest.raises(what):
                model["b.weight"]
        assert not list((tmp_path / "c").glob("v1/tmp/*"))
        assert {name: codes(tensor) for name, tensor in model.items()} == right
    assert load(path, tmp_path / "c")[1] == right


@pytest.mark.parametrize("become", ["deleted", "replaced", "touched", "longer"])
def test_damage_after_the_file_went(tmp_path: Path, become: str) -> None:
    """A file that is gone is mapped still, and one that was touched is what it was: what is damaged is quantized of it."""
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": weight(0), "b.weight": weight(1)}, path)
    _, right = load(path, tmp_path / "c")
    damage(tmp_path / "c")
    with warnings.catch_warnings(), qc.load(path, "int8", cache=tmp_path / "c") as model:
        warnings.simplefilter("ignore")
        if become == "touched":
            os.utime(path)
        elif become == "longer":
            with path.open("ab") as file:
                file.write(bytes(1000))
        else:
            path.unlink()
        if become == "replaced":
            save_file({"z.weight": weight(9)}, path)
        assert {name: codes(tensor) for name, tensor in model.items()} == right


def test_a_file_that_was_cut_is_said(tmp_path: Path) -> None:
    """A file that becomes shorter between being opened and read is an error, and no signal."""
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": weight(0)}, path)
    for ask in (lambda source: source.tensors, lambda source: source.fingerprint):
        path.write_bytes(path.read_bytes())
        source = Source(path, later=True)
        whole = path.read_bytes()
        os.truncate(path, 0)
        with pytest.raises(qc.SourceError, match="shorter"):
            ask(source)
        path.write_bytes(whole)


@pytest.mark.parametrize("level", ["reference", "auto"])
@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_everything_is_checked_once(
    tmp_path: Path, write_gguf: Write, kernel_level: Callable[[str], None], suffix: str, level: str
) -> None:
    """A load that checks all of an entry reads it once, whoever has to say what the file is."""
    path = tmp_path / f"m.{suffix}"
    tensors = {f"blk.{n}.attn_output.weight": weight(n) for n in range(3)}
    if suffix == "gguf":
        write_gguf(path, tensors, {"general.architecture": "llama"})
    else:
        save_file(tensors, path)
    load(path, tmp_path / "c")
    if level != "auto":
        kernel_level(level)
    with qc.load(path, "int8", cache=tmp_path / "c", verify="open") as model:
        assert model.hit
        assert model.profile.nbytes["verify"] == model.nbytes


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="descriptors cannot be counted here")
def test_a_load_that_fails_holds_nothing(tmp_path: Path) -> None:
    """A file that is no model leaves no descriptor open."""
    (tmp_path / "m.safetensors").write_bytes(b"no model at all")
    before = len(os.listdir("/proc/self/fd"))
    kept = []
    for _ in range(5):
        with pytest.raises(qc.SourceError) as caught:
            load(tmp_path / "m.safetensors", tmp_path / "c")
        kept.append(caught)
    assert len(os.listdir("/proc/self/fd")) <= before + 5  # a mapping has one, up to Python 3.12


def test_wrong_choice_of_names(tmp_path: Path) -> None:
    """An argument that cannot be meant is refused on a hit, too."""
    save_file({"a.weight": weight(0)}, tmp_path / "m.safetensors")
    load(tmp_path / "m.safetensors", tmp_path / "c")
    with pytest.raises(qc.UsageError, match="names="):
        load(tmp_path / "m.safetensors", tmp_path / "c", names="none")


def test_safetensors_keep_their_names(tmp_path: Path, write_gguf: Write) -> None:
    """Names are those of a GGUF's architecture only in a GGUF: what metadata of another format says changes nothing."""
    tensors = {"blk.0.time_mix_key.weight": weight(0)}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"general.architecture": "rwkv7"})
    assert list(load(tmp_path / "m.safetensors", tmp_path / "c")[1]) == ["blk.0.time_mix_key.weight"]
    path = write_gguf(tmp_path / "m.gguf", tensors, {"general.architecture": "rwkv7"})
    assert list(load(path, tmp_path / "c")[1]) != ["blk.0.time_mix_key.weight"]
