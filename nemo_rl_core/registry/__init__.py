"""Registry of components: index, decorators, resolution, manifest; and the hooks of a run.

Discovery reads metadata only. Nothing of a plugin is imported before it is selected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_rl_core.exports import lazy_exports
from nemo_rl_core.registry._current import Lookup, make_with
from nemo_rl_core.registry.discovery._kinds import KINDS, Kind

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
    from nemo_rl_core.registry._escapes import comes_from_outside, is_escape, text_of
    from nemo_rl_core.registry._hook_plugin import HookFailure
    from nemo_rl_core.registry._hooks import HookPlugins, RunHooks
    from nemo_rl_core.registry._manifest import (
        ManifestDifference,
        active_table,
        compare_manifests,
        difference_table,
        is_first_party,
        manifest,
        report_changes,
    )
    from nemo_rl_core.registry._provider import Provider
    from nemo_rl_core.registry._reference import ComponentRef
    from nemo_rl_core.registry._registry import Registry, get_registry
    from nemo_rl_core.registry._trace import (
        PluginCall,
        Trace,
        blame,
        contained,
        failure_of,
        origin_of,
        provider_of,
    )
    from nemo_rl_core.registry._typed import Resolves
    from nemo_rl_core.registry._verification import (
        NodeDifference,
        check_nodes,
        node_differences,
        node_table,
        worker_rows,
    )

__all__ = [
    "KINDS",
    "ComponentRef",
    "HookFailure",
    "HookPlugins",
    "Kind",
    "ManifestDifference",
    "NodeDifference",
    "PluginCall",
    "Provider",
    "Registry",
    "Resolves",
    "RunHooks",
    "Trace",
    "active_table",
    "blame",
    "check_nodes",
    "comes_from_outside",
    "compare_manifests",
    "contained",
    "difference_table",
    "failure_of",
    "get_registry",
    "is_escape",
    "is_first_party",
    "manifest",
    "node_differences",
    "node_table",
    "origin_of",
    "provider_of",
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
    "report_changes",
    "text_of",
    "worker_rows",
]

_HOMES = {
    "ComponentRef": "._reference",
    "HookFailure": "._hook_plugin",
    "HookPlugins": "._hooks",
    "ManifestDifference": "._manifest",
    "PluginCall": "._trace",
    "Provider": "._provider",
    "Registry": "._registry",
    "Resolves": "._typed",
    "RunHooks": "._hooks",
    "Trace": "._trace",
    "NodeDifference": "._verification",
    "active_table": "._manifest",
    "check_nodes": "._verification",
    "compare_manifests": "._manifest",
    "blame": "._trace",
    "comes_from_outside": "._escapes",
    "contained": "._trace",
    "failure_of": "._trace",
    "is_escape": "._escapes",
    "text_of": "._escapes",
    "difference_table": "._manifest",
    "get_registry": "._registry",
    "is_first_party": "._manifest",
    "manifest": "._manifest",
    "origin_of": "._trace",
    "provider_of": "._trace",
    "node_differences": "._verification",
    "node_table": "._verification",
    "report_changes": "._manifest",
    "worker_rows": "._verification",
    **{name: "._decorators" for name in __all__ if name.startswith("register_")},
}


def _registry_of_process() -> Lookup:
    from nemo_rl_core.registry._registry import get_registry

    return get_registry()


make_with(_registry_of_process)

# `nemo-rl --help` needs the index alone.
__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
