"""Make checkpoints of real models' shapes, of any size and element type, for the benchmarks. Weights are random.

Widths and vocabularies are those of published models; as many layers as the size asks for. Nothing is ever whole in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import drop_cache

FAMILIES = ("llama", "rwkv7", "bert")
DTYPES = {"f32": ("F32", 4), "f16": ("F16", 2), "bf16": ("BF16", 2)}
#: weights that are drawn; every tensor is these, from another place on
_DRAWN = (1 << 24) + 4099


def _llama(width: int) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    hidden, narrow, vocabulary = {512: (1408, 512, 8192), 2048: (5632, 256, 32000), 3072: (8192, 1024, 128256)}[width]
    once = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    layer = {
        "self_attn.q_proj.weight": (width, width), "self_attn.k_proj.weight": (narrow, width),
        "self_attn.v_proj.weight": (narrow, width), "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (hidden, width), "mlp.up_proj.weight": (hidden, width), "mlp.down_proj.weight": (width, hidden),
        "input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,),
    }  # fmt: skip
    return once, {f"model.layers.{{}}.{name}": shape for name, shape in layer.items()}


def _rwkv7(width: int) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    rank = {512: 64, 2048: 96, 2560: 96}[width]
    once = {"emb.weight": (8192 if width == 512 else 65536, width), "ln_out.weight": (width,), "ln_out.bias": (width,)}
    layer: dict[str, tuple[int, ...]] = {f"att.{name}.weight": (width, width) for name in ("receptance", "key", "value", "output")}
    for name in "wagv":
        layer |= {f"att.{name}1": (width, rank), f"att.{name}2": (rank, width)}
    layer |= {f"att.x_{name}": (1, 1, width) for name in "rwkvag"} | {f"att.{name}0": (1, 1, width) for name in "wav"}
    layer |= {"att.r_k": (width // 64, 64), "att.ln_x.weight": (width,), "att.ln_x.bias": (width,), "ffn.x_k": (1, 1, width)}
    layer |= {"ffn.key.weight": (4 * width, width), "ffn.value.weight": (width, 4 * width)}
    layer |= {f"ln{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
    return once, {f"blocks.{{}}.{name}": shape for name, shape in layer.items()}


def _bert(width: int) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    once = {
        "embeddings.word_embeddings.weight": (30522 if width > 512 else 8192, width),
        "embeddings.position_embeddings.weight": (512, width), "pooler.dense.weight": (width, width), "pooler.dense.bias": (width,),
    }  # fmt: skip
    layer: dict[str, tuple[int, ...]] = {}
    square = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    for name, rows, columns in [(name, width, width) for name in square] + [
        ("intermediate.dense", 4 * width, width), ("output.dense", width, 4 * width),
    ]:  # fmt: skip
        layer |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    layer |= {f"{name}.LayerNorm.{kind}": (width,) for name in ("attention.output", "output") for kind in ("weight", "bias")}
    return once, {f"encoder.layer.{{}}.{name}": shape for name, shape in layer.items()}


def shapes(family: str, nbytes: int, itemsize: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model that takes about so many bytes."""
    weights = nbytes // itemsize
    make, widths = {
        "llama": (_llama, (512, 2048, 3072)), "rwkv7": (_rwkv7, (512, 2048, 2560)), "bert": (_bert, (512, 768, 1024)),
    }[family]  # fmt: skip
    once, layer = make(widths[0] if weights < 1 << 27 else widths[1] if weights < 1 << 31 else widths[2])
    spare = weights - sum(map(math.prod, once.values()))
    layers = max(1, round(spare / sum(map(math.prod, layer.values()))))
    return once | {name.format(n): shape for n in range(layers) for name, shape in layer.items()}


def make(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str) -> int:
    """Write a .safetensors file, and read it; return its length.

    It is in the page cache then as programs find a file that was read before: in large pages, which take a hundredth of the time to map.
    What was only written is in whatever pages there were just then.

    Args:
        path: where.
        tensors: name -> shape.
        dtype: "f32", "f16" or "bf16".
    """
    name, itemsize = DTYPES[dtype]
    drawn = np.random.default_rng(7).standard_normal(_DRAWN, np.float32) * np.float32(0.02)
    values: Any = drawn.astype(np.float16) if dtype == "f16" else drawn
    if dtype == "bf16":
        values = (drawn.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    header: dict[str, Any] = {}
    position = 0
    for key, shape in sorted(tensors.items()):
        end = position + math.prod(shape) * itemsize
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 64) * 64 - 8 + (64 if len(text) % 64 > 56 else 0))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, shape in enumerate(tensors[key] for key in sorted(tensors)):
            for piece in _pieces(values, math.prod(shape), number * 7919):
                file.write(piece)
    drop_cache(path)
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass
    return path.stat().st_size


def _pieces(values: Any, count: int, start: int) -> Iterator[Any]:
    """Yield so many of the values, going round, from a place on."""
    start %= values.size
    while count:
        piece = values[start : start + count]
        yield piece.data.cast("B")
        count, start = count - piece.size, 0
