"""Check the command line: what each verb does, prints, and exits with."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import quantcache
from quantcache import cli
from quantcache.cache.locks import Lock
from quantcache.cache.store import Cache
from quantcache.errors import LockTimeoutError
from quantcache.loader import model as model_module
from quantcache.render import Output

REPOSITORY = Path(quantcache.__file__).parents[1]


def checkpoint(path: Path, seed: int = 0) -> Path:
    """Write a small checkpoint: one tensor that is quantized, one that is not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weight = np.random.default_rng(seed).standard_normal((64, 128)).astype(np.float16)
    save_file({"blocks.0.att.key.weight": weight, "blocks.0.ln1.weight": np.ones(64, np.float16)}, path)
    return path


@dataclass
class Result:
    """Hold what a run of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The document on stdout."""
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return the folder of a store that does not exist yet."""
    return tmp_path / "the store"


@pytest.fixture
def run(store: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command line in this process, on the test's store."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = cli.main([*map(str, arguments), "--cache-dir", str(store)])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a checkpoint in a folder with a space in its name."""
    return checkpoint(tmp_path / "my models" / "model.safetensors")


@pytest.fixture
def key(run: Run, model: Path) -> str:
    """Return the key of the only entry of a warm store."""
    (found,) = run("--json", "warm", model).json["models"][0]["keys"]
    return str(found)


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process of its own, with nobody at its terminal."""
    command = [sys.executable, "-m", "quantcache.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "env": environment} | options
    return subprocess.run(command, check=False, **options)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder but the index, whose pages change when it is read."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data for name, data in found.items() if "index.sqlite3" not in name}


def entry_file(store: Path) -> Path:
    """Return the only entry's file."""
    (found,) = store.glob("v*/entries/*/*.safetensors")
    return found


def damage(store: Path) -> None:
    """Flip the last byte of the only entry, which is tensor data."""
    with entry_file(store).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 0xFF]))


# ---- each verb does its work ----


def test_warm_builds_then_hits(run: Run, model: Path) -> None:
    """The first run builds the entry, and the second finds it."""
    first, second = run("warm", model), run("warm", model)
    assert (first.code, second.code) == (0, 0)
    assert first.out.startswith("built ")
    assert second.out.startswith("hit ")


def test_warm_refresh_builds_again(run: Run, model: Path, key: str) -> None:
    """--refresh quantizes again although the entry is there."""
    (found,) = run("--json", "warm", model, "--refresh").json["models"]
    assert (found["state"], found["keys"]) == ("built", [key])


def test_warm_takes_a_folder(run: Run, model: Path, key: str) -> None:
    """A folder means the checkpoint in it."""
    (found,) = run("--json", "warm", model.parent).json["models"]
    assert (found["state"], found["keys"]) == ("hit", [key])


def test_warm_options_change_the_key(run: Run, model: Path, key: str) -> None:
    """Another codec or another rule is another entry."""
    others = [
        run("--json", "warm", model, *options).json["models"][0]["keys"][0]
        for options in (["--quant", "int8"], ["--rule", "blocks.*=int8"], ["--exclude", "blocks.*"])
    ]
    assert key not in others
    assert len(run("--json", "ls").json["entries"]) >= 3


def test_ls_shows_entries(run: Run, model: Path, key: str) -> None:
    """`ls` shows an entry by the start of its key, with its recipe and its source."""
    found = run("ls")
    assert found.code == 0
    assert key[:12] in found.out
    assert "nf4" in found.out
    assert str(model) in found.out


@pytest.mark.parametrize(
    ("condition", "shown"),
    [
        ("size>1kB", 1),
        ("size>1GB", 0),
        ("age<1h", 1),
        ("age>30d", 0),
        ("recipe=nf4", 1),
        ("recipe=int8", 0),
        ("hits<=0", 1),
    ],
)
def test_ls_filters(run: Run, key: str, condition: str, shown: int) -> None:
    """--filter keeps the entries for which the condition holds."""
    assert len(run("--json", "ls", "--filter", condition).json["entries"]) == shown


