"""Number of workers that one replica of a model takes, according to its training backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_rl_core.config.components import Resolver, default_resolver, find
from nemo_rl_core.errors import PluginError
from nemo_rl_core.schema import PolicyConfig

__all__ = ["replica_sizes", "training_backend"]


def training_backend(policy: PolicyConfig, pins: Mapping[str, str], resolver: Resolver | None = None) -> Any:
    """The class that trains the model; None if it is not chosen or cannot be loaded, which others report."""
    if policy.backend is None:
        return None
    try:
        return find(resolver or default_resolver(), "training_backends", policy.backend, pins).load()
    except PluginError:
        return None


def replica_sizes(policy: PolicyConfig, pins: Mapping[str, str], resolver: Resolver | None = None) -> dict[str, int]:
    """The settings, by path within `policy`, whose product is the workers of one replica.

    A backend without `layout`, or whose options are not structured, has tensor parallelism alone.
    """
    backend = training_backend(policy, pins, resolver)
    options_class = getattr(backend, "config_class", None)
    if hasattr(backend, "layout") and isinstance(options_class, type) and isinstance(policy.options, options_class):
        return dict(backend.layout(policy))
    return {"tensor_parallel_size": policy.tensor_parallel_size}
