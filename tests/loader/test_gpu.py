"""A model on a GPU: the stored bytes, bounded, checked; what cannot be done is an exception, and gives everything back."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.quant import native
from quantcache.quant.blocks import block_type
from quantcache.tensor import BLOCKS

gpu = pytest.importorskip("quantcache.loader.gpu")
compute = pytest.importorskip("quantcache.loader.gpu.compute")
encode = pytest.importorskip("quantcache.loader.gpu.encode")
steps = pytest.importorskip("quantcache.loader.gpu.steps")

LAYERS = 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Write a model of odd shapes: three layers, scalars, single bytes, a width that no vector divides."""
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    tensors: dict[str, Any] = {"emb.weight": rng.standard_normal((67, 128)).astype(np.float16)}
    for layer in range(LAYERS):
        tensors[f"blocks.{layer}.a.weight"] = rng.standard_normal((96, 128)).astype(np.float32)
        tensors[f"blocks.{layer}.b.weight"] = (rng.standard_normal((384, 256)) * 1e-3).astype(np.float16)
        tensors[f"blocks.{layer}.odd.weight"] = rng.standard_normal((33, 131)).astype(np.float16)
        tensors[f"blocks.{layer}.byte"] = rng.integers(0, 255, 3, np.uint8)
        tensors[f"blocks.{layer}.scalar"] = np.array(rng.standard_normal(), np.float32)
        tensors[f"blocks.{layer}.empty"] = np.empty((0, 7), np.float32)
    save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def stored(tensor: Any) -> dict[str, bytes]:
    """Return the bytes of a tensor's parts."""
    parts = tensor.parts if isinstance(tensor, qc.QuantTensor) else {"values": tensor}
    return {name: np.ascontiguousarray(part).tobytes() for name, part in parts.items()}


def damage(folder: Path, position: int | None = None) -> None:
    """Change one bit of the only entry of a store: at a place of its file, or of its first tensor."""
    (entry,) = folder.glob("c/v*/entries/*/*.safetensors")
    raw = bytearray(entry.read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little") if position is None else position] ^= 1
    entry.write_bytes(raw)


def there(tensor: Any) -> dict[str, bytes]:
    """Return the same of a tensor on the device, without what only shaders need."""
    pieces = {name: found for name, found in tensor.pieces.items() if name != "nested_offset"}
    return {name: b"".join(tensor.device.read(piece).tobytes() for piece in found) for name, found in pieces.items()}


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "int8", "int8-row", "f16"])
@pytest.mark.parametrize("how", [{}, {"order": "size"}, {"lazy": True}])
def test_the_bytes_arrive(device: Any, path: Path, tmp_path: Path, quant: str, how: dict[str, Any]) -> None:
    """Every part is on the device as it is stored, on a miss and on a hit, whichever way it came."""
    for hit in (False, True):
        with qc.load(path, quant, cache=tmp_path / "c") as model, model.upload(device, **how) as found:
            assert list(found) == list(model)
            assert found.hit == hit
            for name, tensor in found.items():
                assert there(tensor) == stored(model[name])
                assert tensor.shape == model[name].shape


def test_small_limits(small: Callable[..., Any], path: Path, tmp_path: Path) -> None:
    """Tensors that no buffer takes are split, those that no binding takes are used by rows; weights and products are the same."""
    with qc.load(path, "nf4", cache=tmp_path / "c") as model:
        device = small(max_buffer=8192, max_binding=4096, staging=1)
        with model.upload(device) as found:
            tensor = found["blocks.1.b.weight"]
            assert len(tensor.pieces["codes"]) > 1
            with pytest.raises(qc.DeviceError, match="split over"):
                _ = tensor.parts
            assert all(there(found[name]) == stored(model[name]) for name in found)
            want = model["blocks.1.b.weight"].dequantize(np.float32)
            assert np.array_equal(gpu.dequantize(tensor, np.float32), want)
            x = np.random.default_rng(1).standard_normal((2, 256)).astype(np.float32)
            exact = x.astype(np.float64) @ want.astype(np.float64).T
            assert np.abs(gpu.matvec(tensor, x) - exact).max() <= 1e-5 * np.abs(exact).max()
        with model.upload(small(max_buffer=1024, max_binding=256)) as found, pytest.raises(qc.DeviceError, match="binds at most"):
            gpu.matvec(found["blocks.1.odd.weight"], np.zeros(131, np.float32))


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "int8", "int8-row", "f16"])
def test_weights_and_products(device: Any, path: Path, tmp_path: Path, quant: str) -> None:
    """Decoded weights equal the references, int8's within one unit of float16; products are within float32's rounding."""
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    with qc.load(path, quant, cache=tmp_path / "c") as model, model.upload(device) as found:
        for name, tensor in found.items():
            mine = model[name]
            if tensor.dtypes.get("values") not in (None, "F16", "F32") or not tensor.nbytes:
                continue
            half = mine.dequantize(np.float16) if isinstance(mine, qc.QuantTensor) else mine.astype(np.float16)
            got = gpu.dequantize(tensor, np.float16)
            off = np.abs(got.view(np.int16).astype(np.int32) - half.view(np.int16).astype(np.int32)).max()
            assert off <= (1 if quant.startswith("int8") else 0)
            if len(tensor.shape) != 2:
                continue
            wide = np.asarray(mine.dequantize(np.float32) if isinstance(mine, qc.QuantTensor) else mine, np.float64)
            for batch in (0, 1, 2, 3, 8, 11):
                x = rng.standard_normal((batch, tensor.shape[1])).astype(np.float32)
                bound = np.abs(x).astype(np.float64) @ np.abs(wide).T * 2e-6 + 1e-30
                assert (np.abs(gpu.matvec(tensor, x) - x.astype(np.float64) @ wide.T) <= bound).all()
            assert gpu.matvec(tensor, x[0]).shape == tensor.shape[:1]
            with pytest.raises(qc.UsageError):
                gpu.matvec(tensor, np.zeros(tensor.shape[1] + 1, np.float32))


