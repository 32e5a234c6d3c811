"""Let atheris look for a file that the readers cannot cope with; run by test_fuzz.py, in a process of its own.

    python tests/stress/fuzz_readers.py CORPUS [BROKEN] [libFuzzer's options]

BROKEN ("exception", "memory", "hang") breaks the reader on purpose, to see that it is noticed.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import atheris

with atheris.instrument_imports(include=["quantcache"]):
    import quantcache.loader.model
    import quantcache.loader.source

#: what the readers may take beyond what Python, NumPy and the fuzzer have at the start
MEMORY = 1 << 30


def checks() -> ModuleType:
    """Return the module that says what has to hold."""
    path = Path(__file__).parents[1] / "hostile" / "test_fuzz_readers.py"
    spec = importlib.util.spec_from_file_location("fuzz_checks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def break_reader(how: str) -> None:
    """Make the reader fail on the files that it would open."""
    real = quantcache.loader.source.Source.check

    def check(self: Any) -> None:
        real(self)
        if how == "exception":
            raise ValueError("broken on purpose")
        kept = []
        while True:
            if how == "memory":
                kept.append(bytes(1 << 24))

    quantcache.loader.source.Source.check = check  # type: ignore[method-assign]


def main() -> None:
    """Fuzz until libFuzzer's options say stop, or something happens that must not."""
    corpus, *options = sys.argv[1:]
    if options and not options[0].startswith("-"):
        break_reader(options.pop(0))
    checking = checks()
    for order, version in (("<", 3), (">", 3), ("<", 2)):
        (Path(corpus) / f"gguf{order}{version}").write_bytes(checking.small_gguf(order, version)[0])
    (Path(corpus) / "safetensors").write_bytes(checking.small_safetensors()[0])
    path = Path(corpus).parent / "input"

    def once(content: bytes) -> None:
        path.write_bytes(content)
        if content:
            checking.read_all(path, load=content[-1] % 8 == 0)

    atheris.Setup([sys.argv[0], corpus, *options], once)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
