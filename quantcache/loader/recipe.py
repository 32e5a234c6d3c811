"""Own which tensor becomes what: ordered rules, and their canonical form for the key. Knows names and shapes, no values."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantcache.errors import UsageError
from quantcache.quant.codec import codec, codec_ids
from quantcache.tensor import TensorInfo

__all__ = ["DEFAULT_EXCLUDE", "DEFAULT_INCLUDE", "Decision", "Recipe", "Rule"]

#: What the default recipe quantizes: names that match, if they are matrices of at least MIN_ELEMENTS.
DEFAULT_INCLUDE = ("*.weight",)
#: Embeddings and output heads, of Hugging Face, RWKV, GPT-2 and GGUF names.
DEFAULT_EXCLUDE = (
    "*embed*", "*emb.weight", "*wte*", "*wpe*", "lm_head*", "head.weight", "output.weight", "*embeddings*", "token_embd*",
)  # fmt: skip
MIN_ELEMENTS = 4096

#: Rules of one regular expression: with thousands it takes longer than one after the other.
_TOGETHER = 256

OTHER = "other"
_OTHERS = ("f16", "keep")


@dataclass(frozen=True, slots=True)
class Rule:
    """Say what becomes of the tensors whose name matches.

    Args:
        pattern: as in fnmatch, case-sensitive, against the whole name.
        codec: a codec's id; "other" for what the recipe does with the rest; "keep" for the source's own type.
        exponent: weights are multiplied by 2**exponent before they are quantized.
    """

    pattern: str
    codec: str
    exponent: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """Say what becomes of one tensor: a codec's id, "keep" (its own bytes) or "native" (a view of the source)."""

    codec: str
    exponent: int = 0
    reason: str = ""


