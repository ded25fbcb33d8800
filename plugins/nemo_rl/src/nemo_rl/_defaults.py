"""The default set: which component is meant when a configuration names none."""

from __future__ import annotations

from nemo_rl_core.hookspecs import hookimpl


@hookimpl
def nemo_rl_defaults() -> dict[str, str]:
    """Kind to name."""
    return {
        "training_backends": "dtensor",
        "generation_backends": "torch_engine",
        "launchers": "local",
        "weight_syncs.workers": "collective",
        "weight_syncs.colocated": "shared_memory",
    }
