"""Own the model of a disk that loses power: which of the recorded calls are durable, and what may be left of the others.

What was written to a file is durable once the file was synced, a name once its folder was. Of all else any part may be there
after a crash, in any order: POSIX promises no more, and neither does SQLite's test file system, whose idea this is.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: path below the root -> bytes; None for a folder
Tree = dict[str, bytes | None]

_HEAD = struct.Struct("=cQqQII")


@dataclass(frozen=True)
class Call:
    """Hold one recorded call; see shim.c."""

    what: str
    inode: int
    offset: int
    path: str
    second: str
    content: bytes

    def __str__(self) -> str:
        """Return it as a person wants to read it."""
        return f"{self.what} {self.path} {self.second} {self.offset} {len(self.content)}"


def read_log(log: Path, root: Path) -> list[Call]:
    """Return the calls that were recorded, with paths below the root."""
    raw, position, calls = log.read_bytes(), 0, []
    while position < len(raw):
        what, inode, offset, length, first, second = _HEAD.unpack_from(raw, position)
        position += _HEAD.size
        names = raw[position : position + first + second].decode()
        position += first + second
        kind = what.decode()
        content = raw[position : position + length] if kind == "W" else b""
        position += len(content)
        below = [os.path.relpath(name, root) if name else "" for name in (names[:first], names[first:])]
        calls.append(Call(kind, inode, offset, below[0], below[1], content))
    return calls


def read_tree(root: Path) -> Tree:
    """Return what is below a folder."""
    tree: Tree = {".": None}
    for path in sorted(root.rglob("*")):
        tree[str(path.relative_to(root))] = path.read_bytes() if path.is_file() else None
    return tree


def write_tree(tree: Tree, root: Path) -> None:
    """Make a folder that looks so; it must not be there."""
    for name in sorted(tree):
        path, content = root / name, tree[name]
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.write_bytes(content)


def digest_of(tree: Tree) -> bytes:
    """Return what tells two trees apart."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(tree):
        content = tree[name]
        state.update(name.encode() + (b"/" if content is None else b"=%d:" % len(content) + content))
    return state.digest()


@dataclass
class _File:
    content: bytearray = field(default_factory=bytearray)


def _apply(content: bytearray, call: Call, *, half: bool = False) -> None:
    if call.what == "W":
        piece = call.content[: len(call.content) // 2] if half else call.content
        if len(content) < call.offset:
            content.extend(bytes(call.offset - len(content)))
        content[call.offset : call.offset + len(piece)] = piece
    elif call.what == "T":
        del content[call.offset :]
        content.extend(bytes(call.offset - len(content)))
    elif call.what == "A" and len(content) < call.offset:
        content.extend(bytes(call.offset - len(content)))


class Disk:
    """Follow recorded calls, and tell what may be on the disk if the power goes now.

    Args:
        tree: what was there, durably, before the first call.
    """

    def __init__(self, tree: Tree) -> None:
        self._names: dict[str, _File | None] = {}
        for name, content in tree.items():
            self._names[name] = None if content is None else _File(bytearray(content))
        self._live = dict(self._names)  # names as the running program sees them
        self._files: dict[int, _File] = {}
        #: what is not durable yet, in order: a change of a file, or of names
        self._pending: list[tuple[_File | None, Call, _File | None]] = []

    def _file(self, call: Call) -> _File:
        """Return the file that a call is about: by its inode, for it may have another name by now."""
        if call.inode not in self._files:
            found = self._live.get(call.path)
            assert found is not None, f"{call}: no such file"
            self._files[call.inode] = found
        return self._files[call.inode]

    def step(self, call: Call) -> None:
        """Take one call."""
        if call.what == "C":
            if self._live.get(call.path) is None:
                new = _File()
                self._live[call.path] = self._files[call.inode] = new
                self._pending.append((None, call, new))
            else:
                self._files[call.inode] = self._live[call.path]  # type: ignore[assignment]
                if call.offset:
                    self._pending.append((self._file(call), Call("T", call.inode, 0, call.path, "", b""), None))
        elif call.what in "WTA":
            self._pending.append((self._file(call), call, None))
        elif call.what == "F":
            file = self._file(call)
            for owner, change, _ in self._pending:
                if owner is file:
                    _apply(file.content, change)
            self._pending = [entry for entry in self._pending if entry[0] is not file]
        elif call.what == "S":
            self._sync_names(call.path)
        else:
            moved = self._live.pop(call.path, None) if call.what in "RUD" else None
            if call.what == "R":
                self._live[call.second] = moved
            elif call.what == "M":
                self._live[call.path] = None
            self._pending.append((None, call, moved))

    def _sync_names(self, folder: str) -> None:
        """Make the names in a folder durable, and with them whatever had to happen to these names before."""
        wanted: set[int] = set()
        touched: set[str] = set()
        for place in reversed(range(len(self._pending))):
            owner, call, _ = self._pending[place]
            if owner is not None:
                continue
            paths = {path for path in (call.path, call.second) if path}
            if paths & touched or any(os.path.dirname(path) == ("" if folder == "." else folder) for path in paths):
                wanted.add(place)
                touched |= paths
        for place in sorted(wanted):
            _rename(self._names, *self._pending[place][1:])
        self._pending = [entry for place, entry in enumerate(self._pending) if place not in wanted]

    def crashes(self, seed: int, *, singles: int = 60, mixes: int = 4) -> Iterator[tuple[str, Tree]]:
        """Yield what may be left if the power goes now: name of the case, and the tree.

        Nothing of what is not durable, all of it, all but one change, one change alone, the last write torn, and
        mixtures drawn at random.
        """
        count = len(self._pending)
        yield "all", self._tree(set(range(count)))
        yield "none", self._tree(set())
        writes = [place for place, entry in enumerate(self._pending) if entry[1].what == "W"]
        if writes:
            yield "torn", self._tree(set(range(count)), torn=writes[-1])
        places = range(count) if count <= singles else sorted(random.Random(seed).sample(range(count), singles))
        for place in places:
            yield f"without {self._pending[place][1]}", self._tree(set(range(count)) - {place})
            yield f"only {self._pending[place][1]}", self._tree({place})
        for number in range(mixes if count > 1 else 0):
            draw = random.Random(seed * 1000 + number)
            yield f"mixture {number}", self._tree({place for place in range(count) if draw.random() < 0.5})

    def _tree(self, kept: set[int], torn: int = -1) -> Tree:
        names = dict(self._names)
        contents: dict[int, bytearray] = {}
        for place, (owner, call, file) in enumerate(self._pending):
            if place not in kept:
                continue
            if owner is None:
                _rename(names, call, file)
            else:
                content = contents.setdefault(id(owner), bytearray(owner.content))
                _apply(content, call, half=place == torn)
        tree: Tree = {}
        for name, file in names.items():
            parent = os.path.dirname(name)
            if parent and parent not in names:
                continue  # its folder is lost
            tree[name] = None if file is None else bytes(contents.get(id(file), file.content))
        return tree


def _rename(names: dict[str, _File | None], call: Call, file: _File | None) -> None:
    """Change names as a call did; one whose folder or file is not there changes nothing."""
    if call.what == "C":
        names[call.path] = file
    elif call.what == "M":
        names[call.path] = None
    elif call.what == "R":
        if call.path in names:
            del names[call.path]
            names[call.second] = file
    else:
        names.pop(call.path, None)
