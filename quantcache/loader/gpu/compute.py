"""Own what can be computed with tensors on a GPU: their weights, and products with vectors and small batches.

The shaders are put together from a codec's own WGSL and a frame here; a runtime puts the same WGSL into shaders of its own.
"""

from __future__ import annotations

import math
import weakref
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from quantcache.errors import UsageError
from quantcache.loader.gpu.device import Binding, Device
from quantcache.loader.gpu.tensors import GpuTensor, row_chunks
from quantcache.quant.wgsl import UNIT, Dots, WeightShader
from quantcache.tensor import float_dtype

__all__ = ["dequantize", "matvec", "record_matvec", "weight_shader"]

Array = NDArray[Any]

#: Rows that a thread multiplies where the codec does not say, threads of a workgroup, those of one that uses qc_dots, and
#: vectors that one pass takes: docs/decisions/0012-gpu.md.
_ROWS, _THREADS, _FEW_THREADS, _BATCH = 4, 64, 32, 8
#: A subgroup has at least so many threads.
_SUBGROUP = 4


def weight_shader(tensor: GpuTensor, group: int = 0, first: int = 0) -> str:
    """Return WGSL that declares a tensor's parts and defines qc_init, qc_unit and perhaps qc_weight.

    For shaders of your own: bind `tensor.parts` in the order of the declarations. See quantcache.quant.wgsl.

    Args:
        tensor: one with the codec and the element types that the shader is for.
        group: bind group of the declarations.
        first: binding of the first part.

    Raises:
        CodecError: no shader here decodes the codec.
        DeviceError: the device failed; of GGUF blocks it is asked, once, what it does to subnormal numbers.
    """
    return tensor.shader.whole(group, first, keeps_subnormals=tensor.shader.asks and _keeps_subnormals(tensor.device))


