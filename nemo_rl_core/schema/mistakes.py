"""Mistakes in a configuration: one record for each, all of them in one error."""

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
    """Place where a value was written."""

    source: str
    """File name, "command line", "overrides" or "Python"."""
    line: int | None = None
    """Line number from 1; None if the source has no lines."""

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@frozen(kw_only=True)
class Mistake:
    """One mistake: the problem, its place and the fix."""

    keys: tuple[Key, ...] = ()
    """Path of the value in the tree."""
    problem: str
    """Description of the problem, with the value found."""
    allowed: str | None = None
    """Allowed type, range or choices, with the unit."""
    fix: str | None = None
    """Advice for the reader."""
    suggestion: str | None = None
    """Name that was probably meant."""
    related: tuple[tuple[Key, ...], ...] = ()
    """Paths of the other values that are involved."""
    position: Position | None = None
    """File and line, if known."""
    error: Exception | None = attrs.field(default=None, eq=False)
    """Error that a plugin raised."""

    @property
    def path(self) -> str:
        """Dotted path, such as `logging.loggers[0].name`."""
        return path_of(self.keys)

    def under(self, *keys: Key) -> Mistake:
        """Return the mistake with its paths below `keys`."""
        related = tuple((*keys, *r) for r in self.related)
        return attrs.evolve(self, keys=(*keys, *self.keys), related=related)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for `--json`."""
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
        """Return lines of text for a person."""
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
    """Make a mistake for a `check` method. Paths are dotted and relative to the object that checks itself.

    Args:
        path: Path of the value to change, such as "num_prompts_per_step".
        problem: Description of the problem, with the numbers found.
        fix: Advice for the reader.
        related: Paths of the other values that are involved.
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
    """Return the dotted path of some keys: `loggers[0].name` for `("loggers", 0, "name")`."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def suggest(name: object, known: Iterable[Any]) -> str | None:
    """Return the known name that `name` probably means; None if none is close."""
    by_lower = {str(k).lower(): str(k) for k in known}
    wanted = str(name).lower().replace("-", "_")
    close = get_close_matches(wanted, by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def locate(mistakes: Sequence[Mistake], positions: Mapping[tuple[Key, ...], Position]) -> list[Mistake]:
    """Return the mistakes with their positions, in the order of sources and lines, without duplicates."""
    placed: list[Mistake] = []
    for m in mistakes:
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
