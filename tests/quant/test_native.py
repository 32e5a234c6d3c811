"""Hold the choice of the CPU level to QUANTCACHE_KERNEL, and its errors to what they must say."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from quantcache.errors import CodecError, KernelError, UsageError
from quantcache.loader.mapping import MappedFile
from quantcache.quant import native
from quantcache.quant.codec import Status, codec_ids
from quantcache.trace import Profile, working_for

Switch = Callable[[str], None]


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the compiled kernels be missing."""

    def missing() -> None:
        raise KernelError("the compiled kernels are not here", hint="build them")

    monkeypatch.setattr(native, "_library", missing)
    caches = (native.available, native.level, native.kernel, native.system, native._runner)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_available_levels() -> None:
    """The reference is always there, first, and the compiled levels are known ones without repetition."""
    found = native.available()
    assert found[0] == "reference"
    assert set(found[1:]) <= set(native.LEVELS)
    assert len(set(found)) == len(found)
    assert "scalar" in found


@pytest.mark.parametrize("value", ["", "auto"])
def test_fastest_level_by_default(value: str, kernel_level: Switch) -> None:
    """Unset, empty or "auto", the fastest level that runs here is taken."""
    kernel_level(value)
    assert native.level() == native.available()[-1] != "reference"


@pytest.mark.parametrize("level", native.available())
def test_named_level(level: str, kernel_level: Switch) -> None:
    """QUANTCACHE_KERNEL picks any level that runs here."""
    kernel_level(level)
    assert native.level() == level


@pytest.mark.parametrize("value", ["sse9", "AVX2", " avx2", "fast"])
def test_unknown_level(value: str, kernel_level: Switch) -> None:
    """A name that is no level is a usage error that lists the levels."""
    kernel_level(value)
    with pytest.raises(UsageError, match="QUANTCACHE_KERNEL") as caught:
        native.level()
    assert caught.value.exit_code == 2
    assert all(name in (caught.value.hint or "") for name in ("auto", "reference", *native.LEVELS))


def test_level_of_another_cpu(kernel_level: Switch) -> None:
    """A level that this CPU cannot run is refused, with those that it can."""
    absent = next(name for name in native.LEVELS if name not in native.available())  # no CPU has AVX-512 and NEON
    kernel_level(absent)
    with pytest.raises(KernelError, match=absent) as caught:
        native.level()
    assert "reference" in (caught.value.hint or "")


def test_missing_library_is_not_hidden(no_library: None, kernel_level: Switch) -> None:
    """Without compiled kernels, the default is an error that says so, not a silent fall to the slow reference."""
    kernel_level("")
    assert native.available() == ("reference",)
    with pytest.raises(KernelError, match="compiled kernels"):
        native.level()


def test_reference_needs_no_library(no_library: None, kernel_level: Switch) -> None:
    """The reference can be asked for where nothing was compiled."""
    kernel_level("reference")
    assert native.level() == "reference"


@pytest.mark.parametrize("level", native.available()[1:])
def test_every_codec_has_its_kernels(level: str) -> None:
    """Every kernel that a codec calls was compiled for every level."""
    assert codec_ids()
    for name in (
        "nf4_quantize", "nf4_dequantize", "nf4_encode_absmax", "nf4_decode_absmax", "f16_cast", "int8_quantize",
        "int8_dequantize", "int8_row_quantize", "int8_row_dequantize",
    ):  # fmt: skip
        assert callable(native.kernel(name, level))


def test_unknown_kernel() -> None:
    """A kernel that was not compiled is named in the error."""
    with pytest.raises(KernelError, match="qc_nf5_quantize__scalar") as caught:
        native.kernel("nf5_quantize", "scalar")
    assert isinstance(caught.value, CodecError)
    assert caught.value.hint


def test_contiguous_copies_only_where_needed() -> None:
    """An aligned, contiguous array is handed on as it is; a strided or unaligned one is copied."""
    array = np.arange(8, dtype=np.float32)
    assert native.contiguous(array) is array
    assert native.contiguous(array[::2]).tolist() == [0, 2, 4, 6]
    odd = np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(np.float32)
    assert not odd.flags.aligned
    copied = native.contiguous(odd)
    assert copied.flags.aligned
    np.testing.assert_array_equal(copied, array)


def test_calls_stop_at_the_first_that_fails() -> None:
    """Calls after one that fails are made when they are asked for, and no call is made twice."""
    (level,) = [found for found in native.available() if found != "reference"][-1:]
    kernel, calls = native.kernel("f16_cast", level), native.Calls()
    good, bad = np.ones(64, np.float32), np.full(64, 1e9, np.float32)
    made = [np.zeros(64, np.float16) for _ in range(4)]
    for source, out in zip((good, bad, good, good), made, strict=True):
        calls.add(kernel, source, 64, 0, out, phase="quantize", nbytes=256)
    profile = Profile()
    with working_for(profile):
        assert calls.run() == 1
        assert calls.result(1) == ("quantize", int(Status.F16_RANGE))
        assert [bool(out.all()) for out in made[2:]] == [False, False]
        assert calls.run(2) == len(calls) == 4
    assert all((out == 1).all() for out in (made[0], made[2], made[3]))
    assert profile.nbytes == {"quantize": 4 * 256}
    assert calls.run(4) == 4
    assert native.Calls().run() == 0


