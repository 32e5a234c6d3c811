"""Own the verbs about what is in the store: ls, stats, du, rm, pin, unpin, dir, config."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from quantcache.cache import settings as settings_of
from quantcache.cache.index import EntryRow
from quantcache.errors import UsageError
from quantcache.render import Output, ago, seconds, size
from quantcache.verbs.common import DRY, agreed, arg, as_json, open_cache, rows_of, verb
from quantcache.verbs.removal import removed

__all__: list[str] = []

@verb(
    "ls", "list entries",
    arg("--filter", metavar="COND", action="append", default=[], help="as 'size>1GB', 'age>30d', 'recipe=nf4'"),
    arg("--sort", default="used", choices=("used", "size", "created", "hits", "name"), help="default used"),
    arg("--limit", type=int, metavar="N", help="only the first N"),
)  # fmt: skip
def _ls(options: argparse.Namespace, output: Output) -> int:
    with open_cache(options) as cache:
        rows = cache.entries(options.sort, None if options.filter else options.limit)
        rows = [row for row in rows if all(_matches(row, text) for text in options.filter)][: options.limit]
        pinned = cache.pinned()
    if output.as_json:
        output.document(entries=[as_json(row, pinned) for row in rows])
    elif rows:
        output.table(
            ("key", "recipe", "size", "hits", "used", "pin", "source"),
            [(row.key[:12], row.recipe, size(row.nbytes), row.hits, ago(row.used_s), "yes" if row.key in pinned else "", row.source_path)
             for row in rows],
        )  # fmt: skip
    else:
        output.words("no entries")
    return 0


def _matches(row: EntryRow, text: str) -> bool:
    for sign in (">=", "<=", ">", "<", "="):
        name, separator, value = text.partition(sign)
        if separator:
            break
    else:
        raise UsageError(f"--filter {text!r} is not NAME>VALUE", hint="as 'size>1GB', 'age>30d', 'recipe=nf4'")
    name = name.strip()
    if name == "recipe" and sign == "=":
        return row.recipe == value.strip()
    known: dict[str, Callable[[], tuple[float, float]]] = {
        "size": lambda: (row.nbytes, settings_of.parse_size(value)),
        "age": lambda: (time.time() - row.used_s, settings_of.parse_duration(value)),
        "hits": lambda: (row.hits, settings_of.parse_size(value)),
    }
    if name not in known:
        raise UsageError(f"--filter: unknown name {name!r}", hint=f"one of {', '.join([*known, 'recipe'])}")
    have, want = known[name]()
    return {">": have > want, "<": have < want, ">=": have >= want, "<=": have <= want, "=": have == want}[sign]


@verb("stats", "hits, misses, bytes and the time that was saved")
def _stats(options: argparse.Namespace, output: Output) -> int:
    with open_cache(options) as cache:
        found, usage = cache.stats(), cache.usage()
        entries = len(cache)
    if output.as_json:
        whole = {name: value if name.startswith("seconds") else int(value) for name, value in found.items()}
        output.document(entries=entries, size=usage["total"], **whole)
        return 0
    loads = found["hits"] + found["misses"]
    share = f" ({100 * found['hits'] / loads:.0f} %)" if loads else ""
    for name, text in (("hits", f"{found['hits']:.0f}{share}"), ("misses", f"{found['misses']:.0f}"),
                       ("served", size(found["bytes_served"])), ("built", f"{size(found['bytes_built'])} in {seconds(found['seconds_building'])}"),
                       ("time saved", seconds(found["seconds_saved"])), ("evicted", f"{found['evicted']:.0f} ({size(found['bytes_evicted'])})"),
                       ("entries", f"{entries} ({size(usage['total'])})")):  # fmt: skip
        print(f"{name:12} {text}")
    return 0


@verb("du", "what takes the space")
def _du(options: argparse.Namespace, output: Output) -> int:
    with open_cache(options) as cache:
        usage, limit, root = cache.usage(), cache.max_size, cache.root
    free = shutil.disk_usage(root).free
    if output.as_json:
        output.document(**usage, max_size=limit, disk_free=free)
    else:
        output.table(("size", "what"), [(size(n), name) for name, n in usage.items()] + [(size(limit), "limit"), (size(free), "free on the disk")])
    return 0


@verb("rm", "remove entries", arg("keys", nargs="+", metavar="KEY|PATH"), *DRY)
def _rm(options: argparse.Namespace, output: Output) -> int:
    from quantcache.cache.maintenance import remove

    with open_cache(options) as cache:
        rows = {row.key: row for named in options.keys for row in rows_of(cache, named)}
        if not agreed(options, f"{len(rows)} entries will be removed"):
            return 1
        return removed(output, remove(cache, list(rows.values()), dry_run=options.dry_run), dry_run=options.dry_run)


def _pinning(options: argparse.Namespace, output: Output, *, pin: bool) -> int:
    with open_cache(options) as cache:
        rows = [row for named in options.keys for row in rows_of(cache, named)]
        for row in rows:
            (cache.pin if pin else cache.unpin)(row.key)
    if output.as_json:
        output.document(pinned=pin, keys=[row.key for row in rows])
    else:
        for row in rows:
            print(f"{'pinned' if pin else 'unpinned'}  {row.key[:12]}  {row.source_path}")
    return 0


@verb("pin", "keep entries from being evicted", arg("keys", nargs="+", metavar="KEY|PATH"))
def _pin(options: argparse.Namespace, output: Output) -> int:
    return _pinning(options, output, pin=True)


@verb("unpin", "let entries be evicted again", arg("keys", nargs="+", metavar="KEY|PATH"))
def _unpin(options: argparse.Namespace, output: Output) -> int:
    return _pinning(options, output, pin=False)


@verb("dir", "print the store's folder")
def _dir(options: argparse.Namespace, output: Output) -> int:
    folder = settings_of.resolve({"dir": options.cache_dir})["dir"].value
    output.document(dir=str(folder)) if output.as_json else print(folder)
    return 0


@verb("config", "print every setting and where it comes from")
def _config(options: argparse.Namespace, output: Output) -> int:
    flags = {"dir": options.cache_dir, "max_size": options.limit_size, "keep_free": options.limit_free,
             "lock_timeout": options.lock_timeout, "threads": options.threads}  # fmt: skip
    found = settings_of.resolve(flags)
    if output.as_json:
        values = {s.name: {"value": str(s.value) if isinstance(s.value, Path) else s.value, "origin": s.origin} for s in found.values()}
        output.document(file=str(settings_of.config_file()), settings=values)
    else:
        output.table(("setting", "value", "origin"), [(s.name, "none" if s.value is None else str(s.value), s.origin) for s in found.values()], flexible=1)
    return 0
