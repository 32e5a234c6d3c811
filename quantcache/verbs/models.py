"""Own the verbs about checkpoints: warm, info, explain, bench."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantcache.cache.settings import resolve
from quantcache.errors import QuantcacheError, UsageError
from quantcache.render import Output, ago, phases, seconds, size
from quantcache.verbs.common import arg, as_json, open_cache, rows_of, verb

__all__: list[str] = []

#: What says which tensor becomes what.
RECIPE = (
    arg("--quant", default="nf4", help="nf4, nf4-dq, int8, int8-row, f16 or native (default nf4)"),
    arg("--rule", action="append", default=[], metavar="PATTERN=CODEC[*FACTOR]", help="before the default rules"),
    arg("--include", action="append", metavar="PATTERN", help="quantize these names (default *.weight)"),
    arg("--exclude", action="append", metavar="PATTERN", help="leave these names (default embeddings and heads)"),
    arg("--other", default="f16", choices=("f16", "keep"), help="what becomes of the rest (default f16)"),
    arg("--native", default="keep", choices=("keep", "convert"), help="GGUF blocks (default keep)"),
    arg("--names", default="auto", choices=("auto", "file"), help="an RWKV GGUF's: the checkpoint's, or the file's (default auto)"),
    arg("--lora", action="append", default=[], metavar="FILE[:ALPHA]", help="merge an adapter first; ALPHA is a number or PATTERN=NUMBER,..."),
)  # fmt: skip


@verb(
    "warm", "build entries ahead of time",
    arg("paths", nargs="+", metavar="PATH", help="checkpoints: files or folders"),
    *RECIPE,
    arg("--refresh", action="store_true", help="build again even if it is there"),
)  # fmt: skip
def _warm(options: argparse.Namespace, output: Output) -> int:
    from quantcache.loader.model import load

    wanted = _wanted(options)
    done: list[dict[str, Any]] = []
    failed, code = 0, 1
    with open_cache(options, create=True) as cache:
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
            state = "not saved" if not saved else "hit" if model.hit else "built"
            failed += not saved
            if not saved and model.unsaved:
                code = model.unsaved[0].exit_code
            done.append({"path": str(path), "state": state, "hit": model.hit, "seconds": round(took, 3), "size": stored,
                         "source_size": came, "tensors": len(reports), "quantized": quantized, "keys": model.keys_in_store,
                         "phases": _phases(model.phases)})  # fmt: skip
            if not output.as_json:
                print(f"{state:9} {path}  {options.quant}: {size(came)} -> {size(stored)}, "
                      f"{quantized} of {len(reports)} tensors quantized, {seconds(took)}")  # fmt: skip
                sys.stdout.flush()
                if options.verbose and model.phases:
                    output.words(f"{'':9} of all threads: {phases(model.phases)}")
    if output.as_json:
        output.document(models=done)
    return 0 if not failed else code if failed == len(options.paths) else 3


def _phases(taken: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"phase": phase, "seconds": round(spent, 4)} for phase, spent in taken.items()]


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


@verb("info", "show an entry, or what is in a checkpoint and would become of it", arg("what", metavar="KEY|PATH"), *RECIPE)
def _info(options: argparse.Namespace, output: Output) -> int:
    if os.path.exists(options.what):
        return _info_path(options, output)
    with open_cache(options) as cache:
        (row,) = rows_of(cache, options.what)
        header, pinned = cache.open(row.key).header, cache.pinned()
        file = cache.path_of(row.key)
    tensors = [{"name": r["name"], "codec": r["codec"], "shape": r["shape"], "source_type": r["dtype"], "reason": r.get("reason")}
               for r in header.records]  # fmt: skip
    if output.as_json:
        known = {"file": str(file), "document": header.document, "phases": _phases(header.built.get("phases", {}))}
        output.document(entry=as_json(row, pinned) | known, tensors=tensors)
        return 0
    for name, value in (("key", row.key), ("file", file), ("recipe", row.recipe), ("size", size(row.nbytes)),
                        ("source", row.source_path), ("source size", size(row.source_nbytes)), ("built", f"{ago(row.created_s)}, in {seconds(row.build_s)}"),
                        ("all threads", phases(header.built.get("phases", {}))),
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


@verb("explain", "why a load would hit or miss, factor by factor; 1 if it would miss", arg("path", metavar="PATH"), *RECIPE)
def _explain(options: argparse.Namespace, output: Output) -> int:
    from quantcache.loader.why import explain_load

    with open_cache(options) as cache:
        found = explain_load(cache, options.path, **_wanted(options), threads=options.threads or 0)
    missing = any(file.explanation is not None and file.explanation.state != "hit" for file in found)
    if output.as_json:
        output.document(files=[_file_as_json(file) for file in found])
        return 1 if missing else 0
    for file in found:
        explanation = file.explanation
        print(f"{explanation.state if explanation else 'native'}  {file.path}")
        for note in file.notes:
            print(f"  {note}")
        if explanation is None:
            continue
        print(textwrap.fill(explanation.why, shutil.get_terminal_size().columns, initial_indent="  ", subsequent_indent="  "))
        print(f"  key {explanation.key}")
        if explanation.nearest and explanation.state != "hit":
            print(f"  nearest entry {explanation.nearest}")
        if explanation.nearest and explanation.state != "hit":  # what is the same stands in --json
            print(f"  {sum(f.same for f in explanation.factors)} factors are the same")
        shown = [f for f in explanation.factors if not (explanation.nearest and explanation.state != "hit" and f.same)]
        rows = [("" if f.same or explanation.nearest is None else "*", f.name, f.wanted, "" if explanation.nearest is None else f.found)
                for f in shown]  # fmt: skip
        output.table(("", "factor", "this load", "nearest entry"), rows, flexible=2)
    return 1 if missing else 0


def _file_as_json(file: Any) -> dict[str, Any]:
    explanation = file.explanation
    if explanation is None:
        return {"path": file.path, "state": "native", "notes": list(file.notes)}
    factors = [{"name": f.name, "wanted": f.wanted, "found": f.found, "same": f.same} for f in explanation.factors]
    return {
        "path": file.path, "state": explanation.state, "why": explanation.why, "key": explanation.key,
        "nearest": explanation.nearest, "notes": list(file.notes), "factors": factors,
    }  # fmt: skip


@verb(
    "bench", "measure this machine with a checkpoint: floor, miss, hit, and the peers that are installed",
    arg("path", metavar="PATH"),
    *RECIPE,
    arg("--rounds", type=int, default=3, metavar="N", help="each figure is the median of N (default 3)"),
)  # fmt: skip
def _bench(options: argparse.Namespace, output: Output) -> int:
    from quantcache.loader.measure import measure

    if options.rounds < 1:
        raise UsageError("--rounds: at least 1")
    root = Path(resolve({"dir": options.cache_dir})["dir"].value).absolute()
    beside = next(folder for folder in (root, *root.parents) if folder.is_dir())  # the disk of the store, which is not touched
    rows = []
    with tempfile.TemporaryDirectory(prefix="quantcache-bench-", dir=beside) as folder:
        for row in measure(options.path, Path(folder), rounds=options.rounds, threads=options.threads or 0, **_wanted(options)):
            rows.append(row)
            if not output.as_json and sys.stderr.isatty():
                output.words(f"{row.name}: {'-' if row.seconds is None else seconds(row.seconds)}")
    if output.as_json:
        output.document(path=options.path, quant=options.quant, rounds=options.rounds,
                        figures=[{"name": r.name, "seconds": r.seconds, "size": r.nbytes, "note": r.note} for r in rows])  # fmt: skip
        return 0
    output.table(
        ("what", "time", "rate", "note"),
        [(r.name, "-" if r.seconds is None else seconds(r.seconds), f"{size(r.nbytes / r.seconds)}/s" if r.seconds and r.nbytes else "", r.note)
         for r in rows],
        flexible=3,
    )  # fmt: skip
    return 0
