"""JSON with a line for every key; a key that occurs twice is an error."""

from __future__ import annotations

import json
from bisect import bisect_right
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

from nemo_rl_core.config.formats._yaml import Positions
from nemo_rl_core.schema.mistakes import Key, Mistake, Position

__all__ = ["parse_json"]


def parse_json(text: str, source: str) -> tuple[Any, Positions, list[Mistake]]:
    """The document, the position of each key, and its mistakes; see `parse_yaml`."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg}, column {error.colno}"
        fix = "Check commas, quotes and brackets there; JSON has no comments and no trailing commas."
        return None, {}, [Mistake(problem=problem, fix=fix, position=Position(source, error.lineno))]
    except RecursionError:
        return None, {}, [Mistake(problem="nested too deeply", position=Position(source))]
    scanner = _Scanner(text, source)
    value, _ = scanner.value(0, ())
    return value, scanner.positions, scanner.mistakes


class _Scanner:
    """A second walk over text that is known to be valid, for the lines."""

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source
        self.positions: Positions = {}
        self.mistakes: list[Mistake] = []
        self.decoder = json.JSONDecoder()
        self.line_starts = [0, *(i + 1 for i, c in enumerate(text) if c == "\n")]

    def value(self, at: int, keys: tuple[Key, ...]) -> tuple[Any, int]:
        at = self.skip(at)
        self.positions.setdefault(keys, self.position(at))
        if self.text[at] == "{":
            return self.object(at + 1, keys)
        if self.text[at] == "[":
            return self.array(at + 1, keys)
        return self.decoder.raw_decode(self.text, at)

    def object(self, at: int, keys: tuple[Key, ...]) -> tuple[dict[str, Any], int]:
        values: dict[str, Any] = {}
        at = self.skip(at)
        while self.text[at] != "}":
            start = at = self.skip(at + 1 if self.text[at] == "," else at)
            key, at = scanstring(self.text, at + 1, True)
            here = (*keys, key)
            if key in values:
                problem = f"the key is written twice, here and on line {self.positions[here].line}"
                at_twice = self.position(start)
                self.mistakes.append(Mistake(keys=here, problem=problem, fix="Keep one of the two.", position=at_twice))
            self.positions.setdefault(here, self.position(start))
            values[key], at = self.value(self.skip(at) + 1, here)
            at = self.skip(at)
        return values, at + 1

    def array(self, at: int, keys: tuple[Key, ...]) -> tuple[list[Any], int]:
        values: list[Any] = []
        at = self.skip(at)
        while self.text[at] != "]":
            at = at + 1 if self.text[at] == "," else at
            item, at = self.value(at, (*keys, len(values)))
            values.append(item)
            at = self.skip(at)
        return values, at + 1

    def skip(self, at: int) -> int:
        while at < len(self.text) and self.text[at] in " \t\r\n":
            at += 1
        return at

    def position(self, at: int) -> Position:
        return Position(self.source, bisect_right(self.line_starts, at))
