"""What `nemo-rl plugins doctor` compares: the plugins of every node of the Ray cluster at RAY_ADDRESS."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl_core.hookspecs import hookimpl

__all__ = ["nemo_rl_node_manifests"]

_TIMEOUT_S = 60.0


@hookimpl
def nemo_rl_node_manifests() -> Mapping[str, Sequence[Mapping[str, Any]]] | None:
    """Plugins of the nodes; None without RAY_ADDRESS (a cluster is never started for this).

    Raises:
        ResourceError: The cluster at RAY_ADDRESS does not answer.
        DeadlineExceeded: Nodes do not answer; names them.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return None
    from nemo_rl_core.schema import ClusterConfig
    from nemo_rl_plugins_ray.cluster import connect
    from nemo_rl_plugins_ray.config import RayConfig

    connection = connect(RayConfig(), ClusterConfig())
    try:
        return _ask_nodes()
    finally:
        connection.close()


def _ask_nodes() -> dict[str, list[dict[str, Any]]]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from nemo_rl_core.errors import DeadlineExceeded

    here = ray.get_runtime_context().get_node_id()
    names: dict[Any, str] = {}
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] != here:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ask = ray.remote(num_cpus=0, max_retries=0)(_listing).options(scheduling_strategy=where)
            names[ask.remote()] = f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"
    ready, late = ray.wait(list(names), num_returns=len(names), timeout=_TIMEOUT_S) if names else ([], [])
    if late:
        raise DeadlineExceeded(
            f"No answer in {_TIMEOUT_S:g} s from the Ray node(s) {', '.join(names[ref] for ref in late)}."
        )
    return {names[ref]: ray.get(ref) for ref in ready}


def _listing() -> list[dict[str, Any]]:
    """On a node: what `nemo-rl plugins list --json` prints there."""
    import json
    import subprocess
    import sys

    command = [sys.executable, "-m", "nemo_rl_core.cli", "plugins", "list", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows
