"""Own the command line: arguments in, text or JSON out, errors to exit codes. No logic of its own."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantcache import __version__
from quantcache.cache import settings as settings_of
from quantcache.cache.index import EntryRow
from quantcache.cache.store import Cache
from quantcache.errors import KeyNotFoundError, QuantcacheError, UsageError
from quantcache.render import Output, ago, iso, seconds, size

__all__ = ["main"]

Verb = Callable[[argparse.Namespace, Output], int]
_VERBS: dict[str, tuple[Verb, str, Callable[[argparse.ArgumentParser], None]]] = {}


def _verb(name: str, describe: str, *arguments: tuple[tuple[str, ...], dict[str, Any]]) -> Callable[[Verb], Verb]:
    """Enter a verb with its arguments."""

    def configure(parser: argparse.ArgumentParser) -> None:
        for names, options in arguments:
            parser.add_argument(*names, **options)

    def enter(function: Verb) -> Verb:
        _VERBS[name] = function, describe, configure
        return function

    return enter


def _arg(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, options


_DRY = (
    _arg("-n", "--dry-run", action="store_true", help="only say what would go"),
    _arg("-y", "--yes", action="store_true", help="do not ask"),
)


def _type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let argparse say what our own parser says."""

    def checked(text: str) -> Any:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(error.message) from error

    return checked


_SIZE, _TIME, _SHARE = map(_type, (settings_of.parse_size, settings_of.parse_duration, settings_of.parse_share))


def _cache(options: argparse.Namespace, *, create: bool = False, readonly: bool = False) -> Cache:
    return Cache(
        options.cache_dir, create=create, readonly=readonly, shared=options.shared,
        max_size=options.limit_size, keep_free=options.limit_free, lock_timeout_s=options.lock_timeout,
    )  # fmt: skip


