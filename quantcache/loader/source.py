"""Own what a checkpoint is to the rest: the Format contract and its registry, Source, and open_checkpoint.

A format is one file under `formats/` with a subclass of Format decorated with `@register`. It finds the files of a
checkpoint and parses a header; mapping, views and digests are done here, once.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quantcache.cache.key import fingerprint, samples
from quantcache.errors import SourceError, SourceNotFoundError, UsageError
from quantcache.loader.mapping import MappedFile
from quantcache.loader.names import runtime_names
from quantcache.memory import HEAD
from quantcache.once import once
from quantcache.quant.blocks import VERSION as BLOCKS_VERSION
from quantcache.quant.blocks import to_little_endian
from quantcache.tensor import ITEMSIZE, TensorInfo, array_dtype, unit

__all__ = ["Format", "Header", "Source", "check_checkpoint", "check_names", "find_checkpoint", "is_plain", "model_files", "open_checkpoint", "register"]


@dataclass(frozen=True)
class Header:
    """Hold what a format's parser found.

    Args:
        tensors: in file order; offsets are from the start of the file and lie inside it.
        metadata: what the file says about itself, as far as it is cheap to read.
        big_endian: every number in it is, tensors' included.
    """

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    big_endian: bool = False


class Format(ABC):
    """Describe one file format. Instances have no state."""

    #: in reports and in `info`
    id: ClassVar[str]
    #: the file names that are tried when a folder is given
    suffixes: ClassVar[tuple[str, ...]]
    #: tensors have the names that the checkpoint's runtime knows, and are of element types: what becomes of a file depends on nothing
    #: but its bytes and the recipe, so that it need not be read once that was stored
    plain: ClassVar[bool] = False

    @abstractmethod
    def recognizes(self, head: bytes) -> bool:
        """Return whether a file that starts so (up to 64 bytes) may be of this format."""

    @abstractmethod
    def parse(self, file: MappedFile) -> Header:
        """Read and check the header.

        Raises:
            SourceError: anything in it cannot be true; with the tensor's name and the offset.
        """

    def shards(self, path: Path) -> list[Path] | None:
        """Return the files of the checkpoint at `path`, in order, or None if this format finds none there.

        Args:
            path: a folder, an index file, or one shard.

        Raises:
            SourceError: there is an index, and it is wrong.
        """
        return None

    def check_names(self, path: Path, held: Mapping[Path, Container[str]]) -> None:
        """Check that the files of a checkpoint hold the tensors that an index of this format promises.

        Args:
            path: what `shards` was asked for.
            held: file -> names of its tensors.

        Raises:
            SourceError: one is not where the index puts it.
        """

    def check_shards(self, path: Path, sources: Sequence[Source]) -> None:
        """Check the files of a checkpoint against each other, once the headers are known.

        Args:
            path: what `shards` was asked for.
            sources: of any format.

        Raises:
            SourceError: a file of this format is not the whole checkpoint.
        """


_registry: dict[str, Format] = {}


def register(cls: type[Format]) -> type[Format]:
    """Enter a format class in the registry.

    Raises:
        UsageError: another format has that id already.
    """
    if cls.id in _registry:
        raise UsageError(f"two formats are called {cls.id!r}")
    _registry[cls.id] = cls()
    return cls


@cache
def _formats() -> tuple[Format, ...]:
    from quantcache.loader import formats

    for module in pkgutil.iter_modules(formats.__path__, f"{formats.__name__}."):
        importlib.import_module(module.name)
    return tuple(_registry.values())


class Source:
    """Read one file of a checkpoint: its tensors as zero-copy views.

    Args:
        path: the file.
        later: no byte is read before something is asked of it, and what is wrong with its content is said then.

    Raises:
        SourceError: it cannot be opened, is no model, or its header cannot be true.
    """

    def __init__(self, path: Path, *, later: bool = False) -> None:
        self.path = path
        self.file = MappedFile(path)
        #: the scheme by which tensors were renamed, with its version; part of what an entry's bytes depend on
        self.names = ""
        if not later:
            _ = self.tensors

    @once
    def _parsed(self) -> tuple[Format, Header]:
        self.file.bring(0, min(self.file.nbytes, HEAD))
        head = self.file.bytes[:64].tobytes()
        for known in _formats():
            if known.recognizes(head):
                return known, known.parse(self.file)
        raise SourceError(
            "not a model: neither a GGUF nor a safetensors header",
            path=self.path,
            offset=0,
            hint="PyTorch .pth/.bin checkpoints can execute code when read: convert them to .safetensors first",
        )

    @once
    def tensors(self) -> dict[str, TensorInfo]:
        """Its tensors by name, in the order of the file."""
        return {info.name: info for info in self._parsed[1].tensors}

    @property
    def format(self) -> str:
        """Id of its format."""
        return self._parsed[0].id

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the file says about itself, as far as it is cheap to read."""
        return self._parsed[1].metadata

    @property
    def big_endian(self) -> bool:
        """Whether every number in it is, tensors' included."""
        return self._parsed[1].big_endian

    @once
    def fingerprint(self) -> str:
        """What may tell its content from another's without reading all of it; see quantcache.cache.key."""
        wanted = samples(self.file.nbytes)
        for start, stop in wanted:  # all at once: a cold file would have each fault read megabytes around itself
            self.file.will_need(start, stop - start)
        for start, stop in wanted:
            self.file.populate(start, stop - start)
        return fingerprint(self.file.memory)

    def reading(self) -> dict[str, Any]:
        """Return what an entry's bytes depend on beside the file's own: how its tensors are named, and its blocks decoded."""
        blocks = any(info.is_block for info in self.tensors.values())
        return ({"names": self.names} if self.names else {}) | ({"blocks": BLOCKS_VERSION} if blocks else {})

    def check(self) -> None:
        """Check that every tensor lies inside the file.

        Raises:
            SourceError: names the first that does not.
        """
        for info in self.tensors.values():
            if info.offset + info.nbytes > self.file.nbytes:
                raise SourceError(
                    f"needs {info.nbytes} bytes, the file has {max(0, self.file.nbytes - info.offset)} from there"
                    " (truncated?)",
                    path=self.path,
                    tensor=info.name,
                    offset=info.offset,
                )

    def view(self, name: str) -> NDArray[Any]:
        """Return a tensor as it is stored, without a copy (a big-endian file: as a little-endian copy).

        Args:
            name: the tensor's.

        Returns:
            Read-only; element types in the shape that the name promises (perhaps unaligned), block types as
            uint8 [..., row bytes].

        Raises:
            SourceError: there is no such tensor, the file is too short for it, or its type is unknown.
        """
        if name not in self.tensors:
            raise SourceError("no such tensor", path=self.path, tensor=name)
        info = self.tensors[name]
        if not info.is_known:
            raise SourceError(f"has the unknown {info.dtype}", path=self.path, tensor=name, offset=info.offset)
        raw = self.little_endian(info, self.raw(info))
        raw.flags.writeable = False
        if info.is_block:
            rows = info.shape[:-1] if len(info.shape) > 1 else (1,)
            return raw.reshape(*rows, -1) if raw.size else raw
        array = raw.view(array_dtype(info.dtype)).reshape(info.shape)
        return array.swapaxes(-1, -2) if info.transposed else array

    def extent(self, info: TensorInfo, start: int, stop: int) -> tuple[int, int]:
        """Return where some weights stand in the file: first byte, and the one behind the last.

        Args:
            info: the tensor.
            start, stop: first weight and the one behind the last, at whole blocks.
        """
        weights, nbytes = unit(info.dtype)
        return info.offset + start // weights * nbytes, info.offset + stop // weights * nbytes

    def piece(self, info: TensorInfo, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the bytes of some weights, faulted in and little-endian; a view wherever that is possible.

        Raises:
            SourceError: the disk failed, or the file has become shorter.
        """
        first, last = self.extent(info, start, stop)
        self.file.populate(first, last - first)
        return self.little_endian(info, self.file.bytes[first:last])

    def little_endian(self, info: TensorInfo, raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return bytes of a tensor as a little-endian file has them: themselves, if this is one."""
        if not self.big_endian:
            return raw
        if info.is_block:
            return to_little_endian(info.dtype, raw)
        return raw.view(f"u{ITEMSIZE[info.dtype]}").byteswap().view(np.uint8)

    def raw(self, info: TensorInfo) -> NDArray[np.uint8]:
        """Return a tensor's bytes, faulted in.

        Raises:
            SourceError: the file is too short for them, or cannot be read.
        """
        raw = self.file.bytes[info.offset : info.offset + info.nbytes]
        if raw.size != info.nbytes:
            raise SourceError("lies behind the end of the file", path=self.path, tensor=info.name, offset=info.offset)
        return raw


def open_checkpoint(path: str | os.PathLike[str], names: str = "auto") -> list[Source]:
    """Open all files of a checkpoint and check them.

    Args:
        path: a model file, one of its shards or their index, or a folder (a hub snapshot or a repository's cache
            folder too).
        names: "auto" gives the tensors of an RWKV GGUF the names of RWKV's own checkpoints; "file" leaves names alone.

    Returns:
        The sources in order; more than one for a sharded checkpoint.

    Raises:
        SourceNotFoundError: nothing is there, or the folder holds no model.
        SourceError: a file is not what it claims to be.
    """
    where, files = find_checkpoint(path, names)
    sources = [Source(file) for file in files]
    check_checkpoint(where, sources, names)
    return sources


def find_checkpoint(path: str | os.PathLike[str], names: str = "auto") -> tuple[Path, list[Path]]:
    """Return where a checkpoint is, and its files in order; reads no byte of them, but an index that there is.

    Args:
        path, names: see open_checkpoint.

    Raises:
        SourceNotFoundError: nothing is there, or the folder holds no model.
        SourceError: files are missing, or it cannot be told which are meant.
        UsageError: `names` is no choice.
    """
    if names not in ("auto", "file"):
        raise UsageError(f"names={names!r}: it is 'auto' or 'file'")
    where = Path(path)
    try:
        where.stat()
    except (OSError, ValueError) as error:  # a name that is too long or holds a null is no file either
        raise SourceNotFoundError(
            "no such file or folder", path=where, hint="give a .safetensors, .st or .gguf file, or a folder with one"
        ) from error
    if where.is_dir():
        where = _snapshot(where)
    found = (known.shards(where) for known in _formats())
    files = next((files for files in found if files is not None), None)
    return where, files or [_only_file(where) if where.is_dir() else where]


def check_checkpoint(where: Path, sources: Sequence[Source], names: str) -> None:
    """Check the files of a checkpoint, and give their tensors the names that are wanted.

    Args:
        where: as it was found.
        sources: of its files.
        names: see open_checkpoint.

    Raises:
        SourceError: a file is not what it claims to be.
    """
    for known in _formats():
        known.check_names(where, {source.path: source.tensors for source in sources})
        known.check_shards(where, sources)
    for source in sources:
        source.check()
    if names == "auto" and not is_plain(sources[0].format):
        # the later parts of a split file carry no architecture
        metadata = sources[0].metadata
        named = runtime_names([source.tensors for source in sources], metadata.get("general.architecture"), metadata)
        for source, (tensors, scheme) in zip(sources, named, strict=True):
            source.tensors, source.names = tensors, scheme
    _check_owners([(source.path, source.tensors) for source in sources])


def check_names(where: Path, held: Sequence[tuple[Path, Collection[str]]]) -> None:
    """Check the files of a checkpoint by the names of their tensors alone, as `check_checkpoint` does.

    Args:
        where: as it was found.
        held: its files, of plain formats, and the names of their tensors.

    Raises:
        SourceError: a tensor stands in two files, or is not where an index puts it.
    """
    for known in _formats():
        known.check_names(where, dict(held))
    _check_owners(held)


def _check_owners(held: Sequence[tuple[Path, Collection[str]]]) -> None:
    """Refuse a tensor that stands in two files."""
    if len(held) == 1:
        return
    owner: dict[str, Path] = {}
    for path, names in held:
        for name in names:
            if name in owner:
                raise SourceError(f"stands in {owner[name].name} too", path=path, tensor=name)
            owner[name] = path


def is_plain(format_id: object) -> bool:
    """Return whether a format is plain, by its id: see Format."""
    return any(known.plain for known in _formats() if known.id == format_id)


def _snapshot(folder: Path) -> Path:
    """Return the current snapshot of a hub's cache folder (`models--org--name`), else the folder itself."""
    reference = folder / "refs" / "main"
    try:
        revision = reference.read_text().strip() if reference.is_file() else ""  # a FIFO would wait for a writer
    except (OSError, UnicodeDecodeError):
        return folder
    snapshot = folder / "snapshots" / revision
    return snapshot if revision and Path(revision).name == revision and snapshot.is_dir() else folder


def model_files(folder: Path) -> list[Path]:
    """Return the files in a folder that are called like models of any format, sorted."""
    suffixes = tuple(suffix for known in _formats() for suffix in known.suffixes)
    return sorted(file for file in folder.iterdir() if file.name.endswith(suffixes) and file.is_file())


def _only_file(folder: Path) -> Path:
    """Return the one model file in a folder."""
    files = model_files(folder)
    preferred = [file for file in files if file.name == "model.safetensors"]
    if len(files) == 1 or preferred:
        return (preferred or files)[0]
    if not files:
        suffixes = ", ".join(suffix for known in _formats() for suffix in known.suffixes)
        raise SourceNotFoundError(f"no model file in this folder ({suffixes})", path=folder)
    names = ", ".join(file.name for file in files[:5])
    raise SourceError(
        f"{len(files)} model files and no index: {names}", path=folder, hint="name the file that you want"
    )
