"""Own the forms of adapters: what their tensors mean, and what their configuration says. Reads no weight, knows no checkpoint.

A tensor that is not understood stands for the weight of its own name; `changes.py` finds out whether there is one.
Source: peft 0.21 (`tuners/lora`), kohya-ss sd-scripts, web-rwkv, llama.cpp's convert_lora_to_gguf.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantcache.errors import SourceError, UsageError, shorten
from quantcache.loader.source import Source, open_checkpoint

__all__ = ["CONFIG", "Adapter", "Alpha", "Module", "by_pattern", "open_adapter", "paired"]

#: A number for all weights; pairs of name pattern and number (or a mapping), of which the first that matches counts; or
#: None: the file's own.
Alpha = float | Sequence[tuple[str, float]] | Mapping[str, float] | None


@dataclass(slots=True)
class Module:
    """Collect what an adapter says about one module.

    Args:
        spelled: its name, or that of its weight.
        roles: "down", "up", "alpha", "bias", "difference" or "difference of bias" -> name of a tensor.
        embedding: its product is of the weight's transpose.
    """

    spelled: str
    roles: dict[str, str] = field(default_factory=dict)
    embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """Hold one opened adapter.

    Args:
        source: its file.
        alpha: given by the caller, a number or pairs; goes before what the file says.
        config: of PEFT, {} for other forms.
        modules: what it says, by module.
        replaced: tensors that stand for themselves, by the name of the weight.
    """

    source: Source
    alpha: float | tuple[tuple[str, float], ...] | None
    config: Mapping[str, Any]
    modules: Mapping[str, Module]
    replaced: Mapping[str, str]

    @property
    def is_peft(self) -> bool:
        """True if its tensors are called as peft calls them."""
        return _is_peft(self.source)


#: How tensors are called: (pattern of the whole name, role; None if the pattern's group says it). The first that matches counts.
_ROLES: tuple[tuple[re.Pattern[str], str | None], ...] = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"(?P<module>.+)\.lora_embedding_(?P<role>[AB])(?:\.[^.]+)?", None),
        (r"(?P<module>.+)\.lora_B(?:\.[^.]+)?\.bias", "bias"),
        (r"(?P<module>.+)\.lora_(?P<role>[AB])(?:\.[^.]+)?\.weight", None),
        (r"(?P<module>.+)\.lora_(?P<role>[ABab])", None),
        (r"(?P<module>.+)\.lora_(?P<role>up|down)\.weight", None),
        (r"(?P<module>.+)\.lora\.(?P<role>up|down)\.weight", None),
        (r"(?P<module>.+)\.lora\.(?P<role>[01])", None),
        (r"(?P<module>.+:\d+):(?P<role>up|down)", None),
        (r"(?P<module>.+)\.alpha", "alpha"),
        (r"(?P<module>.+)\.diff_b", "difference of bias"),
        (r"(?P<module>.+)\.diff", "difference"),
    )
)
_DOWN_UP = {"A": "down", "a": "down", "0": "down", "down": "down", "B": "up", "b": "up", "1": "up", "up": "up"}

#: Changes that are no sum of a product: refused by their names.
_REFUSED = (
    (r"lora_magnitude_vector|dora_scale", "DoRA"), (r"\.hada_", "LoHa"), (r"\.lokr_", "LoKr"),
    (r"\.lora_mid\.", "a Tucker decomposition (LoCon)"), (r"\.oft_|\.boft_", "OFT"), (r"\.ia3_", "IA3"),
    (r"\.vera_", "VeRA"), (r"trainable_tokens", "trainable tokens"),
)  # fmt: skip
#: Settings of PEFT's configuration that change what the tensors mean: refused where they are set.
_REFUSED_SETTINGS = {
    "use_dora": "DoRA", "layer_replication": "layer replication", "use_qalora": "QA-LoRA", "alora_invocation_tokens": "aLoRA",
    "target_parameters": "LoRA of bare parameters", "use_bdlora": "BD-LoRA", "arrow_config": "Arrow", "trainable_token_indices": "trainable tokens",
    "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA",
}  # fmt: skip
#: Ways to begin that take something away from the checkpoint's own weights, which the adapter then belongs to.
_REFUSED_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")

_PEFT_PREFIX = "base_model.model."
CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG = 1 << 20
_MAX_PATTERN, _MAX_REPEATS, _MAX_MODULE = 512, 3, 256


def paired(given: Any) -> tuple[str | os.PathLike[str], Any]:
    """Return an adapter's path and alpha, given as a path or as (path, alpha).

    Raises:
        UsageError: it is neither.
    """
    if isinstance(given, str | os.PathLike):
        return given, None
    if not isinstance(given, Sequence) or len(given) != 2 or not isinstance(given[0], str | os.PathLike):
        raise UsageError(f"an adapter is a path or (path, alpha), not {given!r}")
    return given[0], given[1]


def open_adapter(path: str | os.PathLike[str], alpha: Alpha = None) -> Adapter:
    """Open an adapter and sort its tensors; a PEFT folder, a .safetensors or .st file, or a GGUF adapter.

    Args:
        path: the file, or PEFT's folder.
        alpha: see Alpha.

    Raises:
        SourceError: it cannot be read, or does something else than add low-rank products.
        UsageError: alpha is no number.
    """
    checked = _checked(alpha)
    where = Path(path)
    if where.is_dir() and (where / _WEIGHTS).exists():
        where = where / _WEIGHTS
    sources = open_checkpoint(where, names="file")
    if len(sources) != 1:
        raise SourceError("an adapter is one file", path=where)
    source = sources[0]
    modules: dict[str, Module] = {}
    replaced: dict[str, str] = {}
    for name in source.tensors:
        for pattern, what in _REFUSED:
            if re.search(pattern, name):
                raise SourceError(f"is {what}, which is no sum of low-rank products", path=source.path, tensor=name)
        _sort(name, modules, replaced, source)
    config = _peft_config(source.path.parent / CONFIG) if _is_peft(source) else {}
    for module in modules.values():
        _check_roles(module, source)
        if config and len(module.spelled) > _MAX_MODULE:
            raise SourceError(f"its name has more than {_MAX_MODULE} characters", path=source.path, tensor=next(iter(module.roles.values())))
    if not source.tensors:
        raise SourceError("the adapter has no tensors", path=source.path)
    return Adapter(source, checked, config, modules, replaced)


def _is_peft(source: Source) -> bool:
    return any(re.search(r"\.lora_(embedding_)?[AB]\.", name) or name.startswith(_PEFT_PREFIX) for name in source.tensors)


def _checked(alpha: Any) -> float | tuple[tuple[str, float], ...] | None:
    """Return alpha as a number or pairs."""

    def number(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError
        found = float(value)
        if not math.isfinite(found):
            raise ValueError
        return found

    try:
        if alpha is None:
            return None
        if isinstance(alpha, str | bytes):
            raise TypeError
        if isinstance(alpha, numbers.Real):
            return number(alpha)
        pairs = tuple((pattern, number(value)) for pattern, value in (alpha.items() if isinstance(alpha, Mapping) else alpha))
        if not pairs or not all(isinstance(pattern, str) and pattern for pattern, _ in pairs):
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"alpha {alpha!r} is neither a number nor (pattern, number) pairs") from None
    return pairs


def _sort(name: str, modules: dict[str, Module], replaced: dict[str, str], source: Source) -> None:
    """Enter one tensor under its module and role."""
    for pattern, role in _ROLES:
        found = pattern.fullmatch(name)
        if not found:
            continue
        spelled = found["module"].removeprefix(_PEFT_PREFIX).replace(".base_layer", "")
        module = modules.setdefault(spelled, Module(spelled))
        role = role or _DOWN_UP[found["role"]]
        if role in module.roles:
            raise SourceError(f"says the same as {shorten(module.roles[role])}", path=source.path, tensor=name)
        module.roles[role] = name
        # llama.cpp keeps the pair of its token embedding the other way round, too
        module.embedding |= "lora_embedding_" in name or (source.format == "gguf" and spelled.removesuffix(".weight") == "token_embd")
        return
    weight = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.)|\.base_layer(?=\.)", "", name.removeprefix(_PEFT_PREFIX))
    if weight in replaced:
        raise SourceError(f"says the same as {shorten(replaced[weight])}", path=source.path, tensor=name)
    replaced[weight] = name


def _check_roles(module: Module, source: Source) -> None:
    """Check that what is said about a module belongs together: halves of a product, and what only a product has."""
    roles = module.roles
    if ("down" in roles) != ("up" in roles):
        raise SourceError("has no other half: a product needs two tensors", path=source.path, tensor=roles.get("down") or roles["up"])
    for role in ("alpha", "bias"):
        if role in roles and "down" not in roles:
            raise SourceError("belongs to no product", path=source.path, tensor=roles[role])


def _peft_config(path: Path) -> dict[str, Any]:
    """Read and check PEFT's configuration; without one, {}."""
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise SourceError(f"has more than {_MAX_CONFIG} bytes", path=path)
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"cannot be read: {str(error)[:120]}", path=path) from error
    if not isinstance(config, dict):
        raise SourceError("is not a JSON object", path=path)
    if str(config.get("peft_type", "LORA")) != "LORA":
        raise SourceError(f"the adapter is {shorten(str(config['peft_type']))}, not LoRA", path=path)
    for setting, what in _REFUSED_SETTINGS.items():
        if config.get(setting):
            raise SourceError(f"the adapter is {what} ({setting}), which is no sum of low-rank products", path=path)
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_REFUSED_STARTS):
        raise SourceError(
            f"the adapter is for weights that were changed when it was begun (init_lora_weights: {shorten(start)})",
            path=path,
            hint="save it as plain LoRA: peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    values = [config.get("r", 8), config.get("lora_alpha", 8)]
    for patterns in (config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}):
        if not isinstance(patterns, dict):
            raise SourceError("rank_pattern and alpha_pattern are objects", path=path)
        values += patterns.values()
        for pattern in patterns:
            _check_pattern(pattern, path)
    if any(isinstance(n, bool) or not isinstance(n, int | float) or not abs(n) < 1e30 for n in values):
        raise SourceError("r, lora_alpha and their patterns are numbers", path=path)
    return config


def _check_pattern(pattern: str, path: Path) -> None:
    """Refuse a regular expression that is none, or that a name could keep busy for ever."""
    repeated_group, repeats = re.search(r"\)[*+{]|\\\d|\(\?(?!:)", pattern), len(re.findall(r"(?<!\\)[*+{]", pattern))
    if len(pattern) > _MAX_PATTERN or repeated_group or repeats > _MAX_REPEATS:
        raise SourceError(f"{shorten(pattern)} is a pattern that could take for ever", path=path)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise SourceError(f"{shorten(pattern)} is no pattern: {error}", path=path) from error


def by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of a module's name, as peft does."""
    starts = [0, *(place + 1 for place, letter in enumerate(module) if letter == ".")]
    for pattern, value in patterns.items():
        if any(re.fullmatch(pattern, module[start:]) for start in starts):
            return value
    return default
