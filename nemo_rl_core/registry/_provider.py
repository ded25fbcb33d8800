"""Provider of a component."""

from __future__ import annotations

from typing import NamedTuple

from nemo_rl_core.registry.discovery._kinds import KINDS

__all__ = ["Provider"]


class Provider(NamedTuple):
    """Who provides a component."""

    kind: str
    name: str
    distribution: str | None = None
    """None for user code: a script, a notebook, a module that no distribution with plugins owns."""
    version: str | None = None
    value: str | None = None

    @property
    def label(self) -> str:
        """`plugin boom 1.2 (dist acme)`, or `user code __main__:Boom`."""
        if self.distribution is not None:
            return f"plugin {self.name} {self.version} (dist {self.distribution})"
        return f"user code {self.value or self.name}"

    def at(self, call: str) -> str:
        """`plugin boom 1.2 (dist acme), loss __call__`."""
        kind = KINDS[self.kind].label if self.kind in KINDS else self.kind
        return f"{self.label}, {kind} {call}"