def test_an_offset_that_only_shaders_need(device: Any, small: Callable[..., Any], tmp_path: Path) -> None:
    """nf4-dq's offset is taken from its text, also if that was damaged; what is bound as a whole is refused where it does not fit."""
    save_file({"w.weight": np.random.default_rng().standard_normal((300, 512)).astype(np.float16)}, tmp_path / "m.safetensors")
    with qc.load(tmp_path / "m.safetensors", "nf4-dq", cache=tmp_path / "c") as model:
        want = model["w.weight"].dequantize(np.float32)
    (entry,) = tmp_path.glob("c/v*/entries/*/*.safetensors")
    for text in (b'{"quant_type"', b'"nested_offset": '):
        damage(tmp_path, entry.read_bytes().rindex(text))  # the header has no such text
        with pytest.warns(qc.QuantcacheWarning, match="damaged"), qc.load(tmp_path / "m.safetensors", "nf4-dq", cache=tmp_path / "c") as model:
            with model.upload(device) as found:
                assert found["w.weight"].dtypes["nested_offset"] == "F32"
                assert np.array_equal(gpu.dequantize(found["w.weight"], np.float32), want)
            with model.upload(small(max_binding=4096)) as found, pytest.raises(qc.DeviceError, match="binds at most"):
                gpu.matvec(found["w.weight"], np.zeros(512, np.float32))


@pytest.mark.parametrize("keeps", [None, False])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_as_they_are(
    device: Any, tmp_path: Path, write_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str, *, keeps: bool | None
) -> None:
    """GGUF blocks of random bits are decoded on the device as the reference does, and multiplied where they are.

    Also where the device flushes subnormal scales, or is said to.
    """
    if keeps is not None:
        monkeypatch.setattr(compute, "_keeps_subnormals", lambda _: keeps)
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    rows, width = 37, 768
    count = rows * width // BLOCKS[kind][0]
    raw = rng.integers(0, 256, (count, BLOCKS[kind][1]), np.uint8)
    layout = block_type(kind).layout
    fields = raw.reshape(-1).view(layout)
    for name in ("d", "dmin"):
        if name in (layout.names or ()):
            fields[name] = (rng.standard_normal(count) * 10.0 ** rng.uniform(-7, 1, count)).astype(np.float16)  # subnormal ones, too
    tensor = int(GGMLQuantizationType[kind]), (rows, width), raw.tobytes()
    write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": tensor}, {"general.architecture": "llama"})
    with qc.load(tmp_path / "m.gguf", "native", mode="off") as model, model.upload(device) as found:
        tensor, mine = found["blk.0.ffn_up.weight"], model["blk.0.ffn_up.weight"]
        assert tensor.codec == kind
        assert there(tensor) == stored(mine)
        want = mine.dequantize(np.float32)
        assert np.array_equal(gpu.dequantize(tensor, np.float32), want)
        x = rng.standard_normal(width).astype(np.float32)
        for batch in (x, np.stack([x, -x, np.roll(x, 1)])):
            bound = np.abs(batch) @ np.abs(want).astype(np.float64).T * 2e-6
            assert (np.abs(gpu.matvec(tensor, batch) - batch @ want.astype(np.float64).T) <= bound).all()


def test_a_damaged_tensor_never_gets_there(device: Any, path: Path, tmp_path: Path) -> None:
    """What is not what was stored is built again, and that is what arrives."""
    with qc.load(path, "int8", cache=tmp_path / "c") as model:
        right = {name: stored(model[name]) for name in model}
    damage(tmp_path, -5000)
    with pytest.warns(qc.QuantcacheWarning, match="damaged"), qc.load(path, "int8", cache=tmp_path / "c") as model, model.upload(device) as found:
        assert {name: there(found[name]) for name in found} == right


