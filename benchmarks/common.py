"""Time contenders in turn in one run and print them as ratios. Shared by the bench_*.py scripts."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One contender.

    Args:
        name: of it.
        call: does it once.
        nbytes: bytes of input that this reads.
        slow: it runs once.
        prepared: what `alternate` is given to prepare is for it, too.
    """

    name: str
    call: Callable[[], Any]
    nbytes: int
    slow: bool = False
    prepared: bool = True


def machine() -> dict[str, Any]:
    """Name the machine: figures mean nothing without it."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def alternate(rows: list[Row], rounds: int = 5, prepare: Callable[[], None] | None = None) -> dict[str, list[float]]:
    """Run every contender once a round, after one round that does not count.

    Returns:
        name -> seconds of each round; what a call returns counts instead of what it took: a number, or numbers by name.
    """
    seconds: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for row in rows:
            if row.slow and turn != 1:
                continue
            gc.collect()
            if prepare and row.prepared:
                prepare()
            start = time.perf_counter()
            found = row.call()
            taken = time.perf_counter() - start
            if turn:
                measured = found if isinstance(found, dict) else {row.name: found if isinstance(found, float) else taken}
                for name, value in measured.items():
                    seconds.setdefault(name, []).append(value)
    return seconds


def as_installed() -> dict[str, str]:
    """Return the environment of a child that keeps what Python compiles, as an installation does."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def settle(nbytes: int) -> None:
    """Touch memory and give it back.

    A virtual machine takes pages that nobody has used for a while away from its guest, and the first touch then costs ten
    times as much: that would be measured, and not a load.
    """
    import numpy as np

    np.empty(nbytes, np.uint8).fill(1)


def drop_cache(*files: Path) -> None:
    """Put files out of the page cache, which nobody may have mapped: models that are closed are collected first."""
    gc.collect()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def median(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def arguments(description: str) -> argparse.Namespace:
    """Parse what all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--quick", action="store_true", help="small inputs, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    return parser.parse_args()


def peak_anonymous(statement: str, *arguments: object) -> int:
    """Return the extra anonymous memory that a statement takes, in bytes: see costs_of."""
    return costs_of(statement, *arguments)["anonymous"]


def costs_of(statement: str, *arguments: object) -> dict[str, int]:
    """Return what a statement costs in a process of its own.

    Args:
        statement: Python, after `import sys, quantcache as qc, numpy`.
        arguments: its sys.argv[1:].

    Returns:
        Bytes: "anonymous", the peak of extra anonymous memory; "read" and "written" through system calls, "from disk" and
        "to disk" as the kernel counts them.
    """
    code = (
        "import sys, threading, time, quantcache as qc, numpy\n"
        "from quantcache.quant.codec import codec_ids; codec_ids()\n"
        "def anonymous():\n"
        "    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')) * 1024\n"
        "def io(): return {l.split(':')[0]: int(l.split()[1]) for l in open('/proc/self/io')}\n"
        "before, peak, stop, first = anonymous(), [0], [], io()\n"
        "def watch():\n"
        "    while not stop: peak[0] = max(peak[0], anonymous()); time.sleep(0.002)\n"
        "thread = threading.Thread(target=watch); thread.start()\n"
        f"{statement}\n"
        "stop.append(1); thread.join(); last = io()\n"
        "print(peak[0] - before, *(last[k] - first[k] for k in ('rchar', 'wchar', 'read_bytes', 'write_bytes')))\n"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=as_installed()).stdout.split()
    return dict(zip(("anonymous", "read", "written", "from disk", "to disk"), map(int, said), strict=True))


def table(title: str, header: tuple[str, ...], lines: list[tuple[Any, ...]]) -> None:
    """Print rows in columns, as Markdown."""
    print(f"\n### {title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "|".join("---" for _ in header) + "|")
    for line in lines:
        print("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in line) + " |")
    sys.stdout.flush()


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write all figures with the machine's name."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")
