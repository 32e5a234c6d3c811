"""Own the verbs that look after the store: verify, repair, prune, clear, doctor."""

from __future__ import annotations

import argparse
import os
from typing import Any

from quantcache.cache import settings as settings_of
from quantcache.render import Output, size
from quantcache.verbs.common import DRY, SHARE, SIZE, TIME, agreed, arg, open_cache, rows_of, verb
from quantcache.verbs.removal import removed

__all__: list[str] = []

@verb(
    "verify", "check entries; 1 if any is damaged",
    arg("keys", nargs="*", metavar="KEY|PATH"),
    arg("--quick", action="store_true", help="headers and lengths only"),
    arg("--full", action="store_true", help="every digest (the default)"),
    arg("--subset", metavar="PART", help="10%% or 50GB of the store, the longest unchecked first; or 2/7"),
    arg("--max-duration", type=TIME, metavar="TIME", help="begin no further entry after this long (10min)"),
    arg("--against-source", action="store_true", help="quantize again, and compare every byte"),
)  # fmt: skip
def _verify(options: argparse.Namespace, output: Output) -> int:
    from quantcache.cache.maintenance import verify

    with open_cache(options) as cache:
        keys = [row.key for named in options.keys for row in rows_of(cache, named)] if options.keys else None
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
        output.words(f"{len(done.checked)} entries checked{left}, {len(done.findings)} findings" + ("; quantcache repair" if any(f.damaged for f in done.findings) else ""))
    return 1 if done.findings else 0


def _finding(finding: Any) -> dict[str, Any]:
    return {"key": finding.subject, "problem": finding.problem, "damaged": finding.damaged}


@verb("repair", "quarantine what is damaged and rebuild the index", *DRY)
def _repair(options: argparse.Namespace, output: Output) -> int:
    from quantcache.cache.maintenance import repair

    with open_cache(options) as cache:
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


@verb(
    "prune", "remove entries by limits; pinned ones stay",
    arg("--max-size", type=SIZE, metavar="SIZE", help="the store shall take at most this (50GB)"),
    arg("--max-age", type=TIME, metavar="TIME", help="not used for this long (30d)"),
    arg("--keep-free", type=SHARE, metavar="SHARE", help="of the disk (10%% or 50GB)"),
    arg("--stale-source", action="store_true", help="whose source file is gone"),
    arg("--orphans", action="store_true", help="the quarantine"),
    *DRY,
)  # fmt: skip
def _prune(options: argparse.Namespace, output: Output) -> int:
    from quantcache.cache.maintenance import prune

    limits = {"max_size": options.max_size, "max_age_s": options.max_age, "keep_free": options.keep_free,
              "stale_source": options.stale_source, "orphans": options.orphans}  # fmt: skip
    with open_cache(options) as cache:
        planned = prune(cache, dry_run=True, **limits)
        if planned.entries and not agreed(options, f"{len(planned.entries)} entries ({size(planned.nbytes)}) will be removed"):
            return 1
        return removed(output, planned if options.dry_run else prune(cache, **limits), dry_run=options.dry_run)


@verb("clear", "remove all entries but the pinned", arg("--pinned", action="store_true", help="pinned ones, too"), *DRY)
def _clear(options: argparse.Namespace, output: Output) -> int:
    from quantcache.cache.maintenance import clear

    with open_cache(options) as cache:
        planned = clear(cache, pinned_too=options.pinned, dry_run=True)
        if not agreed(options, f"{len(planned.entries)} entries ({size(planned.nbytes)}) will be removed"):
            return 1
        return removed(output, planned if options.dry_run else clear(cache, pinned_too=options.pinned), dry_run=options.dry_run)


@verb("doctor", "check this machine: store, permissions, file system, locks, room, kernels, GPU")
def _doctor(options: argparse.Namespace, output: Output) -> int:
    from quantcache.loader.doctor import check_machine

    root = settings_of.resolve({"dir": options.cache_dir})["dir"].value
    checks = list(check_machine(root, shared=options.shared))
    if output.as_json:
        output.document(checks=[{"name": c.name, "state": c.state, "found": c.found, "hint": c.hint or None} for c in checks])
    else:
        for check in checks:
            print(f"{check.state:5} {check.name:12} {check.found}")
            if check.hint:
                print(f"{'':18} {check.hint}")
    return 1 if any(check.state == "fail" for check in checks) else 0
