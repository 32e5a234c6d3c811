"""How do time and memory grow with the size of the model, the threads, the number of tensors, and the number of shards?

Float16, nf4, page cache warm; one dimension at a time. Medians of misses and hits (every tensor handed out, every digest
checked), and the peak of extra anonymous memory of a process that does nothing else.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Row, alternate, arguments, costs_of, machine, median, settle, table, write_json
from models import make, shapes

import quantcache as qc

LOAD = "with qc.load(sys.argv[1], quant='nf4', cache=sys.argv[2], threads=int(sys.argv[3])) as model: [model[name] for name in model]"


def tensors(count: int, weights: int) -> dict[str, tuple[int, ...]]:
    """Return so many matrices that have so many weights together."""
    rows = max(64, weights // count // 64 // 64 * 64)
    return {f"blocks.{n // 10}.part{n % 10}.weight": (rows, 64) for n in range(count)}


def sharded(folder: Path, count: int, weights: int) -> Path:
    """Write a checkpoint of so many files, with its index."""
    folder.mkdir()
    mapping = {}
    for shard in range(count):
        name = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        part = {f"blocks.{shard}.{key}": shape for key, shape in tensors(8, weights // count).items()}
        make(folder / name, part, "f16")
        mapping |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    return folder


def measure(path: Path, folder: Path, rounds: int, threads: int = 0) -> dict[str, float]:
    """Return the seconds of a miss and of a hit, and the bytes of memory of a miss and of a hit."""
    cache, fresh = folder / "cache", folder / "fresh"

    def load(where: Path) -> float:
        start = time.perf_counter()
        with qc.load(path, quant="nf4", cache=where, threads=threads) as model:
            for name in model:
                model[name]
            return time.perf_counter() - start

    def anew() -> None:
        shutil.rmtree(fresh, ignore_errors=True)
        qc.Cache(fresh).close()
        settle(1 << 29)

    load(cache)
    seconds = alternate([Row("miss", lambda: load(fresh), 0), Row("hit", lambda: load(cache), 0)], rounds, prepare=anew)
    shutil.rmtree(fresh, ignore_errors=True)
    memory = {kind: costs_of(LOAD, path, where, threads)["anonymous"] for kind, where in (("miss", fresh), ("hit", cache))}
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(cache)
    return {"miss": median(seconds["miss"]), "hit": median(seconds["hit"]), "memory of a miss": memory["miss"], "memory of a hit": memory["hit"]}


def main() -> None:
    """Run."""
    options = arguments(__doc__ or "")
    warnings.simplefilter("error", qc.QuantcacheWarning)
    rounds, unit = min(options.rounds, 3), 2_000_000 if options.quick else 50_000_000
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = folder / "model.safetensors"

        def row(dimension: str, label: str, where: Path, **more: Any) -> None:
            time.sleep(2.2)  # a younger file is digested by every load
            figures.setdefault(dimension, {})[label] = measure(where, folder, rounds, **more)

        for share in (0.25, 1) if options.quick else (0.25, 1, 4, 10):
            make(path, shapes("llama", int(unit * 2 * share), 2), "f16")
            row("size", f"{unit * 2 * share / 1e6:.0f} MB", path)
        for threads in sorted({1, 2, machine()["cores"]}):
            row("threads", str(threads), path, threads=threads)
        for count in (10, 100, 1000) if options.quick else (10, 100, 1000, 5000, 20_000):
            make(path, tensors(count, max(unit, count * 4096)), "f16")
            row("tensors", str(count), path)
        path.unlink()
        for count in (1, 10) if options.quick else (1, 10, 50, 200):
            where = sharded(folder / "sharded", count, unit)
            row("shards", str(count), where)
            shutil.rmtree(where)
    for dimension, found in figures.items():
        lines = [(label, f["miss"] * 1e3, f["hit"] * 1e3, f"{f['memory of a miss'] / 1e6:.0f} MB", f"{f['memory of a hit'] / 1e6:.0f} MB") for label, f in found.items()]
        table(f"Growth with {dimension}", (dimension, "miss, ms", "hit, ms", "memory of a miss", "of a hit"), lines)
    write_json(options.json, {"growth": figures})


if __name__ == "__main__":
    main()