def dequantize(tensor: GpuTensor, dtype: DTypeLike = np.float16) -> Array:
    """Decode a tensor on its GPU, and bring the weights back.

    Args:
        tensor: any that has a shader.
        dtype: float16 or float32.

    Returns:
        An array of the tensor's shape. nf4 and GGUF blocks are equal to the references, bit for bit; int8 may differ by one
        unit in the last place, where the device fuses its multiplication and addition.

    Raises:
        CodecError: no shader here decodes it.
        UsageError: another dtype.
        DeviceError: the device failed.
    """
    kind = float_dtype(dtype)
    if kind == "BF16":
        raise UsageError("a GPU decodes to float16 or float32")
    device, shader = tensor.device, tensor.shader
    if not math.prod(tensor.shape):
        return np.empty(tensor.shape, np.float32 if kind == "F32" else np.float16)
    itemsize = 4 if kind == "F32" else 2
    fast = _by_units(tensor, shader)
    per_thread = UNIT if fast else 2
    found = []
    for rows, bound in row_chunks(tensor, shader):
        room = device.max_binding // itemsize // tensor.width // 2 * 2 or len(rows)
        for start in range(0, len(rows), room):
            count = min(room, len(rows) - start) * tensor.width
            size = -(-count * itemsize // 64) * 64
            out = device.buffer(size, "decoded weights")
            pipeline = device.pipeline(decode_source(shader, kind, fast=fast))
            encoder = device.encoder()
            threads = -(-count // per_thread)
            settings = device.uniform(tensor.width, count, start)
            with device.compute_pass(encoder) as within:
                device.dispatch(within, pipeline, [(out, 0, size), settings, *(bound[name] for name in shader.parts)], -(-threads // 256))
            found.append(device.read((out, 0, count * itemsize), before=encoder))
    whole = np.concatenate(found) if len(found) != 1 else found[0]
    return whole.view(np.float32 if kind == "F32" else np.float16).reshape(tensor.shape)


def matvec(tensor: GpuTensor, x: Array) -> NDArray[np.float32]:
    """Multiply a matrix on a GPU with a vector or a small batch: W @ x, or x @ W.T.

    Args:
        tensor: of shape (out, in).
        x: [in] or [batch, in]; becomes float32.

    Returns:
        float32 [out] or [batch, out], summed in float32.

    Raises:
        CodecError: no shader here decodes it.
        UsageError: the shapes do not fit.
        DeviceError: the device failed.
    """
    vectors = np.ascontiguousarray(np.atleast_2d(x), np.float32)
    if len(tensor.shape) != 2 or np.ndim(x) not in (1, 2) or vectors.shape[1] != tensor.shape[1]:
        raise UsageError(f"a tensor of shape {tensor.shape} and x of shape {np.shape(x)} do not multiply")
    device = tensor.device
    batch, rows = len(vectors), tensor.shape[0]
    if not batch or not math.prod(tensor.shape):
        nothing = np.zeros((batch, rows), np.float32)
        return nothing[0] if np.ndim(x) == 1 else nothing
    inputs = device.buffer(-(-vectors.nbytes // 16) * 16, "vectors")
    outputs = device.buffer(batch * rows * 4, "products")
    device.write(inputs, 0, vectors.reshape(-1).view(np.uint8))
    encoder = device.encoder()
    with device.compute_pass(encoder) as within:
        record_matvec(within, tensor, (inputs, 0, inputs.size), (outputs, 0, outputs.size), batch)
    found: NDArray[np.float32] = device.read((outputs, 0, outputs.size), before=encoder).view(np.float32).reshape(batch, rows)
    return found[0] if np.ndim(x) == 1 else found


def record_matvec(within: Any, tensor: GpuTensor, x: Binding, y: Binding, batch: int = 1) -> None:
    """Record the same into a compute pass of your own: nothing is waited for, nothing comes back.

    But for the first GGUF blocks on a device: it is asked, once, what it does to subnormal numbers.

    Args:
        within: a wgpu compute pass encoder of the tensor's device.
        tensor: of shape (out, in).
        x: float32 [batch, in], as (buffer, offset, bytes); the offset a multiple of the device's alignment.
        y: float32 [batch, out], the same; written.
        batch: number of vectors.

    Raises:
        CodecError, UsageError, DeviceError: as `matvec`.
    """
    device, shader = tensor.device, tensor.shader
    if len(tensor.shape) != 2 or not math.prod(tensor.shape):
        raise UsageError(f"a tensor of shape {tensor.shape} is no matrix with weights")
    rows, width = tensor.shape
    if x[2] < batch * width * 4 or y[2] < batch * rows * 4:
        raise UsageError(f"x and y have {x[2]} and {y[2]} bytes, {batch} vectors take {batch * width * 4} and {batch * rows * 4}")
    fast = _by_units(tensor, shader)
    keeps = shader.asks and _keeps_subnormals(device)
    for part, bound in row_chunks(tensor, shader):
        for first in range(0, batch, _BATCH):
            few = min(_BATCH, batch - first)
            dots = shader.dots if few == 1 and shader.dots and width % (2 * shader.dots.apart * UNIT) == 0 else None
            rows_each = dots.rows if dots else _ROWS
            source = _product_source(shader, few, rows_each, dots, fast=fast, subgroups="subgroup" in device.features, keeps_subnormals=keeps)
            pipeline = device.pipeline(source)
            settings = device.uniform(width, len(part), part.start, rows)
            ends = device.uniform(first)
            bindings = [x, y, settings, ends, *(bound[name] for name in shader.parts)]
            device.dispatch(within, pipeline, bindings, -(-len(part) // rows_each))


_kept: weakref.WeakKeyDictionary[Device, bool] = weakref.WeakKeyDictionary()
_PROBE = """
@group(0) @binding(0) var<storage, read> halves: array<u32>;
@group(0) @binding(1) var<storage, read_write> found: array<u32>;
@compute @workgroup_size(4)
fn main(@builtin(local_invocation_index) lane: u32) { found[lane] = bitcast<u32>(unpack2x16float(halves[lane]).x); }
"""


def _keeps_subnormals(device: Device) -> bool:
    """Return whether a device's unpack2x16float() keeps subnormal float16, which WGSL leaves open; found out once."""
    if device not in _kept:
        halves = np.array([0x0001, 0x03FF, 0x8001, 0x83FF], np.uint16)
        given, found = device.buffer(256, "a few numbers"), device.buffer(256, "a few numbers")
        device.write(given, 0, halves.astype(np.uint32).view(np.uint8))
        encoder = device.encoder()
        with device.compute_pass(encoder) as within:
            device.dispatch(within, device.pipeline(_PROBE), [(given, 0, 16), (found, 0, 16)], 1)
        _kept[device] = device.read((found, 0, 16), before=encoder).tobytes() == halves.view(np.float16).astype(np.float32).tobytes()
    return _kept[device]


def _by_units(tensor: GpuTensor, shader: WeightShader) -> bool:
    """Return whether rows are whole units; the others need a qc_weight."""
    if tensor.width % UNIT == 0:
        return True
    if not shader.any_width:
        raise UsageError(f"{tensor.codec} of width {tensor.width}: a GPU takes multiples of {UNIT}")
    return False


_NUMBER = "let number = wid.y * groups.x + wid.x;"
_BUILTINS = "@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lane: u32"


@cache
def decode_source(shader: WeightShader, kind: str, *, fast: bool) -> str:
    """Return a shader that writes weights: a unit a thread, or two of any width."""
    store = (
        "\n".join(f"    out[{len(_stored(kind))}u * unit + {n}u] = {value};" for n, value in enumerate(_stored(kind)))
        if fast
        else _stored_pair(kind)
    )
    if fast:
        body = f"""
  if (unit * {UNIT}u < settings.y) {{
    let units = settings.x / {UNIT}u;
    let w = qc_unit(settings.z + unit / units, unit % units, settings.x);
{store}
  }}"""
    else:
        body = f"""
  if (unit * 2u < settings.y) {{
    let at = unit * 2u;
    let a = qc_weight(settings.z + at / settings.x, at % settings.x, settings.x);
    var b = 0.0;
    if (at + 1u < settings.y) {{ b = qc_weight(settings.z + (at + 1u) / settings.x, (at + 1u) % settings.x, settings.x); }}
{store}
  }}"""
    element = {"F32": "vec4<f32>" if fast else "vec2<f32>", "F16": "vec4<u32>" if fast else "u32"}[kind]
    return f"""{shader.whole(0, 2)}
@group(0) @binding(0) var<storage, read_write> out: array<{element}>;
@group(0) @binding(1) var<uniform> settings: vec4<u32>;
@compute @workgroup_size(256)
fn main({_BUILTINS}) {{
  qc_init(lane);
  workgroupBarrier();
  {_NUMBER}
  let unit = number * 256u + lane;{body}
}}
"""


def _stored(kind: str) -> list[str]:
    """Return the vectors that a unit's weights `w` are stored as."""
    if kind == "F32":
        return ["w[0]", "w[1]"]
    return ["vec4<u32>(" + ", ".join(f"pack2x16float(w[{m}].{half})" for m in (0, 1) for half in ("xy", "zw")) + ")"]


def _stored_pair(kind: str) -> str:
    value = "vec2<f32>(a, b)" if kind == "F32" else "pack2x16float(vec2<f32>(a, b))"
    return f"    out[unit] = {value};"


@cache
def _product_source(
    shader: WeightShader, batch: int, row_count: int, dots: Dots | None, *, fast: bool, subgroups: bool, keeps_subnormals: bool
) -> str:
    """Return a shader that multiplies: a workgroup takes a few rows, its threads the columns in turn, by qc_dots if that is to be used."""
    lanes = _FEW_THREADS if dots else _THREADS

    def each_row(place: str, body: str) -> str:
        """Return the body for every row, with its number, and where it stands, put in."""
        return "\n".join(body.replace("ROW", f"{r}").replace("PLACE", f"min(row + {r}u, last), {place}, settings.x") for r in range(row_count))

    sums = [(r, b) for r in range(row_count) for b in range(batch)]
    zeros = "\n  ".join(f"var s{r}_{b} = 0.0;" for r, b in sums)
    # lanes that stand side by side read what stands side by side, of the weights and of the vectors
    turn = ""
    if dots:
        # a lane takes units that share bytes: of 2 * apart that follow each other, `run` and as many further on
        run, apart = dots.run, dots.apart
        place, end, each = "turn", f"units / {2 * run}u", apart // run
        turn = f"    let unit = turn / {each}u * {2 * apart}u + turn % {each}u * {run}u;\n"
        taken = [*range(run), *range(apart, apart + run)]
        loads = "\n".join(f"    let x{n} = x[(settings2.x * units + unit + {taken[n // 2]}u) * 2u + {n % 2}u];" for n in range(2 * len(taken)))
        rows = each_row("unit", f"    sROW_0 += qc_dots(PLACE, {', '.join(f'x{n}' for n in range(4 * run))});")
    elif fast:
        place, end = "unit", "units"
        loads = "\n".join(f"    let x{b}_{k} = x[((settings2.x + {b}u) * units + unit) * 2u + {k}u];" for b in range(batch) for k in range(2))
        if shader.has_dot and batch == 1:
            rows = each_row(place, "    sROW_0 += qc_dot(PLACE, x0_0, x0_1);")
        else:
            terms = " ".join(f"sROW_{b} += dot(w[0], x{b}_0) + dot(w[1], x{b}_1);" for b in range(batch))
            rows = each_row(place, f"    {{ let w = qc_unit(PLACE); {terms} }}")
    else:
        place, end = "column", "settings.x"
        loads = "\n".join(f"    let x{b} = x[(settings2.x + {b}u) * settings.x + column];" for b in range(batch))
        terms = " ".join(f"sROW_{b} += w * x{b};" for b in range(batch))
        rows = each_row(place, f"    {{ let w = qc_weight(PLACE); {terms} }}")
    loop = f"for (var {place} = lane; {place} < {end}; {place} += {lanes}u) {{\n{turn}{loads}\n{rows}\n  }}"
    count = len(sums)
    if subgroups:
        each = lanes // _SUBGROUP  # workgroup memory is zeroed first: the less, the better
        gather = "\n  ".join(f"let t{r}_{b} = subgroupAdd(s{r}_{b}); if (sid == 0u) {{ sums[{n * each}u + lane / size] = t{r}_{b}; }}" for n, (r, b) in enumerate(sums))
        total = f"""for (var k = 0u; k < ({lanes}u + size - 1u) / size; k += 1u) {{ total += sums[lane * {each}u + k]; }}"""
        builtins = _BUILTINS + ", @builtin(subgroup_invocation_id) sid: u32, @builtin(subgroup_size) size: u32"
    else:
        each = lanes
        gather = "\n  ".join(f"sums[{n * lanes}u + lane] = s{r}_{b};" for n, (r, b) in enumerate(sums))
        total = f"for (var k = 0u; k < {lanes}u; k += 1u) {{ total += sums[lane * {lanes}u + k]; }}"
        builtins = _BUILTINS
    return f"""{shader.whole(0, 4, keeps_subnormals=keeps_subnormals)}
@group(0) @binding(0) var<storage, read> x: array<{"vec4<f32>" if fast else "f32"}>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@group(0) @binding(2) var<uniform> settings: vec4<u32>;  // width, rows bound, first of them, rows of the tensor
@group(0) @binding(3) var<uniform> settings2: vec4<u32>;  // first vector
var<workgroup> sums: array<f32, {count * each}>;
@compute @workgroup_size({lanes})
fn main({builtins}) {{
  qc_init(lane);
  workgroupBarrier();
  {_NUMBER}
  let row = number * {row_count}u;
  let last = settings.y - 1u;
  let units = settings.x / {UNIT}u;
  {zeros}
  {loop}
  {gather}
  workgroupBarrier();
  if (lane < {count}u && row + lane / {batch}u < settings.y) {{
    var total = 0.0;
    {total}
    y[(settings2.x + lane % {batch}u) * settings.w + settings.z + row + lane / {batch}u] = total;
  }}
}}
"""