def test_ls_sorts(run: Run, tmp_path: Path) -> None:
    """--sort name goes by the source's path."""
    for name in ("b", "a", "c"):
        run("warm", checkpoint(tmp_path / f"{name}.safetensors", seed=ord(name)))
    found = run("--json", "ls", "--sort", "name").json["entries"]
    assert [Path(entry["source"]).stem for entry in found] == ["a", "b", "c"]


def test_ls_limit(run: Run, tmp_path: Path) -> None:
    """--limit shows only the first entries."""
    for seed in range(3):
        run("warm", checkpoint(tmp_path / f"{seed}.safetensors", seed))
    found = run("--json", "ls", "--limit", "2")
    assert found.code == 0, found.err
    assert len(found.json["entries"]) == 2


def test_ls_of_an_empty_store(run: Run, store: Path) -> None:
    """A store without entries is not an error."""
    Cache(store).close()
    found = run("ls")
    assert (found.code, found.out) == (0, "")
    assert "no entries" in found.err


def test_info_of_a_key(run: Run, key: str, store: Path) -> None:
    """`info KEY` shows the entry's file and its tensors."""
    found = run("info", key)
    assert found.code == 0
    assert str(entry_file(store)) in found.out
    assert "blocks.0.att.key.weight" in found.out


def test_info_of_a_path(run: Run, model: Path) -> None:
    """`info PATH` shows what each tensor would become, and needs no store."""
    found = run("--json", "info", model, "--quant", "int8")
    assert found.code == 0
    assert {t["name"]: t["becomes"] for t in found.json["tensors"]} == {
        "blocks.0.att.key.weight": "int8",
        "blocks.0.ln1.weight": "keep",
    }


def adapter(folder: Path) -> Path:
    """Write a LoRA in RWKV's form, which does not say how large its alpha is."""
    ones = np.ones((4, 128), np.float32), np.ones((64, 4), np.float32)
    save_file({"blocks.0.att.key.lora.0": ones[0], "blocks.0.att.key.lora.1": ones[1]}, folder / "my lora.st")
    return folder / "my lora.st"


def test_warm_with_an_adapter(run: Run, model: Path, key: str, tmp_path: Path) -> None:
    """--lora FILE:ALPHA is an entry of its own; the same alpha, however it is written, is a hit, and `info` shows it."""
    lora = adapter(tmp_path)
    first, again, by_name, other = (
        run("--json", "warm", model, "--lora", f"{lora}:{alpha}").json["models"][0] for alpha in ("8", "8.0", "*.key.*=8", "4")
    )
    assert [found["state"] for found in (first, again, by_name, other)] == ["built", "hit", "hit", "built"]
    assert first["keys"] == again["keys"] == by_name["keys"]
    assert len({key, first["keys"][0], other["keys"][0]}) == 3
    shown = run("info", first["keys"][0]).out
    assert "adapter" in shown
    assert "scale 2" in shown


def test_info_of_a_path_with_an_adapter(run: Run, model: Path, tmp_path: Path) -> None:
    """`info PATH` takes what `warm` takes, and shows which tensors an adapter changes and what would be stored."""
    found = run("--json", "info", model, "--quant", "nf4", "--lora", f"{adapter(tmp_path)}:8").json
    weight, norm = ({t["name"]: t for t in found["tensors"]}[name] for name in ("blocks.0.att.key.weight", "blocks.0.ln1.weight"))
    assert (weight["changes"], norm["changes"]) == (1, 0)
    assert (weight["becomes"], weight["type"], weight["shape"]) == ("nf4", "F16", [64, 128])
    assert weight["stored_size"] < weight["size"] == 64 * 128 * 2
    assert found["stored_size"] == weight["stored_size"] + norm["stored_size"]


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [("{}", 2, "--lora FILE:ALPHA"), ("{}:x", 2, "no alpha"), ("{}:*=x", 2, "no alpha"), ("nothing.st:8", 4, "no such file")],
)
def test_adapters_that_cannot_be(run: Run, model: Path, tmp_path: Path, given: str, code: int, words: str) -> None:
    """An adapter without an alpha, with none that is a number, or without a file: in words, with the exit code."""
    found = run("warm", model, "--lora", given.format(adapter(tmp_path)))
    assert found.code == code
    assert words in found.err


