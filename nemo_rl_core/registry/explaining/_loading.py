"""Importing everything that distributions provide, to see what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nemo_rl_core.errors import PluginError, PluginIncompatible, describe, text_of
from nemo_rl_core.registry.discovery._index import CORE
from nemo_rl_core.registry.discovery._kinds import KINDS
from nemo_rl_core.registry.explaining._finding import Finding, Problem, remedy

if TYPE_CHECKING:
    from nemo_rl_core.registry._registry import Registry

__all__ = ["faults_of_components", "faults_of_hooks"]


def faults_of_components(registry: Registry, *, load: bool, distribution: str | None = None) -> Iterator[Finding]:
    """Components that do not fit this core or, with `load`, cannot be imported or are not what their kind requires.

    Args:
        registry: What is installed.
        load: Import them.
        distribution: Only those of this one; None is all.
    """
    for ref in registry.entries():
        if distribution is not None and ref.distribution != distribution:
            continue
        try:
            ref.load() if load else ref.check()
        except PluginIncompatible as error:
            fix = f"pip install -U {CORE} {ref.distribution or ''}".strip()
            yield Finding("incompatible", ref.qualified_name, text_of(error), fix)
        except PluginError as error:
            yield Finding("broken", ref.qualified_name, text_of(error), remedy(ref.distribution))


def faults_of_hooks(registry: Registry, *, distribution: str | None = None) -> Iterator[Finding]:
    """Hook plugins that cannot be imported or are malformed, and provision hooks that raise."""
    from nemo_rl_core.registry._hooks import HookPlugins

    for entry in registry.index.hooks():
        dist = entry.distribution
        if distribution is not None and dist.name != distribution:
            continue
        try:
            plugins = HookPlugins.of(registry, entry)
        except PluginError as error:
            kind: Problem = "incompatible" if isinstance(error, PluginIncompatible) else "hook plugin"
            yield Finding(kind, f"{dist.name}:{entry.name}", text_of(error), remedy(dist.name))
            continue
        for each in KINDS:
            list(plugins.call_each(f"nemo_rl_{each}"))
        for failure in plugins.failures:
            text = f"{failure.hook} raised {describe(failure.error)}"
            yield Finding("hook plugin", f"{dist.name}:{entry.name}", text, remedy(dist.name))
