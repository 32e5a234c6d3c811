"""Own every exception and warning of quantcache. Imports nothing.

The tree::

    QuantcacheError                 message, hint, exit_code
    ├── UsageError (ValueError)     an argument or setting that cannot be meant        2
    ├── SourceError                 the checkpoint cannot be read: path, tensor, offset  1
    │   └── SourceNotFoundError     there is nothing at that path                      4
    ├── CodecError                  a tensor cannot be coded or decoded that way       1
    │   └── KernelError             the compiled kernels are missing or refused        1
    ├── CacheError                  the store failed (a load never raises these)       1
    │   ├── CorruptEntryError       an entry's bytes are not what was stored           1
    │   ├── KeyNotFoundError        no entry has that key or path                      4
    │   ├── NoCacheError            there is no store at that root                    10
    │   ├── LockTimeoutError        another process held the lock for too long        11
    │   ├── StoreTooNewError        written by a newer quantcache                     12
    │   └── StoreReadOnlyError      the store cannot be written                       13
    └── DeviceError                 the GPU failed, was lost, or was closed            1
        ├── DeviceUnavailable       there is no GPU that can be used                  14
        └── DeviceOutOfMemory       its memory does not take what was asked for       15

    QuantcacheWarning (UserWarning) something was done without the cache, or a tensor was kept
"""

from __future__ import annotations

__all__ = [
    "CacheError",
    "CodecError",
    "CorruptEntryError",
    "DeviceError",
    "DeviceOutOfMemory",
    "DeviceUnavailable",
    "KernelError",
    "KeyNotFoundError",
    "LockTimeoutError",
    "NoCacheError",
    "QuantcacheError",
    "QuantcacheWarning",
    "SourceError",
    "SourceNotFoundError",
    "StoreReadOnlyError",
    "StoreTooNewError",
    "UsageError",
]


class QuantcacheWarning(UserWarning):
    """Say what was done without the cache, or which tensor was kept as it was."""


class QuantcacheError(Exception):
    """Carry what went wrong, what helps, and the exit code of the command line.

    Args:
        message: what, which file and tensor, expected and found.
        hint: the command or setting that helps, if there is one.
        exit_code: overrides the class's own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(QuantcacheError, ValueError):
    """Reject an argument or a setting."""

    exit_code = 2


class SourceError(QuantcacheError):
    """Report a checkpoint that cannot be read.

    Args:
        message: what is wrong.
        path: the file.
        tensor: the tensor's name, if it is about one.
        offset: where in the file, in bytes from its start, if known.
        hint: what helps.
    """

    def __init__(
        self,
        message: str,
        *,
        path: object = None,
        tensor: str | None = None,
        offset: int | None = None,
        hint: str | None = None,
    ) -> None:
        where = "" if path is None else f"{path}: "
        if tensor is not None:
            where += f"tensor {shorten(tensor)}: "
        at = "" if offset is None else f" (at byte {offset})"
        super().__init__(f"{where}{message}{at}", hint=hint)
        self.path = path
        self.tensor = tensor
        self.offset = offset


class SourceNotFoundError(SourceError):
    """Report that nothing, or nothing like a checkpoint, is at a path."""

    exit_code = 4


class CodecError(QuantcacheError):
    """Report a tensor that a codec cannot code or decode."""


class KernelError(CodecError):
    """Report compiled kernels that are missing, or a CPU level that cannot run here."""


class CacheError(QuantcacheError):
    """Report a failure of the store; `load` turns it into a miss and one warning."""


class CorruptEntryError(CacheError):
    """Report an entry whose bytes are not those that were stored."""


class KeyNotFoundError(CacheError):
    """Report a key or path without an entry."""

    exit_code = 4


class NoCacheError(CacheError):
    """Report that there is no store where one was expected."""

    exit_code = 10


class LockTimeoutError(CacheError):
    """Report a lock that another process kept for longer than the limit."""

    exit_code = 11


class StoreTooNewError(CacheError):
    """Report something that a newer version of quantcache wrote."""

    exit_code = 12


class StoreReadOnlyError(CacheError):
    """Report a store that cannot be written."""

    exit_code = 13


class DeviceError(QuantcacheError):
    """Report a GPU that failed or was lost, or what was closed."""


class DeviceUnavailable(DeviceError):  # noqa: N818 - what is missing, rather than what failed
    """Report that there is no GPU that can be used."""

    exit_code = 14


class DeviceOutOfMemory(DeviceError):  # noqa: N818 - the field's own name
    """Report memory that a GPU does not have.

    Args:
        message: what was asked for, and what there is.
        asked: bytes.
        held: bytes that this device's uploads held at that time.
        hint: what helps.
    """

    exit_code = 15

    def __init__(self, message: str, *, asked: int = 0, held: int = 0, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.asked = asked
        self.held = held


def shorten(name: str, limit: int = 120) -> str:
    """Quote a name from a file for a message: control characters escaped, long ones cut.

    Args:
        name: any text, possibly hostile.
        limit: characters kept.
    """
    quoted = ascii(name) if not name.isprintable() else f"'{name}'"
    return quoted if len(quoted) <= limit else f"{quoted[: limit - 3]}..."
