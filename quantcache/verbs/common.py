"""Own what the verbs of the command line share: their registry, arguments, the store, asking, and naming entries."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantcache.cache import settings as settings_of
from quantcache.cache.index import EntryRow
from quantcache.cache.store import Cache
from quantcache.errors import KeyNotFoundError, UsageError
from quantcache.render import Output, iso

__all__ = ["DRY", "SHARE", "SIZE", "TIME", "VERBS", "Verb", "agreed", "arg", "as_json", "open_cache", "rows_of", "type_of", "verb"]

Verb = Callable[[argparse.Namespace, Output], int]
#: name -> what runs it, what it is for, what adds its arguments
VERBS: dict[str, tuple[Verb, str, Callable[[argparse.ArgumentParser], None]]] = {}


def verb(name: str, describe: str, *arguments: tuple[tuple[str, ...], dict[str, Any]]) -> Callable[[Verb], Verb]:
    """Enter a verb with its arguments."""

    def configure(parser: argparse.ArgumentParser) -> None:
        for names, options in arguments:
            parser.add_argument(*names, **options)

    def enter(function: Verb) -> Verb:
        VERBS[name] = function, describe, configure
        return function

    return enter


def arg(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Describe an argument as argparse wants it."""
    return names, options


#: of every verb that removes something
DRY = (
    arg("-n", "--dry-run", action="store_true", help="only say what would go"),
    arg("-y", "--yes", action="store_true", help="do not ask"),
)


def type_of(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let argparse say what our own parser says."""

    def checked(text: str) -> Any:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(error.message) from error

    return checked


SIZE, TIME, SHARE = map(type_of, (settings_of.parse_size, settings_of.parse_duration, settings_of.parse_share))


def open_cache(options: argparse.Namespace, *, create: bool = False, readonly: bool = False) -> Cache:
    """Open the store that the options name."""
    return Cache(
        options.cache_dir, create=create, readonly=readonly, shared=options.shared,
        max_size=options.limit_size, keep_free=options.limit_free, lock_timeout_s=options.lock_timeout,
    )  # fmt: skip


def agreed(options: argparse.Namespace, what: str) -> bool:
    """Ask before something is lost; where nobody can answer, --yes is needed."""
    if options.yes or options.dry_run:
        return True
    if not sys.stdin.isatty():
        raise UsageError(f"{what}: nobody is there to ask", hint="add --yes, or --dry-run to see what would go")
    print(f"{what}. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def as_json(row: EntryRow, pinned: set[str]) -> dict[str, Any]:
    """Return a row as JSON shows it."""
    return {
        "key": row.key, "recipe": row.recipe, "size": row.nbytes, "source": row.source_path, "source_size": row.source_nbytes,
        "tensors": row.tensors, "created": iso(row.created_s), "used": iso(row.used_s), "checked": iso(row.checked_s),
        "hits": row.hits, "build_seconds": row.build_s, "pinned": row.key in pinned,
    }  # fmt: skip


def rows_of(cache: Cache, named: str) -> list[EntryRow]:
    """Return the entries that a key's prefix or a checkpoint's path means."""
    path = Path(named)
    if named and os.path.exists(named):
        keys = cache.keys_of_model(path.resolve())
        if path.is_dir():
            keys += [row.key for row in cache.entries() if Path(row.source_path).parent == path.resolve() and row.key not in keys]
        if not keys:
            raise KeyNotFoundError(f"nothing is stored for {named}", hint=f"quantcache warm {named}")
        return [row for row in cache.entries() if row.key in keys]
    gone = [row for row in cache.entries() if row.source_path == str(path.absolute())] if os.sep in named else []
    if gone:  # the source was deleted since
        return gone
    if not named or not all(digit in "0123456789abcdef" for digit in named.lower()):
        raise KeyNotFoundError(f"{named!r} is neither a key nor a file", hint="quantcache ls shows the keys")
    return [cache.lookup(named)]
