"""Own why a key document has an entry or has none: factor by factor, against the nearest entry. Knows documents, no models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantcache.cache.key import digest, key_of
from quantcache.errors import CacheError

if TYPE_CHECKING:
    from quantcache.cache.store import Cache

__all__ = ["Explanation", "Factor", "explain"]

#: entries that are compared, the most alike of the index first
_CANDIDATES = 64
_MISSING = "-"


@dataclass(frozen=True, slots=True)
class Factor:
    """Compare one factor of a key: what is asked for, and what the nearest entry was built from."""

    name: str
    wanted: str
    found: str

    @property
    def same(self) -> bool:
        """Whether it makes no difference."""
        return self.wanted == self.found


@dataclass(frozen=True, slots=True)
class Explanation:
    """Say whether a key document has an entry, and why.

    Args:
        key: of the document.
        state: "hit", "miss" or "damaged".
        why: in words.
        nearest: key of the entry that has the most factors in common, or None.
        factors: of the document, beside the nearest entry's.
    """

    key: str
    state: str
    why: str
    nearest: str | None
    factors: tuple[Factor, ...]


def explain(cache: Cache, document: Mapping[str, Any]) -> Explanation:
    """Say whether a key document has an entry, and against the nearest one, factor by factor, why not.

    Args:
        cache: the store.
        document: the key document.
    """
    key = key_of(document)
    wanted = dict(_factors(document))
    if cache.path_of(key).exists():
        try:
            entry = cache.open(key)
        except CacheError as error:
            return Explanation(key, "damaged", f"the entry cannot be used: {error.message}", None, _beside(wanted, {}))
        if key_of(entry.header.document) != key:
            return Explanation(key, "damaged", "the entry was built for another key document", None, _beside(wanted, {}))
        return Explanation(key, "hit", "an entry has this key", key, _beside(wanted, wanted))
    best: tuple[int, str, dict[str, str]] | None = None
    for candidate in cache.related(document, _CANDIDATES):
        try:
            found = dict(_factors(cache.open(candidate).header.document))
        except CacheError:
            continue
        # the source counts most: an entry of the same model is nearer than one with the same settings
        common = sum(found.get(name) == value for name, value in wanted.items()) + 100 * (found.get(_SOURCE) == wanted.get(_SOURCE))
        if best is None or common > best[0]:
            best = common, candidate, found
    if best is None:
        return Explanation(key, "miss", "no entry is like it", None, _beside(wanted, {}))
    factors = _beside(wanted, best[2])
    differing = [factor.name for factor in factors if not factor.same]
    return Explanation(key, "miss", f"differs in {', '.join(differing)}", best[1], factors)


_SOURCE, _ORDER = "source digest", " order"


def _factors(document: Any) -> Iterator[tuple[str, str]]:
    """Yield name and value of every factor of a document, nested ones by their path."""

    def walk(name: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            for inner in sorted(value):
                yield from walk(f"{name} {inner}".strip(), value[inner])
        elif isinstance(value, list) and any(isinstance(inner, Mapping | list) for inner in value):
            if all(isinstance(inner, list) for inner in value):
                # by what they say: one more in front would make all others differ by their place
                texts = [" ".join(map(str, inner)) for inner in value]
                yield from ((f"{name}: {text}", "yes") for text in texts)
                yield f"{name}{_ORDER}", digest("\n".join(texts).encode()).hex()[:8]
                return
            for position, inner in enumerate(value):
                yield from walk(f"{name} {position + 1}", inner)
        else:
            yield name, str(value) if value != [] and value != {} else _MISSING

    if isinstance(document, Mapping):
        yield from walk("", document)


def _beside(wanted: Mapping[str, str], found: Mapping[str, str]) -> tuple[Factor, ...]:
    names = [*wanted, *(name for name in found if name not in wanted)]
    factors = [Factor(name, wanted.get(name, _MISSING), found.get(name, _MISSING)) for name in names]
    # an order that differs is worth a line only where nothing else does
    listed = {factor.name.partition(": ")[0] for factor in factors if not factor.same and ": " in factor.name}
    return tuple(f for f in factors if not (f.name.endswith(_ORDER) and f.name.removesuffix(_ORDER) in listed))
