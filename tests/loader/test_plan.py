"""What is planned of a checkpoint: tensors that are alike share what they can, and what is said of them fits the place that is kept for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.cache.blobs import StagedEntry
from quantcache.cache.container import stated_nbytes
from quantcache.loader.changes import Change
from quantcache.loader.plan import Request, plan, records_nbytes, slots_of
from quantcache.loader.recipe import Decision, Recipe
from quantcache.loader.source import Source

#: names that JSON has as they are, and names that it has not
NAMES = {"plain": "layers", "a quote": 'lay"ers', "a backslash": "lay\\ers", "more than ASCII": "läyers", "a line's end": "lay\ners"}


def _save(path: Path, stem: str) -> None:
    """Save tensors of several kinds and layers, with names of different lengths."""
    rng, tensors = np.random.default_rng(3), dict[str, Any]()
    for layer in (0, 7, 11, 100):
        for part, shape in {"attn.q": (128, 256), "attn.key": (128, 256), "norm": (256,), "up": (300, 64)}.items():
            tensors[f"{stem}.{layer}.{part}.weight"] = rng.standard_normal(shape).astype(np.float16)
        tensors[f"{stem}.{layer}.bias"] = rng.standard_normal(33).astype(np.float32)
        tensors[f"{stem}.{layer}.ids"] = rng.integers(0, 9, 5)
    save_file(tensors, path)


@pytest.mark.parametrize("quant", ["nf4", "int8", "nf4-dq", "f16"])
@pytest.mark.parametrize("stem", NAMES.values(), ids=NAMES.keys())
def test_what_is_said_of_tensors_has_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stem: str, quant: str) -> None:
    """The room for records, counted from one of each kind, is what all take; so no entry is written twice for want of it."""
    path = tmp_path / "m.safetensors"
    _save(path, stem)
    jobs = plan(Source(path), Request(Recipe.of(quant)))
    wanted = stated_nbytes([job.record() for job in jobs])
    assert records_nbytes(jobs) == wanted

    def written_twice(*_: Any) -> None:
        raise AssertionError("the header did not fit")

    monkeypatch.setattr(StagedEntry, "_rewrite", written_twice)
    with qc.load(path, quant, cache=tmp_path / "c") as model:
        assert len(model) == len(jobs)
    assert model.unsaved == []
    with qc.load(path, quant, cache=tmp_path / "c") as model:
        assert model.hit


def test_what_records_say_beside_names(tmp_path: Path) -> None:
    """Tensors of a kind may differ in what is said of them: each is counted with what is said of it."""
    _save(tmp_path / "m.safetensors", "layers")
    job = plan(Source(tmp_path / "m.safetensors"), Request(Recipe.of("nf4")))[0]
    jobs = [job.again() for _ in range(8)]
    jobs[1].decision = Decision("keep", 0, "for a reason that takes some room")
    jobs[2].decision = Decision("keep", 0, 'for "another"')
    jobs[3].info = jobs[4].info = replace(job.info, transposed=True)
    for changed in (4, 5, 6):
        jobs[changed].changes = (cast("Change", None),) * 10 ** (changed - 4)
    assert {one.kind for one in jobs} == {job.kind}
    for some in (jobs, jobs[::-1], jobs[3:], jobs[:1]):
        assert records_nbytes(some) == stated_nbytes([one.record() for one in some])


def test_nothing_takes_no_room() -> None:
    """An empty plan says so."""
    assert records_nbytes([]) == stated_nbytes([])


def test_tensors_that_are_alike_share_a_slot(tmp_path: Path) -> None:
    """A model has thousands of tensors, of a dozen kinds: what is not of one alone is there once a layer."""
    _save(tmp_path / "m.safetensors", "layers")
    jobs = plan(Source(tmp_path / "m.safetensors"), Request(Recipe.of("nf4")))
    slots = slots_of(jobs)
    assert slots["layers.7.attn.q.weight"] is slots["layers.7.attn.key.weight"] is not slots["layers.11.attn.key.weight"]
    for job in jobs:
        assert job.slots.items() <= slots.items()
        assert list(job.slots) == list(job.keys) == list(job.parts.values())
        assert {slot.layer for slot in job.slots.values()} == {job.layer}
        again = job.again()
        assert (again.info, again.keys, again.kept) == (job.info, job.keys, None)
        assert again.kind is job.kind
    assert sum(len(job.slots) for job in jobs) == len(slots)
