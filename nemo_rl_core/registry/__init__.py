"""Names to components: index, decorators, resolution, manifest; and the hooks of a run.

Discovery reads metadata only. Nothing of a plugin is imported before it is selected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_rl_core.registry._decorators import (
    register_advantage,
    register_algorithm,
    register_callback,
    register_command,
    register_dataset,
    register_environment,
    register_exporter,
    register_generation_backend,
    register_launcher,
    register_logger,
    register_loss,
    register_reward,
    register_sandbox,
    register_training_backend,
    register_weight_sync,
)
from nemo_rl_core.registry._kinds import KINDS, Kind
from nemo_rl_core.registry._manifest import ManifestDifference, compare_manifests, difference_table, manifest
from nemo_rl_core.registry._reference import ComponentRef
from nemo_rl_core.registry._registry import Registry, get_registry

if TYPE_CHECKING:
    from nemo_rl_core.registry._hooks import HookFailure, HookPlugins, RunHooks

__all__ = [
    "KINDS",
    "ComponentRef",
    "HookFailure",
    "HookPlugins",
    "Kind",
    "ManifestDifference",
    "Registry",
    "RunHooks",
    "compare_manifests",
    "difference_table",
    "get_registry",
    "manifest",
    "register_advantage",
    "register_algorithm",
    "register_callback",
    "register_command",
    "register_dataset",
    "register_environment",
    "register_exporter",
    "register_generation_backend",
    "register_launcher",
    "register_logger",
    "register_loss",
    "register_reward",
    "register_sandbox",
    "register_training_backend",
    "register_weight_sync",
]


def __getattr__(name: str) -> Any:
    """The hook classes, imported when first asked for: they need pluggy, naming a component does not."""
    if name in ("HookFailure", "HookPlugins", "RunHooks"):
        from nemo_rl_core.registry import _hooks

        return getattr(_hooks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
