"""What does a load cost: miss, hit, hit with digests, beside plain readers and a runtime that quantizes each time?

A Llama-like checkpoint is made (f16, or f32 with --f32), or one is named. Contenders alternate in one run on a warm page
cache; medians. Every load touches all tensors, and every byte of them where that is what is compared. Memory is the
peak of anonymous memory of a process that does nothing else.
"""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Row, alternate, arguments, median, peak_anonymous, table, write_json
from safetensors.numpy import load_file, save_file

import quantcache as qc


def make_model(path: Path, layers: int, width: int) -> None:
    """Write a checkpoint of Llama's shapes."""
    rng = np.random.default_rng(3)
    hidden = width * 11 // 4 // 256 * 256

    def weights(rows: int, columns: int) -> Any:
        return (rng.standard_normal((rows, columns), np.float32) * np.float32(0.02)).astype(np.float16)

    tensors = {"model.embed_tokens.weight": weights(8192, width), "model.norm.weight": np.ones(width, np.float16)}
    for n in range(layers):
        for name in ("q", "k", "v", "o"):
            tensors[f"model.layers.{n}.self_attn.{name}_proj.weight"] = weights(width, width)
        tensors[f"model.layers.{n}.mlp.gate_proj.weight"] = weights(hidden, width)
        tensors[f"model.layers.{n}.mlp.up_proj.weight"] = weights(hidden, width)
        tensors[f"model.layers.{n}.mlp.down_proj.weight"] = weights(width, hidden)
        tensors[f"model.layers.{n}.input_layernorm.weight"] = np.ones(width, np.float16)
    save_file(tensors, path)


def touch(array: Any) -> int:
    """Read every byte."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return int(raw[: raw.size // 8 * 8].view(np.uint64).sum(dtype=np.uint64)) if raw.size >= 8 else 0


def quantcache_load(path: Path, cache: Any, *, read: bool = False, **options: Any) -> bool:
    """Load all tensors; return whether it was a hit."""
    with qc.load(path, cache=cache, **options) as model:
        for name in model:
            tensor = model[name]
            if read:
                for part in tensor.parts.values() if isinstance(tensor, qc.QuantTensor) else (tensor,):
                    touch(part)
        return model.hit


def entry_of(cache: Path, recipe: str) -> Path:
    """Return the entry file of a recipe."""
    with qc.Cache(cache) as store:
        return next(store.path_of(row.key) for row in store.entries() if row.recipe == recipe)


def bare_mmap(path: Path) -> int:
    """Map a file and read every byte."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        raw = np.frombuffer(mapped, np.uint8)
        total = int(raw[: raw.size // 8 * 8].view(np.uint64).sum(dtype=np.uint64))
        del raw
        return total


def bitsandbytes_load(path: Path, quant: str) -> None:
    """Do what a runtime without a cache does at every start: read, and quantize the same tensors."""
    import bitsandbytes.functional as bnb
    from safetensors.torch import load_file as torch_load

    recipe = qc.Recipe.of(quant)
    for name, tensor in torch_load(path).items():
        info = qc.TensorInfo(name, "F16", tuple(tensor.shape), 0, tensor.nbytes)
        if recipe.decide(info).codec == "nf4":
            bnb.quantize_4bit(tensor, blocksize=64, quant_type="nf4")
        elif recipe.decide(info).codec == "int8-row":
            bnb.int8_vectorwise_quant(tensor)


#: takes every tensor
MISS = "with qc.load(sys.argv[1], quant=sys.argv[3], cache=sys.argv[2]) as model: [model[name] for name in model]"


def main() -> None:
    """Run."""
    options = arguments(__doc__ or "")
    warnings.simplefilter("error", qc.QuantcacheWarning)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        make_model(path, *((2, 512) if options.quick else (12, 2048)))
        nbytes = path.stat().st_size
        for quant in ("nf4", "int8", "int8-row"):
            cache, fresh = Path(folder) / "cache", Path(folder) / "fresh"
            quantcache_load(path, cache, quant=quant)
            entry = entry_of(cache, quant)

            def miss(quant: str = quant, fresh: Path = fresh) -> None:
                if quantcache_load(path, fresh, quant=quant):
                    raise SystemExit("a miss was expected")

            def hit(quant: str = quant, cache: Path = cache, **extra: Any) -> None:
                if not quantcache_load(path, cache, quant=quant, **extra):
                    raise SystemExit("a hit was expected")

            rows = [
                Row("miss, stored", miss, nbytes),
                Row("miss, mode=off", lambda q=quant: quantcache_load(path, None, quant=q, mode="off"), nbytes),
                Row("hit, digests checked", hit, entry.stat().st_size),
                Row("hit, verify=off, every byte read", lambda h=hit: h(verify="off", read=True), entry.stat().st_size),
                Row("hit, verify=off, nothing read", lambda h=hit: h(verify="off"), 0),
                Row("load_file of the entry", lambda e=entry: load_file(e), entry.stat().st_size),
                Row("load_file of the source", lambda: load_file(path), nbytes),
                Row("bare mmap of the entry, every byte read", lambda e=entry: bare_mmap(e), entry.stat().st_size),
            ]
            if quant != "int8":
                try:
                    import bitsandbytes  # noqa: F401

                    rows.append(Row("bitsandbytes: read and quantize", lambda q=quant: bitsandbytes_load(path, q), nbytes))
                except ImportError as error:
                    print(f"peer left out: {error}")
            seconds = alternate(rows, options.rounds, prepare=lambda fresh=fresh: shutil.rmtree(fresh, ignore_errors=True))
            base = median(seconds["hit, digests checked"])
            shutil.rmtree(fresh, ignore_errors=True)
            peak = peak_anonymous(MISS, path, fresh, quant) if Path("/proc/self/status").exists() else 0
            lines = [(row.name, median(seconds[row.name]) * 1e3, median(seconds[row.name]) / base) for row in rows]
            size = f"{nbytes / 1e6:.0f} MB -> {entry.stat().st_size / 1e6:.0f} MB"
            table(f"{quant}, {size}, extra memory of a miss {peak / 1e6:.0f} MB", ("load", "ms", "times a hit"), lines)
            figures[quant] = {name: ms for name, ms, _ in lines} | {
                "source bytes": nbytes, "entry bytes": entry.stat().st_size, "extra memory of a miss": peak,
            }  # fmt: skip
            shutil.rmtree(cache)
    write_json(options.json, {"end to end, ms": figures})


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
