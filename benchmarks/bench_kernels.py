"""How fast are the kernels, beside memcpy and beside the peers, and do they scale to all cores?

Every kernel is checked against its reference first. One thread; input rates in GB/s; the ratio to memcpy and to
the peer is of this same run, contenders alternated, medians. Outputs are touched before, as the pipeline's are.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Row, alternate, arguments, machine, median, settle, table, write_json

from quantcache.quant import native
from quantcache.quant.codec import Scratch, Status, codec, quantize
from quantcache.tensor import array_dtype, output_for

ROW = 4096


def encode(codec_id: str, flat: Any, dtype: str, scratch: Scratch) -> None:
    """Quantize flat weights in tiles of 1 M, into the thread's reused buffers, as the pipeline does."""
    encoder = codec(codec_id).encoder("X.weight", (flat.size // ROW, ROW), dtype, codec(codec_id).variants[0])
    tile = 1 << 20
    for start in range(0, flat.size, tile):
        status, _ = encoder.encode(flat[start : start + tile], start, scratch)
        if status != Status.OK:
            raise SystemExit(f"{codec_id} refused the benchmark's weights: {status}")


def check() -> None:
    """Compare the level in use with the reference on fresh random weights."""
    seed = int.from_bytes(os.urandom(4), "little")
    weights = (np.random.default_rng(seed).standard_normal((64, ROW)) * 0.02).astype(np.float32)
    in_use = native.level()
    for codec_id in ("nf4", "nf4-dq", "int8", "int8-row", "f16"):
        for dtype in (np.float32, np.float16, array_dtype("BF16")):
            results = []
            for level in (in_use, "reference"):
                os.environ["QUANTCACHE_KERNEL"] = level
                native.level.cache_clear()
                native.kernel.cache_clear()
                results.append(quantize(codec_id, weights.astype(dtype))[1])
            if any(results[0][k].tobytes() != results[1][k].tobytes() for k in results[1]):
                raise SystemExit(f"{codec_id} from {dtype} differs from its reference (seed {seed})")
    os.environ["QUANTCACHE_KERNEL"] = in_use
    native.level.cache_clear()


def peers(f32: Any, f16: Any) -> dict[str, Row]:
    """Return what bitsandbytes and torch do, on a part of the weights (they are slow)."""
    try:
        import bitsandbytes.functional as bnb
        import torch
    except ImportError as error:
        print(f"peers left out: {error}")
        return {}
    torch.set_num_threads(1)
    part = slice(0, f32.size // 8)  # nf4 alone: a round over all of it would take 4 s
    a, h = torch.from_numpy(f32[part]), torch.from_numpy(f16[part])
    rows = torch.from_numpy(f16).reshape(-1, ROW)
    codes, state = bnb.quantize_4bit(rows, blocksize=64, quant_type="nf4")
    return {
        "nf4 from f32": Row("bitsandbytes nf4 f32", lambda: bnb.quantize_4bit(a, blocksize=64, quant_type="nf4"), a.nbytes),
        "nf4 from f16": Row("bitsandbytes nf4 f16", lambda: bnb.quantize_4bit(h, blocksize=64, quant_type="nf4"), h.nbytes),
        "int8-row from f16": Row("bitsandbytes int8-row", lambda: bnb.int8_vectorwise_quant(rows), rows.nbytes),
        "nf4 to f16": Row("bitsandbytes nf4 decode", lambda: bnb.dequantize_4bit(codes, state), codes.nbytes),
        "f16 from f32": Row("torch .half()", torch.from_numpy(f32).half, f32.nbytes),
    }


def fresh(nbytes: int, call: Callable[[], Any]) -> float:
    """Return the seconds of a call that writes into as much new memory, of which the machine has as much at hand."""
    settle(nbytes)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Run."""
    options = arguments(__doc__ or "")
    check()
    n = (4 if options.quick else 64) << 20
    f32 = (np.random.default_rng(1).standard_normal(n, dtype=np.float32) * np.float32(0.02)).astype(np.float32)
    f16 = f32.astype(np.float16)
    bf16 = (f32.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    inputs = {"f32": (f32, "F32"), "f16": (f16, "F16"), "bf16": (bf16, "BF16")}
    scratch = Scratch()
    copy = np.empty_like(f32)
    copy.fill(1)
    rows = [Row("memcpy", lambda: np.copyto(copy, f32), f32.nbytes)]
    whole = np.empty(n, np.float16)
    whole.fill(1)
    rows.append(Row("f16 from f32, whole", lambda: native.kernel("f16_cast")(f32, n, 0, whole), f32.nbytes))
    for codec_id in ("f16", "nf4", "nf4-dq", "int8", "int8-row"):
        for name, (flat, dtype) in inputs.items():
            if (codec_id, name) != ("f16", "f16"):
                call = lambda c=codec_id, x=flat, d=dtype: encode(c, x, d, scratch)  # noqa: E731
                rows.append(Row(f"{codec_id} from {name}", call, flat.nbytes))
    for codec_id in ("nf4", "int8", "int8-row"):
        parts = quantize(codec_id, f16.reshape(-1, ROW))[1]
        shape = (n // ROW, ROW)
        out = output_for(shape, "F16", None)
        out.fill(1)
        call = lambda c=codec_id, p=parts, o=out: codec(c).dequantize_into(p, o, "F16")  # noqa: E731
        rows.append(Row(f"{codec_id} to f16", call, parts["codes"].nbytes))
        anew = lambda c=codec_id, p=parts, s=shape: fresh(out.nbytes, lambda: codec(c).dequantize(p, s, "F16"))  # noqa: E731
        rows.append(Row(f"{codec_id} to f16, fresh output", anew, parts["codes"].nbytes))
    rows.append(Row("fresh memory written once, of float16", lambda: fresh(out.nbytes, lambda: np.empty(n, np.float16).fill(1)), out.nbytes))
    beside = peers(f32, f16)
    seconds = alternate(rows + list(beside.values()), options.rounds)
    rate = {row.name: row.nbytes / median(seconds[row.name]) / 1e9 for row in rows + list(beside.values())}
    lines, figures = [], {}
    for row in rows:
        peer = beside.get(row.name.removesuffix(", fresh output"))
        ratio = rate[row.name] / rate["memcpy"]
        against = rate[row.name] / rate[peer.name] if peer else None
        lines.append((row.name, rate[row.name], ratio, f"{against:.1f}x {peer.name}" if peer else ""))
        figures[row.name] = {"GB/s": rate[row.name], "of memcpy": ratio, "of peer": against}
    title = f"Kernels, one thread, level {native.level()}, GB/s of input"
    table(title, ("kernel", "GB/s", "of memcpy", "against the peer"), lines)

    cores = machine()["cores"]
    lines = []
    with ThreadPoolExecutor(cores) as pool:
        own = [Scratch() for _ in range(cores)]
        for codec_id in ("f16", "nf4", "int8", "int8-row"):
            flats = [f32[k * (n // cores // ROW * ROW) :][: n // cores // ROW * ROW] for k in range(cores)]

            def all_cores(c: str = codec_id, flats: list[Any] = flats) -> None:
                list(pool.map(lambda k: encode(c, flats[k], "F32", own[k]), range(cores)))

            times = alternate([Row("one", lambda c=codec_id: encode(c, f32, "F32", scratch), 1), Row("all", all_cores, 1)], options.rounds)
            scaling = median(times["one"]) / median(times["all"])
            lines.append((f"{codec_id} from f32", scaling))
            figures[f"{codec_id} on {cores} cores"] = {"times one core": scaling}
    table(f"The same on {cores} cores", ("kernel", "times one core"), lines)
    write_json(options.json, {"kernels": figures})


if __name__ == "__main__":
    main()
