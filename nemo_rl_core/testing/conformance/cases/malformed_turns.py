"""What a policy says when it nearly speaks the grammar of an environment: the example's own turns, spoiled.

A policy that learns to call tools cuts its JSON, invents tools, gives text for a number, forgets to close a tag. An
environment meets thousands of these before the first good turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["malformed"]

_TAG = re.compile(r"<([A-Za-z_][\w-]*)[^<>]*>(.*?)</\1>", re.DOTALL)
_CALL = re.compile(r"\b([A-Za-z_]\w*)\(([^()]*)\)")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_OTHER_VALUES: tuple[Any, ...] = (None, True, -1, 0, 10**30, 2.5, float("nan"), float("inf"), "", "no such value")
_OTHER_CONTAINERS: tuple[Any, ...] = ([], {}, [["a"]], {"a": {"b": 1}})
_OTHER_NUMBERS = ("-1", "0", "2.5", "9" * 400, "1e999", "nan", "\u0663", "\u00b2", "two", "1_000", "")
_OTHER_ARGUMENTS = ("", "1, 2, 3, 4, 5", "None", "'", "x=", "[1, {", "'text', 'text'")


def malformed(turn: str) -> list[str]:
    """Variants of a turn that are not quite what it was, without repetition."""
    ways = (_cut, _json, _tags, _calls, _numbers)
    found = dict.fromkeys(variant for way in ways for variant in way(turn))
    found.pop(turn, None)
    return list(found)


def _cut(turn: str) -> Iterator[str]:
    """Cut short, repeated, in other letters: whatever the grammar is."""
    for length in (1, len(turn) // 2, len(turn) - 1):
        yield turn[:length]
    yield from (turn[1:], turn + turn, (turn * 200)[:20_000], turn.upper(), turn[::-1], f"{turn}\0", f"\ufeff{turn}")
    yield re.sub(r"\s+", "", turn)


def _json(turn: str) -> Iterator[str]:
    """Every JSON value in the turn with something missing, unknown or of another type."""
    for start, end, value in _json_values(turn):
        before, body, after = turn[:start], turn[start:end], turn[end:]
        texts = [body[:-1], body[: len(body) // 2], body + "}", body.replace('"', "'"), body.replace(",", ",,")]
        texts += [json.dumps(other) for other in (*_changed(value), *_OTHER_VALUES, *_OTHER_CONTAINERS)]
        yield from (f"{before}{text}{after}" for text in texts)


def _json_values(turn: str) -> Iterator[tuple[int, int, Any]]:
    """Where a JSON object or list stands, outermost ones only."""
    decoder = json.JSONDecoder()
    position = 0
    while (found := re.compile(r"[{\[]").search(turn, position)) is not None:
        try:
            value, end = decoder.raw_decode(turn, found.start())
        except ValueError:
            position = found.end()
            continue
        yield found.start(), end, value
        position = end


def _changed(value: object) -> Iterator[Any]:
    """The value with one thing in it missing, added, or replaced by something of another type."""
    if isinstance(value, Mapping):
        yield {**value, "no such field": 1}
        for key, inner in value.items():
            yield {name: kept for name, kept in value.items() if name != key}
            yield from ({**value, key: other} for other in (*_OTHER_VALUES, *_OTHER_CONTAINERS))
            yield from ({**value, key: other} for other in _changed(inner))
    elif isinstance(value, list):
        yield value * 2
        for index, inner in enumerate(value):
            yield value[:index] + value[index + 1 :]
            replacements = (*_OTHER_VALUES, *_changed(inner))
            yield from ([*value[:index], other, *value[index + 1 :]] for other in replacements)


def _tags(turn: str) -> Iterator[str]:
    """Every pair of tags unclosed, unopened, empty, nested, twice, or around nothing but space."""
    for found in _TAG.finditer(turn):
        before, after = turn[: found.start()], turn[found.end() :]
        name, body = found.group(1), found.group(2)
        opening, closing = f"<{name}>", f"</{name}>"
        texts = [f"{opening}{body}", f"{body}{closing}", opening, f"{opening}{closing}", f"{opening} {closing}"]
        texts += [f"{opening}{opening}{body}{closing}{closing}", f"{closing}{body}{opening}", found.group() * 2]
        texts += [f"<{name}{body}</{name}", found.group().replace(name, name.upper()), f"<{name} a='1'>{body}{closing}"]
        yield from (f"{before}{text}{after}" for text in texts)


def _calls(turn: str) -> Iterator[str]:
    """Every `name(arguments)` with another name, other arguments, or a bracket that is missing."""
    for found in _CALL.finditer(turn):
        before, after = turn[: found.start()], turn[found.end() :]
        name, arguments = found.groups()
        texts = [f"no_such_{name}({arguments})", f"{name}({arguments}", f"{name}{arguments})", name]
        texts += [f"{name}({other})" for other in _OTHER_ARGUMENTS]
        texts += [f"{name}({name}({arguments}))", f"{name}({arguments}, {arguments})"]
        yield from (f"{before}{text}{after}" for text in texts)


def _numbers(turn: str) -> Iterator[str]:
    """Every number replaced by one out of range, or by what is none."""
    for found in _NUMBER.finditer(turn):
        yield from (f"{turn[: found.start()]}{other}{turn[found.end() :]}" for other in _OTHER_NUMBERS)
