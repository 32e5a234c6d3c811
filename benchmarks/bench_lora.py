"""What does merging a LoRA cost on a miss: rank 64 on all linear layers, beside a plain miss and beside torch and peft's way?

A Llama-like float16 checkpoint of about 1 GB (--quick: a small one). A miss with and without the adapter alternate in one
run; every load waits until the entry is stored. The peer does what a runtime does that merges at every start: W +
scale * (B @ A) in float32 with torch, on as many threads, without quantizing or storing anything.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import Row, alternate, arguments, median, peak_anonymous, table, write_json
from models import make, shapes
from safetensors import safe_open
from safetensors.numpy import save_file

import quantcache as qc

RANK, ALPHA = 64, 32
MERGING_MISS = "with qc.load(sys.argv[1], lora=[sys.argv[3]], cache=sys.argv[2]) as model: model.finish()"


def make_adapter(model: Path, folder: Path) -> None:
    """Write an adapter in PEFT's form for every linear layer of a model."""
    rng = np.random.default_rng(4)
    tensors: dict[str, Any] = {}
    with safe_open(model, "np") as source:
        for name in source.keys():  # noqa: SIM118 - not a dict
            shape = source.get_slice(name).get_shape()
            if "_proj" in name:
                module = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{module}.lora_A.weight"] = (rng.standard_normal((RANK, shape[1]), np.float32) * 0.01).astype(np.float16)
                tensors[f"{module}.lora_B.weight"] = (rng.standard_normal((shape[0], RANK), np.float32) * 0.01).astype(np.float16)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}))


def miss(model: Path, store: Path, **options: Any) -> None:
    """Quantize and store everything."""
    shutil.rmtree(store, ignore_errors=True)
    with qc.load(model, cache=store, **options) as loaded:
        loaded.finish()
        if loaded.hit:
            raise SystemExit("that was a hit")


def torch_merge(model: Path, adapter: Path) -> None:
    """Merge with torch, in float32, tensor by tensor, as peft does."""
    import torch
    from safetensors.torch import load_file

    weights, updates = load_file(model), load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, weight in weights.items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" in updates:
                down, up = (updates[f"{module}.lora_{x}.weight"].float() for x in "AB")
                weights[name] = (weight.float() + (up @ down) * (ALPHA / RANK)).half()


def main() -> None:
    """Run."""
    options = arguments(__doc__ or "")
    figures: dict[str, Any] = {}
    lines = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("QUANTCACHE_BENCH_DIR")) as name:
        folder = Path(name)
        model, adapter, store = folder / "model.safetensors", folder / "adapter", folder / "store"
        make(model, shapes("llama", 20_000_000 if options.quick else 1_160_000_000, 2), "f16")
        make_adapter(model, adapter)
        nbytes = model.stat().st_size
        rows = []
        for quant in ("nf4", "int8"):
            rows.append(Row(f"{quant} miss", lambda q=quant: miss(model, store, quant=q), nbytes))
            rows.append(Row(f"{quant} miss, merged", lambda q=quant: miss(model, store, quant=q, lora=[adapter]), nbytes))
        try:
            import torch  # noqa: F401

            rows.append(Row("torch reads and merges", lambda: torch_merge(model, adapter), nbytes))
        except ImportError as error:
            print(f"peer left out: {error}")
        seconds = alternate(rows, options.rounds)
        for row in rows:
            took = median(seconds[row.name])
            plain = median(seconds[f"{row.name.split()[0]} miss"]) if row.name.endswith("merged") else None
            lines.append((row.name, took * 1e3, "" if plain is None else f"{took / plain:.2f}x the plain miss"))
            figures[row.name] = {"seconds": took, "of the plain miss": None if plain is None else took / plain}
        shutil.rmtree(store, ignore_errors=True)
        extra = peak_anonymous(MERGING_MISS, model, store, adapter)
        figures["extra anonymous memory of a merging miss"] = extra
        lines.append(("extra anonymous memory, merging, MB", extra / 1e6, ""))
    table(f"Merging rank {RANK} into {nbytes / 1e9:.2f} GB of float16", ("what", "ms", ""), lines)
    write_json(options.json, {"lora": figures, "nbytes": nbytes})


if __name__ == "__main__":
    main()
