"""Own what a codec says to a GPU: WGSL that turns stored parts into weights, and weights into parts. Runs nothing, knows no device.

A weights file defines, on module-scope variables called `qc_<part>`:

    qc_init(local_index: u32)          fills workgroup memory; a workgroupBarrier() must follow
    qc_unit(row, unit, width: u32)     the 8 weights from column 8 * unit of a row on, as array<vec4<f32>, 2>; the tensor
                                       has `width` columns, a multiple of 8
    qc_dot(row, unit, width, x, y)     the sum of those 8 weights times the vec4<f32> x and y, with scales applied once; only
                                       where that is less work than to decode them
    qc_dots(row, unit, width, a, ...)  the same of several units, where those share bytes: see Dots
    qc_weight(row, column, width)      one weight, of any width; only where the codec takes widths that are no multiple of 8

It may ask QC_KEEPS_SUBNORMALS, whether unpack2x16float() of the device does not flush subnormal numbers.

An encode file defines `qc_encode(number: u32, lane: u32)`: invocation `lane` of workgroup `number` quantizes its units. It gets
the functions of encode.wgsl, and

    qc_bits(i: u32)                    weight number i of the step, as the bits of a float32
    qc_weights()                       number of weights in the step
    qc_<part>: array<u32>              where a part goes, written from qc_<part>_base() on
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["UNIT", "Dots", "EncodeShader", "WeightShader", "read"]

#: Weights that qc_unit() returns.
UNIT = 8
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Dots:
    """Say which units qc_dots takes: `run` from one on, and as many `apart` units further on.

    Args:
        run, apart: of the first unit, unit / apart is even, and unit a multiple of run.
        rows: that one thread multiplies: as many as share what it read of the vector, and still fit its registers.
    """

    run: int
    apart: int
    rows: int = 4


@dataclass(frozen=True, eq=False)
class WeightShader:
    """Describe how a shader gets at weights. Each is itself, so that what is made of one can be kept by it.

    Args:
        parts: name of a stored part -> WGSL type of the storage array that it is bound as, in binding order.
        source: defines qc_init, qc_unit and perhaps qc_weight.
        any_width: whether there is a qc_weight.
        by_rows: whether parts may be bound for some of the rows, which are numbered from there on.
        dots: what qc_dots takes; None if there is none.
    """

    parts: Mapping[str, str]
    source: str
    any_width: bool = False
    by_rows: bool = True
    dots: Dots | None = None

    @property
    def asks(self) -> bool:
        """Whether it makes a difference what the device does to subnormal numbers."""
        return "QC_KEEPS_SUBNORMALS" in self.source

    @property
    def has_dot(self) -> bool:
        """Whether there is a qc_dot."""
        return "fn qc_dot(" in self.source

    def whole(self, group: int, first: int, *, keeps_subnormals: bool = False) -> str:
        """Return declarations and functions, for a shader of your own.

        Args:
            group: bind group of the parts.
            first: binding of the first part; the others follow.
            keeps_subnormals: what the device does; False is right on every device.
        """
        declared = "".join(
            f"@group({group}) @binding({first + number}) var<storage, read> qc_{name}: {kind};\n"
            for number, (name, kind) in enumerate(self.parts.items())
        )
        return f"const QC_KEEPS_SUBNORMALS = {str(keeps_subnormals).lower()};\n{declared}{self.source}"


@dataclass(frozen=True, eq=False)
class EncodeShader:
    """Describe how a shader quantizes. What it says is bit for bit what the reference does, or that it does not know.

    Args:
        unit: weights that one invocation, or one workgroup, quantizes; the last may be shorter.
        parts: name of a part -> bytes of it that a unit makes, multiples of 4.
        units: of a workgroup.
        lanes: invocations of a workgroup.
        source: defines qc_encode.
    """

    unit: int
    parts: Mapping[str, int]
    units: int
    lanes: int
    source: str

    def whole(self, element: str) -> str:
        """Return the shader, with `main`, for one element type of the source: "F32", "F16" or "BF16".

        Bindings of group 0: the source, the status, four u32 (weights, and the first word of each part), the parts.
        """
        settings = "xyzw"
        places = "".join(
            f"@group(0) @binding({3 + n}) var<storage, read_write> qc_{name}: array<u32>;\n"
            f"fn qc_{name}_base() -> u32 {{ return qc_settings.{settings[1 + n]}; }}\n"
            for n, name in enumerate(self.parts)
        )
        return f"""@group(0) @binding(0) var<storage, read> qc_source: array<u32>;
@group(0) @binding(1) var<storage, read_write> qc_status: array<u32>;
@group(0) @binding(2) var<uniform> qc_settings: vec4<u32>;
{places}fn qc_weights() -> u32 {{ return qc_settings.x; }}
{read("half.wgsl")}{read(f"source_{element.lower()}.wgsl")}{read("encode.wgsl")}{self.source}
@compute @workgroup_size({self.lanes})
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) count: vec3<u32>, @builtin(local_invocation_index) lane: u32) {{
  qc_encode(id.y * count.x + id.x, lane);
}}
"""


@cache
def read(path: str) -> str:
    """Return the text of a .wgsl file.

    Args:
        path: from the folder of this module, "codecs/nf4/weights.wgsl".
    """
    return (_FOLDER / path).read_text()

