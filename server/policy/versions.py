"""Which versions of a model should be loaded, and which one an empty `model_version` means. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from server.versions import SemVer, order_key, parse_version


@dataclass(frozen=True, slots=True)
class Latest:
    """The `num_versions` highest versions."""

    num_versions: int = 1


@dataclass(frozen=True, slots=True)
class All:
    """Every version."""


@dataclass(frozen=True, slots=True)
class Specific:
    """Versions by number, where N means the one that counts as N.0.0, and by text."""

    ordinals: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


VersionPolicy = Latest | All | Specific


@dataclass(frozen=True, slots=True)
class Choice:
    """What a policy admits: `texts` highest first. `missing` is what it names and nobody has."""

    texts: tuple[str, ...]
    missing: tuple[str, ...] = ()


def highest_first(texts: Iterable[str]) -> list[str]:
    """Version texts in descending order; the order of equal versions (`1` and `1.0.0`) is that of their texts."""
    return sorted(texts, key=order_key, reverse=True)


def admitted(policy: VersionPolicy, texts: Collection[str]) -> Choice:
    """The versions out of `texts` that the policy admits. Asking twice gives the same answer."""
    ordered = highest_first(texts)
    match policy:
        case Latest(num_versions):
            return Choice(tuple(ordered[: max(num_versions, 1)]))
        case All():
            return Choice(tuple(ordered))
        case Specific(ordinals, named):
            wanted = set(named)
            missing = [text for text in named if text not in texts]
            for ordinal in ordinals:
                found = _of_ordinal(ordinal, ordered)
                if found is None:
                    missing.append(str(ordinal))
                else:
                    wanted.add(found)
            return Choice(tuple(text for text in ordered if text in wanted), tuple(missing))


def _of_ordinal(ordinal: int, ordered: Sequence[str]) -> str | None:
    if str(ordinal) in ordered:
        return str(ordinal)
    if ordinal < 0:
        return None
    return next((text for text in ordered if parse_version(text) == SemVer(ordinal)), None)


def default_version(ready: Iterable[str]) -> str:
    """What an empty `model_version` means: the highest of the READY versions by semantic order, "" when there is none.

    1.0.0 is above 1.0.0-rc.1, and 2.0.0-rc.1 is above both: an operator who wants no pre-release to answer unnamed
    calls leaves it out of the version policy.
    """
    ordered = highest_first(ready)
    return ordered[0] if ordered else ""
