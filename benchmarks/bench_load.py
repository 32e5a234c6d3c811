"""What does a load cost: miss, hit, first tensor, memory, beside the floor, plain readers, and who quantizes each time?

Models of real shapes are made (benchmarks/models.py). Contenders alternate in one run; medians, with the quickest and the
slowest. The floor is what one core needs to read, quantize and write at the rates that each has alone, over the number
of cores. A plot of time over size is written beside the figures with --plot.

    bench_load.py                 all shapes and types at 0.1 GB, a Llama at 1 GB: some minutes
    bench_load.py --full          all at 1 GB, and the Llama at 7 GB, too
    bench_load.py --sizes 7       only that size, in GB
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Row, alternate, as_installed, costs_of, drop_cache, machine, median, settle, table, write_json
from models import DTYPES, make, shapes
from plot import plot
from safetensors.numpy import load_file

import quantcache as qc
from quantcache.loader.measure import Floor, bare_mmap, floor, touch

#: family, element type, codec, and whether the slow peers take part
MODELS = [
    ("llama", "f16", "nf4", True),
    ("llama", "f16", "int8", False),
    ("llama", "f32", "nf4", False),
    ("llama", "bf16", "int8", False),
    ("rwkv7", "f16", "int8-row", True),
    ("bert", "f32", "int8", False),
]
#: takes every tensor
LOAD = "with qc.load(sys.argv[1], quant=sys.argv[3], cache=sys.argv[2]) as model: [model[name] for name in model]"


def load(path: Path, cache: Path | None, quant: str, *, read: bool = False, stored: bool = False, hit: bool | None = None, **more: Any) -> Any:
    """Load all tensors; return the seconds until the caller has them, and if asked until they are stored."""
    start = time.perf_counter()
    with qc.load(path, quant=quant, cache=cache, **more) as model:
        for name in model:
            tensor = model[name]
            if read:
                touch(tensor)
        taken = time.perf_counter() - start
        if hit is not None and model.hit != hit:
            raise SystemExit(f"a {'hit' if hit else 'miss'} was expected")
    return {"miss, all tensors there": taken, "miss, stored and durable": time.perf_counter() - start} if stored else taken


def by_layers(path: Path, cache: Path, quant: str) -> None:
    """Load layer by layer, reading every byte."""
    with qc.load(path, quant=quant, cache=cache) as model:
        for layer in model.layers():
            for tensor in layer.values():
                touch(tensor)


def first(path: Path, cache: Path, quant: str, name: str) -> float:
    """Return the seconds until one tensor is there; then stop."""
    start = time.perf_counter()
    model = qc.load(path, quant=quant, cache=cache)
    model[name]
    taken = time.perf_counter() - start
    model.cancel()
    return taken


def raw_read(path: Path, threads: int) -> None:
    """Read a file with positioned reads into reused buffers, on several threads."""
    import os

    descriptor, piece = os.open(path, os.O_RDONLY), 2 << 20
    starts = iter(range(0, path.stat().st_size, piece))

    def work(_: int) -> None:
        buffer = bytearray(piece)
        for start in starts:
            os.preadv(descriptor, [buffer], start)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    os.close(descriptor)


def cat(path: Path) -> None:
    """Let `cat` read a file."""
    with open("/dev/null", "wb") as nowhere:
        subprocess.run(["cat", path], stdout=nowhere, check=True)


def bitsandbytes(path: Path, quant: str) -> Callable[[], None] | None:
    """Return what a runtime without a cache does at every start: read, and quantize the same tensors."""
    try:
        import bitsandbytes.functional as bnb
        from safetensors.torch import load_file as torch_load
    except ImportError as error:
        print(f"peer left out: {error}")
        return None
    with qc.load(path, quant=quant, mode="off") as model:
        wanted = {report.name for report in model.report() if report.codec == quant}

    def run() -> None:
        for name, tensor in torch_load(path).items():
            if name in wanted and quant == "nf4":
                bnb.quantize_4bit(tensor, blocksize=64, quant_type="nf4")
            elif name in wanted:
                bnb.int8_vectorwise_quant(tensor.half())

    return run


def torch_load(path: Path) -> Callable[[], None] | None:
    """Return torch's own way to read the file, nothing quantized."""
    try:
        from safetensors.torch import load_file as load_tensors
    except ImportError as error:
        print(f"peer left out: {error}")
        return None
    return lambda: [tensor.sum() for tensor in load_tensors(path).values()] and None


