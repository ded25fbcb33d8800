"""TOML with a line for every key."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from nemo_rl_core.config.formats._yaml import Positions
from nemo_rl_core.schema.mistakes import Key, Mistake, Position

__all__ = ["parse_toml"]

_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_DOTTED = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_TABLE = re.compile(rf"\s*(\[\[?)\s*({_DOTTED})\s*\]\]?\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(rf"\s*({_DOTTED})\s*=")
_LINE = re.compile(r" \(at line (\d+), column (\d+)\)$")


def parse_toml(text: str, source: str) -> tuple[Any, Positions, list[Mistake]]:
    """The document, the position of each key, and its mistakes; see `parse_yaml`."""
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = _LINE.search(str(error))
        line = int(match[1]) if match else text.count("\n") + 1
        problem = f"not valid TOML: {_LINE.sub('', str(error))}" + (f", column {match[2]}" if match else "")
        fix = "Check quotes, brackets and keys there; a key may be written once."
        return None, {}, [Mistake(problem=problem, fix=fix, position=Position(source, line))]
    except RecursionError:
        return None, {}, [Mistake(problem="nested too deeply", position=Position(source))]
    return value, _positions(text, source), []


def _positions(text: str, source: str) -> Positions:
    """Lines of tables and assignments; what is inside a value has the line of its assignment."""
    positions: Positions = {(): Position(source, 1)}
    table: tuple[Key, ...] = ()
    lengths: dict[tuple[Key, ...], int] = {}
    quote: str | None = None  # inside a multi-line string
    for number, line in enumerate(text.split("\n"), start=1):
        if quote is None:
            header, assignment = _TABLE.match(line), _ASSIGNMENT.match(line)
            if header:
                table = _parts(header[2])
                if header[1] == "[[":
                    lengths[table] = lengths.get(table, -1) + 1
                    positions.setdefault(table, Position(source, number))
                    table = (*table, lengths[table])
                elif table[:-1] in lengths:
                    table = (*table[:-1], lengths[table[:-1]], table[-1])
            keys = table if header else (*table, *_parts(assignment[1])) if assignment else None
            for end in range(1, len(keys or ()) + 1):
                positions.setdefault((keys or ())[:end], Position(source, number))
        for mark in re.findall(r'"""|\'\'\'', line):
            quote = mark if quote is None else None if quote == mark else quote
    return positions


def _parts(dotted: str) -> tuple[Key, ...]:
    return tuple(part.strip("\"'") for part in re.findall(_KEY, dotted))
