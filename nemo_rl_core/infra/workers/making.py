"""Creation of a worker from its specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nemo_rl_core.protocols.launcher import Worker, WorkerReference
from nemo_rl_core.registry import PluginCall

__all__ = ["kind_of", "make_worker"]


_W = TypeVar("_W", bound=Worker)


def kind_of(factory: object) -> str:
    """The kind of component that a worker's factory makes."""
    return str(getattr(factory, "kind", "training_backends"))


def make_worker(factory: WorkerReference[_W] | Callable[[], _W]) -> _W:
    """Make a worker from a `ComponentRef` (or a class)."""
    made = factory.load() if isinstance(factory, WorkerReference) and not isinstance(factory, type) else factory
    with PluginCall(kind_of(factory), factory, "__init__", "made"):
        return made()