def new_store(folder: Path) -> None:
    """Make an empty store: a user makes one once."""
    shutil.rmtree(folder, ignore_errors=True)
    with qc.Cache(folder) as cache:
        cache.usage()  # the index, too


def entry_of(cache: Path) -> Path:
    """Return the one entry file of a store."""
    (entry,) = cache.glob("v*/entries/*/*.safetensors")
    return entry


def warm(path: Path, quant: str, folder: Path, rounds: int, *, slow: bool) -> dict[str, Any]:
    """Compare loads of one model on a warm page cache; print and return the figures."""
    cache, fresh = folder / "cache", folder / "fresh"
    load(path, cache, quant, stored=True)
    entry, came = entry_of(cache), path.stat().st_size
    kept, cores = entry.stat().st_size, machine()["cores"]
    with qc.load(path, quant=quant, cache=cache) as model:
        wanted = next(report.name for report in model.report() if report.codec == quant)

    def anew() -> None:
        new_store(fresh)
        settle(min(came + kept, max(2 << 30, kept * 5 // 4)))  # what a miss or load_file of the entry takes

    rows = [
        Row("miss, all tensors there", lambda: load(path, fresh, quant, stored=True, hit=False), came),
        Row("miss on one thread", lambda: load(path, fresh, quant, hit=False, threads=1), came),
        Row("miss, mode=off", lambda: load(path, None, quant, mode="off"), came),
        Row("miss, one tensor", lambda: first(path, fresh, quant, wanted), 0),
        Row("hit, one tensor", lambda: first(path, cache, quant, wanted), 0, prepared=False),
        Row("hit, every digest checked", lambda: load(path, cache, quant, hit=True), kept, prepared=False),
        Row("hit, unchecked, every byte read", lambda: load(path, cache, quant, hit=True, read=True, verify="off"), kept, prepared=False),
        Row("hit, by layers, checked and read", lambda: by_layers(path, cache, quant), kept, prepared=False),
        Row("hit, nothing read", lambda: load(path, cache, quant, hit=True, verify="off"), 0, prepared=False),
        Row("bare mmap of the entry, every byte read", lambda: bare_mmap(entry), kept, prepared=False),
        Row("bare mmap of the source, every byte read", lambda: bare_mmap(path), came, prepared=False),
        Row("cat of the source", lambda: cat(path), came, prepared=False),
        Row("load_file of the entry", lambda: len(load_file(entry)), kept),
    ]
    try:
        load_file(path)
        rows.append(Row("load_file of the source", lambda: len(load_file(path)), came, slow=came > 1 << 31))
    except (TypeError, KeyError, AttributeError):  # NumPy has no bfloat16
        pass
    if slow and (peer := torch_load(path)):
        rows.append(Row("torch: load_file of the source, summed", peer, came, slow=came > 1 << 31, prepared=False))
    if came > 1 << 31:  # minutes each, and no other answer
        rows = [row for row in rows if row.name not in ("miss on one thread", "hit, by layers, checked and read", "cat of the source")]
    if slow and (peer := bitsandbytes(path, quant)):
        rows.append(Row("bitsandbytes: read and quantize", peer, came, slow=came > 1 << 29))
    floors: dict[int, list[Floor]] = {1: [], cores: []}
    for threads in [*floors] * 3:
        settle(256 << 20)
        floors[threads].append(floor(path, folder, threads=threads, quant=quant))
    least, together = (sorted(found, key=lambda found: found.seconds(1))[len(found) // 2] for found in (floors[1], floors[cores]))
    seconds = alternate(rows, rounds, prepare=anew)
    found = {name: median(values) for name, values in seconds.items()}
    found |= {"floor": least.seconds(cores), "floor, all cores at once": together.seconds(cores)}
    shutil.rmtree(fresh, ignore_errors=True)
    costs = {kind: costs_of(LOAD, path, where, quant) for kind, where in (("miss", fresh), ("hit", cache))}
    shutil.rmtree(fresh, ignore_errors=True)
    lines = [
        (name, found[name] * 1e3, f"{min(values) * 1e3:.3g} to {max(values) * 1e3:.3g}", found[name] / found["floor"])
        for name, values in seconds.items()
    ]
    title = f"{path.stem}, {quant}: {came / 1e6:.0f} MB -> {kept / 1e6:.0f} MB"
    floor_lines = [
        (f"floor of a miss: one core's rates, over {cores}", found["floor"] * 1e3, "", 1.0),
        ("the same, all cores at once", together.seconds(cores) * 1e3, "", together.seconds(cores) / found["floor"]),
    ]
    table(title, ("load", "ms", "spread", "of the floor"), [*floor_lines, *lines])
    table("what it costs", ("", *costs["miss"]), [(kind, *(f"{value / 1e6:.1f} MB" for value in cost.values())) for kind, cost in costs.items()])
    shutil.rmtree(cache)
    return {"source": came, "entry": kept, "seconds": found, "spread": {k: [min(v), max(v)] for k, v in seconds.items()}, "costs": costs,
            "floor parts": [least.read_s, least.quantize_s, least.write_s]}  # fmt: skip


def cold(path: Path, quant: str, folder: Path, rounds: int, floor_s: float) -> dict[str, Any]:
    """Compare loads of one model that is not in the page cache."""
    cache, fresh = folder / "cache", folder / "fresh"
    load(path, cache, quant, stored=True)
    entry, came = entry_of(cache), path.stat().st_size
    kept = entry.stat().st_size

    def anew() -> None:
        new_store(fresh)
        settle(min(kept + (64 << 20), 2 << 30))
        drop_cache(path, entry)

    def checked_ahead() -> None:
        with qc.load(path, quant=quant, cache=cache) as model:
            model.prefetch()
            for name in model:
                model[name]

    rows = [
        Row("raw read of the source, two threads", lambda: raw_read(path, 2), came),
        Row("miss", lambda: load(path, fresh, quant, hit=False), came),
        Row("raw read of the entry, two threads", lambda: raw_read(entry, 2), kept),
        Row("hit, prefetched, every digest checked", checked_ahead, kept),
        Row("hit, by layers, checked and read", lambda: by_layers(path, cache, quant), kept),
        Row("hit, every digest checked", lambda: load(path, cache, quant, hit=True), kept),
        Row("bare mmap of the entry, every byte read", lambda: bare_mmap(entry), kept),
    ]
    seconds = alternate(rows, rounds, prepare=anew)
    found = {row.name: median(seconds[row.name]) for row in rows}
    raw = kept / found["raw read of the entry, two threads"]
    bound = max(found["raw read of the source, two threads"], floor_s)
    table(f"{path.stem}, {quant}, cold page cache", ("load", "ms", "GB/s", "ratio"), [
        (row.name, found[row.name] * 1e3, row.nbytes / found[row.name] / 1e9,
         f"{found[row.name] / bound:.2f} of max(disk, floor)" if row.name == "miss" else f"{row.nbytes / found[row.name] / raw:.2f} of the raw rate" if row.nbytes == kept else "")
        for row in rows
    ])  # fmt: skip
    shutil.rmtree(cache)
    shutil.rmtree(fresh, ignore_errors=True)
    return {"seconds": found, "spread": {k: [min(v), max(v)] for k, v in seconds.items()}}


def processes(path: Path, quant: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Compare four processes that want the same cold model with one: all are given the same start."""
    code = ("import sys, time, quantcache as qc, numpy\nfrom quantcache.quant.codec import codec_ids; codec_ids(); qc.load\n"
            "print('ready', flush=True); sys.stdin.readline(); start = time.perf_counter()\n" + LOAD + "\nprint(time.perf_counter() - start, model.hit)")  # fmt: skip
    fresh = folder / "fresh"

    def run(count: int) -> float:
        started = [subprocess.Popen([sys.executable, "-c", code, str(path), str(fresh), quant], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=as_installed())
                   for _ in range(count)]  # fmt: skip
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        for process in started:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        said = [process.communicate()[0].split() for process in started]
        if sum(hit == "False" for _, hit in said) != 1:
            raise SystemExit("one quantization was expected")
        return max(float(seconds) for seconds, _ in said)

    def anew() -> None:
        new_store(fresh)
        settle(1 << 29)

    rows = [Row("one process", lambda: run(1), 0), Row("four processes, the last", lambda: run(4), 0)]
    seconds = alternate(rows, rounds, prepare=anew)
    found = {name: median(values) for name, values in seconds.items()}
    table(f"The same miss, {path.stem}, {quant}", ("", "ms", "times one"), [(n, s * 1e3, s / found["one process"]) for n, s in found.items()])
    shutil.rmtree(fresh, ignore_errors=True)
    return found


def gguf_file(folder: Path, size: int, rounds: int) -> dict[str, Any]:
    """Compare how a GGUF file of Q4_K blocks becomes float32 for a runtime that has no kernels for them."""
    try:
        import gguf
        import libgguf
        import numpy as np
    except ImportError as error:
        print(f"peer left out: {error}")
        return {}
    path, cache, fresh = folder / "blocks.gguf", folder / "cache", folder / "fresh"
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(3)
    q4_k = gguf.GGMLQuantizationType.Q4_K
    for number in range(max(2, size // (4 << 20))):
        blocks = rng.integers(0, 256, (2048, 16, 144), dtype=np.uint8)
        blocks[:, :, :4] = rng.normal(0, 0.01, (2048, 16, 2)).astype("<f2").view(np.uint8)
        writer.add_tensor(f"blk.{number}.ffn_up.weight", blocks.reshape(2048, -1), raw_dtype=q4_k)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    time.sleep(2.2)
    came = path.stat().st_size
    convert = {"quant": qc.Recipe([], other="f16", native="convert"), "hit": None}

    def theirs(decode: Callable[[Any], Any]) -> None:
        for tensor in gguf.GGUFReader(path).tensors:
            decode(tensor.data)

    def with_libgguf(data: Any) -> None:
        libgguf.dequantize_rows(np.ascontiguousarray(data), libgguf.GGMLQuantizationType.Q4_K)

    load(path, cache, **convert, stored=True)
    rows = [
        Row("blocks as they are, read", lambda: load(path, cache, "native", read=True), came, prepared=False),
        Row("bare mmap, every byte read", lambda: bare_mmap(path), came, prepared=False),
        Row("miss to float16", lambda: load(path, fresh, **convert, stored=True), came),
        Row("hit, every digest checked", lambda: load(path, cache, **convert), came, prepared=False),
        Row("libgguf to float32", lambda: theirs(with_libgguf), came, prepared=False),
        Row("gguf-py to float32", lambda: theirs(lambda data: gguf.quants.dequantize(data, q4_k)), came, slow=True, prepared=False),
    ]

    def anew() -> None:
        new_store(fresh)
        settle(8 * came)

    seconds = alternate(rows, rounds, prepare=anew)
    found = {name: median(values) for name, values in seconds.items()}
    best = found["bare mmap, every byte read"]
    table(f"A GGUF file of Q4_K, {came / 1e6:.0f} MB", ("load", "ms", "of a bare mmap"), [(n, s * 1e3, s / best) for n, s in found.items()])
    for folder_of_rows in (cache, fresh):
        shutil.rmtree(folder_of_rows, ignore_errors=True)
    path.unlink()
    return found


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--quick", action="store_true", help="small models, to see that it runs")
    parser.add_argument("--full", action="store_true", help="the 7 GB model, too")
    parser.add_argument("--sizes", help="of the models, in GB, separated by commas")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--plot", type=Path, help="write the plot here")
    options = parser.parse_args()
    warnings.simplefilter("error", qc.QuantcacheWarning)
    sizes = [10_000_000] if options.quick else [100_000_000, 1_000_000_000] + [7_000_000_000] * options.full
    if options.sizes:
        sizes = [round(float(size) * 1e9) for size in options.sizes.split(",")]
    all_below = 2_000_000_000 if options.full else 500_000_000
    figures: dict[str, Any] = {"warm": {}, "cold": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for size in sizes:
            label = f"{size / 1e9:g} GB"
            for family, dtype, quant, slow in MODELS if size < all_below else MODELS[:1]:
                path = folder / f"{family}-{dtype}-{size / 1e9:g}GB.safetensors"
                make(path, shapes(family, size, DTYPES[dtype][1]), dtype)
                time.sleep(2.2)  # a file as young as that is digested by every load: nobody's model is
                rounds = options.rounds if size < 2_000_000_000 else min(options.rounds, 3)
                name = f"{family} {dtype} {quant}, {label}"
                found = figures["warm"][name] = warm(path, quant, folder, rounds, slow=slow)
                if (family, dtype, quant) == MODELS[0][:3]:
                    figures["cold"][name] = cold(path, quant, folder, rounds, found["seconds"]["floor"])
                    if size < 2_000_000_000:
                        figures.setdefault("processes", {})[name] = processes(path, quant, folder, rounds)
                path.unlink()
                write_json(options.json, {"load, seconds": figures})  # now, should the rest be stopped
        figures["gguf"] = gguf_file(folder, min(sizes[0], 200_000_000), options.rounds)
    write_json(options.json, {"load, seconds": figures})
    if options.plot:
        series = {name: f for name, f in figures["warm"].items() if name.startswith("llama f16 nf4")}
        options.plot.write_text(plot(series, machine()["cpu"]))


if __name__ == "__main__":
    main()
