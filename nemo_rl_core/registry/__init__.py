"""Names to components: index, decorators, resolution, manifest; and the hooks of a run.

Discovery reads metadata only. Nothing of a plugin is imported before it is selected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_rl_core.registry._kinds import KINDS, Kind

if TYPE_CHECKING:
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
    from nemo_rl_core.registry._hooks import HookFailure, HookPlugins, RunHooks
    from nemo_rl_core.registry._manifest import ManifestDifference, compare_manifests, difference_table, manifest
    from nemo_rl_core.registry._reference import ComponentRef
    from nemo_rl_core.registry._registry import Registry, get_registry

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


_HOMES = {
    "ComponentRef": "_reference",
    "HookFailure": "_hooks",
    "HookPlugins": "_hooks",
    "ManifestDifference": "_manifest",
    "Registry": "_registry",
    "RunHooks": "_hooks",
    "compare_manifests": "_manifest",
    "difference_table": "_manifest",
    "get_registry": "_registry",
    "manifest": "_manifest",
    **{name: "_decorators" for name in __all__ if name.startswith("register_")},
}


def __getattr__(name: str) -> Any:
    """A public name, imported when first asked for: `nemo-rl --help` needs the index alone."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
