"""Load a model while the Nth call on the store fails, for every N: python faults.py SCENARIO MODEL FOLDER ERRNO... behind the shim.

One process for all of it, forked for every load: the interpreter starts once. Prints one line for each load that went wrong.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path

from disk import read_log

import quantcache as qc
from quantcache.cache import index, maintenance

#: errors that stay, as those of a full or a dying disk do; the others pass
LASTING = (errno.ENOSPC, errno.EIO, errno.EROFS)

Weights = dict[str, bytes]
shim = ctypes.CDLL(None)


def weights_of(model: qc.Model) -> Weights:
    """Return the bytes of every part of every tensor."""
    found = {}
    for name, tensor in model.items():
        parts = tensor.parts if isinstance(tensor, qc.QuantTensor) else {"": tensor}
        found |= {f"{name} {part}": array.tobytes() for part, array in parts.items()}
    return found


def load(model: Path, root: Path) -> Weights:
    """Load it, and close it."""
    with qc.load(model, cache=root, threads=1) as loaded:
        return weights_of(loaded)


def attempt(model: Path, root: Path, right: Weights, at: int, code: int, *, lasting: bool) -> str:
    """Load with a failing call; return what is wrong, or "".

    The weights are right and there is one warning at most; afterwards, with a disk that works, the store is sound.
    """
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shim.qc_shim(os.fsencode(root), None, at, code, int(lasting), 0 if NETWORK else 3)
        found = load(model, root)
        shim.qc_shim(None, None, 0, 0, 0, 0)
    if found != right:
        return "wrong weights"
    said = [str(w.message) for w in caught]
    if len(said) > 1:
        return f"{len(said)} warnings: {said}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if load(model, root) != right:
            return "wrong weights afterwards"
        with qc.Cache(root) as cache:
            damaged = [finding for finding in maintenance.verify(cache).findings if finding.damaged]
    if time.monotonic() - start > PATIENCE_S:
        return f"took {time.monotonic() - start:.1f} s"
    return f"damaged afterwards: {damaged}" if damaged else f"afterwards: {caught[0].message}" if caught else ""


def unseen_bytes(log: Path, root: Path, before: Path) -> int:
    """Return how many bytes of the entries that a load made are in no call of its log."""
    found: dict[str, int] = {}
    for call in read_log(log, root):
        if call.what == "W" and call.path.endswith(".tmp"):
            found[call.path] = found.get(call.path, 0) + len(call.content)
    made = [path for path in root.rglob("*.safetensors") if not (before / path.relative_to(root)).exists()]
    return max(0, sum(path.stat().st_size for path in made) - sum(found.values()))


def main() -> None:
    """Try every call with every error."""
    scenario, model, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if NETWORK:
        index.is_network = lambda path: True  # type: ignore[assignment]
    template, root = folder / "template", folder / "store"
    right = load(model, template)
    if scenario == "miss":
        shutil.rmtree(template)
        load(Path(sys.argv[2]).with_name("other.safetensors"), template)
    elif scenario == "first":
        shutil.rmtree(template)
    if template.exists():
        shutil.copytree(template, root, copy_function=shutil.copy2)
    log = folder / "log"
    shim.qc_shim(os.fsencode(root), os.fsencode(log), 0, 0, 0, 0 if NETWORK else 3)
    load(model, root)
    calls = shim.qc_shim_count()
    shim.qc_shim(None, None, 0, 0, 0, 0)
    unseen = unseen_bytes(log, root, template)
    if unseen:
        sys.exit(f"{unseen} bytes of an entry were written by calls that the shim does not see, and that never fail here")
    shutil.rmtree(root)
    tried = wrong = 0
    for code in map(int, sys.argv[4:]):
        for lasting in (False, True) if code in LASTING else (False,):
            for at in range(1, calls + 1, EVERY if code not in (errno.ENOSPC, errno.EIO) else 1):
                if template.exists():
                    shutil.copytree(template, root, copy_function=shutil.copy2)
                child = os.fork()
                if not child:
                    said = ""
                    try:
                        said = attempt(model, root, right, at, code, lasting=lasting)
                    except BaseException:
                        said = traceback.format_exc()
                    shim.qc_shim(None, None, 0, 0, 0, 0)
                    if said:
                        print(f"{scenario}: call {at} {errno.errorcode[code]}{' lasting' if lasting else ''}: {said}", flush=True)
                    os._exit(3 if said else 0)
                _, status = os.waitpid(child, 0)
                tried += 1
                wrong += status != 0
                shutil.rmtree(root, ignore_errors=True)
                if wrong > 20:
                    sys.exit(1)
    print(f"{tried} loads tried", flush=True)
    sys.exit(wrong > 0)


#: as on a network file system: SQLite without shared memory, and locks that can fail like any other call. On a local one no
#: lock fails so, and SQLite's log would try it for ten seconds.
NETWORK = os.environ.get("QC_NETWORK") == "1"
#: of the other errors every so-manieth call is tried, unless QUANTCACHE_EXHAUSTIVE is set: all of them take 10 minutes
EVERY = 1 if os.environ.get("QUANTCACHE_EXHAUSTIVE") else 10
#: nobody waits for a lock or a busy neighbour on account of an error (a load takes 50 ms)
PATIENCE_S = 5
if __name__ == "__main__":
    main()
