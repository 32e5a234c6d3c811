"""Run the Python of the documentation, and hold what it says about verbs, options, settings and errors."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantcache import cli, errors
from quantcache.cache.settings import SETTINGS

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(
    r"(?P<mark><!--\s*not run:\s*(?P<reason>[^\n]*?)\s*-->\s*\n\s*)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
EXIT_CODES = {0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 15, 130}


def text_of(page: Path) -> str:
    """Return a page's text; skip the test where the page is not written yet."""
    if not page.is_file():
        pytest.skip(f"{page.name} is not written yet")
    return page.read_text()


def python_of(page: Path) -> list[tuple[int, str, str | None]]:
    """Return the Python blocks of a page: line, code, and why it is not run (None: it is)."""
    text = text_of(page)
    return [
        (text.count("\n", 0, found.start("code")) + 1, found["code"], found["reason"] if found["mark"] else None)
        for found in BLOCK.finditer(text)
        if found["language"] in ("python", "py")
    ]


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each verb, and that of the program under ""."""
    top = cli._parser()
    (verbs,) = [action for action in top._actions if isinstance(action, argparse._SubParsersAction)]
    return {"": top, **verbs.choices}


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the long options of a parser."""
    return {name for action in parser._actions for name in action.option_strings if name.startswith("--")}


def commands_of(page: Path) -> list[tuple[str, str]]:
    """Return the command lines that a page shows: their verb, and the whole of it. Prose and Python do not count."""
    text = text_of(page)
    shown = [
        line
        for found in BLOCK.finditer(text)
        if found["language"] not in ("python", "py")
        for line in found["code"].splitlines()
    ]
    shown += re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
    shown = [part for line in shown for part in re.split(r"&&|\|\||;|\s\|\s", line)]
    found = [re.match(r"(?:\$ )?quantcache ((?:-\S+ )*)([a-z]+)\b", line.strip()) for line in shown]
    return [(match[2], match.string) for match in found if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page run from top to bottom, beside a small model.safetensors."""
    generator = np.random.default_rng(0)
    names = [
        f"blocks.{n}.{part}.weight" for n in range(2) for part in ("att.key", "att.output", "ffn.key", "ffn.value")
    ]
    tensors = {
        name: generator.standard_normal((64, 128)).astype(np.float16) for name in [*names, "emb.weight", "head.weight"]
    }
    save_file(tensors | {"blocks.0.ln1.weight": np.ones(128, np.float16)}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "__main__"}
    for line, code, reason in python_of(page):
        if reason is None:
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), space)
        else:
            assert len(reason) > 5, f"{page.name}:{line}: a block that is not run needs a reason"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fences_close(page: Path) -> None:
    """Every block of code ends on a line of its own: one that does not would be neither shown nor run."""
    fences = re.findall(r"^```(.*)$", text_of(page), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert all(not closing for closing in fences[1::2])
    assert "```" not in BLOCK.sub("", text_of(page))


def test_the_readme_shows_python() -> None:
    """README.md has Python that is run."""
    assert [code for _, code, reason in python_of(REPOSITORY / "README.md") if reason is None]


def test_blocks_are_found(tmp_path: Path) -> None:
    """A marked block is known from one that is run, and other languages are left out."""
    page = tmp_path / "page.md"
    page.write_text(
        "a\n```python\n1 / 0\n```\n<!-- not run: needs a GPU -->\n```python\nx\n```\n"
        "```sh\nquantcache ls\n```\n`quantcache du -n`, `quantcache ls && quantcache rm x`"
    )
    assert python_of(page) == [(3, "1 / 0\n", None), (7, "x\n", "needs a GPU")]
    assert commands_of(page) == [
        ("ls", "quantcache ls"),
        ("du", "quantcache du -n"),
        ("ls", "quantcache ls"),
        ("rm", "quantcache rm x"),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_commands_exist(page: Path) -> None:
    """Every command that a page shows has a verb and options of the parser."""
    known = parsers()
    for verb, line in commands_of(page):
        assert verb in known, f"{page.name}: {line}"
        unknown = set(re.findall(r"(?<!\S)\[?(--[a-z-]+)", line)) - options_of(known[verb]) - options_of(known[""])
        assert not unknown, f"{page.name}: {line}"


def sections() -> dict[str, str]:
    """Return what docs/cli.md says about each verb, by its headings."""
    found = re.split(
        r"^### `([a-z]+)[^\n]*\n", text_of(DOCS / "cli.md").split("\n## Everywhere")[0], flags=re.MULTILINE
    )
    return dict(zip(found[1::2], found[2::2], strict=True))


def test_every_verb_is_documented() -> None:
    """docs/cli.md has one section per verb, and none for a verb that is not there."""
    assert set(sections()) == set(parsers()) - {""}


@pytest.mark.parametrize("verb", [verb for verb in parsers() if verb])
def test_every_option_is_documented(verb: str) -> None:
    """A verb's section names exactly the verb's own options."""
    known = parsers()
    own = options_of(known[verb]) - options_of(known[""])
    assert set(re.findall(r"`(?:-\w`, `)?(--[a-z-]+)", sections()[verb])) == own


def test_common_options_and_settings_are_documented() -> None:
    """docs/cli.md names every option that all verbs have, every setting and every exit code."""
    text = text_of(DOCS / "cli.md")
    assert {name for name in options_of(parsers()[""]) if f"`{name}" not in text} == set()
    assert set(re.findall(r"^\| `(\w+)` \|", text.split("## Settings")[1], re.MULTILINE)) == set(SETTINGS)
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)} == EXIT_CODES


def test_every_error_is_documented() -> None:
    """docs/errors.md has a row for every exception with its exit code, and for every warning; and for nothing else."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", text_of(DOCS / "errors.md"), re.MULTILINE))
    assert set(rows) == set(errors.__all__)
    for name, code in rows.items():
        assert code == str(getattr(getattr(errors, name), "exit_code", "-")), name


@pytest.mark.parametrize("test", re.findall(r"`(tests/[^`]+)`", (DOCS / "promises.md").read_text()))
def test_promises_name_tests(test: str) -> None:
    """Every test that promises.md names is there."""
    path, _, name = test.partition("::")
    assert (REPOSITORY / path).exists(), path
    if name:
        assert f"def {name}(" in (REPOSITORY / path).read_text(), test


def test_every_promise_is_shown() -> None:
    """The fifteen promises each name a test."""
    parts = re.split(r"^## (?=\d+\.)", (DOCS / "promises.md").read_text(), flags=re.MULTILINE)[1:]
    assert [int(part.split(".")[0]) for part in parts] == list(range(1, 16))
    assert all("Shown by `tests/" in part for part in parts)
