"""Many processes at one store: cold keys, leaders that die, pruning under readers, and a loop of kills."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.cache.maintenance import prune, verify

ENVIRONMENT = os.environ | {"OPENBLAS_NUM_THREADS": "1"}

#: loads, says hit and digest, and after that whatever lines it is sent
LOAD = """
import hashlib, sys, quantcache as qc
def digest(model):
    total = hashlib.sha256()
    for name in sorted(model):
        tensor = model[name]
        for part in tensor.parts.values() if isinstance(tensor, qc.QuantTensor) else (tensor,):
            total.update(part.tobytes())
    return total.hexdigest()
model = qc.load(sys.argv[1], cache=sys.argv[2], verify=sys.argv[3] if len(sys.argv) > 3 else None)
print(model.hit, flush=True)
print(digest(model), flush=True)
for line in sys.stdin:
    print(digest(model), flush=True)
model.close()
"""


def _model(path: Path, layers: int, *, seed: int = 0, width: int = 2048) -> Path:
    rng = np.random.default_rng(seed)
    save_file({f"layers.{n}.key.weight": rng.standard_normal((width, 2048)).astype(np.float32) for n in range(layers)}, path)
    return path


def _start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOAD, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **({"env": ENVIRONMENT} | options))


def _said(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return out.split()


def _wait_for_temp_file(root: Path, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not list(root.glob("v1/tmp/*.tmp")):
        time.sleep(0.001)


def test_32_processes_on_one_cold_key(tmp_path: Path) -> None:
    """However many ask at once, one quantizes; all get the same bytes."""
    path = _model(tmp_path / "m.safetensors", 2, width=512)
    running = [_start(path, tmp_path / "c") for _ in range(32)]
    said = [_said(process) for process in running]
    assert sorted(hit for hit, _ in said) == ["False", *["True"] * 31]
    assert len({digest for _, digest in said}) == 1
    with qc.Cache(tmp_path / "c") as store:
        assert store.stats()["misses"] == 1
        assert len(store) == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda signal: signal.name)
def test_a_waiter_takes_over(tmp_path: Path, how: signal.Signals) -> None:
    """The leader is killed, or gets Ctrl-C: a waiter builds in its place, soon after."""
    path = _model(tmp_path / "m.safetensors", 48)  # plain NumPy takes a core several seconds
    slow = ENVIRONMENT | {"QUANTCACHE_KERNEL": "reference"}
    leader = _start(path, tmp_path / "c", env=slow)
    _wait_for_temp_file(tmp_path / "c", leader)
    waiter = _start(path, tmp_path / "c", env=slow)
    time.sleep(1.0)  # until it waits
    mine = set((tmp_path / "c" / "v1" / "tmp").glob("*.tmp"))
    assert mine, "the build was over before the waiter was there"
    assert leader.poll() is None
    leader.send_signal(how)
    stopped_s = time.monotonic()
    if how == signal.SIGKILL:
        leader.wait()
    while not set((tmp_path / "c" / "v1" / "tmp").glob("*.tmp")) - mine:
        assert time.monotonic() - stopped_s < 20, "nobody took over"
        time.sleep(0.005)
    leader.communicate()
    assert _said(waiter)[0] == "False"
    assert not list((tmp_path / "c" / "v1" / "tmp").iterdir())
    assert _said(_start(path, tmp_path / "c"))[0] == "True"


@pytest.mark.parametrize("verify_mode", ["touch", "off"])
def test_pruning_under_readers(tmp_path: Path, verify_mode: str) -> None:
    """`prune --max-size 0` and `clear` while others have the entry mapped: these go on reading the right bytes."""
    path = _model(tmp_path / "m.safetensors", 2)
    right = _said(_start(path, tmp_path / "c"))[1]
    readers = [_start(path, tmp_path / "c", verify_mode) for _ in range(2)]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline().strip() == "True"
        reader.stdout.readline()
    command = [sys.executable, "-m", "quantcache.cli", "--cache-dir", str(tmp_path / "c"), "--yes"]
    for verb in (["prune", "--max-size", "0"], ["clear"]):
        assert subprocess.run([*command[:3], verb[0], *verb[1:], *command[3:]], check=False, capture_output=True).returncode == 0
    assert not list((tmp_path / "c").glob("v1/entries/*/*"))
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write("again\n")
        assert _said(reader) == [right]


def test_readers_never_wait_for_a_writer(tmp_path: Path) -> None:
    """A process that holds the index's write lock delays no hit, nor what a hit would write."""
    import sqlite3

    path = _model(tmp_path / "m.safetensors", 1, width=256)
    with qc.load(path, cache=tmp_path / "c") as model:
        model.finish()
    writer = sqlite3.connect(tmp_path / "c" / "v1" / "index.sqlite3", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE counters SET amount = amount")
    start = time.monotonic()
    for _ in range(20):
        with qc.load(path, cache=tmp_path / "c") as model:
            assert model.hit
            list(model.values())
    took_s = time.monotonic() - start
    writer.execute("ROLLBACK")
    writer.close()
    assert took_s < 20 * 0.5  # waiting would take a second each


def test_kill_loop(tmp_path: Path) -> None:
    """Loads, prunes and checks that are killed at any moment: whoever is left gets the right bytes, and nothing needs a repair."""
    paths = [_model(tmp_path / f"m{n}.safetensors", 3, seed=n, width=512) for n in range(3)]
    right = {path: _said(_start(path, tmp_path / f"own{n}"))[1] for n, path in enumerate(paths)}
    root = tmp_path / "c"
    draw = random.Random(int(os.environ.get("QUANTCACHE_TEST_SEED", "0")))
    end_s = time.monotonic() + float(os.environ.get("QUANTCACHE_KILL_S", "15"))
    tools = [["prune", "--max-size", "0", "--yes"], ["verify"], ["repair"], ["ls"]]
    killed = finished = 0
    running: list[tuple[subprocess.Popen[str], Path | None]] = []
    while time.monotonic() < end_s or running:
        while len(running) < 4 and time.monotonic() < end_s:
            if draw.random() < 0.75:
                path = draw.choice(paths)
                running.append((_start(path, root), path))
                running[-1][0].stdin.close()  # type: ignore[union-attr]
                running[-1][0].stdin = None
            else:
                command = [sys.executable, "-m", "quantcache.cli", *draw.choice(tools), "--cache-dir", str(root)]
                running.append((subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), None))
        process, path = running.pop(draw.randrange(len(running)))
        if draw.random() < 0.5:
            time.sleep(draw.random() * 0.5)
            process.kill()
            process.communicate()
            killed += 1
            continue
        out, err = process.communicate(timeout=120)
        finished += 1
        if path is not None:
            assert process.returncode == 0, err
            assert out.split()[1] == right[path]
        else:
            assert "Traceback" not in err, err
            assert process.returncode in (0, 10), err
    assert killed > 5
    assert finished > 5
    for path in paths:
        assert _said(_start(path, root))[1] == right[path]
        assert _said(_start(path, root)) == ["True", right[path]]
    with qc.Cache(root) as store:
        assert verify(store).findings == []
        prune(store)
        assert not list((store.folder / "tmp").iterdir())
        assert {row.key for row in store.entries()} == {file.stem for file in store.entry_files()}