def test_adapter_with_a_colon_in_its_name(run: Run, model: Path, tmp_path: Path) -> None:
    """A file that exists under the whole text is meant, and not an alpha."""
    lora = adapter(tmp_path).rename(tmp_path / "a:8")
    assert "does not say how large alpha is" in run("warm", model, "--lora", lora).err
    assert run("warm", model, "--lora", f"{lora}:8").out.startswith("built")
    long = ",".join(f"*.key.weight{'?' * n}=1" for n in range(30))
    assert "is called like" in run("warm", model, "--lora", f"{lora}:*=8,{long}").err


def test_alpha_for_the_rest(run: Run, model: Path, tmp_path: Path) -> None:
    """A number without a name behind others is for the rest, and none may be left without a weight."""
    lora = adapter(tmp_path)
    first, again = (run("--json", "warm", model, "--lora", f"{lora}:{alpha}").json["models"][0] for alpha in ("8", "*.key.*=8,3"))
    assert (first["state"], again["state"]) == ("built", "hit")
    assert run("warm", model, "--lora", f"{lora}:=5").code == 2


@pytest.mark.parametrize("options", [["--native", "convert"], ["--include", "*"], ["--exclude", "a"]])
def test_native_takes_no_other_wish(run: Run, model: Path, options: list[str]) -> None:
    """What contradicts `--quant native` is refused, not ignored."""
    assert run("warm", model, "--quant", "native", *options).code == 2
    assert run("info", model, "--quant", "native", *options).code == 2


def test_stats_count(run: Run, model: Path, key: str) -> None:
    """`stats` counts one miss and one hit after two runs."""
    run("warm", model)
    found = run("--json", "stats").json
    assert (found["misses"], found["hits"], found["entries"]) == (1, 1, 1)
    assert run("stats").out.startswith("hits         1 (50 %)")


def test_du_adds_up(run: Run, key: str, store: Path) -> None:
    """`du` says how much the entries take."""
    found = run("--json", "du").json
    assert found["entries"] == entry_file(store).stat().st_size
    assert found["total"] >= found["entries"]
    assert run("du").out.splitlines()[0].split() == ["size", "what"]


def test_verify_of_a_whole_store(run: Run, key: str) -> None:
    """`verify` of undamaged entries finds nothing."""
    found = run("verify")
    assert (found.code, found.out) == (0, "")
    assert "1 entries checked, 0 findings" in found.err


def test_verify_then_repair(run: Run, key: str, store: Path) -> None:
    """A flipped byte is a finding, `repair` takes the entry away, and the store is well again."""
    damage(store)
    found = run("verify", key)
    assert found.code == 1
    assert found.out.startswith(f"damaged  {key}")
    assert run("--json", "verify").json["findings"][0]["key"] == key
    assert run("repair", "--yes").code == 0
    assert not list(store.glob("v*/entries/*/*.safetensors"))
    assert run("verify").code == 0


def test_repair_dry_run(run: Run, key: str, store: Path) -> None:
    """`repair --dry-run` says what is damaged and leaves it where it is."""
    damage(store)
    before = files_of(store)
    found = run("repair", "--dry-run")
    assert found.out.startswith(f"would quarantine  {key}")
    assert files_of(store) == before


def test_quick_verify_reads_no_digests(run: Run, key: str, store: Path) -> None:
    """`verify --quick` looks at the header and the length: it sees a cut file, and not a flipped byte."""
    damage(store)
    assert run("verify", "--quick").code == 0
    with entry_file(store).open("r+b") as file:
        file.truncate(entry_file(store).stat().st_size - 1)
    assert run("verify", "--quick").code == 1


