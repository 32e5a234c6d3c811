"""Draw time per load over model size, on two logarithmic axes, as one SVG file. Plain text: no plotting library."""

from __future__ import annotations

import itertools
import math
from typing import Any
from xml.sax.saxutils import escape

#: name in the figures, label, colour, dashes
LINES = [
    ("bitsandbytes: read and quantize", "bitsandbytes, at every start", "#c0392b", ""),
    ("load_file of the source", "safetensors load_file, unquantized", "#8e8e8e", ""),
    ("miss, all tensors there", "quantcache, the first time", "#d68910", ""),
    ("floor", "floor of the first time", "#d68910", "5 4"),
    ("hit, every digest checked", "quantcache, every other time", "#1e8449", ""),
    ("bare mmap of the entry, every byte read", "floor: bare mmap", "#1e8449", "5 4"),
]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 430, 70, 250, 50, 55


def plot(figures: dict[str, Any], cpu: str) -> str:
    """Return the SVG.

    Args:
        figures: one model's, as bench_load.py has them: "source" in bytes, "seconds" by name.
        cpu: of the machine.
    """
    sizes = [found["source"] for found in figures.values()]
    values = [found["seconds"][name] for found in figures.values() for name, *_ in LINES if name in found["seconds"]]
    low_x, high_x = math.log10(min(sizes) / 1.3), math.log10(max(sizes) * 1.3)
    low_y, high_y = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def x(nbytes: float) -> float:
        return LEFT + (math.log10(nbytes) - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def y(seconds: float) -> float:
        return HEIGHT - BOTTOM - (math.log10(seconds) - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="15" fill="#222">Loading a Llama in NF4: time over the size of the checkpoint</text>',
        f'<text x="{LEFT}" y="38" fill="#666">float16, page cache warm, medians; {escape(cpu)}</text>',
    ]
    for power in range(low_y, high_y + 1):
        label = f"{10**power:g} s" if power >= 0 else f"{10 ** (power + 3):g} ms"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(10**power):.1f}" y2="{y(10**power):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(10**power) + 4:.1f}" text-anchor="end" fill="#444">{label}</text>')
    for size in sizes:
        parts.append(f'<line x1="{x(size):.1f}" x2="{x(size):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#eee"/>')
        parts.append(f'<text x="{x(size):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#444">{size / 1e9:.2g} GB</text>')
    labels = []
    for name, label, colour, dashes in LINES:
        points = [(x(found["source"]), y(found["seconds"][name])) for found in figures.values() if name in found["seconds"]]
        if not points:
            continue
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in points if not dashes]
        size, last = [(found["source"], found["seconds"][name]) for found in figures.values() if name in found["seconds"]][-1]
        text = (f"{last:.3g} s" if last >= 1 else f"{last * 1e3:.3g} ms") + ("" if size == max(sizes) else f" at {size / 1e9:.2g} GB")
        labels.append([points[-1][1] + 4, f"{label}: {text}", colour])
    labels.sort()
    for above, below in itertools.pairwise(labels):  # no label over another
        below[0] = max(below[0], above[0] + 15)
    parts += [f'<text x="{WIDTH - RIGHT + 10}" y="{at:.1f}" fill="{colour}">{escape(text)}</text>' for at, text, colour in labels]
    return "\n".join([*parts, "</svg>"]) + "\n"
