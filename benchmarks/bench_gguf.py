"""How fast are GGUF blocks decoded, beside gguf-py, libgguf and memcpy; and how fast does a big header open?

Two threads for everybody: each decodes half of the blocks into memory that was touched before. Every type is checked
against its reference, and against libgguf, first. Rates are of float32 written, in GB/s: that, not the decoding, is
what binds float32 (beside memcpy, which reads as much as it writes).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Row, alternate, arguments, median, table, write_json

from quantcache.loader.source import Source
from quantcache.quant import native
from quantcache.quant.blocks import block_type, block_types, decode

THREADS = 2
ROW = 4096


def some_blocks(name: str, weights: int, seed: int) -> Any:
    """Return uint8 [rows, bytes of a row]: random codes under scales of a usual size."""
    kind = block_type(name)
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, weights // kind.weights * kind.nbytes, dtype=np.uint8)
    fields = blocks.view(kind.layout)
    for field in ("d", "m", "dmin"):
        if field in (kind.layout.names or ()):
            fields[field] = rng.standard_normal(fields[field].shape) * 0.01
    if name == "MXFP4":
        fields["e"] = rng.integers(110, 125, fields["e"].shape)
    if name == "IQ1_M":  # the scale's exponent stands in the high nibble of the last word
        fields["scales"][:, 3] = fields["scales"][:, 3] & 0x0FFF | 0x2000
    return blocks.reshape(weights // ROW, -1)


def at_level(level: str, name: str, blocks: Any, dtype: str) -> Any:
    """Decode at a given level."""
    os.environ["QUANTCACHE_KERNEL"] = level
    native.level.cache_clear()
    native.kernel.cache_clear()
    out = np.empty(len(blocks) * ROW, np.float32 if dtype == "F32" else np.uint16)
    decode(name, blocks.reshape(-1), out, dtype)
    return out


def check(name: str, in_use: str) -> bool:
    """Compare the level in use with the reference and with libgguf; return whether libgguf knows the type."""
    seed = int.from_bytes(os.urandom(4), "little")
    blocks = some_blocks(name, 64 * ROW, seed)
    for dtype in ("F32", "F16", "BF16"):
        if at_level(in_use, name, blocks, dtype).tobytes() != at_level("reference", name, blocks, dtype).tobytes():
            raise SystemExit(f"{name} to {dtype} differs from its reference (seed {seed})")
    ours = at_level(in_use, name, blocks, "F32")
    try:
        theirs = libgguf.dequantize_rows(blocks, libgguf.GGMLQuantizationType[name])
    except (KeyError, ValueError):
        return False
    if ours.tobytes() != np.ascontiguousarray(theirs).tobytes():
        raise SystemExit(f"{name} differs from libgguf (seed {seed})")
    return True


def contenders(name: str, blocks: Any, outs: dict[str, Any], pool: ThreadPoolExecutor, known: bool) -> list[Row]:
    """Return everybody who decodes this type."""
    half = len(blocks) // THREADS
    parts = [slice(k * half, (k + 1) * half) for k in range(THREADS)]

    def ours(dtype: str) -> None:
        out = outs[dtype].reshape(-1, ROW)
        list(pool.map(lambda s: decode(name, blocks[s].reshape(-1), out[s].reshape(-1), dtype), parts))

    def peer() -> None:
        kind = libgguf.GGMLQuantizationType[name]
        out = outs["F32"].reshape(-1, ROW)
        list(pool.map(lambda s: libgguf.dequantize_rows_into_raw(kind, blocks[s], out[s], half, ROW), parts))

    nbytes = len(blocks) * ROW * 4
    rows = [Row(f"{name} {dtype}", lambda d=dtype: ours(d), nbytes) for dtype in outs]
    if known:
        rows.append(Row(f"{name} libgguf", peer, nbytes))
    try:
        kind = gguf.GGMLQuantizationType[name]
        few = blocks[: max(2, len(blocks) // 8)]  # it takes a second for all of them
        gguf.quants.dequantize(few[:1], kind)
        two = [few[: len(few) // 2], few[len(few) // 2 :]]
        call = lambda: list(pool.map(lambda part: gguf.quants.dequantize(part, kind), two))  # noqa: E731
        rows.append(Row(f"{name} gguf-py", call, len(few) * ROW * 4))
    except (KeyError, NotImplementedError):
        pass
    return rows


def header(folder: Path, rounds: int) -> tuple[float, float]:
    """Return the seconds that opening a vocabulary of 150,000 tokens takes, here and in gguf-py."""
    path = folder / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    tokens = [f"token{i}".encode() for i in range(150_000)]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_merges([f"a{i} b{i}" for i in range(len(tokens))])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = alternate([Row("ours", lambda: Source(path), 1)], rounds)["ours"]
    start = time.perf_counter()
    gguf.GGUFReader(path)
    return median(ours), time.perf_counter() - start


def main() -> None:
    """Run."""
    options = arguments(__doc__ or "")
    in_use = native.level()
    n = (1 if options.quick else 16) << 20
    outs: dict[str, Any] = {"F32": np.ones(n, np.float32), "F16": np.ones(n, np.uint16), "BF16": np.ones(n, np.uint16)}
    source = np.ones(n, np.float32)
    lines, figures = [], {}
    with ThreadPoolExecutor(THREADS) as pool:
        halves = [slice(k * n // THREADS, (k + 1) * n // THREADS) for k in range(THREADS)]
        copy = Row("memcpy", lambda: list(pool.map(lambda s: np.copyto(outs["F32"][s], source[s]), halves)), n * 4)
        for name in block_types():
            known = check(name, in_use)
            os.environ["QUANTCACHE_KERNEL"] = in_use
            native.level.cache_clear()
            native.kernel.cache_clear()
            blocks = some_blocks(name, n, 1)
            rows = [copy, *contenders(name, blocks, outs, pool, known)]
            seconds = alternate(rows, options.rounds)
            rate = {row.name.removeprefix(f"{name} "): row.nbytes / median(seconds[row.name]) / 1e9 for row in rows}
            ours = rate["F32"]
            beside = {peer: ours / rate[peer] if peer in rate else None for peer in ("gguf-py", "libgguf")}
            half = rate["F16"] / ours
            lines.append((name, ours, blocks.nbytes / (n * 4) * ours, ours / rate["memcpy"],
                          *("-" if r is None else f"{r:.1f}x" for r in beside.values()), f"{half:.2f}x", f"{rate['BF16'] / ours:.2f}x"))  # fmt: skip
            figures[name] = {"GB/s of float32": ours, "of memcpy": ours / rate["memcpy"], "f16 over f32": half, **beside}
    table(
        f"GGUF blocks to float32, {THREADS} threads, level {in_use}",
        ("type", "GB/s written", "GB/s of blocks", "of memcpy", "gguf-py", "libgguf", "to f16", "to bf16"),
        lines,
    )
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = header(Path(folder), options.rounds)
    table("Opening a header with 150,000 tokens and as many merges", ("reader", "ms"), [("quantcache", ours * 1e3), ("gguf-py", theirs * 1e3)])
    write_json(options.json, {"gguf": figures, "header": {"quantcache s": ours, "gguf-py s": theirs}})


if __name__ == "__main__":
    main()
