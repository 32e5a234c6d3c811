"""Hold the structure of the package: who may import whom, where SQL may stand, how long a module may get."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantcache

PACKAGE = Path(quantcache.__file__).parent
MODULES = {
    ".".join(("quantcache", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
CODE_LINES = 460

#: part of the package -> parts that it may import besides itself, and why no more
MAY_IMPORT: dict[str, tuple[set[str], str]] = {
    "errors": (set(), "everything imports it, so it can import nothing"),
    "trace": ({"errors"}, "whoever does something measures it, so it knows nobody"),
    "tensor": ({"errors"}, "plain records; they know neither codecs nor files"),
    "once": (set(), "it knows attributes, whatever they are of"),
    "memory": (set(), "it asks the system about addresses, whatever is there"),
    "quant": ({"once", "trace", "tensor", "errors"}, "a codec turns arrays into arrays: no files, no store"),
    "cache": ({"once", "trace", "memory", "errors"}, "it stores bytes, whatever they mean: another loader can use it, and `ls` needs no NumPy"),
    "loader": ({"once", "trace", "memory", "quant", "cache", "tensor", "errors"}, "the one place where files, codecs and the store meet"),
    "render": (set(), "it formats what it is given and decides nothing"),
    "integrations": ({"loader", "quant", "cache", "tensor", "errors"}, "they stand on the loader, nothing on them"),
    "verbs": ({"loader", "cache", "render", "errors"}, "they have no logic of their own, so they need no codec"),
    "cli": ({"verbs", "loader", "cache", "render", "errors"}, "it has no logic of its own, so it needs no codec"),
    "": ({"loader", "cache", "tensor", "errors"}, "the public names, imported when they are first used"),
}  # fmt: skip

#: who (a pattern), must not import what (a pattern), and why
MUST_NOT_IMPORT: list[tuple[str, str, str]] = [
    (r"errors", r"(?!__future__).*", "everything imports it, so that it costs nothing and cannot make a circle"),
    (r"cache(\..*)?", r"numpy|wgpu|ml_dtypes|gguf", "`quantcache ls` answers at once, and bytes need no arrays"),
    (r"cli|verbs\..*|render|", r"numpy|wgpu|ml_dtypes|gguf", "`quantcache ls` answers at once"),
    (r"(?!loader\.gpu\.device$).*", r"wgpu", "it is slow to import and can abort the process: one file knows how to handle it"),
    (r"(?!cache\.(index|tolerant)$).*", r"sqlite3", "one file has the SQL; tolerant.py only catches its error class"),
    (r"loader\.formats\..*", r"quantcache\.loader\.(pipeline|model|plan|recipe)", "a new format is one file"),
    (r"loader\.formats\..*", r"quantcache\.(quant|cache)", "what is in a file does not depend on what becomes of it"),
    (r"(?!cli$|verbs\b).*", r"argparse|quantcache\.(cli|verbs|render)", "a library neither reads arguments nor prints"),
    (r".*", r"pickle|marshal|shelve|dill|torch", "loading executes nothing that is in a file"),
]  # fmt: skip

SQL = re.compile(
    r"\b(SELECT\s.+\sFROM|INSERT\s(OR\s\w+\s)?INTO|UPDATE\s\S+\sSET|DELETE\sFROM|(CREATE|DROP)\s(TABLE|INDEX)|PRAGMA\s\w)",
    re.DOTALL,
)


def imports_of(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Return the dotted names that a module imports anywhere in it: in functions, and for the type checker, too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            home = ".".join([*base, *([node.module] if node.module else [])])
            found.add(home)
            found |= {f"{home}.{alias.name}" for alias in node.names if f"{home}.{alias.name}" in MODULES}
    return found


def part_of(module: str) -> str:
    """Return the part of the package that a module belongs to: "cache" for quantcache.cache.key."""
    return [*module.split("."), ""][1]


def upward(module: str, imported: set[str]) -> list[str]:
    """Return what a module imports from parts that it may not import."""
    part = part_of(module)
    allowed = MAY_IMPORT[part][0] | {part, ""}  # the package itself imports nothing until it is asked
    return sorted(name for name in imported if name.split(".")[0] == "quantcache" and part_of(name) not in allowed)


def forbidden(module: str, imported: set[str]) -> list[str]:
    """Return what a module must not import, with the reason."""
    who = module.removeprefix("quantcache").removeprefix(".")
    return [
        f"{name}: {reason}"
        for pattern, what, reason in MUST_NOT_IMPORT
        if re.fullmatch(pattern, who)
        for name in sorted(imported)
        if re.fullmatch(rf"({what})(\..*)?", name)
    ]


def other_codecs(module: str, imported: set[str]) -> list[str]:
    """Return the codecs other than its own that a codec imports."""
    own = re.match(r"quantcache\.quant\.codecs\.\w+", module)
    return sorted(
        name
        for name in imported
        if own and re.match(r"quantcache\.quant\.codecs\.\w+", name) and not f"{name}.".startswith(f"{own[0]}.")
    )


def imported_by(module: str) -> set[str]:
    """Return the imports of one of the package's modules."""
    path = MODULES[module]
    return imports_of(path.read_text(), module, is_package=path.name == "__init__.py")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    """A module imports only from its own part and from those below it."""
    assert part_of(module) in MAY_IMPORT, "a new part needs a row in MAY_IMPORT"
    assert upward(module, imported_by(module)) == [], MAY_IMPORT[part_of(module)][1]