def _mount_tmpfs(folder: Path, nbytes: int) -> bool:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)], capture_output=True, check=False)
    return done.returncode == 0


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """On a real file system without room a load gives the right weights, says once that it is not saved, and leaves no file."""
    path = _model(tmp_path / "m.safetensors", 4)  # 9.4 MB of nf4
    disk = tmp_path / "disk"
    if not _mount_tmpfs(disk, 6 << 20):
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        with qc.load(path, mode="off") as model:
            right = {name: tensor.parts["codes"].tobytes() for name, tensor in model.items()}
        for filled in (0, 5 << 20):
            (disk / "ballast").write_bytes(bytes(filled))
            with pytest.warns(qc.QuantcacheWarning) as caught, qc.load(path, cache=qc.Cache(disk / "c", keep_free="0")) as model:
                assert {name: tensor.parts["codes"].tobytes() for name, tensor in model.items()} == right
            assert len(caught) == 1
            assert "not saved" in str(caught[0].message)
            assert not list(disk.glob("c/v1/tmp/*"))
            assert not list(disk.glob("c/v1/entries/*/*"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_quota_on_the_size_of_files(tmp_path: Path) -> None:
    """Under RLIMIT_FSIZE, which stands for a quota, the same."""
    path = _model(tmp_path / "m.safetensors", 4)
    code = (
        "import resource, signal, sys, warnings\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import quantcache as qc\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    with qc.load(sys.argv[1], cache=sys.argv[2]) as model: total = sum(int(t.parts['codes'].astype('u8').sum()) for t in model.values())\n"
        "print(total, len(caught), caught[0].message)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), str(tmp_path / "c")], capture_output=True, text=True, check=True)
    total, warned, *words = done.stdout.split()
    with qc.load(path, mode="off") as model:
        assert int(total) == sum(int(tensor.parts["codes"].astype("u8").sum()) for tensor in model.values())
    assert warned == "1"
    assert "saved:" in words
    assert not list((tmp_path / "c").glob("v1/tmp/*"))