@pytest.mark.parametrize(
    "arguments",
    [["prune", "--max-size", "0"], ["rm", "KEY"], ["rm", "PATH"], ["rm", "FOLDER"], ["clear"]],
    ids=" ".join,
)
def test_removing(run: Run, key: str, model: Path, store: Path, arguments: list[str]) -> None:
    """With --yes the entry goes; the source stays."""
    words = {"KEY": key, "PATH": model, "FOLDER": model.parent}
    found = run(*[words.get(word, word) for word in arguments], "--yes")
    assert found.code == 0
    assert found.out.startswith(f"removed  {key[:12]}")
    assert not list(store.glob("v*/entries/*/*.safetensors"))
    assert model.exists()


@pytest.mark.parametrize(
    "options", [["--max-size", "1GB"], ["--max-age", "30d"], ["--stale-source"], ["--keep-free", "0%"]]
)
def test_prune_keeps_what_is_within_limits(run: Run, key: str, store: Path, options: list[str]) -> None:
    """An entry that no limit hits stays."""
    assert run("prune", "--yes", *options).code == 0
    assert entry_file(store).exists()


def test_prune_stale_source(run: Run, key: str, model: Path, store: Path) -> None:
    """--stale-source removes the entry of a checkpoint that is gone."""
    model.unlink()
    assert run("prune", "--yes", "--stale-source").out.startswith(f"removed  {key[:12]}")


def test_pin_and_unpin(run: Run, key: str, store: Path) -> None:
    """A pinned entry survives `clear`; after `unpin` it goes."""
    assert run("pin", key).out.startswith(f"pinned  {key[:12]}")
    assert run("--json", "ls").json["entries"][0]["pinned"] is True
    run("clear", "--yes")
    assert entry_file(store).exists()
    assert run("unpin", key).out.startswith(f"unpinned  {key[:12]}")
    assert run("clear", "--yes").code == 0
    assert not list(store.glob("v*/entries/*/*.safetensors"))


def test_clear_pinned(run: Run, key: str, store: Path) -> None:
    """`clear --pinned` takes the pinned entries, too, and their pins."""
    run("pin", key)
    assert run("clear", "--pinned", "--yes").code == 0
    assert not list(store.glob("v*/entries/*/*.safetensors"))
    assert not list(store.glob("v*/pins/*"))


def test_dir(run: Run, store: Path) -> None:
    """`dir` prints the folder, and does not make it."""
    assert run("dir").out == f"{store}\n"
    assert run("--json", "dir").json["dir"] == str(store)
    assert not store.exists()


