"""Quantizing on a GPU: the store cannot tell, whatever the values; what a shader cannot promise, the CPU does."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.cache.blobs import StagedEntry
from quantcache.loader.gpu import encode, kept
from quantcache.loader.gpu import upload as uploading
from quantcache.loader.gpu.groups import Arriving
from quantcache.loader.gpu.transfer import Transfer
from quantcache.loader.mapping import MappedFile
from quantcache.quant import native, wgsl
from quantcache.quant.codecs.nf4 import MIDDLES
from quantcache.tensor import BLOCKS

QUANTS = ["nf4", "nf4-dq", "int8", "int8-row"]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
TYPES = ["f32", "f16", "bf16"]


@pytest.fixture
def quantizers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have small tensors quantized on the GPU, too, in small tiles and steps of several; return the quantizers that loads make."""
    made: list[Any] = []
    real = encode.GpuQuantizer.__init__

    def init(self: Any, device: Any) -> None:
        real(self, device)
        made.append(self)

    monkeypatch.setattr(encode, "_LEAST", 0)
    monkeypatch.setattr(encode, "_STEP", 5 << 20)
    monkeypatch.setattr(encode.GpuQuantizer, "__init__", init)
    return made


@pytest.fixture
def rng() -> np.random.Generator:
    """Return fresh random numbers."""
    return np.random.default_rng(int.from_bytes(os.urandom(8), "little"))


def both(folder: Path, tensors: dict[str, Any], quant: str, device: Any) -> None:
    """Compare what the CPU makes of tensors with what the GPU makes of them: in the store, and where it stays on the device."""
    save_file(tensors, folder / "m.safetensors")
    same(folder, folder / "m.safetensors", device, quant=quant)


def same(folder: Path, path: Path, device: Any, **how: Any) -> None:
    """Compare the two for any file and any way to load it."""
    with qc.load(path, cache=folder / "cpu", **how) as wanted, qc.load(path, cache=folder / "gpu", device=device, **how) as got:
        assert not got.hit
        with got.upload(device) as there:
            for name in wanted:
                assert parts(got[name]) == parts(wanted[name]), name
                assert arrived(device, there[name]) == parts(wanted[name]), name
    digests = []
    for store in ("cpu", "gpu"):
        with qc.Cache(folder / store) as cache:
            (row,) = cache.entries()
            digests.append((row.key, cache.open(row.key).header.wanted, cache.open(row.key).header.records))
    assert digests[0] == digests[1]


def parts(tensor: Any) -> dict[str, bytes]:
    """Return the bytes of a tensor's parts."""
    found = tensor.parts if isinstance(tensor, qc.QuantTensor) else {"values": tensor}
    return {name: np.ascontiguousarray(part).tobytes() for name, part in found.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=TYPES)
@pytest.mark.parametrize("quant", QUANTS)
def test_the_store_cannot_tell(device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, quant: str, dtype: Any) -> None:
    """Weights of all sizes, blocks of zeros, negative zeros and constants, odd numbers of groups, several steps of several tiles."""
    weights = rng.standard_normal((67, 384)) * 10.0 ** rng.uniform(-3, 3, (67, 1))
    weights[3], weights[5, :128], weights[7], weights[9, 5:77] = 0, -0.0, 1.5, 0
    tensors = {
        "a.weight": weights.astype(dtype),
        "odd.weight": rng.standard_normal((65, 128)).astype(dtype),
        "tiles.weight": (rng.standard_normal((2100, 1664)) * 0.02).astype(dtype),
        "bias": rng.standard_normal(70_000).astype(dtype),
    }
    both(tmp_path, tensors, quant, device)
    assert quantizers[0].quantized + quantizers[0].given_back >= 4
    assert quantizers[0].given_back <= (2 if quant == "int8" else 0)  # float16 does not take all of its scales


