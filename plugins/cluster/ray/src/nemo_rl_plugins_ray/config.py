"""Options of the Ray launcher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import Factory, field, frozen
from attrs.validators import gt, optional

__all__ = ["RayConfig"]


@frozen(kw_only=True)
class RayConfig:
    """Options of the Ray launcher (`cluster.options`)."""

    address: str | None = None
    """Address of the cluster: host:port, or auto for the one on this machine; None is RAY_ADDRESS, and without that a
    cluster of this run's own on this machine, which ends with the run."""
    namespace: str | None = None
    """Ray namespace of the run; None is one of its own."""
    runtime_env: dict[str, Any] = Factory(dict)
    """Ray runtime environment of every worker, such as `{env_vars: {A: b}, pip: [x], working_dir: .}`."""
    role_runtime_env: dict[str, dict[str, Any]] = Factory(dict)
    """Runtime environments by role, such as `{generation: {pip: [vllm]}}`; they go over `runtime_env`."""
    object_store_gib: float | None = field(default=None, validator=optional(gt(0)))
    """Shared memory of a cluster that this run starts; None is Ray's own choice."""
    placement_timeout_s: float = field(default=60.0, validator=gt(0))
    """How long to wait for resources that the cluster has but others use."""
    start_timeout_s: float = field(default=300.0, validator=gt(0))
    """Deadline of starting a group's actors, their runtime environments with them, and of their `setup`."""
    call_timeout_s: float = field(default=3600.0, validator=gt(0))
    """Deadline of a call that sets none itself: no wait is without one."""
    failure_grace_s: float = field(default=10.0, validator=gt(0))
    """When one worker raises, how long the others may take to answer before they are ended as well."""

    def environment_of(self, role: str, env_vars: Mapping[str, str]) -> dict[str, Any]:
        """Ray runtime environment of one role's workers: the base, the role's over it, `env_vars` over both."""
        own = self.role_runtime_env.get(role, {})
        variables = {**self.runtime_env.get("env_vars", {}), **own.get("env_vars", {}), **env_vars}
        merged = {**self.runtime_env, **own}
        merged.pop("env_vars", None)
        return {**merged, "env_vars": variables} if variables else merged
