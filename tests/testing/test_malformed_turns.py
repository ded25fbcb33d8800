"""Variants of a turn in its own grammar."""

from __future__ import annotations

import json

import pytest

from nemo_rl_core.testing.conformance.cases.malformed_turns import malformed

CALL = 'Now. <call>{"tool": "guess", "arguments": {"number": 5}}</call>'


def calls_in(turns):
    """Every JSON value that is whole between the tags, by its text."""
    found = []
    for turn in turns:
        head, _, rest = turn.partition("<call>")
        body, closing, after = rest.partition("</call>")
        if head == "Now. " and closing and not after:
            try:
                found.append(json.loads(body))
            except ValueError:
                continue
    return [json.dumps(value) for value in found]


@pytest.mark.parametrize(
    "variant",
    [
        {"tool": "no such value", "arguments": {"number": 5}},
        {"tool": None, "arguments": {"number": 5}},
        {"arguments": {"number": 5}},
        {"tool": "guess"},
        {"tool": "guess", "arguments": {}},
        {"tool": "guess", "arguments": []},
        {"tool": "guess", "arguments": {"number": ""}},
        {"tool": "guess", "arguments": {"number": None}},
        {"tool": "guess", "arguments": {"number": True}},
        {"tool": "guess", "arguments": {"number": 5}, "no such field": 1},
        [],
        None,
    ],
    ids=str,
)
def test_a_call_is_spoilt_in_its_fields(variant):
    assert json.dumps(variant) in calls_in(malformed(CALL))


@pytest.mark.parametrize(
    "variant",
    [
        'Now. <call>{"tool": "guess", "arguments": {"number": 5}</call>',
        'Now. <call>{"tool": "guess", "arguments": {"number": 5}}',
        "Now. <call></call>",
        'Now. {"tool": "guess", "arguments": {"number": 5}}</call>',
        CALL + CALL,
        CALL[:-1],
    ],
)
def test_a_call_is_cut_and_its_tags_are_lost(variant):
    assert variant in malformed(CALL)


@pytest.mark.parametrize("variant", ["move(, 2)", "no_such_move(1, 2)", "move()", "move(1, 2", "move(1, nan)"])
def test_a_call_in_brackets_is_spoilt(variant):
    assert variant in malformed("move(1, 2)")


@pytest.mark.parametrize("turn", ["", "7", "yes", CALL, '[{"a": [1]}]', "{broken", "\\boxed{0.75}"])
def test_variants_are_other_turns_and_differ(turn):
    found = malformed(turn)
    assert turn not in found and len(found) == len(set(found)) and all(isinstance(variant, str) for variant in found)