@pytest.mark.parametrize("quant", QUANTS)
def test_tensors_that_come_together(
    device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small tensors are one dispatch where they stand side by side, whatever their sizes; of one that the GPU leaves the others know nothing."""
    dispatches: list[int] = []
    real = type(device).dispatch
    monkeypatch.setattr(type(device), "dispatch", lambda self, *given: (dispatches.append(1), real(self, *given)))
    shapes = [(64, 256)] * 9 + [(33, 128), (64, 256), (1, 4096), (512, 256), (7, 640), (64, 384)] + [(64, 256)] * 6
    tensors = {f"{n:02d}.weight": (rng.standard_normal(shape) * 0.02).astype(DTYPES[n > 15]) for n, shape in enumerate(shapes)}
    tensors["04.weight"][5] = 1e-39  # which a device may flush
    both(tmp_path, tensors, quant, device)
    assert quantizers[0].quantized + quantizers[0].given_back >= len(shapes)
    assert (quant != "int8-row") <= quantizers[0].given_back <= 2
    assert len(dispatches) < len(shapes), "even if those beside the one that was left come twice"


def arrived(device: Any, tensor: Any) -> dict[str, bytes]:
    """Return the bytes of a tensor's parts on the device, but for what only shaders need."""
    found = {part: b"".join(device.read(place).tobytes() for place in places) for part, places in tensor.pieces.items()}
    found.pop("nested_offset", None)
    return found


@pytest.mark.parametrize("first", ["device", "host", "half"])
@pytest.mark.parametrize("quant", QUANTS)
def test_nothing_is_stored(
    device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, quant: str, first: str
) -> None:
    """Then codes stay on the device, and what is asked for here is the same, quantized here; whichever comes first, whatever else the CPU did."""
    brought: list[int] = []
    real = Transfer.submit

    def submit(self: Any, encoder: Any, wanted: Any) -> Any:
        brought.append(sum(nbytes for (_, _, nbytes), _ in wanted))
        return real(self, encoder, wanted)

    monkeypatch.setattr(Transfer, "submit", submit)
    tensors = {f"{n}.weight": (rng.standard_normal((700, 1024)) * 0.02).astype(np.float16) for n in range(4)}
    tensors["2.weight"][600, 900] = 1e-7  # a subnormal number
    tensors["3.weight"] = (rng.standard_normal((1100, 1024)) * 1e-35).astype(np.float32)  # which the CPU does, in part of its tiles
    tensors["3.weight"][1030:] *= 1e33
    save_file(tensors, tmp_path / "m.safetensors")
    with qc.load(tmp_path / "m.safetensors", quant, mode="off") as wanted, qc.load(tmp_path / "m.safetensors", quant, mode="off", device=device) as got:
        if first == "host":
            assert {name: parts(got[name]) for name in got} == {name: parts(wanted[name]) for name in wanted}
        if first == "half":
            assert parts(got["1.weight"]) == parts(wanted["1.weight"])
        with got.upload(device, lazy=first == "half") as there:
            for name in wanted:
                assert arrived(device, there[name]) == parts(wanted[name]), name
        for name in wanted:
            assert parts(got[name]) == parts(wanted[name]), name
    assert quantizers[0].quantized >= 3
    codes = sum(tensor.size for tensor in tensors.values()) // 2
    assert sum(brought) < codes / 2


def test_nothing_is_stored_and_the_file_changes(device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator) -> None:
    """What is on the device is right and stays; what is asked for here then would be another file's, and is refused."""
    path = tmp_path / "m.safetensors"
    save_file({f"{n}.weight": rng.standard_normal((64, 1024)).astype(np.float16) for n in range(2)}, path)
    with qc.load(path, "nf4", mode="off") as wanted:
        right = {name: parts(wanted[name]) for name in wanted}
    with qc.load(path, "nf4", mode="off", device=device) as model:
        model.finish()
        assert parts(model["0.weight"]) == right["0.weight"]
        with path.open("r+b") as file:
            file.seek(-3000, os.SEEK_END)
            file.write(bytes(2000))
        os.utime(path, ns=(1, 1))
        with model.upload(device) as there:
            assert {name: arrived(device, there[name]) for name in there} == right
        with pytest.raises(qc.SourceError, match="may have changed"):
            model["1.weight"]
        assert parts(model["0.weight"]) == right["0.weight"]


def test_nothing_is_stored_and_the_file_changes_unseen(
    device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was collected before is never handed out with codes of other weights, even if stat() tells of no change."""
    path = tmp_path / "m.safetensors"
    save_file({f"{n}.weight": rng.standard_normal((64, 1024)).astype(np.float16) for n in range(2)}, path)
    monkeypatch.setattr(MappedFile, "changed", lambda self: False)
    with qc.load(path, "nf4-dq", mode="off", device=device) as model:
        model.finish()
        right = parts(model["0.weight"])
        with path.open("r+b") as file:
            file.seek(-3000, os.SEEK_END)
            file.write(bytes(2000))
        with pytest.raises(qc.SourceError, match="may have changed"):
            model["1.weight"]
        assert parts(model["0.weight"]) == right


@pytest.mark.parametrize("stored", [True, False])
def test_small_parts_that_cannot_be_read(
    device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    """A tensor of which the rest has to be asked for again is moved as a whole, of what it really holds."""
    path = tmp_path / "m.safetensors"
    save_file({f"{n}.weight": rng.standard_normal((64, 1024)).astype(np.float16) for n in range(3)}, path)
    failed: list[int] = []

    def add_populate(calls: Any, address: int, nbytes: int) -> None:
        failed.append(nbytes)
        calls.add(native.system("write"), 1 << 30, np.array([0, address, nbytes], np.uint64), 1, phase="read", nbytes=nbytes)  # which fails

    monkeypatch.setattr(uploading, "add_populate", add_populate)
    how: dict[str, Any] = {"cache": tmp_path / "c"} if stored else {"mode": "off"}
    with qc.load(path, "nf4", mode="off") as wanted, qc.load(path, "nf4", device=device, **how) as model, model.upload(device) as there:
        assert {name: arrived(device, there[name]) for name in there} == {name: parts(wanted[name]) for name in wanted}
    assert failed


def test_a_store_that_fails_on_the_way(device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, pwrite: Any) -> None:
    """From then on nothing comes back; all tensors are right, here and there."""
    path = tmp_path / "m.safetensors"
    save_file({f"{n:02d}.weight": rng.standard_normal((1024, 1024)).astype(np.float16) for n in range(12)}, path)
    written: list[int] = []
    real = os.pwrite

    def write(descriptor: int, data: bytes, place: int) -> int:
        written.append(len(data))
        if sum(written) > 2 << 20:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, place)

    with (
        qc.load(path, "nf4", mode="off") as wanted,
        pwrite(write),
        pytest.warns(qc.QuantcacheWarning, match="not saved"),
        qc.load(path, "nf4", cache=tmp_path / "c", device=device, threads=1) as model,
    ):
        with model.upload(device) as there:
            for name in wanted:
                assert arrived(device, there[name]) == parts(wanted[name]), name
        for name in wanted:
            assert parts(model[name]) == parts(wanted[name]), name


@pytest.mark.parametrize("error", [KeyError, TypeError, qc.CacheError, qc.DeviceError])
def test_prepared_while_it_begins_again(
    device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """A tensor whose parts are just being replaced by others is looked at later."""
    save_file({f"{n}.weight": rng.standard_normal((64, 1024)).astype(np.float16) for n in range(3)}, tmp_path / "m.safetensors")
    with qc.load(tmp_path / "m.safetensors", "nf4", mode="off") as wanted, qc.load(tmp_path / "m.safetensors", "nf4", mode="off", device=device) as model:
        real, refused = model.outline, list[str]()

        def outline(name: str, *, wait: bool = True) -> Any:
            if name == "1.weight" and not wait:
                refused.append(name)
                raise error(name)
            return real(name, wait=wait)

        monkeypatch.setattr(model, "outline", outline)
        with model.upload(device) as there:
            assert {name: arrived(device, there[name]) for name in there} == {name: parts(wanted[name]) for name in wanted}
        assert refused


@pytest.mark.filterwarnings("ignore::quantcache.QuantcacheWarning")
def test_what_was_planned_leaves_first(
    device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers that were made for what did not come as it was planned are gone before others are made."""
    tensors = {f"{n}.weight": rng.standard_normal((256, 1024)).astype(np.float16) for n in range(8)}
    tensors["7.weight"][9, 9] = np.nan
    save_file(tensors, tmp_path / "m.safetensors")
    made, alive, held, real = list[Any](), list[int](), threading.Event(), Arriving.prepare

    def place(described: Any, device: Any, new: Any, *given: Any) -> Any:
        gc.collect()
        alive.append(sum(one() is not None for one in made))

        def noted(nbytes: int) -> Any:
            buffer = new(nbytes)
            made.append(weakref.ref(buffer))
            return buffer

        return placing(described, device, noted, *given)

    def prepare(self: Any, model: Any) -> None:
        real(self, model)
        held.set()

    def encode_some(self: Any, *given: Any, **how: Any) -> Any:
        assert held.wait(60)
        return encoding(self, *given, **how)

    placing, encoding = uploading.place, encode.GpuQuantizer.encode
    monkeypatch.setattr(uploading, "place", place)
    monkeypatch.setattr(Arriving, "prepare", prepare)
    monkeypatch.setattr(encode.GpuQuantizer, "encode", encode_some)
    with (
        qc.load(tmp_path / "m.safetensors", "nf4", mode="off") as wanted,
        qc.load(tmp_path / "m.safetensors", "nf4", mode="off", device=device) as model,
        model.upload(device) as there,
    ):
        assert {name: arrived(device, there[name]) for name in there} == {name: parts(wanted[name]) for name in wanted}
    assert alive == [0, 0]


def test_a_store_that_fails_after_all_was_planned(
    device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, pwrite: Any
) -> None:
    """What an upload has prepared of tensors that go to the store is not what comes of them, if they end up in memory."""
    path = tmp_path / "m.safetensors"
    save_file({f"{n:02d}.weight": rng.standard_normal((256, 1024)).astype(np.float16) for n in range(40)}, path)
    prepared, real = threading.Event(), Arriving.prepare

    def prepare(self: Any, model: Any) -> None:
        real(self, model)
        prepared.set()

    def write(descriptor: int, data: bytes, place: int) -> int:
        assert prepared.wait(60)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Arriving, "prepare", prepare)
    with (
        qc.load(path, "nf4", mode="off") as wanted,
        pwrite(write),
        pytest.warns(qc.QuantcacheWarning, match="not saved"),
        qc.load(path, "nf4", cache=tmp_path / "c", device=device, threads=1) as model,
        model.upload(device) as there,
    ):
        assert {name: arrived(device, there[name]) for name in there} == {name: parts(wanted[name]) for name in wanted}


@pytest.mark.parametrize("made", [1, 5])
def test_results_in_several_buffers(device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, made: int) -> None:
    """Where the results of a step stand in several buffers, and two steps share one, every tensor has its own place."""
    monkeypatch.setattr(kept, "_BUNDLE", made * 16 << 10)
    monkeypatch.setattr(encode, "_STEP", 1 << 19)
    both(tmp_path, {f"{n:02d}.weight": rng.standard_normal((64, 512)).astype(np.float16) for n in range(24)}, "nf4", device)
    assert (quantizers[0].quantized, quantizers[0].given_back) == (24, 0)


def test_a_wgpu_without_mapped_ranges(device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What wgpu calls experimental may go: mapped memory is written the slow way then."""
    buffers = type(device.staging_buffer(8))
    monkeypatch.delattr(buffers, "_experimental_get_mapped_range")
    save_file({"a.weight": rng.standard_normal((65, 130)).astype(np.float16)}, tmp_path / "odd.safetensors")
    with qc.load(tmp_path / "odd.safetensors", "f16", mode="off") as model, model.upload(device) as there:
        assert device.read(there["a.weight"].parts["values"]).tobytes() == model["a.weight"].tobytes()
    both(tmp_path, {f"{n}.weight": rng.standard_normal((65, 128)).astype(np.float16) for n in range(3)}, "nf4", device)
    assert quantizers[0].quantized == 3


@pytest.mark.parametrize("quant", ["nf4", "int8", "int8-row"])
def test_every_float16(device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, quant: str) -> None:
    """All finite float16, subnormal ones, too, in any order: the GPU does them all, but for scales that float16 does not take."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = bits[(bits & 0x7C00) != 0x7C00]
    sorted_by_size = finite[np.argsort(finite & 0x7FFF, kind="stable")]
    tensors = {f"{n}.weight": np.resize(found, (497, 128)).view(np.float16) for n, found in enumerate([rng.permutation(finite), sorted_by_size])}
    both(tmp_path, tensors, quant, device)
    assert quantizers[0].given_back <= (2 if quant == "int8" else 0)
    assert quantizers[0].quantized >= 2


@pytest.mark.filterwarnings("ignore::quantcache.QuantcacheWarning")  # tensors with NaN are kept as they are
@pytest.mark.parametrize("quant", ["nf4", "int8", "int8-row"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
def test_any_bits(device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, quant: str, dtype: Any) -> None:
    """Random bits, with Inf and NaN and numbers that a device flushes: the CPU has the last word, and the rest is the GPU's."""
    kind = np.uint32 if dtype is np.float32 else np.uint16
    tensors = {"bits.weight": rng.integers(0, np.iinfo(kind).max, (64, 256), kind, endpoint=True).view(dtype)}
    for exponent in (-149, -127, -126, -101, -100, -99, -15, 0, 15, 119, 120, 121, 127):
        with np.errstate(over="ignore"):
            scaled = np.ldexp(rng.uniform(-1, 1, (64, 256)), exponent).astype(np.float32)
        scaled[0, ::7], scaled[1] = 0, np.ldexp(1.0, exponent)
        tensors[f"{exponent}.weight"] = scaled.astype(dtype)
    both(tmp_path, tensors, quant, device)
    assert quantizers[0].given_back
    assert quantizers[0].quantized


def beside_thresholds(rng: np.random.Generator) -> dict[str, Any]:
    """Return weights that are a unit or two away from where codes change, with scales of random significands, by codec."""

    def beside(values: Any) -> Any:
        found = np.asarray(values, np.float32)
        for _ in range(2):
            found = np.where(rng.random(found.shape) < 0.5, np.nextafter(found, np.float32(np.inf)), np.nextafter(found, np.float32(-np.inf)))
        return found

    absmax = (rng.uniform(1, 2, (4096, 1)) * 2.0 ** rng.integers(-90, 90, (4096, 1))).astype(np.float32)
    blocks = beside(rng.choice(MIDDLES, (4096, 64)) * absmax)
    blocks[:, 0] = absmax[:, 0]
    low = (rng.choice([-1, 1], (512, 1)) * rng.uniform(1, 2, (512, 1))).astype(np.float16).astype(np.float32)
    scale = (rng.uniform(1, 2, (512, 1)) * 2.0 ** rng.integers(-9, 7, (512, 1))).astype(np.float16).astype(np.float32)
    groups = beside(low + (rng.integers(1, 255, (512, 128)) - 0.5) * scale)
    groups[:, 0], groups[:, 1] = low[:, 0], (low + 255 * scale)[:, 0]
    largest = rng.uniform(1, 2, (512, 1)).astype(np.float16).astype(np.float32)
    rows = beside(((rng.integers(-126, 127, (512, 128)) + 0.5) / 127 * largest).astype(np.float16).astype(np.float32))
    rows[:, 0] = largest[:, 0]
    return {"nf4": blocks.reshape(1024, 256), "int8": groups, "int8-row": rows}


def test_beside_every_threshold(device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator) -> None:
    """No code differs where one unit would change it."""
    for quant, weights in beside_thresholds(rng).items():
        (tmp_path / quant).mkdir()
        both(tmp_path / quant, {"a.weight": weights}, quant, device)
        assert quantizers[-1].given_back == 0
        assert quantizers[-1].quantized == 1


@pytest.mark.parametrize("off", [-4, -1, 1, 4])
def test_a_device_that_divides_badly(device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, off: int) -> None:
    """A quotient that is off by as much as WGSL allows, and more, is put right: this device's own may be exact."""
    estimate = "u32(140737488355328.0 / f32(m))"
    assert estimate in wgsl.read("encode.wgsl")
    monkeypatch.setattr(wgsl, "read", lambda path, real=wgsl.read: real(path).replace(estimate, f"u32(i32({estimate}) + {off})"))
    weights = beside_thresholds(rng)
    for quant in ("nf4", "int8-row"):
        (tmp_path / quant).mkdir()
        both(tmp_path / quant, {"a.weight": weights[quant]}, quant, device)
        assert quantizers[-1].quantized == 1


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q5_0"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_blocks(
    device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, write_gguf: Callable[..., Path], kind: str, quant: str
) -> None:
    """GGUF blocks that are to be converted are decoded on the GPU; of a type that no shader decodes, on the CPU."""
    from quantcache.quant.blocks import block_type

    weights, nbytes = BLOCKS[kind]
    rows, width = 300, 1024
    layout, count = block_type(kind).layout, rows * width // weights
    raw = rng.integers(0, 256, (count, nbytes), np.uint8)
    for name in ("d", "dmin"):
        if name in (layout.names or ()):
            raw.reshape(-1).view(layout)[name] = (rng.standard_normal(count) * 0.01).astype(np.float16)
    tensor = int(GGMLQuantizationType[kind]), (rows, width), raw.tobytes()
    write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": tensor}, {"general.architecture": "llama"})
    same(tmp_path, tmp_path / "m.gguf", device, quant=quant, native="convert")
    assert bool(quantizers[0].quantized) == (kind != "Q5_0")


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "int8"])
def test_blocks_beside_numbers(
    device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, write_gguf: Callable[..., Path], quant: str
) -> None:
    """Blocks that come after float32, and after other blocks, are decoded first: float32 is what they become, not what they are."""
    q4, q8 = np.zeros((512 * 16, 18), np.uint8), np.zeros((512 * 16, 34), np.uint8)
    q4[:, :2], q4[:, 2:] = np.array([1 / 8], np.float16).view(np.uint8), 0  # all -1: as float32 they are harmless numbers
    q8[:, :2], q8[:, 2:] = np.array([0.01], np.float16).view(np.uint8), rng.integers(20, 120, (512 * 16, 32))
    plain = (rng.standard_normal((512, 512)) * 0.02).astype(np.float32)
    tensors: dict[str, Any] = {"blk.0.attn_q.weight": plain}
    for name, kind, raw in (("ffn_down", "Q4_0", q4), ("ffn_gate", "Q8_0", q8), ("ffn_up", "Q8_0", q8[::-1].copy())):
        tensors[f"blk.0.{name}.weight"] = int(GGMLQuantizationType[kind]), (512, 512), raw.tobytes()
    write_gguf(tmp_path / "m.gguf", tensors, {"general.architecture": "llama"})
    same(tmp_path, tmp_path / "m.gguf", device, quant=quant, native="convert", threads=1)
    assert (quantizers[0].quantized, quantizers[0].given_back) == (4, 0)


@pytest.mark.parametrize("threads", [2, 8])
def test_tiles_that_are_left_while_others_wait(device: Any, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Steps of a tensor that wait for their turn, while another one is left to the CPU, are left to it, too."""
    monkeypatch.setattr(encode, "_STEP", 2 << 20)
    weights = (rng.standard_normal((4096, 4096), np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    weights[::32, :64] = 1e-38
    save_file({"a.weight": weights, "b.weight": rng.standard_normal((64, 4096)).astype(np.float16)}, tmp_path / "m.safetensors")
    how: dict[str, Any] = {"quant": "nf4", "mode": "off"}
    with qc.load(tmp_path / "m.safetensors", **how) as wanted, qc.load(tmp_path / "m.safetensors", **how, device=device, threads=threads) as got:
        assert {name: parts(got[name]) for name in got} == {name: parts(wanted[name]) for name in wanted}


def test_cancelled_while_steps_wait(device: Any, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that wait for their turn when the load is cancelled end quietly, and whoever asks is told that it was cancelled."""
    monkeypatch.setattr(encode, "_STEP", 5 << 20)
    save_file({f"{n}.weight": (rng.standard_normal((2048, 2048)) * 0.02).astype(np.float16) for n in range(8)}, tmp_path / "m.safetensors")
    real, entered = Transfer.put, threading.Event()

    def put(self: Any, *given: Any) -> None:
        entered.set()
        time.sleep(1.0)
        real(self, *given)

    monkeypatch.setattr(Transfer, "put", put)
    model = qc.load(tmp_path / "m.safetensors", "nf4", mode="off", device=device, threads=8)
    assert entered.wait(60)
    model.cancel()
    for thread in model._pipelines[0]._threads:
        thread.join(60)
    assert model._pipelines[0].failure is None
    with pytest.raises(qc.QuantcacheError, match=r"stopped|closed"):
        _ = model["7.weight"]


def test_lost_while_results_are_mapped(tmp_path: Path, rng: np.random.Generator) -> None:
    """A device that goes while its results are being copied costs a warning, and the load goes on."""
    save_file({f"{n}.weight": (rng.standard_normal((512, 2048)) * 0.02).astype(np.float16) for n in range(3)}, tmp_path / "m.safetensors")
    code = """
import sys, warnings, quantcache as qc
device = qc.gpu.open_device()
buffers = type(device.landing_buffer(8))
real, calls = buffers.read_mapped, []
def read_mapped(self, *given, **how):
    found = real(self, *given, **how)
    calls.append(1)
    if len(calls) == 1:
        device.raw.destroy()
    return found
buffers.read_mapped = read_mapped
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    with qc.load(sys.argv[1], "nf4", mode="off", device=device, threads=1) as model:
        model.finish()
print(len(calls), [str(one.message) for one in said])
"""
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.safetensors")], capture_output=True, text=True, timeout=120)
    assert said.stdout.startswith("1 ['quantizing on the CPU: "), said.stdout + said.stderr[-2000:]


def test_a_wgpu_that_reads_only_its_own_way(device: Any, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode in which wgpu reads for itself may go, too."""
    buffers = type(device.landing_buffer(8))
    real = buffers.map_async

    def map_async(self: Any, mode: Any, *given: Any) -> Any:
        if mode == "READ_NOSYNC":
            raise ValueError(f"Invalid flag value {mode!r}")
        return real(self, mode, *given)

    monkeypatch.setattr(buffers, "map_async", map_async)
    monkeypatch.setattr(device, "_read_mode", device._read_mode)  # which it changes
    both(tmp_path, {"a.weight": rng.standard_normal((512, 256)).astype(np.float16)}, "nf4", device)


def test_what_results_take(device: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    """A model on the device says what its tensors take, also if they share buffers; layers leave one by one."""
    save_file({f"layers.{n}.weight": (rng.standard_normal((512, 1024)) * 0.02).astype(np.float16) for n in range(8)}, tmp_path / "m.safetensors")
    gc.collect()
    before = device.held
    with qc.load(tmp_path / "m.safetensors", "nf4", mode="off", device=device) as model:
        model.finish()
        with model.upload(device) as found:
            assert model.nbytes <= found.nbytes <= model.nbytes + 8 * 1024
            kept = found["layers.3.weight"]
    del model, found
    gc.collect()
    assert device.held - before <= kept.nbytes + 4096
    del kept
    gc.collect()
    assert device.held == before


@pytest.mark.filterwarnings("ignore::quantcache.QuantcacheWarning")
def test_a_store_that_fails_holds_nothing(device: Any, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What begins again after the store failed takes its place on the device once, and gives it up when the model is closed."""
    save_file({f"{n}.weight": (rng.standard_normal((512, 1024)) * 0.02).astype(np.float16) for n in range(8)}, tmp_path / "m.safetensors")
    gc.collect()
    before, real, calls = device.held, StagedEntry.place, [0]

    def place(self: Any, *given: Any) -> Any:
        calls[0] += 1
        if calls[0] > 3:
            raise qc.CacheError("no space left")
        return real(self, *given)

    monkeypatch.setattr(StagedEntry, "place", place)
    model = qc.load(tmp_path / "m.safetensors", "nf4", cache=tmp_path / "c", device=device, threads=1)
    model.finish()
    model.close()
    gc.collect()
    assert device.held == before


def test_what_the_cpu_does(device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator) -> None:
    """Changed and scaled weights, rows of no whole words, plain weights: not for the GPU, and none the worse."""
    tensors = {"a.weight": rng.standard_normal((64, 128)).astype(np.float32), "b.weight": rng.standard_normal((33, 131)).astype(np.float16)}
    save_file(tensors, tmp_path / "m.safetensors")
    same(tmp_path, tmp_path / "m.safetensors", device, quant="int8-row", rules=[("a.weight", "int8-row", 0.5)])
    assert quantizers[0].quantized == 0


def test_small_limits(small: Callable[..., Any], tmp_path: Path, quantizers: list[Any], rng: np.random.Generator) -> None:
    """A device that binds no tile leaves them to the CPU; one that takes a part but no tensor in a buffer has several."""
    weights = {"a.weight": rng.standard_normal((1024, 4096)).astype(np.float16)}
    for number, limit in enumerate((2000 << 10, 2100 << 10)):
        (tmp_path / str(number)).mkdir()
        both(tmp_path / str(number), weights, "nf4", small(max_buffer=limit))
    assert [bool(made.quantized) for made in quantizers] == [False, True]


def test_a_device_that_fails(small: Callable[..., Any], tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the device refuses, at whichever call, the load says so once and goes on with the CPU."""
    import wgpu

    save_file({f"{n}.weight": rng.standard_normal((256, 256)).astype(np.float32) for n in range(4)}, tmp_path / "m.safetensors")
    with qc.load(tmp_path / "m.safetensors", "int8", mode="off") as model:
        wanted = {name: parts(model[name]) for name in model}
    for failing in range(5):
        device, calls = small(), [0]
        real = device.raw.create_buffer

        def refuse(failing: int = failing, calls: Any = calls, real: Any = real, **arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] > failing:
                raise wgpu.GPUValidationError("Validation Error\n\nCaused by:\n  Not enough memory left.")
            return real(**arguments)

        with monkeypatch.context() as patch:
            patch.setattr(device.raw, "create_buffer", refuse)
            with pytest.warns(qc.QuantcacheWarning, match="quantizing on the CPU") as said, qc.load(tmp_path / "m.safetensors", "int8", mode="off", device=device) as model:
                assert {name: parts(model[name]) for name in model} == wanted
            assert len(said) == 1


def test_nothing_is_moved_twice(device: Any, tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was quantized on the device is used where it is; it stays for the upload, and leaves with it."""
    gc.collect()
    before = device.held
    save_file({"a.weight": rng.standard_normal((1024, 1024)).astype(np.float16)}, tmp_path / "m.safetensors")
    moved: list[int] = []
    real = type(device).write
    with qc.load(tmp_path / "m.safetensors", "nf4", cache=tmp_path / "c", device=device) as model:
        model.finish()
        monkeypatch.setattr(type(device), "write", lambda self, buffer, offset, data: (moved.append(len(data)), real(self, buffer, offset, data)))
        with model.upload(device) as found:
            assert sum(moved) < 1000
            want = model["a.weight"].dequantize(np.float32)
            tensor = found["a.weight"]
            assert np.array_equal(qc.gpu.dequantize(tensor, np.float32), want)
            monkeypatch.undo()
        with model.upload(device) as again:  # which is closed after the model
            model.close()
            assert np.array_equal(qc.gpu.dequantize(again["a.weight"], np.float32), want)
        with pytest.raises(qc.DeviceError, match="closed"):
            _ = tensor.parts
    del model, found, again, tensor
    quantizers.clear()
    gc.collect()
    assert device.held == before


@pytest.mark.filterwarnings("ignore:quantizing on the CPU")
def test_a_device_that_fails_in_the_middle(
    small: Callable[..., Any], tmp_path: Path, quantizers: list[Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor of which the CPU did the rest, after the device had no room for another, is not taken for complete there."""
    save_file({f"{n}.weight": (rng.standard_normal((2048, 4096)) * 0.02).astype(np.float16) for n in range(2)}, tmp_path / "m.safetensors")
    device = small()
    real_encode, began, asked = encode.GpuQuantizer._encode, threading.Event(), threading.Event()

    def step(self: Any, lane: Any, stretches: Any, *given: Any, **how: Any) -> Any:
        if stretches[0][0].job.info.name == "1.weight":
            raise qc.DeviceOutOfMemory("no room", asked=1, held=0)
        if not began.is_set():
            began.set()
            assert asked.wait(60)
        return real_encode(self, lane, stretches, *given, **how)

    monkeypatch.setattr(encode.GpuQuantizer, "_encode", step)
    with qc.load(tmp_path / "m.safetensors", "nf4", mode="off", device=device, threads=1) as model:
        assert began.wait(60)
        asking = threading.Thread(target=lambda: model["1.weight"])
        asking.start()
        while not model._pipelines[0]._urgent:
            asked.wait(0.001)
        asked.set()  # after the first step of one comes the first of the other, which fails
        model.finish()
        asking.join(60)
        assert quantizers[0].quantized == 1
        monkeypatch.undo()
        with model.upload(device) as found:
            for name in model:
                assert {part: device.read(place).tobytes() for part, place in found[name].parts.items()} == parts(model[name])


def test_a_device_that_is_lost_meanwhile(tmp_path: Path, rng: np.random.Generator) -> None:
    """A device that goes between two steps costs a warning, and the load goes on."""
    save_file({f"{n}.weight": (rng.standard_normal((2048, 4096)) * 0.02).astype(np.float16) for n in range(3)}, tmp_path / "m.safetensors")
    code = """
import sys, warnings, numpy as np, quantcache as qc
from quantcache.loader.gpu import encode
device, steps, real = qc.gpu.open_device(), [], encode.GpuQuantizer._encode
encode._STEP = 5 << 20
def step(self, *given, **how):
    steps.append(1)
    if len(steps) == 3:
        device.raw.destroy()
    return real(self, *given, **how)
encode.GpuQuantizer._encode = step
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    with qc.load(sys.argv[1], "nf4", mode="off", device=device, threads=1) as model, qc.load(sys.argv[1], "nf4", mode="off") as other:
        same = all(np.array_equal(model[name].parts["codes"], other[name].parts["codes"]) for name in other)
print(same, [str(one.message) for one in said])
"""
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.safetensors")], capture_output=True, text=True, timeout=120)
    assert said.stdout.startswith("True ['quantizing on the CPU: "), said.stdout + said.stderr[-2000:]