def test_config_shows_origins(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag beats the environment, that the file, and that the default; `config` names each."""
    file = tmp_path / "quantcache.toml"
    file.write_text('threads = 3\nmax_size = "1GB"\nkeep_free = "1%"\n')
    monkeypatch.setenv("QUANTCACHE_CONFIG", str(file))
    monkeypatch.setenv("QUANTCACHE_THREADS", "2")
    monkeypatch.setenv("QUANTCACHE_MAX_SIZE", "2GB")
    found = run("--json", "config", "--threads", "1").json["settings"]
    assert found["threads"] == {"value": 1, "origin": "flag"}
    assert found["max_size"] == {"value": 2 * 10**9, "origin": "environment QUANTCACHE_MAX_SIZE"}
    assert found["keep_free"] == {"value": "1%", "origin": f"file {file}"}
    assert found["policy"] == {"value": "lru", "origin": "default"}
    assert run("config").out.splitlines()[0].split() == ["setting", "value", "origin"]


# ---- what is printed, and where ----


@pytest.mark.parametrize(
    "arguments",
    [
        ["warm", "PATH"], ["ls"], ["info", "KEY"], ["info", "PATH"], ["stats"], ["du"], ["verify"], ["repair"],
        ["prune", "--yes"],
        ["rm", "KEY", "--yes"], ["clear", "--yes"], ["pin", "KEY"], ["unpin", "KEY"], ["dir"], ["config"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_json(run: Run, key: str, model: Path, arguments: list[str]) -> None:
    """Every verb prints one document with schema_version, and with sizes that are integers."""
    words = {"KEY": key, "PATH": model}
    found = run(*[words.get(word, word) for word in arguments], "--json")
    assert found.code == 0
    assert found.json["schema_version"] == 1

    def look(value: object, name: str = "") -> None:
        if isinstance(value, dict):
            for inner, child in value.items():
                look(child, inner)
        elif isinstance(value, list):
            for child in value:
                look(child, name)
        elif isinstance(value, float):
            assert "seconds" in name, f"{name} is {value}"

    look(found.json)


def test_errors_as_json(run: Run, key: str) -> None:
    """With --json an error is a document as well, with its kind, message and hint."""
    found = run("info", "abcdef" * 6, "--json")
    assert found.code == 4
    assert found.json["error"]["kind"] == "KeyNotFoundError"
    assert found.json["error"]["message"] in found.err


def test_data_and_words_go_apart(store: Path, model: Path) -> None:
    """In a process, stdout has the data only; messages are on stderr, and --quiet drops all but errors."""
    assert process("warm", model, "--cache-dir", store).stderr == ""
    loud = process("rm", "-n", model, "--cache-dir", store)
    assert loud.stdout.startswith("would remove ")
    assert loud.stderr.startswith("1 entries, ")
    quiet = process("rm", "-n", model, "-q", "--cache-dir", store)
    assert (quiet.stdout, quiet.stderr) == (loud.stdout, "")
    failed = process("-q", "info", "abc", "--cache-dir", store)
    assert (failed.returncode, failed.stdout) == (4, "")
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr


def test_a_closed_pipe_is_quiet(store: Path, model: Path) -> None:
    """A reader that goes away, as in `ls | head -c 0`, leaves no traceback and no failure."""
    process("warm", model, "--cache-dir", store)
    reading, writing = os.pipe()
    os.close(reading)
    try:
        found = process("ls", "--cache-dir", store, capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    finally:
        os.close(writing)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["dir"], ["ls"]], ids=" ".join)
def test_quick_verbs_import_little(store: Path, arguments: list[str]) -> None:
    """What must answer at once imports neither NumPy nor anything else that is slow."""
    Cache(store).close()
    script = (
        "import sys; from quantcache.cli import main; main(sys.argv[1:]); "
        "print(sorted({'numpy', 'gguf', 'rich', 'wgpu', 'ml_dtypes', 'filelock'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", script, *arguments, "--cache-dir", str(store)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert found.stderr.splitlines()[-1] == "[]"


def test_table_fits_the_terminal(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of 80 columns a long path is cut in its middle; in a pipe nothing is."""
    path = checkpoint(tmp_path / ("a long name " * 6) / ("another long name " * 6) / "model.safetensors")
    run("warm", path)
    assert str(path) in run("ls").out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("ls").out.splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) <= 80
    assert "…" in lines[1]
    assert lines[1].endswith(".safetensors")


def test_table_aligns(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers stand to the right and words to the left."""
    Output(as_json=False, quiet=False, progress=False, color=False).table(("n", "name"), [(1, "a"), (100, "bcd")])
    assert capsys.readouterr().out == "  n  name\n  1  a\n100  bcd\n"


def test_hostile_names_are_not_printed_raw(run: Run, tmp_path: Path) -> None:
    """A tensor's name cannot send escapes to the terminal."""
    path = tmp_path / "model.safetensors"
    save_file({"a\x1b[2Jb.weight": np.zeros((64, 128), np.float16)}, path)
    for found in (run("info", path), run("warm", path), run("info", run("--json", "ls").json["entries"][0]["key"])):
        assert "\x1b" not in found.out + found.err


# ---- exit codes ----


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["nonsense"], ["warm"], ["warm", "PATH", "--quant", "nf5"], ["warm", "PATH", "--rule", "nf4"],
        ["warm", "PATH", "--rule", "a=nf4*x"], ["prune", "--max-size", "lots"], ["ls", "--filter", "size"],
        ["ls", "--filter", "colour=red"], ["ls", "--sort", "colour"], ["--limit-size", "lots", "warm", "PATH"],
        ["--threads", "-3", "warm", "PATH"], ["--lock-timeout", "soon", "warm", "PATH"],
    ],
    ids=lambda words: " ".join(words) or "no verb",
)  # fmt: skip
def test_usage_is_2(run: Run, key: str, model: Path, arguments: list[str]) -> None:
    """What cannot be meant is 2, with a message on stderr and nothing on stdout."""
    found = run(*[model if word == "PATH" else word for word in arguments])
    assert (found.code, found.out) == (2, "")
    assert found.err


