"""What a component has left in its process, and how long it kept the event loop."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import random
import time
from typing import ClassVar

import pytest

from nemo_rl_core.testing.conformance.frame._blocking import longest_block
from nemo_rl_core.testing.conformance.frame.process_traces import (
    changes,
    component_state,
    process_state,
    variables_written,
)

counter = itertools.count()
remembered: dict = {}


@functools.cache
def square(number):
    return number * number


class Other:
    """Of the same module."""

    total = 0


class Component:
    numbers: ClassVar[list] = [1, 2]
    generator: ClassVar[random.Random] = random.Random(1)

    def method(self, seen=[]):  # noqa: B006
        return seen


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Component.numbers", lambda: Component.numbers.append(3)),
        ("Component.generator", lambda: Component.generator.random()),
        ("Component.method", lambda: Component().method().append(1)),
        ("Other.total", lambda: setattr(Other, "total", Other.total + 1)),
        (".counter", lambda: next(counter)),
        (".remembered", lambda: remembered.update(a={"b": len(remembered)})),
        (".square", lambda: square(time.monotonic())),
    ],
)
def test_what_changed_in_classes_and_modules_is_named(name, change):
    before = component_state(functools.partial(Component))
    assert changes(before, component_state(Component)) == []
    change()
    (told,) = changes(before, component_state(Component))
    assert name in told.partition(" was ")[0]


def test_a_change_is_shown_where_it_is():
    (told,) = changes({"x": "a" * 500 + "1"}, {"x": "a" * 500 + "2"})
    assert told == f"x was ...{'a' * 20}1 and is ...{'a' * 20}2"


def test_what_changed_for_the_whole_process_is_named():
    before = process_state()
    random.random()
    (told,) = changes(before, process_state())
    assert told.startswith("the global state of `random` was ")


def test_variables_that_are_written_are_named_also_if_they_stay_the_same(monkeypatch):
    monkeypatch.setenv("SOME_VARIABLE", "1")
    with variables_written() as written:
        os.environ["SOME_VARIABLE"] = "1"
        del os.environ["SOME_VARIABLE"]
    os.environ["SOME_VARIABLE"] = "1"
    assert written == ["SOME_VARIABLE", "SOME_VARIABLE"] and os.environ["SOME_VARIABLE"] == "1"


def test_a_block_that_comes_again_is_found_and_one_that_does_not_is_not():
    runs = []

    async def block_at_first():
        runs.append(1)
        if len(runs) == 1:
            time.sleep(0.08)
        await asyncio.sleep(0)

    async def block_always():
        await asyncio.sleep(0)
        time.sleep(0.08)

    assert longest_block(block_at_first, limit_s=0.05) < 0.08 and len(runs) > 1
    assert longest_block(block_always, limit_s=0.05) >= 0.05