@pytest.mark.parametrize("level", ["reference", "none", native.available()[-1]])
def test_copies(kernel_level: Switch, request: pytest.FixtureRequest, level: str) -> None:
    """Bytes are copied in one go, to where they belong and nowhere else, without kernels, too; sizes that differ are refused."""
    if level == "none":
        request.getfixturevalue("no_library")
    else:
        kernel_level(level)
    target, data = np.zeros(1000, np.uint8), np.frombuffer(os.urandom(900), np.uint8)
    native.copy([(target[7:107], data[:100]), (target[200:200], data[:0]), (target[300:999], data[100:799])], "upload")
    wanted = np.zeros(1000, np.uint8)
    wanted[7:107], wanted[300:999] = data[:100], data[100:799]
    assert np.array_equal(target, wanted)
    native.copy([], "upload")
    with pytest.raises(ValueError, match="do not fit"):
        native.copy([(target[:10], data[:11])], "upload")


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("left", [0, 1, 30])
def test_calls_in_a_row(times: int, left: int) -> None:
    """A template that is made several times goes on by its steps each time; of what there are many, the last time takes what is left."""
    data, target = np.frombuffer(os.urandom(1000), np.uint8), np.zeros(1000, np.uint8)
    template = native.Template((100, 200, 20), many=2)
    template.add(native.system("copy"), [(0, 7), (1, 3), (2, 0)], phase="digest", nbytes=20)
    template.add(native.system("copy"), [(0, 90), (1, 0), 2], phase="quantize", nbytes=2)
    calls = native.Calls()
    calls.repeat(template, (native.address(target), native.address(data), (times - 1) * 20 + left), times=times)
    calls.add(native.system("copy"), target[:1], data[:1], 1, phase="digest", nbytes=1)
    assert calls.run() == 2
    wanted = np.zeros(1000, np.uint8)
    for n in range(times):
        size = 20 if n + 1 < times else left
        wanted[7 + 100 * n : 7 + 100 * n + size] = data[3 + 200 * n : 3 + 200 * n + size]
        wanted[90 + 100 * n : 92 + 100 * n] = data[200 * n : 200 * n + 2]
    wanted[0] = data[0]
    assert np.array_equal(target, wanted)
    profile = Profile()
    with working_for(profile):
        calls.run()
    assert set(profile.seconds) == {"digest", "quantize"}


def test_copies_to_places() -> None:
    """Pieces are copied to wherever each belongs, none of them in whatever order."""
    data, target = np.frombuffer(os.urandom(1000), np.uint8), np.zeros(1000, np.uint8)
    rows = [(500, 0, 100), (0, 100, 1), (7, 900, 100), (3, 5, 0)]
    table = np.array([(native.address(target) + place, native.address(data) + start, size) for place, start, size in rows], np.uint64)
    assert native.system("copy_pieces")(table, len(rows)) == native.system("copy_pieces")(table, 0) == 0
    wanted = np.zeros(1000, np.uint8)
    for place, start, size in rows:
        wanted[place : place + size] = data[start : start + size]
    assert np.array_equal(target, wanted)


def test_pieces_side_by_side(tmp_path: Path) -> None:
    """Pieces of all sizes, some of none, side by side and apart, hundreds in a row, are written where each belongs."""
    rng = np.random.default_rng()
    for _ in range(20):
        sizes = rng.choice([0, 1, 7, 64, 5000], rng.integers(1, 300))
        gaps = rng.choice([0, 0, 0, 0, 0, 0, 0, 3], sizes.size)
        places = np.cumsum(sizes + gaps) - sizes
        data = rng.integers(1, 256, int(sizes.sum()), np.uint8)
        starts, wanted = np.cumsum(sizes) - sizes, np.zeros(int(places[-1] + sizes[-1]), np.uint8)
        for place, start, size in zip(places, starts, sizes, strict=True):
            wanted[place : place + size] = data[start : start + size]
        table = np.stack([places, native.address(data) + starts, sizes], axis=1).astype(np.uint64)
        with (tmp_path / "f").open("w+b") as file:
            assert native.system("write")(file.fileno(), table, len(table)) == 0
            file.truncate(wanted.size)
        assert (tmp_path / "f").read_bytes() == wanted.tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other limits")
def test_a_write_that_is_cut_short(tmp_path: Path) -> None:
    """A write that a limit of the file's length cuts goes on where it was cut, and then says why it cannot."""
    import resource

    data = np.arange(1, 101, dtype=np.uint8)
    table = np.array([[0, native.address(data), 60], [60, native.address(data) + 60, 40]], np.uint64)
    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with (tmp_path / "f").open("w+b") as file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (75, limit[1]))
            code = native.system("write")(file.fileno(), table, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert code == errno.EFBIG
    assert (tmp_path / "f").read_bytes() == data[:75].tobytes()


def test_calls_of_the_system(tmp_path: Path) -> None:
    """Bytes are written where they belong, and why they cannot be is told; pages that are not there are, too."""
    data = np.arange(100, dtype=np.uint8)
    table = np.array([1000, native.address(data), 100], np.uint64)
    path = tmp_path / "f"
    with path.open("w+b") as file:
        assert native.system("write")(file.fileno(), table, 1) == 0
    assert path.read_bytes() == bytes(1000) + data.tobytes()
    with path.open("rb") as file:
        assert native.system("write")(file.fileno(), table, 1) == errno.EBADF
        assert native.system("write")(file.fileno(), table, 0) == 0
    if sys.platform == "linux":
        mapped = MappedFile(path)
        with path.open("r+b") as file:
            file.truncate(0)
        assert native.system("populate")(mapped.address, mapped.nbytes) == errno.EFAULT
