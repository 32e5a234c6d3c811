"""What does a GPU cost: uploads beside torch's copies, misses on GPU and CPU, memory while streaming, products beside reading once.

One process, contenders alternated, medians. torch is the peer where it sees the same GPU; without it, rows are left out. Products
are timed by the device's own clock, behind a pass that keeps it busy: an idle card lowers its clocks. On a software adapter the
figures mean nothing, and the benchmark only shows that it runs.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Row, alternate, arguments, median, settle, table, write_json
from models import make, shapes

import quantcache as qc
from quantcache.quant.codec import codec, quantize
from quantcache.tensor import BLOCKS, element_name

_STEP = 8 << 20


def torch_or_none() -> Any:
    """Return torch, if it sees a GPU."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def torch_rows(path: Path, nbytes: int) -> list[Row]:
    """Return what torch does with as many bytes: a pinned copy, a pageable one, a pinned ring fed from the mapped file."""
    torch = torch_or_none()
    if torch is None:
        return []
    mapped = torch.from_numpy(np.memmap(path, np.uint8, "c")[:nbytes])
    there = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    pinned = mapped.clone().pin_memory()
    step, cores = 16 << 20, torch.get_num_threads()
    ring = [torch.empty(step, dtype=torch.uint8).pin_memory() for _ in range(4)]

    def fed(threads: int) -> None:
        torch.set_num_threads(threads)
        events: list[Any] = [None] * len(ring)
        for number, start in enumerate(range(0, nbytes, step)):
            slot, end = number % len(ring), min(start + step, nbytes)
            if events[slot] is not None:
                events[slot].synchronize()
            ring[slot][: end - start].copy_(mapped[start:end])
            there[start:end].copy_(ring[slot][: end - start], non_blocking=True)
            events[slot] = torch.cuda.Event()
            events[slot].record()
        torch.cuda.synchronize()

    def copied(source: Any) -> None:
        there.copy_(source)
        torch.cuda.synchronize()

    return [
        Row("torch, pinned, into memory that is there", lambda: copied(pinned), nbytes),
        Row("torch, pageable", lambda: copied(mapped), nbytes),
        Row("torch, pinned ring from the mapped file, 4 threads", lambda: fed(4), nbytes),
        Row("torch, pinned ring from the mapped file, all cores", lambda: fed(cores), nbytes),
    ]