@pytest.mark.parametrize("module", MODULES)
def test_forbidden_imports(module: str) -> None:
    """No module imports what the table keeps from it."""
    assert forbidden(module, imported_by(module)) == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("quantcache.quant.codecs.")])
def test_codecs_stand_alone(module: str) -> None:
    """A codec never imports another one, so that removing a folder removes a codec and nothing else."""
    assert other_codecs(module, imported_by(module)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("quantcache.cache.key", "import quantcache.tensor"),
        ("quantcache.cache.key", "def f():\n    from quantcache.loader import model"),
        ("quantcache.cache.key", "from ..quant.codec import codec"),
        ("quantcache.cache.key", "import numpy as np"),
        ("quantcache.cache.key", "if TYPE_CHECKING:\n    from numpy.typing import NDArray"),
        ("quantcache.tensor", "from .quant import codec"),
        ("quantcache.errors", "import os"),
        ("quantcache.loader.model", "import wgpu.utils"),
        ("quantcache.loader.model", "import sqlite3"),
        ("quantcache.loader.formats.gguf", "from quantcache.loader import plan"),
        ("quantcache.quant.codecs.nf4", "from quantcache.quant.codecs import int8"),
        ("quantcache.quant.codecs.int8", "from quantcache.quant.codecs.int8_row import reference"),
    ],
)
def test_the_tables_catch(module: str, source: str) -> None:
    """Each kind of forbidden import is seen in each form in which it can be written."""
    imported = imports_of(source, module)
    assert upward(module, imported) or forbidden(module, imported) or other_codecs(module, imported)


@pytest.mark.parametrize("module", MODULES)
def test_sql_stands_in_one_file(module: str) -> None:
    """Only cache/index.py has SQL, so that the schema can change in one place."""
    tree = ast.parse(MODULES[module].read_text())
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert any(map(SQL.search, texts)) == (module == "quantcache.cache.index")


def code_lines(source: str) -> int:
    """Return the number of lines that are neither blank, comment nor docstring."""
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in documented for number, line in lines
    )


def test_code_lines_counts_code() -> None:
    """Docstrings, comments and blank lines are free."""
    assert code_lines('"""One.\n\nTwo."""\n\n# no\nx = 1\n\n\ndef f():\n    """Doc."""\n    return 2  # yes\n') == 3


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module: str) -> None:
    """A module that outgrows about 400 lines of code has two jobs."""
    assert code_lines(MODULES[module].read_text()) <= CODE_LINES


def test_public_names() -> None:
    """`__all__` is sorted, has every exception, and every name in it can be imported."""
    from quantcache import errors

    assert quantcache.__all__ == sorted(set(quantcache.__all__))
    assert set(errors.__all__) < set(quantcache.__all__)
    assert dir(quantcache) == quantcache.__all__
    for name in quantcache.__all__:
        assert getattr(quantcache, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        quantcache.nothing  # noqa: B018


def test_importing_the_package_is_light() -> None:
    """`import quantcache` imports none of its parts: they come when a name is first used."""
    script = "import sys, quantcache; print([n for n in sys.modules if n.startswith('quantcache.') or n == 'numpy'])"
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("module", MODULES)
def test_all_names_what_is_there(module: str) -> None:
    """Every name in a module's `__all__` exists, once."""
    names = getattr(importlib.import_module(module), "__all__", [])
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(sys.modules[module], name)] == []


def public(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield public functions, classes and their public methods."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module: str) -> None:
    """Every module and every public function, class and method says what it is for."""
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree)
    assert [name for name, node in public(tree) if not ast.get_docstring(node)] == []  # type: ignore[arg-type]
