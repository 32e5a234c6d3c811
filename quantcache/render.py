"""Own how the command line writes: tables, sizes, times, JSON, progress. Decides nothing."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["Output", "ago", "phases", "seconds", "size"]

SCHEMA_VERSION = 1


def size(nbytes: float) -> str:
    """Return bytes as people read them, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(nbytes) < 999.5 or unit == "TB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return ""


def seconds(amount: float) -> str:
    """Return a duration as people read it."""
    if amount < 1:
        return f"{amount * 1000:.0f} ms"
    if amount < 120:
        return f"{amount:.1f} s"
    return f"{amount / 60:.0f} min" if amount < 7200 else f"{amount / 3600:.1f} h"


def phases(taken: Mapping[str, float]) -> str:
    """Return the seconds of each phase, longest first."""
    return ", ".join(f"{phase} {seconds(amount)}" for phase, amount in sorted(taken.items(), key=lambda pair: -pair[1]))


def ago(at_s: float) -> str:
    """Return how long ago a time was."""
    passed = max(0.0, time.time() - at_s)
    for limit, unit, divisor in ((90, "s", 1), (5400, "min", 60), (129600, "h", 3600)):
        if passed < limit:
            return f"{passed / divisor:.0f} {unit} ago"
    return f"{passed / 86400:.0f} d ago"


def iso(at_s: float) -> str | None:
    """Return a time as ISO 8601 in UTC; None for never."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s)) if at_s else None


class Output:
    """Write data to stdout, and words to stderr.

    Args:
        as_json: one JSON document instead of text.
        quiet: no words but errors.
        progress: bars on a terminal, lines in a pipe; none if false.
        color: escapes on a terminal.
    """

    def __init__(self, *, as_json: bool, quiet: bool, progress: bool, color: bool) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._bars = progress and not quiet
        self._color = color and sys.stderr.isatty() and "NO_COLOR" not in os.environ

    def document(self, **content: Any) -> None:
        """Print a JSON document."""
        print(json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=1))

    def words(self, text: str) -> None:
        """Say something on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def problem(self, kind: str, text: str, hint: str | None = None) -> None:
        """Say what went wrong; shown even when quiet."""
        mark = f"\033[1m{kind}:\033[0m" if self._color else f"{kind}:"
        print(f"{mark} {text}", file=sys.stderr)
        if hint:
            print(f"  hint: {hint}", file=sys.stderr)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]], *, flexible: int = -1) -> None:
        """Print columns; the flexible one is cut in the middle where the terminal is too narrow.

        Args:
            header: names of the columns; numbers are aligned to the right.
            rows: cells.
            flexible: index of the column that may be cut; in a pipe nothing is.
        """
        cells = [[printable(str(cell)) for cell in row] for row in rows]
        widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
        if sys.stdout.isatty():
            spare = shutil.get_terminal_size((80, 24)).columns - sum(widths) - 2 * (len(widths) - 1)
            if spare < 0:
                widths[flexible] = max(12, widths[flexible] + spare)
        right = [bool(rows) and all(not isinstance(row[i], str) or row[i][:1].isdigit() for row in rows) for i in range(len(header))]
        for line in [list(header), *cells]:
            fitted = [cut(cell, width) for cell, width in zip(line, widths, strict=True)]
            padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(fitted, widths, right, strict=True)]
            print("  ".join(padded).rstrip())

    @contextmanager
    def progress(self, title: str) -> Any:
        """Yield a callback for `load`: a bar on a terminal, a line every 10 s in a pipe."""
        if not self._bars:
            yield None
        elif sys.stderr.isatty():
            with _bar(title, color=self._color) as callback:
                yield callback
        else:
            yield _lines(title)


def printable(text: str) -> str:
    """Return a text without control characters: names come from files, and a terminal obeys what it is sent."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def cut(text: str, width: int) -> str:
    """Shorten a text in its middle."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head):]}"


def _lines(title: str) -> Callable[[Any], None]:
    told = [time.monotonic()]

    def callback(report: Any) -> None:
        if time.monotonic() - told[0] >= 10:
            told[0] = time.monotonic()
            share = 100 * report.done_nbytes // max(1, report.total_nbytes)
            left = "" if report.left_s is None else f", {size(report.rate)}/s, {seconds(report.left_s)} left"
            print(f"{title}: {share} % ({report.done_tensors} of {report.total_tensors} tensors{left})", file=sys.stderr)

    return callback


@contextmanager
def _bar(title: str, *, color: bool) -> Any:
    from rich.console import Console  # here: 60 ms that only a terminal pays
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True, no_color=not color)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(cut(title, 30), total=None)

        def callback(report: Any) -> None:
            # what is left after the last tensor is the disk's work
            described = f"{cut(title, 24)}, sync" if report.phase == "sync" else cut(title, 30)
            bar.update(task, total=report.total_nbytes, completed=report.done_nbytes, description=described)

        yield callback
