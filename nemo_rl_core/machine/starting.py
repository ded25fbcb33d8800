"""Precautions while this process starts another one."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["environment", "starting"]

_turn = threading.Lock()
"""The environment and the main module of a process are one: others are started one after another."""


@contextlib.contextmanager
def starting(variables: Mapping[str, str] | None = None) -> Iterator[None]:
    """Start processes inside: they have `variables`, and do not run the user's script again.

    `multiprocessing` would import the main module in a new process; whatever stands in it travels by value, so that a
    script needs no `if __name__ == "__main__":`.

    Args:
        variables: Environment variables; put back afterwards.
    """
    with _turn, environment(variables or {}), _without_main():
        yield


@contextlib.contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Have these environment variables inside, without those that are None; afterwards all are as before."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    main = vars(sys.modules["__main__"])
    hidden: dict[str, Any] = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.pop("__spec__", None)
        main.update(hidden)
