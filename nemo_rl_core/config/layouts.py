"""Number of workers that one replica of a model takes, and the backend that trains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from nemo_rl_core.errors import PluginError
from nemo_rl_core.schema import PolicyConfig

if TYPE_CHECKING:
    from nemo_rl_core.protocols.training_backend import TrainingBackend

__all__ = ["HasLayout", "replica_sizes", "training_backend"]


@runtime_checkable
class HasLayout(Protocol):
    """Options of a training backend that splits a model in more ways than by tensor parallelism."""

    def layout(self, policy: PolicyConfig) -> Mapping[str, int]:
        """Return the settings whose product is the number of workers of one replica: path within `policy` to size.

        `num_workers` divided by the product is the number of data-parallel replicas.
        """
        ...


def training_backend(policy: PolicyConfig, pins: Mapping[str, str]) -> type[TrainingBackend] | None:
    """The class that trains the model; None if it is not chosen or cannot be loaded, which others report."""
    if policy.backend is None:
        return None
    from nemo_rl_core.registry import get_registry

    try:
        found: type[TrainingBackend] = get_registry().resolve("training_backends", policy.backend, plugins=pins).load()
    except PluginError:
        return None
    return found


def replica_sizes(policy: PolicyConfig) -> Mapping[str, int]:
    """The settings, by path within `policy`, whose product is the workers of one replica.

    They are those of the backend's options, if these have a `layout`; else tensor parallelism is all there is.
    """
    if isinstance(policy.options, HasLayout):
        return policy.options.layout(policy)
    return {"tensor_parallel_size": policy.tensor_parallel_size}