def _agreed(options: argparse.Namespace, output: Output, what: str) -> bool:
    """Ask before something is lost; where nobody can answer, --yes is needed."""
    if options.yes or options.dry_run:
        return True
    if not sys.stdin.isatty():
        raise UsageError(f"{what}: nobody is there to ask", hint="add --yes, or --dry-run to see what would go")
    print(f"{what}. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _as_json(row: EntryRow, pinned: set[str]) -> dict[str, Any]:
    return {
        "key": row.key, "recipe": row.recipe, "size": row.nbytes, "source": row.source_path, "source_size": row.source_nbytes,
        "tensors": row.tensors, "created": iso(row.created_s), "used": iso(row.used_s), "checked": iso(row.checked_s),
        "hits": row.hits, "build_seconds": row.build_s, "pinned": row.key in pinned,
    }  # fmt: skip


def _rows_of(cache: Cache, named: str) -> list[EntryRow]:
    """Return the entries that a key's prefix or a checkpoint's path means."""
    path = Path(named)
    if named and path.exists():
        keys = cache.keys_of_model(path.resolve())
        if path.is_dir():
            keys += [row.key for row in cache.entries() if Path(row.source_path).parent == path.resolve() and row.key not in keys]
        if not keys:
            raise KeyNotFoundError(f"nothing is stored for {named}", hint=f"quantcache warm {named}")
        return [row for row in cache.entries() if row.key in keys]
    if not named or not all(digit in "0123456789abcdef" for digit in named.lower()):
        raise KeyNotFoundError(f"{named!r} is neither a key nor a file", hint="quantcache ls shows the keys")
    return [cache.lookup(named)]


#: What says which tensor becomes what.
_RECIPE = (
    _arg("--quant", default="nf4", help="nf4, nf4-dq, int8, int8-row, f16 or native (default nf4)"),
    _arg("--rule", action="append", default=[], metavar="PATTERN=CODEC[*FACTOR]", help="before the default rules"),
    _arg("--include", action="append", metavar="PATTERN", help="quantize these names (default *.weight)"),
    _arg("--exclude", action="append", metavar="PATTERN", help="leave these names (default embeddings and heads)"),
    _arg("--other", default="f16", choices=("f16", "keep"), help="what becomes of the rest (default f16)"),
    _arg("--native", default="keep", choices=("keep", "convert"), help="GGUF blocks (default keep)"),
    _arg("--names", default="auto", choices=("auto", "file"), help="an RWKV GGUF's: the checkpoint's, or the file's (default auto)"),
    _arg("--lora", action="append", default=[], metavar="FILE[:ALPHA]", help="merge an adapter first; ALPHA is a number or PATTERN=NUMBER,..."),
)  # fmt: skip


@_verb(
    "warm", "build entries ahead of time",
    _arg("paths", nargs="+", metavar="PATH", help="checkpoints: files or folders"),
    *_RECIPE,
    _arg("--refresh", action="store_true", help="build again even if it is there"),
)  # fmt: skip
def _warm(options: argparse.Namespace, output: Output) -> int:
    from quantcache.loader.model import load

    wanted = _wanted(options)
    done: list[dict[str, Any]] = []
    failed, code = 0, 1
    with _cache(options, create=True) as cache:
        for path in options.paths:
            start = time.monotonic()
            try:
                with output.progress(Path(path).name) as progress, load(
                    path, **wanted, cache=cache, mode="refresh" if options.refresh else "auto", threads=options.threads,
                    progress=progress,
                ) as model:  # fmt: skip
                    model.finish()
                    reports = model.report()
            except QuantcacheError as error:
                if len(options.paths) == 1:
                    raise
                output.problem("error", str(error), error.hint)
                failed += 1
                done.append({"path": str(path), "state": "failed", "error": str(error), "hint": error.hint})
                continue
            took = time.monotonic() - start
            stored, came = sum(r.nbytes for r in reports), sum(r.source_nbytes for r in reports)
            quantized = sum(r.codec not in ("keep", "native", "f16") for r in reports)
            passed = bool(reports) and all(r.codec == "native" for r in reports)
            saved = bool(model.keys_in_store) or passed
            state = "hit" if model.hit else "built" if saved else "not saved"
            failed += not saved
            if not saved and model.unsaved:
                code = model.unsaved[0].exit_code
            done.append({"path": str(path), "state": state, "hit": model.hit, "seconds": round(took, 3), "size": stored,
                         "source_size": came, "tensors": len(reports), "quantized": quantized, "keys": model.keys_in_store})  # fmt: skip
            if not output.as_json:
                print(f"{state:9} {path}  {options.quant}: {size(came)} -> {size(stored)}, "
                      f"{quantized} of {len(reports)} tensors quantized, {seconds(took)}")  # fmt: skip
                sys.stdout.flush()
    if output.as_json:
        output.document(models=done)
    return 0 if not failed else code if failed == len(options.paths) else 3


def _wanted(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `load` that say which tensor becomes what."""
    return {
        "quant": options.quant, "rules": [_parse_rule(text) for text in options.rule], "include": options.include,
        "exclude": options.exclude, "other": options.other, "native": options.native, "names": options.names,
        "lora": [_parse_lora(text) for text in options.lora],
    }  # fmt: skip


def _parse_lora(text: str) -> tuple[str, Any]:
    """Split FILE[:ALPHA]; a file whose name has a colon is taken whole if it exists."""
    path, separator, given = text.rpartition(":")
    if not separator or os.path.exists(text):
        return text, None
    try:
        if "=" not in given:
            return path, float(given)
        # a number alone is for the rest
        pairs = [part.rpartition("=") if "=" in part else ("*", "=", part) for part in given.split(",")]
        return path, [(pattern, float(value)) for pattern, _, value in pairs]
    except ValueError:
        if os.path.exists(path):
            raise UsageError(f"--lora {text!r}: {given!r} is no alpha", hint="as FILE:16 or 'FILE:*.att.*=16,*.ffn.*=8'") from None
        return text, None


def _parse_rule(text: str) -> tuple[str, str] | tuple[str, str, float]:
    pattern, separator, target = text.rpartition("=")
    codec, _, factor = target.partition("*")
    if not separator or not pattern or not codec:
        raise UsageError(f"--rule {text!r} is not PATTERN=CODEC", hint="as 'blocks.0.*=int8' or 'att.output.*=int8*0.5'")
    try:
        return (pattern, codec, float(factor)) if factor else (pattern, codec)
    except ValueError as error:
        raise UsageError(f"--rule {text!r}: {factor!r} is not a number") from error


@_verb(
    "ls", "list entries",
    _arg("--filter", metavar="COND", action="append", default=[], help="as 'size>1GB', 'age>30d', 'recipe=nf4'"),
    _arg("--sort", default="used", choices=("used", "size", "created", "hits", "name"), help="default used"),
    _arg("--limit", type=int, metavar="N", help="only the first N"),
)  # fmt: skip
def _ls(options: argparse.Namespace, output: Output) -> int:
    with _cache(options) as cache:
        rows = cache.entries(options.sort, None if options.filter else options.limit)
        rows = [row for row in rows if all(_matches(row, text) for text in options.filter)][: options.limit]
        pinned = cache.pinned()
    if output.as_json:
        output.document(entries=[_as_json(row, pinned) for row in rows])
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


@_verb("info", "show an entry, or what is in a checkpoint and would become of it", _arg("what", metavar="KEY|PATH"), *_RECIPE)
def _info(options: argparse.Namespace, output: Output) -> int:
    path = Path(options.what)
    if path.exists():
        return _info_path(options, output)
    with _cache(options) as cache:
        (row,) = _rows_of(cache, options.what)
        header, pinned = cache.open(row.key).header, cache.pinned()
        file = cache.path_of(row.key)
    tensors = [{"name": r["name"], "codec": r["codec"], "shape": r["shape"], "source_type": r["dtype"], "reason": r.get("reason")}
               for r in header.records]  # fmt: skip
    if output.as_json:
        output.document(entry=_as_json(row, pinned) | {"file": str(file), "document": header.document}, tensors=tensors)
        return 0
    for name, value in (("key", row.key), ("file", file), ("recipe", row.recipe), ("size", size(row.nbytes)),
                        ("source", row.source_path), ("source size", size(row.source_nbytes)), ("built", f"{ago(row.created_s)}, in {seconds(row.build_s)}"),
                        ("used", f"{ago(row.used_s)}, {row.hits} hits"), ("pinned", "yes" if row.key in pinned else "no")):  # fmt: skip
        print(f"{name:12} {value}")
    for adapter in header.document.get("adapters", ()):
        print(f"{'adapter':12} {adapter['digest'][:12]}, scale {', '.join(f'{scale:g}' for scale in adapter['scales'])}")
    print()
    output.table(("codec", "type", "shape", "tensor", "why"), [(t["codec"], t["source_type"], "x".join(map(str, t["shape"])), t["name"], t["reason"] or "") for t in tensors], flexible=3)
    return 0


def _info_path(options: argparse.Namespace, output: Output) -> int:
    """Show what each tensor of a checkpoint is, and would become."""
    from quantcache.loader.preview import preview

    wanted = _wanted(options)
    tensors = [vars(found) for found in preview(options.what, **wanted)]
    totals = {"size": sum(t["size"] for t in tensors), "stored_size": sum(t["stored_size"] for t in tensors)}
    if output.as_json:
        output.document(path=options.what, quant=options.quant, tensors=tensors, **totals)
        return 0
    output.table(
        ("type", "shape", "size", "becomes", "then", "tensor", "why"),
        [(t["type"], "x".join(map(str, t["shape"])), size(t["size"]), t["becomes"], size(t["stored_size"]), t["name"],
          ", ".join(filter(None, ("merged" if t["changes"] else "", t["reason"])))) for t in tensors],
        flexible=5,
    )  # fmt: skip
    native = sum(t["becomes"] == "native" for t in tensors)
    output.words(f"{len(tensors)} tensors, {native} of them as they are: {size(totals['size'])} -> {size(totals['stored_size'])}")
    return 0


@_verb("stats", "hits, misses, bytes and the time that was saved")
def _stats(options: argparse.Namespace, output: Output) -> int:
    with _cache(options) as cache:
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


@_verb("du", "what takes the space")
def _du(options: argparse.Namespace, output: Output) -> int:
    with _cache(options) as cache:
        usage, limit, root = cache.usage(), cache.max_size, cache.root
    free = shutil.disk_usage(root).free
    if output.as_json:
        output.document(**usage, max_size=limit, disk_free=free)
    else:
        output.table(("size", "what"), [(size(n), name) for name, n in usage.items()] + [(size(limit), "limit"), (size(free), "free on the disk")])
    return 0


@_verb(
    "verify", "check entries; 1 if any is damaged",
    _arg("keys", nargs="*", metavar="KEY|PATH"),
    _arg("--quick", action="store_true", help="headers and lengths only"),
    _arg("--full", action="store_true", help="every digest (the default)"),
    _arg("--subset", metavar="PART", help="10%% or 50GB of the store, the longest unchecked first; or 2/7"),
    _arg("--max-duration", type=_TIME, metavar="TIME", help="begin no further entry after this long (10min)"),
    _arg("--against-source", action="store_true", help="quantize again, and compare every byte"),
)  # fmt: skip
def _verify(options: argparse.Namespace, output: Output) -> int:
    from quantcache.cache.maintenance import verify

    with _cache(options) as cache:
        keys = [row.key for named in options.keys for row in _rows_of(cache, named)] if options.keys else None
        done = verify(cache, keys, quick=options.quick, subset=options.subset, max_duration_s=options.max_duration,
                      threads=options.threads or os.cpu_count() or 1)  # fmt: skip
        if options.against_source:
            from quantcache.loader.against_source import compare

            bad = {finding.subject for finding in done.findings}
            done.findings += compare(cache, [key for key in done.checked if key not in bad], threads=options.threads or 0)
    if output.as_json:
        output.document(checked=len(done.checked), left=done.left, findings=[_finding(f) for f in done.findings])
    else:
        for finding in done.findings:
            print(f"{'damaged' if finding.damaged else 'found'}  {finding.subject}  {finding.problem}")
        left = f", {done.left} left for another time" if done.left else ""
        output.words(f"{len(done.checked)} entries checked{left}, {len(done.findings)} findings" + ("; quantcache repair" if done.findings else ""))
    return 1 if done.findings else 0


def _finding(finding: Any) -> dict[str, Any]:
    return {"key": finding.subject, "problem": finding.problem, "damaged": finding.damaged}


@_verb("repair", "quarantine what is damaged and rebuild the index", *_DRY)
def _repair(options: argparse.Namespace, output: Output) -> int:
    from quantcache.cache.maintenance import repair

    with _cache(options) as cache:
        done, removed, left = repair(cache, dry_run=options.dry_run, threads=options.threads or os.cpu_count() or 1)
    if output.as_json:
        output.document(dry_run=options.dry_run, entries=left, findings=[_finding(f) for f in done.findings],
                        removed=[str(path) for path, _ in removed.files])  # fmt: skip
    else:
        for finding in done.findings:
            done_to_it = "found" if not finding.damaged else "would quarantine" if options.dry_run else "quarantined"
            print(f"{done_to_it}  {finding.subject}  {finding.problem}")
        output.words(f"{len(done.findings)} findings, {len(removed.files)} temp files, {left} entries")
    return 0


@_verb(
    "prune", "remove entries by limits; pinned ones stay",
    _arg("--max-size", type=_SIZE, metavar="SIZE", help="the store shall take at most this (50GB)"),
    _arg("--max-age", type=_TIME, metavar="TIME", help="not used for this long (30d)"),
    _arg("--keep-free", type=_SHARE, metavar="SHARE", help="of the disk (10%% or 50GB)"),
    _arg("--stale-source", action="store_true", help="whose source file is gone"),
    _arg("--orphans", action="store_true", help="the quarantine"),
    *_DRY,
)  # fmt: skip
def _prune(options: argparse.Namespace, output: Output) -> int:
    from quantcache.cache.maintenance import prune

    limits = {"max_size": options.max_size, "max_age_s": options.max_age, "keep_free": options.keep_free,
              "stale_source": options.stale_source, "orphans": options.orphans}  # fmt: skip
    with _cache(options) as cache:
        planned = prune(cache, dry_run=True, **limits)
        if planned.entries and not _agreed(options, output, f"{len(planned.entries)} entries ({size(planned.nbytes)}) will be removed"):
            return 1
        return _removed(output, planned if options.dry_run else prune(cache, **limits), dry_run=options.dry_run)


def _removed(output: Output, found: Any, *, dry_run: bool) -> int:
    if output.as_json:
        output.document(dry_run=dry_run, size=found.nbytes, freed=found.freed, entries=[row.key for row in found.entries], files=[str(p) for p, _ in found.files])
    else:
        for row in found.entries:
            print(f"{'would remove' if dry_run else 'removed'}  {row.key[:12]}  {size(row.nbytes)}  {row.source_path}")
        output.words(f"{len(found.entries)} entries, {size(found.freed)} of the disk {'would come' if dry_run else 'came'} free")
    for message in found.failed:
        output.problem("error", message)
    return 3 if found.failed else 0


@_verb("rm", "remove entries", _arg("keys", nargs="+", metavar="KEY|PATH"), *_DRY)
def _rm(options: argparse.Namespace, output: Output) -> int:
    from quantcache.cache.maintenance import remove

    with _cache(options) as cache:
        rows = {row.key: row for named in options.keys for row in _rows_of(cache, named)}
        if not _agreed(options, output, f"{len(rows)} entries will be removed"):
            return 1
        return _removed(output, remove(cache, list(rows.values()), dry_run=options.dry_run), dry_run=options.dry_run)


@_verb("clear", "remove all entries but the pinned", _arg("--pinned", action="store_true", help="pinned ones, too"), *_DRY)
def _clear(options: argparse.Namespace, output: Output) -> int:
    from quantcache.cache.maintenance import clear

    with _cache(options) as cache:
        planned = clear(cache, pinned_too=options.pinned, dry_run=True)
        if not _agreed(options, output, f"{len(planned.entries)} entries ({size(planned.nbytes)}) will be removed"):
            return 1
        return _removed(output, planned if options.dry_run else clear(cache, pinned_too=options.pinned), dry_run=options.dry_run)


def _pinning(options: argparse.Namespace, output: Output, *, pin: bool) -> int:
    with _cache(options) as cache:
        rows = [row for named in options.keys for row in _rows_of(cache, named)]
        for row in rows:
            (cache.pin if pin else cache.unpin)(row.key)
    if output.as_json:
        output.document(pinned=pin, keys=[row.key for row in rows])
    else:
        for row in rows:
            print(f"{'pinned' if pin else 'unpinned'}  {row.key[:12]}  {row.source_path}")
    return 0


@_verb("pin", "keep entries from being evicted", _arg("keys", nargs="+", metavar="KEY|PATH"))
def _pin(options: argparse.Namespace, output: Output) -> int:
    return _pinning(options, output, pin=True)


@_verb("unpin", "let entries be evicted again", _arg("keys", nargs="+", metavar="KEY|PATH"))
def _unpin(options: argparse.Namespace, output: Output) -> int:
    return _pinning(options, output, pin=False)


@_verb("dir", "print the store's folder")
def _dir(options: argparse.Namespace, output: Output) -> int:
    folder = settings_of.resolve({"dir": options.cache_dir})["dir"].value
    output.document(dir=str(folder)) if output.as_json else print(folder)
    return 0


@_verb("config", "print every setting and where it comes from")
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


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("everywhere")
    add = group.add_argument
    hide = argparse.SUPPRESS
    add("--cache-dir", metavar="DIR", default=hide, help="the store (QUANTCACHE_DIR)")
    add("--json", action="store_true", default=hide, help="one JSON document on stdout")
    add("-q", "--quiet", action="store_true", default=hide, help="no words but errors")
    add("-v", "--verbose", action="store_true", default=hide, help="tracebacks, too")
    add("--no-progress", action="store_true", default=hide, help="no bars")
    add("--no-color", action="store_true", default=hide, help="no colours")
    add("--threads", type=_type(settings_of.parse_threads), metavar="N", default=hide, help="0: one per core")
    add("--limit-size", metavar="SIZE", default=hide, help="the store's max_size (200GB)")
    add("--limit-free", metavar="SHARE", default=hide, help="the disk's keep_free (5%%)")
    add("--lock-timeout", type=_TIME, metavar="TIME", default=hide, help="for another process's build")
    add("--shared", action="store_true", default=hide, help="accept a store of another user")
    parser = argparse.ArgumentParser(prog="quantcache", description="A store of quantized weights.", parents=[common], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"quantcache {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, (_, describe, configure) in _VERBS.items():
        configure(verbs.add_parser(name, help=describe, description=describe, parents=[common], allow_abbrev=False))
    return parser


_DEFAULTS: dict[str, Any] = {"cache_dir": None, "json": False, "quiet": False, "verbose": False, "no_progress": False,
                             "no_color": False, "threads": None, "limit_size": None, "limit_free": None, "lock_timeout": None,
                             "shared": False}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; sys.argv if None.

    Returns:
        The exit code: 0 done, 1 failure or findings, 2 usage, 3 partly done, 4 not found, 10 no cache, 11 lock
        timeout, 12 store too new, 13 read-only, 130 interrupted.
    """
    parser = _parser()
    output = Output(as_json=False, quiet=False, progress=False, color=False)
    try:
        options = parser.parse_args(arguments)
        for name, value in _DEFAULTS.items():
            setattr(options, name, getattr(options, name, value))
        output = Output(as_json=options.json, quiet=options.quiet, progress=not options.no_progress, color=not options.no_color)
        if not options.verb:
            parser.print_help(sys.stderr)
            return 2
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: output.problem("warning", str(message))
            warnings.simplefilter("always")
            code = _VERBS[options.verb][0](options, output)
        sys.stdout.flush()
        return code
    except SystemExit as error:  # argparse
        return int(error.code or 0)
    except KeyboardInterrupt:
        output.problem("interrupted", "nothing unfinished was stored")
        return 130
    except BrokenPipeError:  # `quantcache ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except QuantcacheError as error:
        if getattr(options, "verbose", False):
            traceback.print_exc()
        if output.as_json:
            output.document(error={"kind": type(error).__name__, "message": str(error), "hint": error.hint})
        output.problem("error", str(error), error.hint)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