def test_a_bad_size_is_explained(run: Run, key: str) -> None:
    """The message for a bad size shows what a size looks like, and no name of a function."""
    found = run("prune", "--max-size", "lots")
    assert "50GB" in found.err.splitlines()[-1]
    assert "parse_size" not in found.err


def test_partly_done_is_3(run: Run, model: Path, tmp_path: Path) -> None:
    """One bad path of two is 3, and the good one is warm."""
    found = run("warm", tmp_path / "missing.safetensors", model)
    assert found.code == 3
    assert found.out.startswith("built ")
    assert "missing.safetensors" in found.err


@pytest.mark.parametrize(
    "arguments",
    [["warm", "nowhere"], ["info", "nowhere"], ["rm", "-y", "nowhere"], ["pin", "0" * 32], ["verify", "0f"]],
)
def test_not_found_is_4(run: Run, key: str, tmp_path: Path, arguments: list[str]) -> None:
    """A path or key that is not there is 4."""
    found = run(*[tmp_path / word if word == "nowhere" else word for word in arguments])
    assert (found.code, found.out) == (4, "")


def test_folder_without_a_model_is_4(run: Run, tmp_path: Path) -> None:
    """A folder without a checkpoint is 4, and the message says what was looked for."""
    folder = tmp_path / "empty"
    folder.mkdir()
    for verb in ("warm", "info"):
        found = run(verb, folder)
        assert found.code == 4
        assert ".safetensors" in found.err


@pytest.mark.parametrize("verb", ["ls", "stats", "du", "verify", "repair", "prune", "clear"])
def test_no_store_is_10(run: Run, store: Path, verb: str) -> None:
    """Without a store a verb that needs one is 10, and makes none."""
    store.mkdir()
    found = run(verb)
    assert found.code == 10
    assert "warm" in found.err
    assert not list(store.iterdir())


