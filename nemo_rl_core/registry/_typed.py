"""`resolve` with the type of what each kind of component is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from nemo_rl_core.protocols.advantage import AdvantageEstimator
    from nemo_rl_core.protocols.algorithm import Algorithm
    from nemo_rl_core.protocols.dataset import DatasetSource
    from nemo_rl_core.protocols.generation_backend import GenerationBackend
    from nemo_rl_core.protocols.launcher import Launcher
    from nemo_rl_core.protocols.logger import Logger
    from nemo_rl_core.protocols.loss import Loss
    from nemo_rl_core.protocols.training_backend import TrainingBackend
    from nemo_rl_core.protocols.weight_sync import WeightSync
    from nemo_rl_core.registry._reference import ComponentRef

__all__ = ["Resolves"]

Choice = object
"""`name`, `dist:name`, `module:attr`, a class, function or object, or a reference; None is the default of the kind."""
Plugins = Mapping[str, str] | None


class Resolves:
    """Finds the component that a choice names."""

    @abstractmethod
    def _resolve(self, kind: str, choice: Choice, plugins: Plugins) -> ComponentRef[Any]: ...

    @overload
    def resolve(
        self, kind: Literal["algorithms"], choice: Choice = None, *, plugins: Plugins = None
    ) -> ComponentRef[type[Algorithm]]: ...
    @overload
    def resolve(
        self, kind: Literal["losses"], choice: Choice = None, *, plugins: Plugins = None
    ) -> ComponentRef[type[Loss]]: ...
    @overload
    def resolve(
        self, kind: Literal["advantages"], choice: Choice = None, *, plugins: Plugins = None
    ) -> ComponentRef[type[AdvantageEstimator]]: ...
    @overload
    def resolve(
        self, kind: Literal["training_backends"], choice: Choice = None, *, plugins: Plugins = None
    ) -> ComponentRef[type[TrainingBackend]]: ...
    @overload
    def resolve(
        self, kind: Literal["generation_backends"], choice: Choice = None, *, plugins: Plugins = None
    ) -> ComponentRef[type[GenerationBackend]]: ...
    @overload
    def resolve(
        self, kind: Literal["datasets"], choice: Choice = None, *, plugins: Plugins = None
    ) -> ComponentRef[type[DatasetSource]]: ...
    @overload
    def resolve(
        self, kind: Literal["launchers"], choice: Choice = None, *, plugins: Plugins = None
    ) -> ComponentRef[type[Launcher]]: ...
    @overload
    def resolve(
        self, kind: Literal["weight_syncs"], choice: Choice = None, *, plugins: Plugins = None
    ) -> ComponentRef[type[WeightSync]]: ...
    @overload
    def resolve(
        self, kind: Literal["loggers"], choice: Choice = None, *, plugins: Plugins = None
    ) -> ComponentRef[type[Logger]]: ...
    @overload
    def resolve(self, kind: str, choice: Choice = None, *, plugins: Plugins = None) -> ComponentRef[Any]: ...
    def resolve(self, kind: str, choice: Choice = None, *, plugins: Plugins = None) -> ComponentRef[Any]:
        """The component that `choice` names. Its metadata is checked; nothing is imported.

        Args:
            kind: Plural name of the kind, as in `KINDS`.
            choice: See `Choice`.
            plugins: Bare name to full name where two distributions provide one (the `plugins` section of a
                configuration); takes precedence over the choices of `Registry.prefer`.

        Returns:
            A reference; its `load` gives what the kind promises, for most a class that fulfils the kind's protocol.

        Raises:
            PluginNotFound: Nothing of that name; says what is installed and what to install.
            PluginConflict: More than one; names them.
            PluginBroken: The entry point cannot be read, or strict mode found a broken plugin.
            PluginIncompatible: It does not fit this core.
        """
        return self._resolve(kind, choice, plugins)