def in_threads(count: int, pieces: list[Any], work: Any) -> None:
    """Do work for every piece, on several threads."""
    waiting = list(reversed(pieces))

    def run() -> None:
        while True:
            try:
                piece = waiting.pop()
            except IndexError:
                return
            work(*piece)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def uploads(device: Any, folder: Path, path: Path, rounds: int) -> dict[str, Any]:
    """Compare ways onto the device; return GB/s by name."""
    qc.load(path, "nf4", cache=folder / "c").close()
    with qc.load(path, "nf4", cache=folder / "c") as model:
        nbytes = sum(part.nbytes for name in model for part in model.outlines(name).parts)

    def ours(verify: str, threads: int) -> float:
        with qc.load(path, "nf4", cache=folder / "c", verify=verify) as model:
            start = time.perf_counter()
            with model.upload(device, threads=threads):
                return time.perf_counter() - start

    def lazily(verify: str) -> dict[str, float]:
        first = 0.0
        with qc.load(path, "nf4", cache=folder / "c", verify=verify) as model:
            start = time.perf_counter()
            with model.upload(device, threads=4, lazy=True) as found:
                for _ in found.layers():
                    first = first or time.perf_counter() - start
                device.settle()
                whole = time.perf_counter() - start
        how = "unchecked" if verify == "off" else "checked"
        return {f"lazily, {how}, 4 threads": whole, f"first layer, {how}": first}

    def passing(name: str, *, reuse: bool) -> float:  # a model that does not fit, again and again: what comes again was checked
        model, found = held.get(name, (None, None))
        if model is None:
            model = qc.load(path, "nf4", cache=folder / "c")
            sizes = [sum(part.nbytes for name in names for part in model.outlines(name).parts) for names in model.in_layers()]
            found = model.upload(device, threads=4, lazy=True, budget=max(max(sizes), 3 * sizes[1]) * 5 // 4, reuse=reuse)
            held[name] = model, found
            for _ in found.layers():
                pass
        device.settle()
        start = time.perf_counter()
        for _ in found.layers():
            pass
        device.settle()
        return time.perf_counter() - start

    held: dict[str, Any] = {}
    entry = np.memmap(next(folder.glob("c/v*/entries/*/*")), np.uint8, "r")[: nbytes // 4 * 4]
    size = 256 << 20 if nbytes > 256 << 20 else -(-nbytes // 256) * 256
    existing = [device.buffer(size, "what is there") for _ in range(-(-entry.size // size))]

    def again() -> None:
        pieces = [(existing[at // size], at % size, entry[at : min(at + _STEP, (at // size + 1) * size)]) for at in range(0, entry.size, _STEP)]
        in_threads(4, pieces, device.write)
        device.settle()

    def made() -> None:
        buffers = [device.buffer(size, "new") for _ in existing]
        device.fence()()
        del buffers

    def whole() -> float:  # what others do: a tensor, a wait, the next one
        with qc.load(path, "nf4", cache=folder / "c", verify="off") as model:
            kept = []
            start = time.perf_counter()
            for name in model:
                tensor = model[name]
                for part in tensor.parts.values() if isinstance(tensor, qc.QuantTensor) else [tensor]:
                    data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
                    buffer = device.buffer(-(-data.size // 4) * 4, "a tensor")
                    device.raw.queue.write_buffer(buffer, 0, data, 0, data.size // 4 * 4)
                    kept.append(buffer)
                device.fence()()
            return time.perf_counter() - start

    rows = [Row(f"upload, unchecked, {threads} threads", lambda t=threads: ours("off", t), nbytes) for threads in (1, 4, 8)]
    rows += [Row(f"upload, checked, {threads} threads", lambda t=threads: ours("touch", t), nbytes) for threads in (1, 4, 8)]
    rows += [Row("lazily, unchecked", lambda: lazily("off"), nbytes), Row("lazily, checked", lambda: lazily("touch"), nbytes)]
    for name, reuse in (("lazily within a budget, a later pass", False), ("the same, layers written over", True)):
        rows.append(Row(name, lambda n=name, r=reuse: passing(n, reuse=r), nbytes))
    rows += [Row("the same bytes into buffers that are there, 4 threads", again, nbytes), Row("making and dropping the buffers alone", made, nbytes)]
    rows += [Row("a tensor and a wait at a time, unchecked", whole, nbytes)]
    rows += torch_rows(next(folder.glob("c/v*/entries/*/*")), nbytes)
    seconds = {name: median(values) for name, values in alternate(rows, rounds, lambda: device.fence()()).items()}
    for model, uploaded in held.values():
        uploaded.close()
        model.close()
    firsts = {name: seconds.pop(name) for name in list(seconds) if name.startswith("first layer")}
    found = {name: nbytes / value / 1e9 for name, value in seconds.items()}
    pinned = found.get("torch, pinned, into memory that is there", float("nan"))
    table(f"Onto {device.name}, {nbytes / 1e6:.0f} MB of nf4", ("way", "GB/s", "of torch, pinned"), [(n, rate, rate / pinned) for n, rate in found.items()])
    table("The first layer of a lazy model", ("what", "ms"), [(name, value * 1e3) for name, value in firsts.items()])
    return {"GB/s": found, "seconds": firsts, "bytes": nbytes}


def misses(device: Any, folder: Path, path: Path, rounds: int) -> dict[str, Any]:
    """Compare misses that quantize on the GPU and on the CPU, until everything is on the device."""
    nbytes = path.stat().st_size

    def source() -> float:
        with qc.load(path, "native", mode="off") as model:
            start = time.perf_counter()
            with model.upload(device, threads=4):
                return time.perf_counter() - start

    def miss(on: Any, threads: int, *, stored: bool) -> float:
        shutil.rmtree(folder / "miss", ignore_errors=True)
        how: dict[str, Any] = {"cache": folder / "miss"} if stored else {"mode": "off"}
        start = time.perf_counter()
        with qc.load(path, "nf4", device=on, threads=threads, **how) as model, model.upload(device):
            return time.perf_counter() - start

    def prepare() -> None:
        settle(min(nbytes, 2 << 30))
        device.fence()()  # gives what was dropped back, which else the next contender's first submission would

    rows = [Row("upload of the source's bytes alone", source, nbytes)]
    for stored in (False, True):
        end = ", stored" if stored else ""
        rows.append(Row(f"miss on the GPU{end}", lambda s=stored: miss(device, 0, stored=s), nbytes))
        for threads in (2, 4, 0):
            name = f"{threads} threads" if threads else "all cores"
            rows.append(Row(f"miss on the CPU, {name}{end}", lambda s=stored, t=threads: miss(None, t, stored=s), nbytes))
    found = {name: nbytes / median(values) / 1e9 for name, values in alternate(rows, rounds, prepare).items()}
    alone = found["upload of the source's bytes alone"]
    table(f"Until {nbytes / 1e6:.0f} MB of float16 are nf4 on the device", ("way", "GB/s of source", "of the upload"), [(n, rate, rate / alone) for n, rate in found.items()])
    return found


def memory(device: Any, path: Path) -> dict[str, float]:
    """Return the extra memory that streaming a large file takes, in MB: anonymous here, and on the device where torch can say."""
    torch = torch_or_none()

    def anonymous() -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")) * 1024

    def used() -> int:
        if torch is None:
            return 0
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    before, peak, stop = (anonymous(), used()), [0, 0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[:] = max(peak[0], anonymous()), max(peak[1], used())

    thread = threading.Thread(target=watch)
    with qc.load(path, "native", mode="off") as model:
        thread.start()
        with model.upload(device, threads=4) as found:
            stop.set()
            thread.join()
            result = found.nbytes
    figures = {"streamed": result / 1e6, "extra here": max(0, peak[0] - before[0]) / 1e6}
    if torch is not None:
        figures["extra on the device"] = max(0, peak[1] - before[1] - result) / 1e6
    table("Memory while streaming, MB", ("what", "MB"), list(figures.items()))
    return figures


class _Clock:
    """Time compute passes by the device's clock, behind work that keeps it busy."""

    _BUSY = """
@group(0) @binding(0) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
@group(0) @binding(2) var<uniform> settings: vec4<u32>;
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  var sum = vec4<u32>(0u);
  for (var turn = 0u; turn < settings.x; turn += 1u) {
    for (var at = id.x; at < arrayLength(&source); at += groups.x * 256u) { sum ^= source[at] + turn; }
  }
  if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x12345678u) { out[0] = 1u; }
}
"""

    def __init__(self, device: Any, nbytes: int, turns: int) -> None:
        self._device = device
        self._queries = device.raw.create_query_set(type="timestamp", count=2)
        self._ticks = device.raw.create_buffer(size=256, usage="QUERY_RESOLVE|COPY_SRC|COPY_DST")
        self.source, self._out = device.buffer(nbytes, "work"), device.buffer(256, "nothing")
        self._turns = turns

    def read(self, within: Any, binding: Any, turns: int = 1, out: Any = None) -> None:
        """Record one reading of a buffer, or several."""
        device = self._device
        bindings = [binding, (out or self._out, 0, 256), device.uniform(turns)]
        device.dispatch(within, device.pipeline(self._BUSY), bindings, min(8192, max(1, binding[2] // 65536)))

    def seconds(self, record: Any) -> float:
        """Return what a pass takes on the device."""
        encoder = self._device.encoder()
        with self._device.compute_pass(encoder) as within:
            self.read(within, (self.source, 0, self.source.size), self._turns)
        marks = {"query_set": self._queries, "beginning_of_pass_write_index": 0, "end_of_pass_write_index": 1}
        timed = encoder.begin_compute_pass(timestamp_writes=marks)
        record(timed)
        timed.end()
        encoder.resolve_query_set(self._queries, 0, 2, self._ticks, 0)
        begin, end = self._device.read((self._ticks, 0, 16), before=encoder).view(np.uint64)
        return float(end - begin) * 1e-9


def products(device: Any, rounds: int, sizes: list[tuple[int, int]], total: int) -> dict[str, Any]:
    """Compare products of matrices and vectors with reading the same bytes once; return GB/s of stored bytes by name."""
    if "timestamp-query" not in device.features:
        return {}
    clock = _Clock(device, total, 60 if total > 100 << 20 else 1)
    lines, found = [], {}
    rng = np.random.default_rng(0)
    source = (rng.standard_normal(1 << 20) * 0.02).astype(np.float16)
    noise = rng.integers(0, 256, 1 << 20, np.uint8)
    for rows, width in sizes:
        for kind in ("f16", "int8", "int8-row", "nf4", "nf4-dq", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"):
            parts = _parts(kind, rows, width, source, noise)
            nbytes = sum(part.nbytes for part in parts.values())
            tensors = [_tensor(device, kind, (rows, width), parts) for _ in range(max(1, total // nbytes))]
            whole = nbytes * len(tensors)
            outs = [device.buffer(256, "nothing") for _ in tensors]

            def reading(within: Any, each: int = nbytes // 256 * 256, outs: Any = outs) -> None:
                for number, out in enumerate(outs):
                    clock.read(within, (clock.source, number * each, each), out=out)

            seconds: dict[str, list[float]] = {}
            for turn in range(rounds + 1):
                for batch in (0, 1, 8):
                    if batch:
                        x, ys = device.buffer(width * 4 * batch, "x"), [device.buffer(rows * 4 * batch, "y") for _ in tensors]

                        def record(within: Any, tensors: Any = tensors, x: Any = x, ys: Any = ys, batch: int = batch) -> None:
                            for tensor, y in zip(tensors, ys, strict=True):  # other bytes every time: no cache has them
                                qc.gpu.record_matvec(within, tensor, (x, 0, x.size), (y, 0, y.size), batch)

                    taken = clock.seconds(record if batch else reading)
                    if turn:
                        seconds.setdefault(str(batch), []).append(taken)
            read, one, eight = (whole / median(seconds[key]) / 1e9 for key in ("0", "1", "8"))
            found[f"{kind} {rows}x{width}"] = {"read": read, "vector": one, "batch of 8": eight}
            lines.append((f"{kind}, {rows} x {width}", one, read, one / read, eight))
            del tensors
    table(f"Products on {device.name}", ("matrix", "vector, GB/s", "read once, GB/s", "ratio", "batch of 8, GB/s"), lines)
    return found


def _parts(kind: str, rows: int, width: int, source: Any, noise: Any) -> dict[str, Any]:
    """Return stored parts of a matrix: of a few rows again and again, since only their size matters."""
    if kind in BLOCKS:
        return {"blocks": np.resize(noise, rows * width // BLOCKS[kind][0] * BLOCKS[kind][1])}
    few = np.resize(source, (64, width))
    if kind == "f16":
        return {"values": np.resize(few, (rows, width))}
    made = quantize(kind, few)[1]
    whole = {"quant_map", "nested_quant_map", "quant_state"}
    grown = {name: part if name in whole else np.resize(part, part.size * rows // 64) for name, part in made.items()}
    return grown | codec(kind).for_shader(made)


def _tensor(device: Any, kind: str, shape: tuple[int, int], parts: Any) -> Any:
    from quantcache.loader.gpu.tensors import Home

    pieces = {}
    for name, part in parts.items():
        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        buffer = device.buffer(-(-max(data.size, 4) // 256) * 256, name)
        if data.size:
            device.write(buffer, 0, data)
        pieces[name] = ((buffer, 0, data.size),)
    return qc.gpu.GpuTensor(kind, shape, {n: element_name(p.dtype) for n, p in parts.items()}, device, Home(), pieces)


def main() -> None:
    """Run."""
    options = arguments(__doc__ or "")
    try:
        device = qc.gpu.open_device()
    except qc.DeviceUnavailable as error:
        print(f"no GPU: {error.message}")
        return
    figures: dict[str, Any] = {"gpu": device.name}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "m.safetensors"
        make(path, shapes("llama", 10_000_000 if options.quick else 8_000_000_000, 2), "f16")
        time.sleep(2.2)  # younger files are digested again
        figures["uploads"] = uploads(device, folder, path, options.rounds)
        figures["memory, MB"] = memory(device, path)
        write_json(options.json, figures)
        if not options.quick:
            make(path, shapes("llama", 3_000_000_000, 2), "f16")
        figures["misses"] = misses(device, folder, path, options.rounds)
        write_json(options.json, figures)
    sizes = [(256, 256)] if options.quick else [(4096, 4096), (16384, 4096), (16384, 16384)]
    figures["products, GB/s"] = products(device, options.rounds, sizes, (1 if options.quick else 512) << 20)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