def test_lock_timeout_is_11(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When another process builds the entry for too long, `warm` is 11: nothing was warmed."""

    def acquire(self: Cache, name: str, done: Callable[[str], bool]) -> Lock:
        raise LockTimeoutError("another process has been building this entry for over 0.1 s")

    monkeypatch.setattr(Cache, "acquire", acquire)
    assert run("warm", model).code == 11


def test_newer_store_is_12(run: Run, store: Path) -> None:
    """A store that only a newer program can read is 12, and is left alone."""
    (store / "v99").mkdir(parents=True)
    assert run("ls").code == 12
    assert [path.name for path in store.iterdir()] == ["v99"]


@pytest.mark.parametrize(
    "arguments", [["prune", "--max-size", "0"], ["clear"], ["rm", "KEY"], ["repair"], ["pin", "KEY"]], ids=" ".join
)
def test_read_only_is_13(
    run: Run, key: str, store: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """In a store that cannot be written, what would write is 13 and changes nothing."""
    before = files_of(store)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **more: mode != os.W_OK and real(path, mode, **more))
    yes = [] if arguments[0] == "pin" else ["--yes"]
    assert run(*[key if word == "KEY" else word for word in arguments], *yes).code == 13
    assert files_of(store) == before


def test_read_only_ls_is_0(run: Run, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a store that cannot be written works."""
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert key[:12] in run("ls").out


def test_interrupt_is_130(run: Run, model: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is 130, with a line and no traceback."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_module, "load", interrupted)
    found = run("warm", model)
    assert (found.code, found.out) == (130, "")
    assert found.err.startswith("interrupted: ")


@pytest.mark.parametrize("words", ["4,096 bytes: Cannot allocate memory", ""])
def test_too_little_memory_is_1(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """Memory that the system does not give is a line with what helps, and no traceback."""

    def refused(*_: object, **__: object) -> None:
        raise MemoryError(*filter(None, [words]))

    monkeypatch.setattr(model_module, "load", refused)
    found = run("warm", model, "--json")
    assert found.code == 1
    assert found.json["error"]["kind"] == "MemoryError"
    assert found.err.startswith(f"error: there is not enough memory: {words}")
    assert "--threads" in found.err


def test_verbose_keeps_the_exit_code(store: Path) -> None:
    """-v adds the traceback, and the exit code stays."""
    Cache(store).close()
    found = process("-v", "info", "abc", "--cache-dir", store)
    assert "Traceback" in found.stderr
    assert found.returncode == 4


# ---- nothing is lost by accident ----


@pytest.mark.parametrize("arguments", [["rm", "KEY"], ["clear"], ["prune", "--max-size", "0"]], ids=" ".join)
def test_nobody_to_ask(key: str, store: Path, arguments: list[str]) -> None:
    """Without --yes and a terminal nothing is removed, and the exit code is 2."""
    before = files_of(store)
    found = process(*[key if word == "KEY" else word for word in arguments], "--cache-dir", store)
    assert (found.returncode, found.stdout) == (2, "")
    assert "--yes" in found.stderr
    assert files_of(store) == before


@pytest.mark.parametrize("arguments", [["rm", "KEY"], ["clear"], ["prune", "--max-size", "0"]], ids=" ".join)
def test_dry_run_removes_nothing(run: Run, key: str, store: Path, arguments: list[str]) -> None:
    """--dry-run names the entry and needs no --yes; every file stays."""
    before = files_of(store)
    found = run(*[key if word == "KEY" else word for word in arguments], "--dry-run")
    assert found.code == 0
    assert found.out.startswith(f"would remove  {key[:12]}")
    assert files_of(store) == before


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 0), ("n\n", 1, 1), ("", 1, 1)])
def test_asking(
    run: Run, key: str, store: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, left: int
) -> None:
    """On a terminal the answer decides, and no answer is no."""
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    found = run("clear")
    assert found.code == code
    assert "[y/N]" in found.err
    assert len(list(store.glob("v*/entries/*/*.safetensors"))) == left


def test_key_prefix(run: Run, key: str) -> None:
    """The start of a key is enough, in either case of letters, as long as only one entry has it."""
    assert run("--json", "info", key[:6]).json["entry"]["key"] == key
    assert run("--json", "info", key[:6].upper()).json["entry"]["key"] == key


def test_ambiguous_key_prefix_is_4(run: Run, tmp_path: Path, store: Path) -> None:
    """A prefix of two entries is refused, and removes neither."""
    keys: list[str] = []
    while len({key[0] for key in keys}) == len(keys):  # ends after 17 at the latest: a first digit comes twice
        path = checkpoint(tmp_path / f"{len(keys)}.safetensors", len(keys))
        keys += run("--json", "warm", path).json["models"][0]["keys"]
    found = run("rm", "--yes", keys[-1][0])
    assert found.code == 4
    assert "2 entries" in found.err
    assert len(list(store.glob("v*/entries/*/*.safetensors"))) == len(keys)


@pytest.mark.parametrize(
    "name", ["../../etc", "/etc", "..", "../v1", "v1/index.sqlite3", "*", "", "0/../../x", "a\x1b[2J"]
)
@pytest.mark.parametrize("verb", [["rm", "--yes"], ["pin"], ["unpin"], ["verify"]], ids=lambda words: words[0])
def test_hostile_keys(
    run: Run, key: str, store: Path, monkeypatch: pytest.MonkeyPatch, verb: list[str], name: str
) -> None:
    """A key is never a path: what is no key is 4 and touches no file."""
    monkeypatch.chdir(store)
    before = files_of(store.parent)
    found = run(*verb, "--", name) if name.startswith("-") else run(*verb, name)
    assert found.code == 4
    assert "\x1b" not in found.err
    assert files_of(store.parent) == before


def test_empty_key(run: Run, key: str, model: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty argument, as from an unset shell variable, is not the folder that one stands in."""
    monkeypatch.chdir(model.parent)
    assert run("rm", "--yes", "").code == 4
    assert entry_file(store).exists()
