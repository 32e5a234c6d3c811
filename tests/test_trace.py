"""Hold the profile to its word: phases add up, the trace file is whole JSON, and no load fails for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.trace import PHASES, Profile, span, spent, working_for

LOAD = "import sys, quantcache as qc\nwith qc.load(sys.argv[1], cache=sys.argv[2]) as m: [m[n] for n in m]; m.finish()"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of two tensors, of more than one tile and of less."""
    rng = np.random.default_rng()
    path = tmp_path / "m.safetensors"
    save_file({"a.0.weight": rng.standard_normal((2048, 1024), np.float32), "norm": np.ones(64, np.float32)}, path)
    return path


def traced(model: Path, tmp_path: Path, where: str) -> subprocess.CompletedProcess[str]:
    """Load in a process with QUANTCACHE_TRACE."""
    environment = {**os.environ, "QUANTCACHE_TRACE": where}
    return subprocess.run([sys.executable, "-c", LOAD, str(model), str(tmp_path / "c")], env=environment, capture_output=True, text=True, check=True)


def test_spans_inside_spans_count_once() -> None:
    """What an inner span takes is not the outer one's, so that phases add up."""
    profile = Profile()
    with working_for(profile), span("merge", 10):
        time.sleep(0.02)
        with span("read", 5):
            time.sleep(0.05)
    assert profile.seconds["read"] >= 0.05
    assert profile.seconds["merge"] < 0.05
    assert profile.nbytes == {"read": 5, "merge": 10}
    assert list(profile.seconds) == ["read", "merge"]


def test_a_thread_without_a_load_is_not_counted() -> None:
    """Spans outside a load go nowhere."""
    profile = Profile()
    with working_for(profile):
        pass
    with span("read"):
        pass
    assert profile.seconds == {}


def test_trace_file(model: Path, tmp_path: Path) -> None:
    """A miss and a hit leave a file that a viewer of the Trace Event Format can open."""
    for turn, wanted in enumerate(({"open", "read", "quantize", "digest", "write", "sync"}, {"open", "verify"})):
        traced(model, tmp_path, str(tmp_path / f"trace{turn}.json"))
        events = json.loads((tmp_path / f"trace{turn}.json").read_text())
        spans = [event for event in events if event["ph"] == "X"]
        assert wanted <= {event["name"] for event in spans} <= set(PHASES)
        assert all(event["dur"] >= 0 and event["pid"] == spans[0]["pid"] for event in spans)
        named = {event["tid"] for event in events if event["ph"] == "M"}
        assert {event["tid"] for event in spans} <= named
    assert any(event.get("args", {}).get("tensor") == "a.0.weight" for event in spans)


def test_trace_file_in_use_is_left_alone(model: Path, tmp_path: Path) -> None:
    """A second process that is given the same name writes beside it; "%p" is the number of the process."""
    fcntl = pytest.importorskip("fcntl")
    first = tmp_path / "trace.json"
    with first.open("w") as held:
        held.write("[]")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        traced(model, tmp_path, str(first))
        assert first.read_text() == "[]"
    assert [json.loads(path.read_text()) for path in tmp_path.glob("trace.*.json")]
    traced(model, tmp_path, str(tmp_path / "p%p.json"))
    (own,) = tmp_path.glob("p*.json")
    assert own.stem[1:].isdigit()


def test_trace_file_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    """It costs one warning, and no load."""
    said = traced(model, tmp_path, str(tmp_path / "no such folder" / "trace.json"))
    assert said.stderr.count("QUANTCACHE_TRACE") == 1


def test_phases_of_a_model(model: Path, tmp_path: Path) -> None:
    """A model says where its time went; the entry remembers how it was built."""
    with qc.load(model, cache=tmp_path / "c") as missed:
        missed.finish()
        assert {"open", "read", "quantize", "write", "sync"} <= set(missed.phases)
    with qc.load(model, cache=tmp_path / "c") as hit:
        list(hit.values())
        assert set(hit.phases) <= {"open", "read", "verify", "digest"}  # the source is young: it is digested again
        assert hit.phases["verify"] > 0
    with qc.Cache(tmp_path / "c") as store:
        (row,) = store.entries()
        assert {"read", "quantize", "write"} <= set(store.open(row.key).header.built["phases"])


def test_what_waits_is_nobodys() -> None:
    """Of spans that follow each other each has its own time; the time of one without a phase is left out."""
    profile = Profile()
    with working_for(profile):
        spent(0, [("read", 5, "t"), ("", 0, "t"), ("digest", 5, "t"), ("write", 1, "t")], [1000, 8000, 9000])
    assert profile.seconds == pytest.approx({"read": 1e-6, "digest": 1e-6})
    assert profile.nbytes == {"read": 5, "digest": 5}


def test_memory_is_written_to_as_well(tmp_path: Path) -> None:
    """A load that stores nothing says what it took to put tensors together."""
    save_file({"a.weight": np.ones((256, 256), np.float32)}, tmp_path / "m.safetensors")
    with qc.load(tmp_path / "m.safetensors", mode="off") as model:
        model.finish()
        assert {"read", "quantize", "write"} <= set(model.phases)
        assert "digest" not in model.phases