@pytest.mark.parametrize("how", [{}, {"lazy": True}, {"order": "size"}])
@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "int8"])
def test_a_flipped_byte_anywhere(device: Any, tmp_path: Path, quant: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever byte of the entry is wrong, in small parts and in those that go in several steps: it is found before anybody computes with it."""
    monkeypatch.setattr(steps, "_STEP", 1 << 20)
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    path = tmp_path / "m.safetensors"
    save_file({f"blocks.{n}.w.weight": rng.standard_normal((3000, 1024)).astype(np.float16) for n in range(2)}, path)
    os.utime(path, (1e9, 1e9))
    with qc.load(path, quant, cache=tmp_path / "c") as model:
        right = {name: stored(model[name]) for name in model}
    (entry,) = tmp_path.glob("c/v*/entries/*/*.safetensors")
    whole = entry.read_bytes()
    first = 8 + int.from_bytes(whole[:8], "little")
    for position in (first, len(whole) - 1, *rng.integers(first, len(whole), 6)):
        damage(tmp_path, position)
        with pytest.warns(qc.QuantcacheWarning, match="damaged"), qc.load(path, quant, cache=tmp_path / "c") as model, model.upload(device, **how) as found:
            assert {name: there(found[name]) for name in found} == right
            assert not model.hit
    with qc.load(path, quant, cache=tmp_path / "c") as model, model.upload(device, **how) as found:
        assert model.hit
        assert {name: there(found[name]) for name in found} == right


def test_a_matrix_that_is_turned(device: Any, tmp_path: Path, write_gguf: Callable[..., Path]) -> None:
    """A matrix that its file has the other way round arrives as callers see it, from a sound entry that stays."""
    values = np.random.default_rng().standard_normal((64, 128)).astype(np.float32)
    metadata = {"general.architecture": "rwkv7", "rwkv7.wkv.head_size": 64}
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.time_mix_w1.weight": values}, metadata)
    for hit in (False, True):
        with qc.load(path, "nf4", cache=tmp_path / "c") as model, model.upload(device) as found:
            ((name, tensor),) = found.items()
            assert there(tensor) == stored(model[name])
            assert model.hit == hit
            assert np.array_equal(np.frombuffer(there(tensor)["values"], np.float16).reshape(tensor.shape), values.T.astype(np.float16))


@pytest.mark.parametrize("how", [{}, {"lazy": True}])
def test_steps_of_odd_rows(device: Any, tmp_path: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts whose chunks are no whole words are cut where both end."""
    monkeypatch.setattr(steps, "_STEP", 1 << 20)
    path = tmp_path / "m.safetensors"
    save_file({"w.weight": np.random.default_rng().standard_normal((60_001, 135)).astype(np.float16)}, path)
    for _ in range(2):
        with qc.load(path, "int8-row", cache=tmp_path / "c") as model, model.upload(device, **how) as found:
            assert there(found["w.weight"]) == stored(model["w.weight"])


def test_a_bad_sector_under_half_of_a_tensor(device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of which one step cannot be read is moved as a whole again: the steps before it may have been wrong, too."""
    from quantcache.loader.gpu import upload

    monkeypatch.setattr(steps, "_STEP", 1 << 20)
    path = tmp_path / "m.safetensors"
    save_file({"w.weight": np.random.default_rng().standard_normal((3000, 1024)).astype(np.float16)}, path)
    with qc.load(path, "int8", cache=tmp_path / "c") as model:
        right = stored(model["w.weight"])
    damage(tmp_path)  # in the first step
    asked: list[int] = []
    real = upload.add_populate

    def add_populate(calls: Any, address: int, nbytes: int) -> None:
        asked.append(1)
        if len(asked) == 2:
            calls.add(native.system("write"), 1 << 30, np.array([0, address, nbytes], np.uint64), 1, phase="read", nbytes=nbytes)  # which fails
        else:
            real(calls, address, nbytes)

    monkeypatch.setattr(upload, "add_populate", add_populate)
    with pytest.warns(qc.QuantcacheWarning, match="damaged"), qc.load(path, "int8", cache=tmp_path / "c") as model, model.upload(device, threads=1) as found:
        assert there(found["w.weight"]) == right
    assert len(asked) >= 2


@pytest.mark.parametrize("damaged", [False, True])
def test_at_the_reference_level(device: Any, path: Path, tmp_path: Path, kernel_level: Callable[[str], None], damaged: bool) -> None:
    """Without kernels bytes are faulted in and checked by Python: the same arrive, and what is damaged does not."""
    with qc.load(path, "nf4", cache=tmp_path / "c") as model:
        right = {name: stored(model[name]) for name in model}
    if damaged:
        damage(tmp_path)
    kernel_level("reference")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with qc.load(path, "nf4", cache=tmp_path / "c") as model, model.upload(device) as found:
            assert {name: there(found[name]) for name in model} == right
    assert any("damaged" in str(one.message) for one in said) == damaged


def test_an_upload_that_stops_checks_no_further(device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that were queued ahead are dropped when an upload fails, or is interrupted: whoever waits is answered soon."""
    from quantcache.loader.gpu import groups

    monkeypatch.setattr(steps, "_STEP", 16 << 10)
    monkeypatch.setattr(groups, "_BUNDLE", 256 << 10)
    path = tmp_path / "m.safetensors"
    save_file({f"blocks.{n}.weight": np.random.default_rng().standard_normal((256, 512)).astype(np.float16) for n in range(150)}, path)
    qc.load(path, "nf4", cache=tmp_path / "c").close()
    checked: list[int] = []

    def check(self: Any, *given: Any, real: Any = qc.gpu.GpuModel._check) -> Any:
        checked.append(1)
        time.sleep(0.01)
        return real(self, *given)

    def put(*_: Any) -> None:
        raise qc.DeviceError("no")

    monkeypatch.setattr(qc.gpu.GpuModel, "_check", check)
    monkeypatch.setattr(qc.gpu.GpuModel, "_put", put)
    with qc.load(path, "nf4", cache=tmp_path / "c") as model, pytest.raises(qc.DeviceError, match="no"):
        model.upload(device, threads=2)
    assert 0 < len(checked) < 100  # of 450


def test_budget(device: Any, path: Path, tmp_path: Path) -> None:
    """The least recently used layers leave; what somebody holds stays valid; a budget that takes no layer is refused."""
    with qc.load(path, "nf4", cache=tmp_path / "c") as model:
        with model.upload(device) as whole:
            sizes = [sum(tensor.home.nbytes for tensor in list(layer.values())[:1]) for layer in whole.layers()]
        budget = max(sizes) * 2
        with model.upload(device, lazy=True, budget=budget) as found:
            held = found["emb.weight"]
            for _ in range(2):
                for layer in found.layers():
                    assert found.nbytes <= budget
                    assert all(there(tensor) == stored(model[name]) for name, tensor in layer.items())
            assert there(held) == stored(model["emb.weight"])
        with model.upload(device, lazy=True, budget=1000) as found, pytest.raises(qc.UsageError, match="does not take layer"):
            found["blocks.0.a.weight"]


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """Return a checkpoint of eight layers of one size between two others."""
    rng = np.random.default_rng()
    tensors = {f"layers.{n}.{name}.weight": rng.standard_normal((96, 256)).astype(np.float16) for n in range(8) for name in "ab"}
    tensors |= {f"layers.{n}.norm": rng.standard_normal(77).astype(np.float16) for n in range(8)}
    save_file(tensors | {"emb.weight": rng.standard_normal((300, 64)).astype(np.float16), "head.weight": rng.standard_normal((64, 256)).astype(np.float16)}, tmp_path / "d.safetensors")
    return tmp_path / "d.safetensors"


def layer_sizes(model: qc.Model, device: Any) -> list[int]:
    """Return the bytes that each layer takes on a device."""
    with model.upload(device, lazy=True) as whole:
        return [next(iter(layer.values())).home.nbytes for layer in whole.layers()]


@pytest.mark.parametrize("quantizes", [False, True])
def test_layers_are_written_over(device: Any, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantizes: bool) -> None:
    """With reuse, layers come into the buffers of those that left, within the budget; work that was submitted before is right."""
    monkeypatch.setattr(encode, "_LEAST", 0)
    with qc.load(deep, "nf4", mode="off", device=device if quantizes else None) as model:
        sizes = layer_sizes(model, device)
        gc.collect()
        before = device.held
        made: list[int] = []
        real = type(device).buffer
        monkeypatch.setattr(type(device), "buffer", lambda self, nbytes, what, **how: (made.append(nbytes) if "layer" in what else None, real(self, nbytes, what, **how))[1])
        with model.upload(device, lazy=True, budget=max(sizes[0] + sizes[1], 2 * sizes[1]), reuse=True) as found:
            xs = np.random.default_rng(3).standard_normal((256,)).astype(np.float32)
            x, left, results = device.buffer(1024, "x"), [], []
            device.write(x, 0, xs.view(np.uint8))
            for turn in range(3):
                for layer in found.layers():
                    for name, tensor in layer.items():
                        assert there(tensor) == stored(model[name]), (turn, name)
                        if tensor.shape == (96, 256):
                            y = device.buffer(96 * 4, "y")
                            encoder = device.encoder()
                            with device.compute_pass(encoder) as within:
                                gpu.record_matvec(within, tensor, (x, 0, 1024), (y, 0, 96 * 4))
                            device.submit(encoder)
                            results.append((name, y))
                    assert not layer or found.nbytes <= found._budget
                    left += [tensor for name, tensor in layer.items() if name.startswith("layers.3.")]
            assert 4 <= len(made) <= 3 * 4  # a turn: what is like no other, and two layers
            assert device.held - before <= found._budget + 1024 + len(results) * 96 * 4
            for name, y in results:
                wanted = model[name].dequantize(np.float32) @ xs
                assert np.allclose(device.read((y, 0, 96 * 4)).view(np.float32), wanted, rtol=1e-3, atol=1e-3), name
            for tensor in left:
                with pytest.raises(qc.DeviceError, match="its layer left"):
                    _ = tensor.parts
        with pytest.raises(qc.UsageError, match="reuse=True is for a budget"):
            model.upload(device, lazy=True, reuse=True)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_are_written_over_in_any_order(device: Any, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """With reuse, whichever layer is asked for, and whatever was fetched ahead, its bytes are right until another is asked for."""
    held: list[int] = []  # right after each buffer was made, on whichever thread
    real = type(device).buffer
    monkeypatch.setattr(type(device), "buffer", lambda self, nbytes, what, **how: (real(self, nbytes, what, **how), held.append(self.held))[0])
    rng = np.random.default_rng()
    qc.load(deep, "nf4", cache=tmp_path / "c").close()
    with qc.load(deep, "nf4", cache=tmp_path / "c") as model:
        sizes = layer_sizes(model, device)
        wanted = {name: stored(model[name]) for name in model}
        gc.collect()
        before = device.held
        held.clear()
        with model.upload(device, lazy=True, budget=layers * max(sizes), reuse=True) as found:
            for number in rng.integers(0, len(sizes), 150):
                names = model.in_layers()[number]
                tensors = {name: found[name] for name in names}
                if rng.random() < 0.5:
                    time.sleep(rng.random() * 0.003)
                assert all(there(tensor) == wanted[name] for name, tensor in tensors.items())
                assert device.held - before <= layers * max(sizes)
            assert held
            assert max(held) - before <= layers * max(sizes)


@pytest.mark.parametrize("reuse", [False, True])
def test_threads_that_want_one_layer_of_a_budget_that_takes_one(device: Any, deep: Path, in_threads: Callable[..., None], reuse: bool) -> None:
    """Who asks for another layer than the one that somebody else asked for last gets it, even if nobody ever asks again."""
    with qc.load(deep, "nf4", mode="off") as model:
        size = max(layer_sizes(model, device))
        with model.upload(device, lazy=True, budget=size, reuse=reuse) as found:

            def ask(seed: int) -> None:
                for turn in range(40):
                    assert found[f"layers.{(seed * 3 + turn % 2) % 8}.a.weight"].nbytes

            in_threads(2, ask)


@pytest.mark.parametrize("reuse", [False, True])
def test_a_layer_that_fails_holds_nothing(device: Any, deep: Path, monkeypatch: pytest.MonkeyPatch, reuse: bool) -> None:
    """What a failed layer held on the device is let go of at once, behind the caller's back as well."""
    with qc.load(deep, "nf4", mode="off") as model:
        sizes = layer_sizes(model, device)
        gc.collect()
        before = device.held
        with model.upload(device, lazy=True, budget=3 * max(sizes), reuse=reuse) as found:
            failed, real = threading.Event(), found._step

            def step(arriving: Any, number: int) -> None:
                if arriving.group.number == 3 and not failed.is_set():
                    failed.set()
                    raise qc.DeviceError("no")
                real(arriving, number)

            monkeypatch.setattr(found, "_step", step)
            gc.disable()
            try:
                for name in list(model):
                    tensor = found[name]
                    if name.startswith("layers.2."):
                        assert failed.wait(60)
                    while any(group.loading for group in found._groups):
                        time.sleep(0.001)
                    del tensor
                    assert device.held - before <= 3 * max(sizes), name
            finally:
                gc.enable()
            assert failed.is_set()


def test_a_layer_that_fits_beside_one_of_two(device: Any, tmp_path: Path) -> None:
    """A layer that does not fit beside the one before the last is still fetched ahead beside the last."""
    tensors = {"emb.weight": np.ones((600, 256), np.float16)} | {f"layers.{n}.w.weight": np.full((96, 256), n + 1, np.float16) for n in range(4)}
    save_file(tensors, tmp_path / "m.safetensors")
    with qc.load(tmp_path / "m.safetensors", "nf4", mode="off") as model:
        sizes = layer_sizes(model, device)
        with model.upload(device, lazy=True, budget=sizes[0] + sizes[1] // 2, reuse=True) as found:
            for turn in range(2):
                for name in model:
                    assert there(found[name]) == stored(model[name])
                    while any(group.loading for group in found._groups):
                        time.sleep(0.001)
                    if name.startswith("layers.0."):
                        assert [group.home is not None for group in found._groups] == [False, True, True, True, False], turn


def test_a_changed_copy_of_a_tensor(device: Any, path: Path, tmp_path: Path) -> None:
    """A copy with another shape has the same bytes, and is closed with them."""
    with qc.load(path, "nf4", cache=tmp_path / "c") as model, model.upload(device) as found:
        tensor = found["blocks.0.a.weight"]
        other = dataclasses.replace(tensor, shape=tensor.shape[::-1])
        assert (other.parts, other.nbytes) == (tensor.parts, tensor.nbytes)
        assert dataclasses.replace(tensor) == tensor
        alike = [dataclasses.replace(one, codec="f16", shape=(1,), dtypes={}) for one in found.values() if one.home is tensor.home]
        assert len(alike) > 1
        assert sum(one == alike[0] for one in alike) == 1  # where they stand tells them apart
    with pytest.raises(qc.DeviceError, match="closed"):
        _ = other.parts


@pytest.mark.parametrize(("budget", "ahead"), [(None, 3), (1 << 30, 1)])
def test_layers_come_ahead(device: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None, ahead: int) -> None:
    """While a layer is used the next three are on their way, in order; with a budget one. Each is brought once."""
    with qc.load(path, "nf4", cache=tmp_path / "c") as model, model.upload(device, lazy=True, budget=budget) as found:
        begun: list[int] = []
        enough, real = threading.Event(), found._begin

        def begin(group: Any) -> Any:
            begun.append(group.number)
            if len(begun) == 1 + ahead:
                enough.set()
            return real(group)

        monkeypatch.setattr(found, "_begin", begin)
        assert found["emb.weight"].nbytes
        assert enough.wait(60)
        assert begun == list(range(1 + ahead))
        for name in model:
            assert there(found[name]) == stored(model[name])
        assert begun == list(range(len(model.in_layers())))


@pytest.mark.parametrize("budget", [None, 1 << 30])
def test_the_first_layer_waits_for_no_other(device: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None) -> None:
    """A layer is handed out while the size of the next is not known yet: on a miss, that one may still be quantized."""
    with qc.load(path, "nf4", cache=tmp_path / "c") as model:
        known, real = threading.Event(), model.outlines

        def outlines(name: str, **how: Any) -> Any:
            if name.startswith("blocks.1."):
                assert known.wait(60)
            return real(name, **how)

        monkeypatch.setattr(model, "outlines", outlines)
        with model.upload(device, lazy=True, budget=budget) as found:
            got: list[Any] = []
            asking = threading.Thread(target=lambda: got.append(found["blocks.0.a.weight"]))
            asking.start()
            asking.join(30)
            assert got
            assert not known.is_set()
            known.set()
            assert there(found["blocks.1.a.weight"]) == stored(model["blocks.1.a.weight"])


def test_bfloat16(device: Any, tmp_path: Path) -> None:
    """Weights that stay bfloat16 are decoded exactly, of widths that 32 divides and others."""
    import ml_dtypes

    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    tensors = {f"w{width}": rng.standard_normal((5, width)).astype(ml_dtypes.bfloat16) for width in (64, 33)}
    save_file(tensors, tmp_path / "m.safetensors")
    with qc.load(tmp_path / "m.safetensors", "nf4", other="keep", mode="off") as model, model.upload(device) as found:
        for name, weights in tensors.items():
            assert found[name].dtypes == {"values": "BF16"}
            assert np.array_equal(gpu.dequantize(found[name], np.float32), weights.astype(np.float32))


def test_after_closing(device: Any, path: Path, tmp_path: Path) -> None:
    """What was closed says so, and gives its memory back."""
    gc.collect()
    before = device.held
    with qc.load(path, "nf4", cache=tmp_path / "c") as model:
        with model.upload(device) as found:
            tensor = found["blocks.0.a.weight"]
            assert device.held > before
        for use in (found.__getitem__, lambda _: tensor.parts, lambda _: gpu.matvec(tensor, np.zeros(128, np.float32))):
            with pytest.raises(qc.DeviceError, match="closed"):
                use("blocks.0.a.weight")
    tensor = use = None
    gc.collect()
    assert device.held == before


def test_no_memory(small: Callable[..., Any], path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit says what was asked for and what is held, and gives back what it had."""
    import wgpu

    device = small()
    made: list[int] = []
    real = device.raw.create_buffer

    def refuse(**arguments: Any) -> Any:
        made.append(arguments["size"])
        if len(made) > 2:
            raise wgpu.GPUValidationError("Validation Error\n\nCaused by:\n  Not enough memory left.")
        return real(**arguments)

    monkeypatch.setattr(device.raw, "create_buffer", refuse)
    with qc.load(path, "nf4", cache=tmp_path / "c") as model:
        with pytest.raises(qc.DeviceOutOfMemory, match="no memory for layer") as error:
            model.upload(device)
        assert error.value.asked == made[2]
        assert error.value.held > 0
        del error
        gc.collect()
        assert device.held == 0
        monkeypatch.undo()
        with model.upload(device) as found:
            assert len(found) == len(model)


def test_many_threads(device: Any, path: Path, tmp_path: Path, in_threads: Callable[..., None]) -> None:
    """Threads that ask for the layers of a lazy model in any order all get the right ones."""
    qc.load(path, "int8", cache=tmp_path / "c").close()
    with qc.load(path, "int8", cache=tmp_path / "c") as model, model.upload(device, lazy=True) as found:
        wrong: list[str] = []

        def ask(seed: int) -> None:
            for name in np.random.default_rng(seed).permutation(list(found)):
                if there(found[name]) != stored(model[name]):
                    wrong.append(name)

        in_threads(4, ask)
        assert not wrong


def test_arguments(device: Any, path: Path, tmp_path: Path) -> None:
    """What cannot be meant is refused before anything moves."""
    with qc.load(path, "nf4", cache=tmp_path / "c") as model:
        for wrong in ({"order": "name"}, {"budget": 5}, {"lazy": True, "order": "size"}, {"device": "gpu"}):
            with pytest.raises(qc.UsageError):
                model.upload(**{"device": device, **wrong})
        with model.upload(device) as found:
            with pytest.raises(KeyError):
                found["nothing"]
            assert gpu.Device.of(device.raw) is gpu.Device.of(device.raw)
            with pytest.raises(qc.UsageError, match="float16 or float32"):
                gpu.dequantize(found["emb.weight"], "bfloat16")
            text = gpu.weight_shader(found["blocks.0.a.weight"], group=1, first=3)
            assert "@group(1) @binding(3) var<storage, read> qc_codes" in text


def test_a_lost_device(device: Any, path: Path, tmp_path: Path) -> None:
    """A device that is lost is an exception in every call, where wgpu itself ends the process."""
    code = """
import sys, quantcache as qc, numpy as np
from quantcache.loader import gpu
device = gpu.open_device()
with qc.load(sys.argv[1], "nf4", mode="off") as model:
    found = model.upload(device)
    tensor = found["blocks.0.a.weight"]
    device.raw.destroy()
    uses = (lambda: model.upload(device), lambda: gpu.matvec(tensor, np.zeros(128, np.float32)), lambda: gpu.dequantize(tensor),
            lambda: device.fence(), lambda: model.upload(device, lazy=True)["emb.weight"])
    for use in uses:
        try:
            use()
        except qc.DeviceError as error:
            print(error)
        else:
            print("nothing was said")
print("alive")
"""
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)
    assert said.stdout.splitlines()[-1:] == ["alive"], said.stderr[-2000:]
    assert "nothing was said" not in said.stdout
    assert "was lost" in said.stdout


def test_no_adapter(path: Path, tmp_path: Path) -> None:
    """Without a driver there is a hint, and everything else works."""
    code = """
import sys, quantcache as qc
with qc.load(sys.argv[1], "nf4", mode="off") as model:
    try:
        model.upload()
    except qc.DeviceUnavailable as error:
        print("unavailable:", error.hint)
    print(len(model["blocks.0.a.weight"].parts))
"""
    nowhere = {"VK_DRIVER_FILES": "/nowhere", "VK_ICD_FILENAMES": "/nowhere"}
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120, env={**os.environ, **nowhere})
    assert said.returncode == 0, said.stderr[-2000:]
    assert said.stdout.startswith("unavailable: install a Vulkan driver")
    assert said.stdout.splitlines()[-1] == "4"


def test_a_second_device(device: Any, path: Path, tmp_path: Path) -> None:
    """A model is on two devices at once, each with buffers of its own; what one quantized is no use to the other; mixing is refused."""
    other = gpu.open_device()
    with qc.load(path, "nf4", cache=tmp_path / "c", device=device) as model, model.upload(device) as here, model.upload(other) as there_too:
        for name in model:
            assert there(here[name]) == there(there_too[name]) == stored(model[name])
        tensor, foreign = here["blocks.0.b.weight"], there_too["blocks.0.b.weight"]
        x = np.ones(256, np.float32)
        assert np.array_equal(gpu.matvec(tensor, x), gpu.matvec(foreign, x))
        vectors, products = device.buffer(1024, "x"), device.buffer(2048, "y")
        encoder = device.encoder()
        with pytest.raises(qc.DeviceError), device.compute_pass(encoder) as within:
            gpu.record_matvec(within, foreign, (vectors, 0, 1024), (products, 0, 1536))


@pytest.mark.parametrize("lazy", [True, False])
def test_closing_in_the_middle(device: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, lazy: bool) -> None:
    """What is on its way when a model is closed ends, gives its memory back, and says that it was closed; nobody waits for ever."""
    from quantcache.loader.gpu import upload

    qc.load(path, "nf4", cache=tmp_path / "c").close()
    gc.collect()
    before, began, go_on = device.held, threading.Event(), threading.Event()
    real = upload.GpuModel._put

    def put(self: Any, *given: Any) -> None:
        began.set()
        assert go_on.wait(60)
        real(self, *given)

    monkeypatch.setattr(upload.GpuModel, "_put", put)
    monkeypatch.setattr(steps, "_STEP", 4096)
    said: list[BaseException] = []
    with qc.load(path, "nf4", cache=tmp_path / "c") as model:
        found = upload.GpuModel(model, device, lazy=lazy, budget=None, order="layers", threads=2)

        def ask() -> None:
            try:
                found["blocks.0.a.weight"] if lazy else found._load_all()
            except qc.QuantcacheError as error:
                said.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        assert began.wait(60)
        found.close()
        go_on.set()
        asking.join(60)
        assert not asking.is_alive()
        assert [type(error) for error in said] == [qc.DeviceError]
        assert "closed" in str(said[0])
    said.clear()
    found = None
    end = time.monotonic() + 10
    while device.held != before and time.monotonic() < end:  # a pool's thread has what it did for a moment longer than its future is open
        gc.collect()
        time.sleep(0.001)
    assert device.held == before


def test_a_budget_with_many_threads(device: Any, path: Path, tmp_path: Path, in_threads: Callable[..., None]) -> None:
    """Threads that want different layers at once wait for each other's: what is held never passes the budget."""
    qc.load(path, "nf4", cache=tmp_path / "c").close()
    with qc.load(path, "nf4", cache=tmp_path / "c") as model:
        with model.upload(device, lazy=True) as whole:
            sizes = [next(iter(layer.values())).home.nbytes for layer in whole.layers()]
        with model.upload(device, lazy=True, budget=2 * max(sizes)) as found:
            wrong: list[Any] = []

            def ask(seed: int) -> None:
                for name in np.random.default_rng(seed).permutation(list(found))[:12]:
                    if there(found[name]) != stored(model[name]) or found.nbytes > 2 * max(sizes):
                        wrong.append(name)

            in_threads(6, ask)
            assert not wrong


def test_a_layer_that_could_not_be_fetched_ahead(device: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed behind the caller's back is tried again when it is asked for, and is not told of twice."""
    with qc.load(path, "nf4", cache=tmp_path / "c") as model, model.upload(device, lazy=True) as found:
        tried, real = threading.Event(), found._begin

        def begin(group: Any) -> Any:
            if group.number == 1 and not tried.is_set():
                tried.set()
                raise qc.DeviceOutOfMemory("no memory", asked=1, held=1)
            return real(group)

        monkeypatch.setattr(found, "_begin", begin)
        assert found["emb.weight"].nbytes
        assert tried.wait(60)
        while found._groups[1].loading:
            time.sleep(0.001)
        assert found["emb.weight"].nbytes  # for which it is not tried again
        assert not found._groups[1].loading
        assert there(found["blocks.0.a.weight"]) == stored(model["blocks.0.a.weight"])


def test_tensors_without_weights(device: Any, tmp_path: Path) -> None:
    """Products and weights of nothing are nothing, or zeros; wgpu never sees a binding of no bytes, for which it ends the process."""
    shapes = {"no_rows": (0, 8), "no_columns": (8, 0)}
    save_file({name: np.empty(shape, np.float16) for name, shape in shapes.items()}, tmp_path / "m.safetensors")
    with qc.load(tmp_path / "m.safetensors", "f16", mode="off") as model, model.upload(device) as found:
        for name, (rows, columns) in shapes.items():
            assert gpu.dequantize(found[name]).shape == (rows, columns)
            for x in (np.ones(columns, np.float32), np.ones((3, columns), np.float32)):
                assert np.array_equal(gpu.matvec(found[name], x), np.zeros((*x.shape[:-1], rows), np.float32))
            buffer = device.buffer(256, "anything")
            with pytest.raises(qc.UsageError, match="no matrix with weights"), device.compute_pass(device.encoder()) as within:
                gpu.record_matvec(within, found[name], (buffer, 0, 256), (buffer, 0, 256))
    pipeline = device.pipeline("@group(0) @binding(0) var<storage, read_write> out: array<u32>; @compute @workgroup_size(1) fn main() { out[0] = 1u; }")
    with pytest.raises(qc.DeviceError, match="binds no"), device.compute_pass(device.encoder()) as within:
        device.dispatch(within, pipeline, [(buffer, 0, 0)], 1)


def test_destroyed_while_somebody_waits() -> None:
    """Whoever waits for a device that somebody destroys is told, and does not wait for ever: wgpu asks it nothing any more."""
    code = """
import quantcache as qc
device = qc.gpu.open_device()
landing = device.landing_buffer(64)
device.raw._poller._poll_func = lambda block: None  # destroyed before the answer came
encoder = device.encoder()
device.copy(encoder, (device.buffer(64, "x"), 0, 64), landing, 0)
device.submit(encoder)
waiting = device.mapping(landing, 64)
device.raw.destroy()
try:
    with waiting:
        print("mapped")
except qc.DeviceError as error:
    print("told", error.message)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert said.stdout.startswith("told"), said.stdout + said.stderr[-2000:]
    assert "lost" in said.stdout


def test_limits_hold(small: Callable[..., Any]) -> None:
    """A device that was given smaller limits keeps them; what is read back may be larger than what is kept for it."""
    device = small(max_buffer=1 << 20)
    for make in (device.buffer, device.mapped_buffer):
        with pytest.raises(qc.DeviceError, match="makes no buffer"):
            make((1 << 20) + 4, "something")
    large = small().buffer((20 << 20) + 4, "something")
    assert device.read((large, 0, large.size)).size == large.size


def test_what_left_is_closed_too(device: Any, path: Path, tmp_path: Path) -> None:
    """A tensor of a layer that left the budget is valid until the model is closed."""
    with qc.load(path, "nf4", cache=tmp_path / "c") as model:
        with model.upload(device, lazy=True) as whole:
            size = max(next(iter(layer.values())).home.nbytes for layer in whole.layers())
        with model.upload(device, lazy=True, budget=size) as found:
            held = found["emb.weight"]
            assert there(found["blocks.2.a.weight"]) == stored(model["blocks.2.a.weight"])
            assert there(held) == stored(model["emb.weight"])
        with pytest.raises(qc.DeviceError, match="closed"):
            _ = held.parts


def test_many_threads_and_a_damaged_entry(device: Any, path: Path, tmp_path: Path, in_threads: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread has an entry built again, the others wait for what they ask; all get the right bytes."""
    from quantcache.loader import shards

    with qc.load(path, "int8", cache=tmp_path / "c") as model:
        right = {name: stored(model[name]) for name in model}
    damage(tmp_path, -5000)
    real = shards.Shard.start

    def start(self: Any, *given: Any, **how: Any) -> None:
        real(self, *given, **how)
        if self.build is not None:
            threading.Event().wait(0.3)

    monkeypatch.setattr(shards.Shard, "start", start)
    with pytest.warns(qc.QuantcacheWarning, match="damaged"), qc.load(path, "int8", cache=tmp_path / "c") as model, model.upload(device, lazy=True) as found:
        wrong: list[Any] = []

        def ask(seed: int) -> None:
            for name in np.random.default_rng(seed).permutation(list(found)):
                if there(found[name]) != right[name]:
                    wrong.append(name)

        in_threads(3, ask)
        assert not wrong
