"""Own how the command line says what was removed, or would be."""

from __future__ import annotations

from typing import Any

from quantcache.render import Output, size

__all__ = ["removed"]


def removed(output: Output, found: Any, *, dry_run: bool) -> int:
    """Show what maintenance removed; return the exit code."""
    if output.as_json:
        output.document(dry_run=dry_run, size=found.nbytes, freed=found.freed, entries=[row.key for row in found.entries], files=[str(p) for p, _ in found.files])
    else:
        for row in found.entries:
            print(f"{'would remove' if dry_run else 'removed'}  {row.key[:12]}  {size(row.nbytes)}  {row.source_path}")
        output.words(f"{len(found.entries)} entries, {size(found.freed)} of the disk {'would come' if dry_run else 'came'} free")
    for message in found.failed:
        output.problem("error", message)
    return 3 if found.failed else 0
