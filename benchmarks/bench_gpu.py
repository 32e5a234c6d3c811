"""What does a GPU cost: uploads beside torch's copies, memory while streaming, products beside reading the same bytes once.

One process, contenders alternated, medians. torch is the peer where it sees the same GPU; without it, rows are left out. On a
software adapter the figures mean nothing, and the benchmark only shows that it runs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Row, alternate, arguments, median, table, write_json
from models import make, shapes

import quantcache as qc
from quantcache.quant.codec import quantize


def torch_rows(path: Path, nbytes: int) -> list[Row]:
    """Return what torch does with as many bytes: a pinned copy, a pageable one, a pinned ring fed from the mapped file."""
    try:
        import torch

        if not torch.cuda.is_available():
            return []
    except ImportError:
        return []
    mapped = torch.from_numpy(np.memmap(path, np.uint8, "c")[:nbytes])
    there = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    pinned = mapped.clone().pin_memory()
    step = 16 << 20
    ring = [torch.empty(step, dtype=torch.uint8).pin_memory() for _ in range(4)]

    def fed() -> None:
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
        Row("torch, pinned", lambda: copied(pinned), nbytes),
        Row("torch, pageable", lambda: copied(mapped), nbytes),
        Row("torch, pinned ring from the mapped file", fed, nbytes),
    ]


def uploads(device: Any, folder: Path, size: int, rounds: int) -> dict[str, float]:
    """Compare ways onto the device; return GB/s by name."""
    path = folder / "m.safetensors"
    make(path, shapes("llama", size, 2), "f16")
    time.sleep(2.2)
    qc.load(path, "nf4", cache=folder / "c").close()
    rows = []
    with qc.load(path, "nf4", cache=folder / "c") as model:
        nbytes = sum(part.nbytes for name in model for part in model.part_sizes(name))

    def ours(verify: str, threads: int, **how: Any) -> None:
        with qc.load(path, "nf4", cache=folder / "c", verify=verify) as model, model.upload(device, threads=threads, **how) as found:
            for _ in found.layers():
                pass
            device.settle()

    def whole() -> None:  # what others do: a tensor, a wait, the next one
        with qc.load(path, "nf4", cache=folder / "c", verify="off") as model:
            kept = []
            for name in model:
                tensor = model[name]
                for part in tensor.parts.values() if isinstance(tensor, qc.QuantTensor) else [tensor]:
                    data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
                    buffer = device.raw.create_buffer(size=-(-data.size // 4) * 4, usage=device._storage)
                    device.raw.queue.write_buffer(buffer, 0, data, 0, data.size // 4 * 4)
                    device.raw.queue.submit([])
                    kept.append(buffer)
                device.fence()()

    for threads in (1, 4, 8):
        rows.append(Row(f"upload, unchecked, {threads} threads", lambda t=threads: ours("off", t), nbytes))
        rows.append(Row(f"upload, checked, {threads} threads", lambda t=threads: ours("touch", t), nbytes))
    rows.append(Row("lazily, a whole pass, checked", lambda: ours("touch", 4, lazy=True), nbytes))
    rows.append(Row("a tensor and a wait at a time, unchecked", whole, nbytes))
    rows += torch_rows(next(folder.glob("c/v*/entries/*/*")), nbytes)
    found = {name: nbytes / median(values) / 1e9 for name, values in alternate(rows, rounds).items()}
    pinned = found.get("torch, pinned", float("nan"))
    table(f"Onto {device.name}, {nbytes / 1e6:.0f} MB of nf4", ("way", "GB/s", "of torch, pinned"), [(n, rate, rate / pinned) for n, rate in found.items()])
    return found


def products(device: Any, rounds: int, sizes: list[tuple[int, int]], most: int) -> dict[str, float]:
    """Compare matrix-vector products with reading the same bytes once; return GB/s of stored bytes by name."""
    lines, found = [], {}
    source = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(np.float16)
    for rows, width in sizes:
        weights = np.resize(source, (rows, width))
        for kind in ("f16", "int8", "int8-row", "nf4"):
            parts = {"values": weights} if kind == "f16" else quantize(kind, weights)[1]
            tensors = [_tensor(device, kind, (rows, width), parts) for _ in range(min(most, max(1, (512 << 20) // sum(p.nbytes for p in parts.values()))))]
            x, y = device.buffer(width * 4, "x"), device.buffer(rows * 4, "y")

            def call(tensors: Any = tensors, x: Any = x, y: Any = y) -> None:
                encoder = device.encoder()
                with device.compute_pass(encoder) as within:
                    for tensor in tensors:  # other bytes every time: no cache has them
                        qc.gpu.record_matvec(within, tensor, (x, 0, x.size), (y, 0, y.size))
                device.read((y, 0, 4), before=encoder)

            nbytes = sum(tensor.nbytes for tensor in tensors)
            reading = _reader(device, [binding for tensor in tensors for binding in list(tensor.parts.values())[:1]])
            seconds = alternate([Row("product", call, nbytes), Row("read", reading, nbytes)], rounds)
            rate, least = nbytes / median(seconds["product"]) / 1e9, nbytes / median(seconds["read"]) / 1e9
            found[f"{kind} {rows}x{width}"] = rate
            lines.append((f"{kind}, {rows} x {width}", rate, least, rate / least, len(tensors)))
            del tensors, call, reading
    table(f"Products on {device.name}", ("tensor", "GB/s", "GB/s, read once", "ratio", "tensors in a submission"), lines)
    return found


def _tensor(device: Any, kind: str, shape: tuple[int, int], parts: Any) -> Any:
    from quantcache.loader.gpu.tensors import Home
    from quantcache.tensor import element_name

    pieces = {}
    for name, part in parts.items():
        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        buffer = device.buffer(-(-data.size // 256) * 256, name)
        device.write(buffer, 0, data)
        pieces[name] = ((buffer, 0, data.size),)
    return qc.gpu.GpuTensor(kind, shape, {n: element_name(p.dtype) for n, p in parts.items()}, device, Home(), pieces)


_READ = """
@group(0) @binding(0) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  var sum = vec4<u32>(0u);
  for (var at = id.x; at < arrayLength(&source); at += groups.x * 256u) { sum ^= source[at]; }
  if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x12345678u) { out[0] = 1u; }
}
"""


def _reader(device: Any, bindings: list[Any]) -> Any:
    pipeline, out = device.pipeline(_READ), device.buffer(256, "nothing")

    def call() -> None:
        encoder = device.encoder()
        with device.compute_pass(encoder) as within:
            for binding in bindings:
                device.dispatch(within, pipeline, [binding, (out, 0, 256)], min(8192, max(1, binding[2] // 65536)))
        device.read((out, 0, 4), before=encoder)

    return call


def main() -> None:
    """Run."""
    options = arguments(__doc__ or "")
    try:
        device = qc.gpu.open_device()
    except qc.DeviceUnavailable as error:
        print(f"no GPU: {error.message}")
        return
    with tempfile.TemporaryDirectory() as folder:
        rates = uploads(device, Path(folder), 10_000_000 if options.quick else 4_000_000_000, options.rounds)
    sizes = [(256, 256)] if options.quick else [(4096, 4096), (14336, 4096), (16384, 16384)]
    write_json(options.json, {"gpu": device.name, "upload, GB/s": rates, "products, GB/s": products(device, options.rounds, sizes, 4 if options.quick else 64)})


if __name__ == "__main__":
    main()
