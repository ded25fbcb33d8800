"""The default set: the component of each kind for configurations that name none."""

from __future__ import annotations

from nemo_rl_core.hookspecs import hookimpl


@hookimpl
def nemo_rl_defaults() -> dict[str, str]:
    """Provide the default component of each kind."""
    return {
        "training_backends": "dtensor",
        "generation_backends": "torch_engine",
        "launchers": "local",
        "weight_syncs.workers": "collective",
        "weight_syncs.colocated": "shared_memory",
    }
