"""A setting comes from the flag, else the environment, else quantcache.toml, else the default, and says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantcache.cache.settings import SETTINGS, parse_duration, parse_share, parse_size, resolve
from quantcache.errors import UsageError


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where quantcache.toml is looked for; no setting comes from outside the test."""
    for name in SETTINGS:
        monkeypatch.delenv(f"QUANTCACHE_{name.upper()}", raising=False)
    path = tmp_path / "quantcache.toml"
    monkeypatch.setenv("QUANTCACHE_CONFIG", str(path))
    return path


def test_order_and_origins(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each level wins over the next, and the origin names the level, the variable or the file."""

    def found(**flags: Any) -> tuple[Any, str]:
        setting = resolve(flags)["max_size"]
        return setting.value, setting.origin

    assert found() == (200 * 10**9, "default")
    config.write_text('max_size = "3GB"\n')
    assert found() == (3 * 10**9, f"file {config}")
    monkeypatch.setenv("QUANTCACHE_MAX_SIZE", "2GB")
    assert found() == (2 * 10**9, "environment QUANTCACHE_MAX_SIZE")
    assert found(max_size="1GB") == (10**9, "flag")
    assert found(max_size=None) == (2 * 10**9, "environment QUANTCACHE_MAX_SIZE")
    monkeypatch.setenv("QUANTCACHE_MAX_SIZE", "")
    assert found() == (3 * 10**9, f"file {config}")


def test_zero_is_a_value(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag of 0 counts as given."""
    monkeypatch.setenv("QUANTCACHE_THREADS", "4")
    assert resolve({"threads": 0})["threads"].value == 0
    assert resolve()["threads"].value == 4


def test_every_setting_is_resolved(config: Path) -> None:
    """Every setting has a value of its default, and settings of other origins leave the rest alone."""
    found = resolve({"verify": "open"})
    assert found.keys() == SETTINGS.keys()
    assert {name: setting.origin for name, setting in found.items() if name != "verify"} == dict.fromkeys(
        SETTINGS.keys() - {"verify"}, "default"
    )
    assert (found["mode"].value, found["keep_free"].value, found["policy"].value) == ("auto", "5%", "lru")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("1", 1), (17, 17), ("1kB", 1000), ("1.5 GB", 1_500_000_000), ("512MiB", 512 << 20), ("2t", 2 * 10**12)],
)
def test_sizes(text: str | int, expected: int) -> None:
    """Sizes take decimal and binary units."""
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "1 XB", "GB", "1e9", "1,5GB", "0x10", "1GB2", "nan"])
def test_no_sizes(text: str) -> None:
    """What is no size is refused in words."""
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("90s", 90), ("5m", 300), ("5min", 300), ("12h", 43_200), ("30d", 2_592_000), ("1W", 604_800)]
)
def test_durations(text: str, expected: float) -> None:
    """Durations take seconds to weeks."""
    assert parse_duration(text) == expected


def test_shares() -> None:
    """A share is a percentage or a size, and at most the whole disk."""
    assert [parse_share(text) for text in ("5%", " 100% ", "20GB", 0)] == ["5%", "100%", "20GB", "0"]
    for bad in ("101%", "%", "-5%", "5%%", "much"):
        with pytest.raises(UsageError):
            parse_share(bad)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_size", "large"), ("keep_free", "200%"), ("policy", "fifo"), ("threads", "-1"), ("threads", "many"),
        ("threads", "1025"), ("verify", "never"), ("mode", "on"), ("lock_timeout", "soon"),
    ],
)  # fmt: skip
def test_bad_values_name_their_origin(config: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A value that cannot be meant is refused, and the message says which setting, and where it stands."""
    with pytest.raises(UsageError, match=f"flag: {name}"):
        resolve({name: value})
    with monkeypatch.context() as patch:
        patch.setenv(f"QUANTCACHE_{name.upper()}", value)
        with pytest.raises(UsageError, match=f"environment QUANTCACHE_{name.upper()}: {name}"):
            resolve()
    config.write_text(f'{name} = "{value}"\n')
    with pytest.raises(UsageError, match=rf"file .*quantcache.toml: {name}"):
        resolve()


@pytest.mark.parametrize("text", ["threads = [1]", "dir = 5", "policy = []", "max_size = {}", "verify = 1"])
def test_bad_types_in_the_file(config: Path, text: str) -> None:
    """A value of another type is refused like any other, not with a traceback."""
    config.write_text(text)
    with pytest.raises(UsageError, match=r"quantcache\.toml"):
        resolve()


@pytest.mark.parametrize("text", ["threads = ", "[", "\ufeff\0"])
def test_broken_file(config: Path, text: str) -> None:
    """A file that is no TOML is named."""
    config.write_text(text)
    with pytest.raises(UsageError, match="is not TOML"):
        resolve()


def test_unknown_setting(config: Path) -> None:
    """A misspelt setting is refused, with the list of those there are."""
    config.write_text("max_sise = 1\n")
    with pytest.raises(UsageError, match="max_sise") as caught:
        resolve()
    assert "max_size" in str(caught.value.hint)


def test_numbers_in_the_file(config: Path) -> None:
    """Plain numbers are fine where a size or a count is wanted; ~ is the home folder."""
    config.write_text('max_size = 5000\nthreads = 3\nlock_timeout = 1.5\ndir = "~/x"\n')
    found = {name: setting.value for name, setting in resolve().items()}
    assert (found["max_size"], found["threads"], found["lock_timeout"]) == (5000, 3, 1.5)
    assert found["dir"] == Path("~/x").expanduser()
