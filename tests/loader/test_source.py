"""Hold open_checkpoint to what may stand at a path: files, folders, hub snapshots, and what is no checkpoint."""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import os
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import numpy as library

from quantcache import memory
from quantcache.cache.key import fingerprint
from quantcache.errors import SourceError, SourceNotFoundError
from quantcache.loader.mapping import MappedFile, whole_pages
from quantcache.loader.source import Source, open_checkpoint

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def _safetensors(path: Path) -> Path:
    library.save_file({"w": WEIGHT}, path)
    return path


def _gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", WEIGHT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _hub(root: Path, *, shards: int = 1) -> Path:
    """Lay out a repository as the hub's cache does: blobs by hash, a snapshot of links, refs/main."""
    repository, revision = root / "models--org--name", "a" * 40
    snapshot = repository / "snapshots" / revision
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    names = ["model.safetensors"] if shards == 1 else [
        f"model-{part:05d}-of-{shards:05d}.safetensors" for part in range(1, shards + 1)
    ]  # fmt: skip
    for part, name in enumerate(names):
        blob = repository / "blobs" / f"{part:064d}"
        library.save_file({f"w{part}": WEIGHT}, blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    (snapshot / "config.json").write_text("{}")
    if shards > 1:
        weight_map = {f"w{part}": name for part, name in enumerate(names)}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return repository


@pytest.mark.parametrize("name", ["m.safetensors", "m.st", "m.gguf"])
@pytest.mark.parametrize("given", ["file", "folder", "text"])
def test_one_file(tmp_path: Path, name: str, given: str) -> None:
    """A file, the folder that holds only it among other things, and a path given as text open alike."""
    path = (_gguf if name.endswith(".gguf") else _safetensors)(tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer").mkdir()
    opened = {"file": path, "folder": tmp_path, "text": str(path)}[given]
    (source,) = open_checkpoint(opened)
    assert source.path == path
    np.testing.assert_array_equal(source.view("w"), WEIGHT)


def test_content_decides_the_format(tmp_path: Path) -> None:
    """A GGUF file that is called .safetensors is read as GGUF."""
    _gguf(tmp_path / "m.gguf").rename(tmp_path / "m.safetensors")
    (source,) = open_checkpoint(tmp_path / "m.safetensors")
    assert source.format == "gguf"


def test_symbolic_link(tmp_path: Path) -> None:
    """A link to a model opens as the model, whatever the target is called."""
    _safetensors(tmp_path / "blob")
    (tmp_path / "link.safetensors").symlink_to("blob")
    (source,) = open_checkpoint(tmp_path / "link.safetensors")
    assert source.path == tmp_path / "link.safetensors"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("given", ["repository", "snapshot"])
def test_hub_snapshot(tmp_path: Path, shards: int, given: str) -> None:
    """A snapshot of links into blobs opens, and so does the repository's folder, by its refs/main."""
    repository = _hub(tmp_path, shards=shards)
    sources = open_checkpoint(repository if given == "repository" else repository / "snapshots" / ("a" * 40))
    assert len(sources) == shards
    for part, source in enumerate(sources):
        np.testing.assert_array_equal(source.view(f"w{part}"), WEIGHT)


@pytest.mark.parametrize("revision", ["", "gone", "../../elsewhere", "/", "..", "a/../b"])
def test_hub_revision_leads_nowhere(tmp_path: Path, revision: str) -> None:
    """A refs/main that is wrong, or leads out of the folder, opens nothing."""
    repository = _hub(tmp_path)
    _safetensors((tmp_path / "elsewhere").with_suffix(".safetensors"))
    (tmp_path / "elsewhere").mkdir()
    _safetensors(tmp_path / "elsewhere" / "model.safetensors")
    (repository / "refs" / "main").write_text(revision)
    with pytest.raises(SourceNotFoundError):
        open_checkpoint(repository)


def test_two_models(tmp_path: Path) -> None:
    """A folder with two models is an error that names both: none is guessed."""
    _safetensors(tmp_path / "a.safetensors")
    _gguf(tmp_path / "b.gguf")
    with pytest.raises(SourceError, match=r"a\.safetensors, b\.gguf") as caught:
        open_checkpoint(tmp_path)
    assert not isinstance(caught.value, SourceNotFoundError)
    assert caught.value.path == tmp_path
    assert caught.value.hint


def test_model_safetensors_is_preferred(tmp_path: Path) -> None:
    """model.safetensors is the model of its folder, whatever lies beside it."""
    _safetensors(tmp_path / "model.safetensors")
    _safetensors(tmp_path / "adapter.safetensors")
    assert [source.path.name for source in open_checkpoint(tmp_path)] == ["model.safetensors"]


def test_missing_path(tmp_path: Path) -> None:
    """Nothing at a path is its own error, with its own exit code and a hint."""
    for path in (tmp_path / "gone.safetensors", tmp_path / "no" / "folder", tmp_path / "nul\0", Path("x" * 5000)):
        with pytest.raises(SourceNotFoundError) as caught:
            open_checkpoint(path)
        assert caught.value.path == path
        assert caught.value.exit_code == 4
    with pytest.raises(SourceNotFoundError):
        Source(tmp_path / "gone.safetensors")


def test_dangling_link(tmp_path: Path) -> None:
    """A link to nothing is a missing file, a link to itself too."""
    (tmp_path / "m.safetensors").symlink_to("gone")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    for name in ("m", "loop"):
        with pytest.raises(SourceNotFoundError):
            open_checkpoint(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("content", [[], ["config.json"], ["pytorch_model.bin"], ["model.safetensors.part"]])
def test_folder_without_a_model(tmp_path: Path, content: list[str]) -> None:
    """A folder without a model is an error that lists what would be one."""
    for name in content:
        (tmp_path / name).write_text("{}")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(SourceNotFoundError, match=r"\.gguf.*\.safetensors.*\.st") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.path == tmp_path


def test_empty_file(tmp_path: Path) -> None:
    """An empty file is said to be empty."""
    (tmp_path / "m.safetensors").touch()
    with pytest.raises(SourceError, match="empty") as caught:
        open_checkpoint(tmp_path / "m.safetensors")
    assert (caught.value.path, caught.value.offset) == (tmp_path / "m.safetensors", 0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_fifo(tmp_path: Path) -> None:
    """A FIFO is refused without waiting for a writer, in a folder too."""
    os.mkfifo(tmp_path / "m.safetensors")
    for opened in (Source, open_checkpoint):
        with pytest.raises(SourceError, match="not a regular file"):
            opened(tmp_path / "m.safetensors")
    with pytest.raises(SourceError):
        open_checkpoint(tmp_path)


def test_device(tmp_path: Path) -> None:
    """A device is refused."""
    if not Path("/dev/zero").exists():
        pytest.skip("this system has no /dev/zero")
    with pytest.raises(SourceError, match="not a regular file"):
        open_checkpoint("/dev/zero")


def test_source_of_a_folder(tmp_path: Path) -> None:
    """A folder is no file."""
    with pytest.raises(SourceError):
        Source(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(60), b"ggml" + bytes(60), b"x", b"12345678", bytes(64), b"GGUX" * 9],
    ids=["pickle", "zip", "ggml", "one-byte", "eight-bytes", "zeros", "almost"],
)
def test_not_a_model(tmp_path: Path, content: bytes) -> None:
    """A file of another kind is refused by its first bytes, with a hint about pickles."""
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match="not a model") as caught:
        open_checkpoint(tmp_path / "m.safetensors")
    assert (caught.value.path, caught.value.offset) == (tmp_path / "m.safetensors", 0)
    assert "pth" in (caught.value.hint or "")


def test_unknown_tensor(tmp_path: Path) -> None:
    """Asking for a tensor that is not there names it and the file."""
    source = Source(_safetensors(tmp_path / "m.safetensors"))
    with pytest.raises(SourceError, match="no such tensor") as caught:
        source.view("v")
    assert (caught.value.path, caught.value.tensor) == (tmp_path / "m.safetensors", "v")


def test_changed(tmp_path: Path) -> None:
    """A file that was replaced, rewritten or removed since it was opened is noticed."""
    path = _safetensors(tmp_path / "m.safetensors")
    source = Source(path)
    assert not source.file.changed()
    _safetensors(tmp_path / "other").replace(path)
    assert source.file.changed()
    again = Source(path)
    os.utime(path, ns=(1, 1))
    assert again.file.changed()
    path.unlink()
    assert again.file.changed()
    np.testing.assert_array_equal(source.view("w"), WEIGHT)  # the opened file is still there


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks Linux to fault pages in")
def test_file_cut_while_open(tmp_path: Path) -> None:
    """A file that becomes shorter after it was opened is an error, not a SIGBUS."""
    path = tmp_path / "m.safetensors"
    library.save_file({"w": np.zeros(1 << 20, np.uint8)}, path)
    source = Source(path)
    os.truncate(path, 5000)
    info = source.tensors["w"]
    with pytest.raises(SourceError, match="shorter") as caught:
        source.file.populate(info.offset, info.nbytes)
    assert (caught.value.path, caught.value.offset) == (path, info.offset)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux which pages are in memory")
def test_a_cold_file_is_not_read_for_its_header(tmp_path: Path) -> None:
    """Opening a file and taking its fingerprint reads header and samples, where a fault reads megabytes around itself; a miss reads on."""
    path, nbytes = tmp_path / "m.safetensors", 64 << 20
    library.save_file({"a.weight": np.random.default_rng().integers(0, 256, nbytes, np.uint8)}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mincore = memory._mincore()
    state = ctypes.create_string_buffer(-(-path.stat().st_size // mmap.PAGESIZE))
    before = MappedFile(path)
    assert mincore(before.address, before.nbytes, state) == 0
    if sum(state.raw) * mmap.PAGESIZE > 1 << 20:
        pytest.skip("files stay in memory here")
    source = Source(path)
    assert source.fingerprint == fingerprint(source.file.memory)
    assert mincore(before.address, before.nbytes, state) == 0
    assert 132 << 10 <= sum(state.raw) * mmap.PAGESIZE < 1 << 20
    source.file.begin_reading(8 << 20)
    until = time.monotonic() + 20
    while sum(state.raw) * mmap.PAGESIZE < 8 << 20:
        assert time.monotonic() < until
        time.sleep(0.01)
        assert mincore(before.address, before.nbytes, state) == 0
    assert sum(state.raw) * mmap.PAGESIZE < 10 << 20


def test_whole_pages() -> None:
    """Every page that a byte is on, each once, and those that touch as one range."""
    page = mmap.PAGESIZE
    assert whole_pages([]) == []
    assert whole_pages([(3 * page + 1, 1), (page - 1, 2), (3 * page + 7, 9), (9 * page, page)]) == [(0, 2 * page), (3 * page, page), (9 * page, page)]
    rng = np.random.default_rng(int.from_bytes(os.urandom(8), "little"))
    ranges = [(int(start), int(nbytes)) for start, nbytes in zip(rng.integers(0, 100 * page, 40), rng.integers(1, 3 * page, 40), strict=True)]
    wanted = {number for start, nbytes in ranges for number in range(start // page, (start + nbytes - 1) // page + 1)}
    found = whole_pages(ranges)
    assert [number for start, nbytes in found for number in range(start // page, (start + nbytes) // page)] == sorted(wanted)
    assert all(start + nbytes < following for (start, nbytes), (following, _) in itertools.pairwise(found))
