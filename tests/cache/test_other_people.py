"""Stores of other users, of a group, of everybody, behind links, on network file systems, of other versions."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantcache.cache import filesystem
from quantcache.cache.blobs import StoredEntry
from quantcache.cache.store import Cache
from quantcache.errors import CacheError, StoreTooNewError

Put = Callable[..., StoredEntry]
needs_root = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can be somebody else")
NOBODY = 65534

AS_OTHER = """
import os, sys, warnings
import platformdirs, sqlite3, tomllib, xxhash  # before: others cannot read this Python's folder
from quantcache.cache.store import Cache
from quantcache.cache.container import Slot
os.setgroups([int(sys.argv[3])]); os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[2])); os.umask(int(sys.argv[4], 8))
try:
    with Cache(sys.argv[1], keep_free="0", shared=len(sys.argv) > 5) as cache:
        if cache.readonly:
            print("readonly", len(cache)); sys.exit()
        def build(stage):
            staged = stage({"x": Slot("U8", (100,), 4096)})
            staged.write("x", 0, bytes(range(100)))
            return staged, []
        entry = cache.get_or_build({"by": int(sys.argv[2])}, build)
        found = [cache.find({"by": user}) is not None for user in (0, 1234, 65534)]
        cache.pin(entry.key); cache.unpin(entry.key); cache.tally(hits=1)
        print("built", sum(found), len(cache.entries()))
except Exception as error:
    print(type(error).__name__, error)
"""


def _as_other(root: Path, *, user: int = NOBODY, group: int = NOBODY, umask: str = "077", shared: bool = False) -> str:
    command = [sys.executable, "-c", AS_OTHER, str(root), str(user), str(group), umask, *(["shared"] if shared else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    return done.stdout + done.stderr


@pytest.fixture
def place() -> Any:
    """Return a folder that others can reach: pytest's own is for one user."""
    folder = Path("/tmp") / f"quantcache-test-{os.getpid()}"
    folder.mkdir(mode=0o755)
    yield folder
    shutil.rmtree(folder)


def _build(root: Path, **options: Any) -> StoredEntry:
    from quantcache.cache.container import Slot

    with Cache(root, keep_free="0", **options) as cache:
        def build(stage: Any) -> Any:
            staged = stage({"x": Slot("U8", (100,), 4096)})
            staged.write("x", 0, bytes(range(100)))
            return staged, []

        return cache.get_or_build({"by": 0}, build)


@needs_root
def test_somebody_elses_store_is_refused(place: Path) -> None:
    """A store of another user is refused, whoever may write there."""
    _build(place / "c")
    os.chown(place / "c", 1234, 1234)
    (place / "c").chmod(0o755)
    assert "belongs to user 1234" in _as_other(place / "c")
    os.chown(place / "c", NOBODY, NOBODY)
    # the root is theirs, the version's folder is not
    os.chown(place / "c" / "v1", 1234, 1234)
    assert "belongs to user 1234" in _as_other(place / "c")


@needs_root
def test_somebody_elses_entry_is_refused(place: Path) -> None:
    """An entry that another user put into a private store is not used."""
    entry = _build(place / "c")
    os.chown(entry.path, 1234, 1234)
    with Cache(place / "c") as cache, pytest.warns(match="belongs to user 1234"):
        assert cache.find({"by": 0}) is None


@needs_root
@pytest.mark.parametrize("umask", ["077", "022", "000"])
def test_a_store_of_a_group(place: Path, umask: str) -> None:
    """What one member of a group stores, another uses, prunes and pins, whatever their umask; the store says that it is shared."""
    group = 4321
    os.chown(place, 0, group)
    (place / "c").mkdir()
    os.chown(place / "c", 1234, group)
    assert _as_other(place / "c", user=1234, group=group, umask=umask, shared=True).startswith("built 1 1")
    # nobody says --shared any more
    assert _as_other(place / "c", user=NOBODY, group=group, umask=umask).startswith("built 2 2")
    assert _as_other(place / "c", user=1234, group=group, umask=umask).startswith("built 2 2")
    for path in [place / "c", *(place / "c" / "v1").rglob("*")]:
        mode = path.stat().st_mode
        assert path.stat().st_gid == group, path
        assert mode & stat.S_IWGRP, path
        assert not mode & stat.S_IWOTH, path
        assert not path.is_dir() or mode & stat.S_ISGID, path
    # who is not of the group is no member
    assert "belongs to user 1234" in _as_other(place / "c", user=NOBODY, group=NOBODY) or "Permission" in _as_other(place / "c", user=NOBODY, group=NOBODY)


def test_private_files_are_private(store: Cache, put: Put) -> None:
    """Whatever the umask, nobody else may read a store."""
    kept = os.umask(0)
    try:
        with Cache(store.root.with_name("other"), keep_free="0") as cache:
            put(cache, 1)
            cache.pin(cache.entries()[0].key)
            modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [cache.root, *cache.folder.rglob("*")]}
    finally:
        os.umask(kept)
    assert not [path for path, mode in modes.items() if path.is_dir() and mode & 0o077]
    assert not [path for path, mode in modes.items() if path.parent.name in ("entries", "pins") and mode & 0o077]


