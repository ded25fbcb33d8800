"""Creation of a worker from its specification."""

from __future__ import annotations

from typing import Any

from nemo_rl_core.registry import PluginCall

__all__ = ["kind_of", "make_worker"]


def kind_of(factory: Any) -> str:
    """The kind of component that a worker's factory makes."""
    return str(getattr(factory, "kind", "training_backends"))


def make_worker(factory: Any) -> Any:
    """Make a worker from a `ComponentRef` (or a class)."""
    load = None if isinstance(factory, type) else getattr(factory, "load", None)
    made = load() if callable(load) else factory
    with PluginCall(kind_of(factory), factory, "__init__", "made"):
        return made()
