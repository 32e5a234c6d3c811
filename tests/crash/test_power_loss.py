"""Cut the power after every call that a publication, a prune, a repair, a migration make, and open what may be left.

After each crash: every entry is a hit with the right bytes, or a miss; nothing raises or warns; no row stands without a file, no
pin is lost; and what was done before the power went, and had returned, is still done.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantcache.cache.store import Cache

HERE = Path(__file__).parent


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"crash_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


act, disk = _module("act"), _module("disk")

#: act -> entries that must be hits whenever the power goes; entries that must be there once it has returned; pins likewise
MUST: dict[str, tuple[set[str], set[str], set[str]]] = {
    "first": (set(), {"new"}, set()), "publish": ({"one", "pinned"}, {"new"}, {"pinned"}), "rearrange": ({"one", "pinned"}, {"new"}, {"pinned"}),
    "prune": ({"pinned"}, set(), {"pinned"}), "remove": (set(), set(), set()), "clear": ({"pinned"}, set(), {"pinned"}),
    "repair": ({"one", "pinned"}, set(), {"pinned"}), "verify": ({"one", "pinned"}, set(), {"pinned"}),
    "rebuild": ({"one", "pinned"}, set(), {"pinned"}), "pin": ({"one", "pinned"}, set(), {"pinned"}),
    "unpin": ({"one", "pinned"}, set(), set()), "hit": ({"one", "pinned"}, set(), {"pinned"}),
    "migrate": ({"one", "pinned"}, set(), {"pinned"}),
}  # fmt: skip
#: pins that must be there once the act has returned
PINNED_AFTER = {"pin": {"one", "pinned"}}


def _served(cache: Cache, name: str) -> bool:
    """Return whether an entry is a hit; its bytes are the right ones, or its digests say that they are not."""
    entry = cache.find(act.document(name))
    if entry is None:
        return False
    wanted = act.content(name)
    fine = {key: entry.intact(key) for key in entry.header.slots}
    for key, intact in fine.items():
        assert not intact or bytes(entry.view(key)) == wanted[key].tobytes(), f"wrong bytes of {name} {key}"
    return all(fine.values())


def _examine(root: Path, doing: str, *, returned: bool) -> None:
    """Open a store after a crash."""
    during, after, pins = MUST[doing]
    if returned:
        during, pins = during | after, pins | PINNED_AFTER.get(doing, set())
    keys = {name: act.key_of(act.document(name)) for name in (*act.BEFORE, act.NEW, act.DAMAGED)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Cache(root, keep_free="0") as cache:
            served = {name for name in keys if _served(cache, name)}
            assert during <= served, f"lost: {during - served}"
            assert act.DAMAGED not in served
            rows = cache.entries()
            assert all(cache.path_of(row.key).exists() for row in rows)
            assert {keys[name] for name in served} <= {row.key for row in rows}, "an entry without a row"
            assert {keys[name] for name in pins} <= cache.pinned(), "a lost pin"
            assert len(cache) == len(rows)
            made = act.make(cache, act.NEW)
            assert all(made.intact(key) for key in made.header.slots)
        with Cache(root, keep_free="0") as cache:
            assert _served(cache, act.NEW)
    assert [str(w.message) for w in caught] == []


@pytest.mark.parametrize("doing", act.ACTS)
def test_power_loss(doing: str, behind_shim: Callable[..., Any], tmp_path: Path) -> None:
    """At every point, with every loss and reordering of what was not synced (singly, and mixtures of them)."""
    root, log = tmp_path / "store", tmp_path / "log"
    act.prepare(root, doing)
    root.mkdir(exist_ok=True)
    before = disk.read_tree(root)
    done = behind_shim(HERE / "act.py", doing, root, log)
    assert done.returncode == 0, done.stderr
    calls = disk.read_log(log, root)
    assert len(calls) > (1 if doing in ("pin", "unpin") else 5)
    # the model follows what happened: with all calls, it has the folder as it is
    model = disk.Disk(before)
    seen: set[bytes] = set()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for position in range(len(calls) + 1):
            if position:
                model.step(calls[position - 1])
            returned = position == len(calls)
            for case, tree in model.crashes(position):
                mark = disk.digest_of(tree) + bytes([returned])
                if mark in seen:
                    continue
                seen.add(mark)
                place = Path(folder) / "store"
                disk.write_tree(tree, place)
                try:
                    _examine(place, doing, returned=returned)
                except BaseException as error:
                    error.add_note(f"{doing}: after call {position} of {len(calls)} ({calls[position - 1] if position else 'none'}), {case}")
                    raise
                finally:
                    shutil.rmtree(place)
    assert len(seen) > len(calls) // 2


def test_the_model_follows(behind_shim: Callable[..., Any], tmp_path: Path) -> None:
    """With nothing lost, the model of the disk ends as the disk did (but for SQLite's shared memory, which is mapped)."""
    for doing in ("publish", "rearrange", "repair"):
        root, log = tmp_path / doing, tmp_path / f"{doing}.log"
        act.prepare(root, doing)
        model = disk.Disk(disk.read_tree(root))
        assert behind_shim(HERE / "act.py", doing, root, log).returncode == 0
        for call in disk.read_log(log, root):
            model.step(call)
        _, tree = next(model.crashes(0))
        after = disk.read_tree(root)
        assert {name: content for name, content in tree.items() if not name.endswith("-shm")} == after
