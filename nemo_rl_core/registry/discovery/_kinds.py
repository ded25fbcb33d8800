"""The kinds of component: one entry-point group each, fixed for ever."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["API_GROUP", "HOOKS_GROUP", "KINDS", "Kind"]

HOOKS_GROUP = "nemo_rl.hooks"
"""Entry-point group of plugins that listen to hooks; the value is a module or an object."""

API_GROUP = "nemo_rl.api"
"""Optional entry-point group in which a distribution declares, as `losses = v1`, the version of each
kind's contract that it was written for. Read as text, never imported; absent means version 1."""


class Kind(NamedTuple):
    """One kind of component."""

    name: str
    """Plural name, the suffix of the entry-point group."""
    label: str
    """What one component of this kind is called in a message."""
    protocol: str | None = None
    """`module:attr` of the contract, imported only when a component of the kind is loaded."""
    api_version: int = 1
    """Version of the contract in this core; raised by a change that breaks plugins."""
    package_hint: str = "nemo-rl-<name>"
    """How distributions that provide this kind are usually named."""

    @property
    def group(self) -> str:
        """The entry-point group."""
        return f"nemo_rl.{self.name}"


_P = "nemo_rl_core.protocols"

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("algorithms", "algorithm", f"{_P}.algorithm:Algorithm"),
        Kind("losses", "loss", f"{_P}.loss:Loss"),
        Kind("advantages", "advantage estimator", f"{_P}.advantage:AdvantageEstimator"),
        Kind("training_backends", "training backend", f"{_P}.training_backend:TrainingBackend"),
        Kind("generation_backends", "generation backend", f"{_P}.generation_backend:GenerationBackend"),
        Kind("environments", "environment", f"{_P}.environment:Environment", package_hint="nemo-rl-env-<name>"),
        Kind("rewards", "reward", f"{_P}.reward:Reward", package_hint="nemo-rl-env-<name>"),
        Kind("datasets", "dataset source", f"{_P}.dataset:DatasetSource"),
        Kind("launchers", "launcher", f"{_P}.launcher:Launcher"),
        Kind("weight_syncs", "weight sync", f"{_P}.weight_sync:WeightSync"),
        Kind("loggers", "logger", f"{_P}.logger:Logger"),
        Kind("callbacks", "callback"),
        Kind("sandboxes", "sandbox", f"{_P}.sandbox:Sandbox"),
        Kind("exporters", "exporter", f"{_P}.exporter:Exporter"),
        Kind("commands", "command"),
    )
}
"""Every kind by its plural name, in the order in which listings show them."""
