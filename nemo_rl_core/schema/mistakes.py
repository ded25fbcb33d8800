"""Mistakes of a configuration: one record each, all of them in one error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import attrs
from attrs import frozen

from nemo_rl_core.errors import ConfigError

__all__ = ["InvalidConfig", "Key", "Mistake", "Position", "locate", "mistake", "path_of", "suggest"]

Key = str | int
"""One step of a path: the name of a field or the index in a list."""


@frozen
class Position:
    """Where a value was written."""

    source: str
    """File name, "command line", "overrides" or "Python"."""
    line: int | None = None
    """1-based; None where there are no lines."""

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@frozen(kw_only=True)
class Mistake:
    """One thing that is wrong, where it stands, and what to do."""

    keys: tuple[Key, ...] = ()
    """The value's place in the tree."""
    problem: str
    """What is wrong, with the value found."""
    allowed: str | None = None
    """Type, range or choices, with the unit."""
    fix: str | None = None
    """What to do about it."""
    suggestion: str | None = None
    """The name that was probably meant."""
    related: tuple[tuple[Key, ...], ...] = ()
    """Other values that take part in it."""
    position: Position | None = None
    """File and line, as far as they are known."""
    error: Exception | None = attrs.field(default=None, eq=False)
    """What a plugin raised."""

    @property
    def path(self) -> str:
        """The dotted path, such as `logging.loggers[0].name`."""
        return path_of(self.keys)

    def under(self, *keys: Key) -> Mistake:
        """The same mistake seen from `keys` above."""
        related = tuple((*keys, *r) for r in self.related)
        return attrs.evolve(self, keys=(*keys, *self.keys), related=related)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "path": self.path,
            "file": self.position.source if self.position else None,
            "line": self.position.line if self.position else None,
            "problem": self.problem,
            "allowed": self.allowed,
            "suggestion": self.suggestion,
            "fix": self.fix,
        }

    def render(self) -> str:
        """Some lines for a person."""
        where = self.path or "(whole file)"
        lines = [f"{where}  ({self.position})" if self.position else where, f"    {self.problem}"]
        if self.suggestion is not None:
            lines[-1] += f"; did you mean `{self.suggestion}`?"
        if self.allowed:
            lines.append(f"    allowed: {self.allowed}")
        if self.fix:
            lines.append(f"    fix: {self.fix}")
        return "\n".join(f"  {line}" for line in "\n".join(lines).splitlines())


def mistake(path: str, problem: str, fix: str | None = None, *, related: Iterable[str] = ()) -> Mistake:
    """A mistake for a `check` method: paths are dotted and relative to the object that checks itself.

    Args:
        path: The value to change, such as "num_prompts_per_step".
        problem: What is wrong, with the numbers found.
        fix: What to do about it.
        related: Paths of the other values that take part in it.
    """
    return Mistake(keys=_keys(path), problem=problem, fix=fix, related=tuple(_keys(r) for r in related))


class InvalidConfig(ConfigError):
    """A configuration with mistakes; the message lists all of them.

    Attributes:
        mistakes: One `Mistake` each, in the order of the file.
    """

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes: tuple[Mistake, ...] = tuple(mistakes)
        count = len(self.mistakes)
        head = f"{count} mistake{'s' if count > 1 else ''} in the configuration:"
        super().__init__("\n\n".join([head, *(m.render() for m in self.mistakes)]))
        codes = {getattr(m.error, "exit_code", type(self).exit_code) for m in self.mistakes}
        if len(codes) == 1:  # nothing but plugin errors: the exit status says so
            self.exit_code = codes.pop()

    def __reduce__(self) -> tuple[Any, ...]:
        plain = tuple(attrs.evolve(m, error=None) for m in self.mistakes)  # a plugin's error may not pickle
        return (type(self), (plain,), {"exit_code": self.exit_code})


def path_of(keys: Sequence[Key]) -> str:
    """`("loggers", 0, "name")` as `loggers[0].name`."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def suggest(name: Any, known: Iterable[Any]) -> str | None:
    """The known name that `name` was probably meant to be."""
    by_lower = {str(k).lower(): str(k) for k in known}
    wanted = str(name).lower().replace("-", "_")
    close = get_close_matches(wanted, by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def locate(found: Sequence[Mistake], positions: Mapping[tuple[Key, ...], Position]) -> list[Mistake]:
    """The mistakes with their positions, in the order of sources and lines; without doubles."""
    placed: list[Mistake] = []
    for m in found:
        m = m if m.position else attrs.evolve(m, position=_position(m, positions))
        if m not in placed:
            placed.append(m)
    sources = list(dict.fromkeys(m.position.source for m in placed if m.position))
    return sorted(placed, key=lambda m: _rank(m, sources))


def _position(m: Mistake, positions: Mapping[tuple[Key, ...], Position]) -> Position | None:
    for keys in (m.keys, *m.related):
        if keys in positions:
            return positions[keys]
    for end in range(len(m.keys) - 1, -1, -1):
        if m.keys[:end] in positions:
            return positions[m.keys[:end]]
    return None


_OVERRIDES = ("command line", "overrides")


def _rank(m: Mistake, sources: list[str]) -> tuple[int, int]:
    if m.position is None:
        return (2 * len(sources), 0)
    rank = sources.index(m.position.source)
    return (rank + len(sources) * (m.position.source in _OVERRIDES), m.position.line or 0)


def _keys(path: str) -> tuple[Key, ...]:
    return tuple(int(part) if part.isdigit() else part for part in path.split(".") if part)
