"""Own every setting: its name, default, and where its value came from. Knows no store."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quantcache.errors import UsageError

__all__ = ["SETTINGS", "Setting", "parse_duration", "parse_share", "parse_size", "parse_threads", "resolve"]

_UNITS = {"": 1, "B": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9, "T": 10**12,
          "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}  # fmt: skip
_SECONDS = {"": 1, "S": 1, "M": 60, "MIN": 60, "H": 3600, "D": 86400, "W": 604800}


@dataclass(frozen=True)
class Setting:
    """Hold one resolved setting.

    Args:
        name: as in quantcache.toml and, upper-cased after QUANTCACHE_, in the environment.
        value: parsed.
        origin: "flag", "environment QUANTCACHE_X", "file <path>" or "default".
    """

    name: str
    value: Any
    origin: str


def _split(text: str, units: Mapping[str, int], what: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if not found or found[2].upper() not in units:
        raise UsageError(f"{text!r} is not {what}")
    return float(found[1]) * units[found[2].upper()]


def parse_size(text: str | int) -> int:
    """Return bytes from "50GB", "512MiB" or a number."""
    return int(_split(str(text), _UNITS, "a size (as 50GB or 512MiB)"))


def parse_duration(text: str | float) -> float:
    """Return seconds from "30d", "12h", "90s" or a number."""
    return _split(str(text), _SECONDS, "a duration (as 30d, 12h or 90s)")


def parse_share(text: str | int) -> str:
    """Check "10%" (of the disk) or a size; returned as it is, since the disk is not known here."""
    value = str(text).strip()
    if value.endswith("%"):
        share = _split(value[:-1], {"": 1}, "a percentage (as 5%)")
        if share > 100:
            raise UsageError(f"{text!r} is more than the whole disk")
    else:
        parse_size(value)
    return value


def _choice(*allowed: str) -> Any:
    def parse(text: str) -> str:
        if text not in allowed:
            raise UsageError(f"{text!r} is not one of {', '.join(allowed)}")
        return text

    return parse


def parse_threads(text: str | int) -> int:
    """Return a number of threads; 0 is one per core."""
    try:
        count = int(text)
    except ValueError:
        count = -1
    if not 0 <= count <= 1024:
        raise UsageError(f"{text!r} is not a number of threads (0: one per core)")
    return count


#: name -> (parser, default)
SETTINGS: dict[str, tuple[Any, Any]] = {
    "dir": (lambda text: Path(text).expanduser(), None),
    "max_size": (parse_size, 200 * 10**9),
    "keep_free": (parse_share, "5%"),
    "policy": (_choice("lru", "size", "cost"), "lru"),
    "threads": (parse_threads, 0),
    "verify": (_choice("touch", "open", "off"), "touch"),
    "mode": (_choice("auto", "off", "readonly", "refresh"), "auto"),
    "lock_timeout": (parse_duration, None),
}


@cache
def _platform_folder(kind: str) -> Path:
    import platformdirs  # here: 30 ms that QUANTCACHE_DIR spares

    return Path(getattr(platformdirs, f"user_{kind}_path")("quantcache"))


def config_file() -> Path:
    """Return where the user's quantcache.toml is read from."""
    named = os.environ.get("QUANTCACHE_CONFIG")
    return Path(named) if named else _platform_folder("config") / "quantcache.toml"


def _from_file() -> tuple[dict[str, Any], Path]:
    path = config_file()
    try:
        raw = path.read_bytes()
    except OSError:
        return {}, path
    import tomllib  # most users have no such file

    try:
        found = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    unknown = sorted(set(found) - set(SETTINGS))
    if unknown:
        raise UsageError(f"{path} has the unknown setting {unknown[0]!r}", hint=f"known: {', '.join(SETTINGS)}")
    return found, path


def resolve(flags: Mapping[str, Any] | None = None) -> dict[str, Setting]:
    """Return every setting: flag, else environment, else quantcache.toml, else default.

    Args:
        flags: name -> value; None counts as not given.

    Raises:
        UsageError: a value cannot be parsed; the message names where it stands.
    """
    flags = flags or {}
    in_file, path = _from_file()
    resolved = {}
    for name, (parse, default) in SETTINGS.items():
        variable = f"QUANTCACHE_{name.upper()}"
        if flags.get(name) is not None:
            raw, origin = flags[name], "flag"
        elif os.environ.get(variable):
            raw, origin = os.environ[variable], f"environment {variable}"
        elif name in in_file:
            raw, origin = in_file[name], f"file {path}"
        else:
            value = _platform_folder("cache") if name == "dir" else default
            resolved[name] = Setting(name, value, "default")
            continue
        try:
            resolved[name] = Setting(name, parse(raw), origin)
        except UsageError as error:
            raise UsageError(f"{origin}: {name}: {error.message}", hint=error.hint) from error
        except RuntimeError as error:  # a home folder that is nobody's
            raise UsageError(f"{origin}: {name}: {raw!r}: {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{origin}: {name}: {raw!r} is not of the right type") from error
    return resolved