def test_everybody_may_write(tmp_path: Path) -> None:
    """A folder that everybody may write is no place for weights, shared or not."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c").chmod(0o777)
    for shared in (False, True):
        with pytest.raises(CacheError, match="everybody"):
            Cache(tmp_path / "c", shared=shared)


def test_behind_links(store: Cache, put: Put, tmp_path: Path) -> None:
    """A store behind a symbolic link is that store; a link in the place of an entry is damage."""
    entry = put(store, 1)
    (tmp_path / "link").symlink_to(store.root, target_is_directory=True)
    with Cache(tmp_path / "link", keep_free="0") as cache:
        assert cache.find({"number": 1, "nbytes": 10_000}) is not None
        put(cache, 2)
    assert len(store) == 2
    moved = entry.path.rename(tmp_path / "elsewhere")
    entry.path.symlink_to(moved)
    with pytest.warns(match="symbolic link"):
        assert store.find({"number": 1, "nbytes": 10_000}) is None
    assert moved.exists()


@needs_root
def test_a_read_only_file_system(place: Path) -> None:
    """On a file system that is mounted read-only, hits work and nothing is written."""
    (place / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place / "disk")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        _build(place / "disk" / "c")
        # rows that are still in the write-ahead log when the disk becomes read-only
        subprocess.run(["mount", "-o", "remount,ro", str(place / "disk")], check=True)
        with Cache(place / "disk" / "c") as cache:
            assert cache.readonly
            assert len(cache.entries()) == 1
            assert cache.find({"by": 0}) is not None
    finally:
        subprocess.run(["umount", "-l", str(place / "disk")], check=False)


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "9p"])
def test_network_file_systems(tmp_path: Path, put: Put, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """On a network file system the index goes without write-ahead log, and everything works."""
    monkeypatch.setattr(filesystem, "filesystem_type", lambda path: kind)
    with Cache(tmp_path / "c", keep_free="0") as cache:
        put(cache, 1)
        assert len(cache) == 1
        assert not list(cache.folder.glob("*-wal"))
        mode = cache.index.call(lambda index: index._db.execute("PRAGMA journal_mode").fetchone()[0], "")
    assert mode == "delete"


def test_without_locks(tmp_path: Path, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no locks, the index stays in memory: nobody waits for a lock that never comes."""
    monkeypatch.setattr("quantcache.cache.tolerant.locks_work", lambda folder: False)
    with Cache(tmp_path / "c", keep_free="0") as cache:
        put(cache, 1)
        assert len(cache) == 1
    assert not (tmp_path / "c" / "v1" / "index.sqlite3").exists()
    with Cache(tmp_path / "c", keep_free="0") as cache:
        assert len(cache.entries()) == 1
        assert cache.find({"number": 1, "nbytes": 10_000}) is not None


# ---- versions ----------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("version", sorted(path.name for path in GOLDEN.iterdir()))
def test_golden_stores(version: str, tmp_path: Path) -> None:
    """A store that an earlier version wrote opens: the same entries, bytes, pins and counters, and it can be added to."""
    shutil.copytree(GOLDEN / version, tmp_path / "c")
    (tmp_path / "c").chmod(0o700)
    with Cache(tmp_path / "c", keep_free="0") as cache:
        assert {row.recipe for row in cache.entries()} == {"nf4", "int8"}
        assert len(cache.pinned()) == 1
        for row in cache.entries():
            entry = cache.open(row.key)
            assert all(entry.intact(key) for key in entry.header.slots)
            assert cache.find(entry.header.document) is not None
        assert cache.stats()["misses"] == 2
        assert cache.index.check() is None
    with Cache(tmp_path / "c", readonly=True) as cache:
        assert len(cache.entries()) == 2


def test_golden_readonly(tmp_path: Path) -> None:
    """An index of an earlier version in a store that may not be written is read around."""
    shutil.copytree(GOLDEN / "schema1", tmp_path / "c")
    (tmp_path / "c").chmod(0o700)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    with Cache(tmp_path / "c", readonly=True) as cache:
        assert len(cache.entries()) == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == before


def test_versions_share_a_root(tmp_path: Path, put: Put) -> None:
    """A newer version's folder beside ours is left as it is; alone, it is too new."""
    newer = tmp_path / "c" / "v2"
    newer.mkdir(parents=True)
    (tmp_path / "c").chmod(0o700)
    (newer / "something").write_text("of another time")
    with pytest.raises(StoreTooNewError):
        Cache(tmp_path / "c", create=False)
    with Cache(tmp_path / "c", keep_free="0") as cache:
        put(cache, 1)
        assert len(cache) == 1
    assert (newer / "something").read_text() == "of another time"
