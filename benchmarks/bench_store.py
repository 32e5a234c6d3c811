"""What does the store itself cost with 100,000 entries: a lookup, a list, a plan, a rebuild; beside diskcache where it has the like?

Entries are small files, made without a model. Whole processes are timed for what users type. Bars: a hit's lookup under 1 ms,
`ls --limit 20` under 200 ms, a prune planned in under 2 s, an index rebuilt at 2,000 entries a second or better.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import arguments, median, table, write_json
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.cache.container import Slot, build_header
from quantcache.cache.key import digest, key_of
from quantcache.cache.maintenance import prune
from quantcache.cache.store import Cache
from quantcache.loader.measure import timed

CONTENT = bytes(range(256)) * 4


def fill(root: Path, count: int) -> None:
    """Write entries straight into their places: publishing each would time the disk's syncs."""
    Cache(root).close()
    slots = {"x": Slot("U8", (len(CONTENT),), 4096)}
    from quantcache.cache.key import combine

    digests = {"x": combine([digest(CONTENT)])}
    for number in range(count):
        document = {"number": number, "source": {"digest": f"{number:032x}", "size": 1}}
        key = key_of(document)
        built = {"path": f"/models/{number // 4}.safetensors", "seconds": number % 7, "created": 1.7e9 + number, "fingerprint": f"{number:032x}", "recipe": "nf4"}
        folder = root / "v1" / "entries" / key[:2]
        folder.mkdir(exist_ok=True)
        (folder / f"{key}.safetensors").write_bytes(build_header(slots, digests, document=document, records=[], built=built) + CONTENT)


def lookup(root: Path, numbers: list[int]) -> float:
    """Return the median seconds of finding an entry by its key document, its header checked."""
    seconds = []
    with Cache(root) as cache:
        for number in numbers:
            document = {"number": number, "source": {"digest": f"{number:032x}", "size": 1}}
            start = time.perf_counter()
            entry = cache.find(document)
            assert entry is not None
            assert cache.index.call(lambda index, key=entry.key: index.entry(key), None) is not None
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def readers(root: Path, count: int, numbers: list[int]) -> float:
    """Return the median seconds of a lookup in each of so many processes at once, as a share of their processors' time."""
    with ProcessPoolExecutor(count) as pool:
        return median(list(pool.map(lookup, [root] * count, [numbers] * count)))


def shards(folder: Path, count: int) -> tuple[float, float]:
    """Return the seconds of a miss and of a hit of a checkpoint of many shards."""
    folder.mkdir()
    for number in range(count):
        weight = np.random.default_rng(number).standard_normal((64, 128)).astype(np.float32)
        save_file({f"layers.{number}.w.weight": weight}, folder / f"model-{number + 1:05}-of-{count:05}.safetensors")
    found = []
    for _ in range(2):
        start = time.perf_counter()
        with qc.load(folder, cache=folder / "c") as model:
            list(model.values())
        found.append(time.perf_counter() - start)
    return found[0], found[1]


def main() -> None:
    """Run."""
    options = arguments(__doc__ or "")
    count = 2_000 if options.quick else 100_000
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, count, 500).tolist()
    lines: list[tuple[Any, ...]] = []
    figures: dict[str, Any] = {"entries": count}

    def note(name: str, value: float, unit: str, bar: str = "", peer: float | None = None) -> None:
        figures[name] = value
        if peer is not None:
            figures[f"{name}, diskcache"] = peer
        lines.append((name, value, unit, "-" if peer is None else f"{peer:.3g}", bar))

    with tempfile.TemporaryDirectory(dir=os.environ.get("QUANTCACHE_BENCH_DIR")) as name:
        root = Path(name) / "c"
        fill(root, count)
        with Cache(root) as cache:
            start = time.perf_counter()
            cache.rebuild_index()
            note("index rebuilt", count / (time.perf_counter() - start), "entries/s", ">= 2000")
        time.sleep(2.5)  # until the folders' times are trusted
        with Cache(root) as cache:
            cache.entries(limit=1)
            peer = diskcache_figures(Path(name) / "d", min(count, 20_000), numbers)
            note("lookup, header checked", lookup(root, numbers) * 1e3, "ms", "< 1", peer.get("get"))
            note("number of entries", timed(lambda: len(cache), options.rounds) * 1e3, "ms", "", peer.get("len"))
            note("all rows", timed(lambda: cache.entries(), options.rounds) * 1e3, "ms", "")
            note("prune planned", timed(lambda: prune(cache, max_size=count * 1000, dry_run=True), options.rounds), "s", "< 2")
        command = [sys.executable, "-m", "quantcache.cli", "ls", "--limit", "20", "--cache-dir", str(root)]
        note("ls --limit 20, whole process", timed(lambda: subprocess.run(command, check=True, capture_output=True), options.rounds) * 1e3, "ms", "< 200")
        start_up = [sys.executable, "-c", "pass"]
        note("the interpreter alone", timed(lambda: subprocess.run(start_up, check=True), options.rounds) * 1e3, "ms")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
        one = readers(root, 1, numbers)
        note("a lookup beside 15 other readers, over one alone", readers(root, 16, numbers) / one, "x", f"<= 2 ({cores} cores for 16)")
        miss, hit = shards(Path(name) / "model", 20 if options.quick else 200)
        note("200 shards, miss" if not options.quick else "20 shards, miss", miss, "s")
        note("200 shards, hit" if not options.quick else "20 shards, hit", hit, "s")
    table(f"The store with {count:,} entries", ("what", "quantcache", "unit", "diskcache", "bar"), lines)
    write_json(options.json, {"store": figures})


def diskcache_figures(folder: Path, count: int, numbers: list[int]) -> dict[str, float]:
    """Return milliseconds of what diskcache has, too: a value fetched (unchecked), the number of entries."""
    try:
        import diskcache
    except ImportError:
        return {}
    cache = diskcache.Cache(str(folder), disk_min_file_size=0)
    with cache.transact():
        for number in range(count):
            cache.set(key_of({"number": number}), CONTENT)
    seconds = []
    for number in numbers:
        key = key_of({"number": number % count})
        start = time.perf_counter()
        assert cache.get(key) == CONTENT
        seconds.append(time.perf_counter() - start)
    found = {"get": median(seconds) * 1e3, "len": timed(lambda: len(cache), 5) * 1e3}
    cache.close()
    return found


if __name__ == "__main__":
    main()
