"""GGML's K block types: super-blocks of 256 weights whose runs of 16 or 32 have quantized scales. Q2_K to Q8_K.

Source: ggml's ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

from quantcache.quant.blocks import BlockShader, Reference, register_family
from quantcache.quant.codecs.ggml_k import reference
from quantcache.quant.wgsl import Dots

_D, _DMIN, _SIXES = ("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", (12,))

#: In the order of kernel.c's numbers.
_TYPES: list[tuple[str, list[Any], Reference]] = [
    ("Q2_K", [("scales", "u1", (16,)), ("qs", "u1", (64,)), _D, _DMIN], reference.q2_k),
    ("Q3_K", [("hmask", "u1", (32,)), ("qs", "u1", (64,)), _SIXES, _D], reference.q3_k),
    ("Q4_K", [_D, _DMIN, _SIXES, ("qs", "u1", (128,))], reference.q4_k),
    ("Q5_K", [_D, _DMIN, _SIXES, ("qh", "u1", (32,)), ("qs", "u1", (128,))], reference.q5_k),
    ("Q6_K", [("ql", "u1", (128,)), ("qh", "u1", (64,)), ("scales", "i1", (16,)), _D], reference.q6_k),
    ("Q8_K", [("d", "<f4"), ("qs", "i1", (256,)), ("bsums", "<i2", (16,))], reference.q8_k),
]
_SHADERS = {
    "Q4_K": BlockShader(("codecs/ggml_k/sixes.wgsl", "codecs/ggml_k/q4_k.wgsl"), Dots(run=2, apart=4, rows=5), lines=True),
    "Q5_K": BlockShader(("codecs/ggml_k/sixes.wgsl", "codecs/ggml_k/q5_k.wgsl"), Dots(run=2, apart=4), lines=True),
    "Q6_K": BlockShader(("scaled.wgsl", "codecs/ggml_k/q6_k.wgsl"), Dots(run=2, apart=8, rows=3)),
}
register_family("ggml_k_decode", _TYPES, shaders=_SHADERS)