class Recipe:
    """Decide for every tensor; the first rule that matches counts.

    Args:
        rules: (pattern, codec) or (pattern, codec, factor); the factor a power of two.
        other: what becomes of float tensors that no rule quantizes: "f16", "keep" (a copy in the store), or
            "native" (a view of the source, for integers too).
        native: what becomes of GGUF blocks: "keep" passes them through unless the target is smaller,
            "convert" leaves none.
        label: how listings call it.

    Raises:
        UsageError: an unknown codec, or a factor that is no power of two.
    """

    def __init__(
        self,
        rules: Iterable[Rule | tuple[str, str] | tuple[str, str, float]],
        *,
        other: str = "f16",
        native: str = "keep",
        label: str = "",
    ) -> None:
        self.rules = tuple(rule if isinstance(rule, Rule) else _rule(rule) for rule in rules)
        for rule in self.rules:
            if rule.codec not in (OTHER, "keep", *codec_ids()):
                codec(rule.codec)  # raises, with the list
        if other not in (*_OTHERS, "native"):
            raise UsageError(f"other={other!r}: it is 'f16', 'keep' or 'native'")
        if native not in ("keep", "convert"):
            raise UsageError(f"native={native!r}: it is 'keep' or 'convert'")
        self.other, self.native = other, native
        # expressions with a group a rule: a model has thousands of names, and every rule would be tried on each
        self._firsts = [
            (start, re.compile("|".join(f"({fnmatch.translate(rule.pattern)})" for rule in self.rules[start : start + _TOGETHER])).match)
            for start in range(0, len(self.rules), _TOGETHER)
        ]
        #: what was decided for the first tensor of a kind is so for all: a model has thousands, of a dozen kinds
        self._decided: dict[tuple[Any, ...], Decision] = {}
        used = [rule.codec for rule in self.rules if rule.codec not in (OTHER, "keep")]
        self.label = label or "+".join(dict.fromkeys(used)) or "native"

    @classmethod
    def of(
        cls,
        quant: str | Recipe,
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        other: str = "f16",
        native: str = "keep",
        rules: Sequence[Rule | tuple[str, str] | tuple[str, str, float]] = (),
    ) -> Recipe:
        """Return the recipe that `load`'s arguments mean.

        Args:
            quant: a codec's id, "native", or a recipe, which is taken as it is.
            include, exclude: patterns of the default recipe; the built-in ones if None.
            other, native: see Recipe.
            rules: stand before the default ones.

        Raises:
            UsageError: patterns or rules beside a recipe, or an unknown codec.
        """
        if isinstance(quant, Recipe):
            if include is not None or exclude is not None or rules or (other, native) != ("f16", "keep"):
                raise UsageError("include, exclude, rules, other and native make the default recipe; put them into the recipe itself")
            return quant
        if quant == "native":
            if include is not None or exclude is not None or native != "keep":
                raise UsageError("quant='native' leaves tensors as they are: include, exclude and native have nothing to say")
            if other not in _OTHERS:
                raise UsageError(f"other={other!r}: it is 'f16' or 'keep'")
            return cls(rules, other="native", native="keep", label="" if rules else "native")
        codec(quant)
        excluded = [Rule(pattern, OTHER) for pattern in (DEFAULT_EXCLUDE if exclude is None else exclude)]
        included = [Rule(pattern, quant) for pattern in (DEFAULT_INCLUDE if include is None else include)]
        return cls([*rules, *excluded, *included], other=other, native=native, label="" if rules else quant)

    @classmethod
    def from_canonical(cls, document: Mapping[str, Any]) -> Recipe:
        """Return the recipe whose canonical form that is.

        Raises:
            UsageError: it names a codec that is not known here.
            KeyError, TypeError, ValueError: it is no canonical form.
        """
        rules = [Rule(str(pattern), str(codec_id), int(exponent)) for pattern, codec_id, exponent in document["rules"]]
        return cls(rules, other=document["other"], native=document["native"])

    @property
    def passes_elements(self) -> bool:
        """Whether tensors of plain element types, too, may pass through as they are."""
        return self.other == "native"

    def canonical(self) -> dict[str, Any]:
        """Return what of the recipe belongs in the key."""
        return {
            "rules": [[rule.pattern, rule.codec, rule.exponent] for rule in self.rules],
            "other": self.other,
            "native": self.native,
            "min_elements": MIN_ELEMENTS,
        }

    def codecs(self) -> dict[str, Any]:
        """Return the version and parameters of every codec that can take part."""
        used = {rule.codec for rule in self.rules} & set(codec_ids()) | {"f16"}  # f16 takes what an adapter changes
        return {name: {"version": codec(name).version, "parameters": codec(name).parameters()} for name in sorted(used)}

    def decide(self, tensor: TensorInfo, *, merged: bool = False) -> Decision:
        """Decide for one tensor, by its name, type and shape.

        Args:
            tensor: of the source.
            merged: an adapter changes it, so that it cannot pass through.
        """
        rule = self._rule(tensor.name)
        # all of a recipe that has a say, too: nobody keeps its owner from changing it between two loads
        alike = rule, self.other, self.native, tensor.dtype, tensor.shape, tensor.nbytes, tensor.transposed, merged
        found = self._decided.get(alike)
        if found is None:
            found = self._decided[alike] = self._decide(rule, tensor, merged=merged)
        return found

    def _decide(self, rule: Rule | None, tensor: TensorInfo, *, merged: bool) -> Decision:
        """Decide for a tensor by its rule, type and shape: nothing here may look at its name."""
        wanted = rule if rule and rule.codec not in (OTHER, "keep") and not tensor.transposed else None
        exponent = rule.exponent if rule else 0
        if tensor.is_block:
            return self._decide_block(tensor, wanted, exponent, must_change=merged or exponent != 0)
        if not tensor.is_float:
            native = (rule is None or rule.codec == OTHER) and self.other == "native"
            reason = "passes through" if native else "is not a type of weights"
            return Decision("native" if native else "keep", reason=f"{tensor.dtype} {reason}")
        if rule and rule.codec == "keep":
            return Decision("keep", exponent, "a rule keeps it")
        if wanted is None and self.other == "native":
            if merged or exponent:
                return Decision("keep", exponent, "an adapter or a factor changes it")
            return Decision("native", reason=f"{tensor.dtype} passes through")
        reason = "no rule quantizes it" if wanted is None else ""
        if wanted is not None and wanted.codec != "f16":
            reason = _refuses(wanted.codec, tensor)
            if not reason:
                return Decision(wanted.codec, exponent)
        half = self.other == "f16" or (wanted is not None and wanted.codec == "f16")
        if not half or (tensor.dtype == "F16" and not exponent):
            return Decision("keep", exponent, reason)
        return Decision("f16", exponent, reason)

    def _rule(self, name: str) -> Rule | None:
        """Return the first rule that matches."""
        for start, match in self._firsts:
            if (found := match(name)) is not None and found.lastindex is not None:
                return self.rules[start + found.lastindex - 1]
        return None

    def _decide_block(self, tensor: TensorInfo, wanted: Rule | None, exponent: int, *, must_change: bool) -> Decision:
        if not tensor.is_known:
            return Decision("native", reason=f"{tensor.dtype} is unknown here")
        target = wanted.codec if wanted is not None else None
        refused = _refuses(target, tensor) if target is not None else "no rule quantizes it"
        if self.native == "convert" or must_change or tensor.transposed:
            return Decision("f16" if target is None or refused else target, exponent, refused)
        if target is None or refused:
            return Decision("native", reason=f"{tensor.dtype} passes through")
        bits = tensor.nbytes * 8 / max(1, tensor.size)
        if bits <= codec(target).bits_per_weight() + 0.01:
            return Decision("native", reason=f"{tensor.dtype} is not larger than {target}")
        return Decision(target)


def _refuses(codec_id: str, tensor: TensorInfo) -> str:
    """Return why a tensor is not quantized by a codec, by its shape; "" if it is."""
    return f"fewer than {MIN_ELEMENTS} elements" if tensor.size < MIN_ELEMENTS else codec(codec_id).refuses(tensor.shape) or ""


def _rule(given: Sequence[Any]) -> Rule:
    """Turn a tuple into a rule."""
    if len(given) not in (2, 3) or not all(isinstance(part, str) for part in given[:2]):
        raise UsageError(f"a rule is (pattern, codec) or (pattern, codec, factor), not {given!r}")
    if len(given) == 2:
        return Rule(given[0], given[1])
    if isinstance(given[2], bool) or not isinstance(given[2], int | float):
        raise UsageError(f"the factor {given[2]!r} of rule {given[0]!r} is no number")
    mantissa, exponent = math.frexp(given[2])
    if mantissa != 0.5 or not -100 <= exponent <= 100:
        raise UsageError(f"the factor {given[2]} of rule {given[0]!r} is not a power of two")
    return Rule(given[0], given[1], exponent - 1)
