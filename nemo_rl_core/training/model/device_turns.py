"""Trainer and engine take turns in the memory of devices that they share.

While the engine samples, the models wait on the host; while they train, the engine sleeps. Nobody says when a model is
needed: it comes back at its first use, and the engine sleeps then. So whatever computes, saves or exports between two
rollouts finds its model in place, and a turn lasts until the other side's begins.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch

from nemo_rl_core.errors import ConfigError, GenerationError, NemoRLError, ResourceError, WorkerDied
from nemo_rl_core.machine.deadline import Deadline
from nemo_rl_core.machine.place import Place, place_of
from nemo_rl_core.registry import PluginCall
from nemo_rl_core.training.model.policy import InitialModel, Policy

if TYPE_CHECKING:
    from nemo_rl_core.protocols.generation_backend import GenerationBackend
    from nemo_rl_core.rollouts.runner import RolloutRunner
    from nemo_rl_core.schema import RunConfig

__all__ = ["DeviceTurns", "make_turns", "share_devices"]

logger = logging.getLogger(__name__)

_CANCEL_TIMEOUT_S = 30.0
_POLL_S = 0.05


class DeviceTurns:
    """Turns of trainer and engine on shared devices. Made without arguments it does nothing: nobody leaves.

    Args:
        models: That compute in turn with the engine, by role.
        leaving: Roles of those whose weights and optimizer leave the device.
        trained: Roles of those that take steps. The others leave before a step as well.
        sleeps: Whether the engine sleeps.
    """

    def __init__(
        self,
        models: Mapping[str, Policy] | None = None,
        *,
        leaving: frozenset[str] = frozenset(),
        trained: frozenset[str] = frozenset(),
        sleeps: bool = False,
    ) -> None:
        self.timed: Callable[[str], AbstractContextManager[None]] = lambda stage: nullcontext()
        """Measures `offload`, `reload`, `sleep` and `wake`."""
        self.slept = False
        """Whether the engine has slept since its last refit: it may have given its weights back."""
        self._models = dict(models or {})
        self._leaving, self._trained, self._sleeps = leaving, trained, sleeps
        self._away: set[str] = set()
        self._asleep = False
        self._engine: GenerationBackend | None = None
        self._runner: RolloutRunner | None = None
        self._lock = threading.RLock()
        for name, model in self._models.items():
            model.before_use = partial(self._use, name)

    def attach(self, engine: GenerationBackend, runner: RolloutRunner) -> None:
        """The engine has started, where the models have left it room."""
        self._engine, self._runner = engine, runner

    def sampling(self) -> None:
        """The engine's turn: the models leave, then it wakes. Nothing if it has the turn."""
        with self._lock:
            for name in sorted(self._leaving - self._away):
                self._send_away(name)
            if self._asleep:
                assert self._engine is not None
                with self.timed("wake"), PluginCall("generation_backends", self._engine, "wake"):
                    self._engine.wake()
                self._asleep = False

    @contextmanager
    def refitting(self, engine: GenerationBackend) -> Iterator[None]:
        """The policy is in place, and `engine` sleeps but for the weights that it takes.

        Args:
            engine: The run's; or one of several, which was started again while the others sample.
        """
        with self._lock:
            if engine is not self._engine and self._engine is not None and not self._asleep:
                with self._refitting_one(engine):
                    yield
                return
            if self._asleep and getattr(engine, "waits_to_start", False):
                self.sampling()  # an engine that died in its sleep starts where the models have left it room
            self._use("policy", stepping=True)
            yield
            self.slept = False

    @contextmanager
    def _refitting_one(self, engine: GenerationBackend) -> Iterator[None]:
        """Only on that engine's devices it is the trainer's turn."""
        if self._sleeps:
            engine.sleep()
        was_away = "policy" in self._away
        if was_away:
            self._bring_back("policy")
        try:
            yield
        finally:
            if was_away:
                self._send_away("policy")
        if self._sleeps:
            engine.wake()

    # -- the trainer's side ------------------------------------------------------------------------

    def _use(self, name: str, *, stepping: bool = False, saving: bool = False) -> None:
        """A model is about to be used: the engine sleeps first; before a step the frozen models leave too.

        What is saved is saved beside an engine that does not go to sleep, if there is room.
        """
        with self._lock:
            if name not in self._models:
                return
            if self._sleeps and not self._asleep and self._engine is not None:
                try:
                    self._put_to_sleep(self._engine)
                except NemoRLError as error:
                    if not saving:
                        raise
                    logger.warning("The engine did not go to sleep before the model %r is saved: %s", name, error)
            if stepping:
                for other in sorted(self._leaving - self._trained - self._away - {name}):
                    self._send_away(other)
            if name in self._away:
                self._bring_back(name)

    def _send_away(self, name: str) -> None:
        with self.timed("offload"):
            self._models[name].offload()
        self._away.add(name)

    def _bring_back(self, name: str) -> None:
        try:
            with self.timed("reload"):
                self._models[name].reload()
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"The model of the role {name!r} does not fit back on its device after sampling, though the engine "
                f"sleeps ({error}). Something else holds the memory (nvidia-smi). Give the model more devices "
                f"({name}.num_workers), or give the roles devices of their own (cluster.colocated: false)."
            ) from error
        self._away.discard(name)

    def _put_to_sleep(self, engine: GenerationBackend) -> None:
        """Cancel what still samples, as it belongs to an abandoned step, and put the engine to sleep."""
        if self._runner is not None and self._runner.engine.traffic.count:
            self._runner.cancel_all()
        deadline = Deadline(_CANCEL_TIMEOUT_S)
        with self.timed("sleep"), PluginCall("generation_backends", engine, "sleep"):
            while True:
                try:
                    engine.sleep()
                    break
                except WorkerDied as error:  # it holds no memory any more; who needs it will be told
                    logger.warning("An engine died before it slept: %s", error)
                    break
                except GenerationError:  # a request that was cancelled takes a moment to leave
                    if deadline.expired:
                        raise
                    time.sleep(_POLL_S)
        self._asleep = self.slept = True


def share_devices(config: RunConfig) -> bool:
    """Return whether trainer and engine are placed on the same devices."""
    return config.cluster.colocated or not config.cluster.roles


def make_turns(
    config: RunConfig,
    models: Mapping[str, Policy | InitialModel],
    trained: Mapping[str, object],
    engine_class: type[GenerationBackend],
    *,
    share_weights: bool,
) -> DeviceTurns:
    """Decide who leaves the device in turn, from `cluster.offload` and the backends' capabilities.

    Args:
        config: Of the run.
        models: By role.
        trained: Those of them that take steps.
        engine_class: Of the generation backend.
        share_weights: The engine samples from the policy's own tensors, which therefore stay.

    Raises:
        ConfigError: `cluster.offload` is always, and one side cannot leave.
    """
    mode, stale = config.cluster.offload, config.rollouts.staleness > 0
    if mode == "never" or not share_devices(config) or (mode == "auto" and not _on_accelerator(models["policy"])):
        return DeviceTurns()
    if stale:
        logger.warning(
            "rollouts.staleness is %d, so the engine samples while the models train, on the same devices: %s and the "
            "engine must fit there together. Give them devices of their own (cluster.colocated: false with "
            "cluster.roles), or leave the models room (a smaller share of the memory in generation.options).",
            config.rollouts.staleness,
            ", ".join(models),
        )
        return DeviceTurns()
    computing = {name: model for name, model in models.items() if isinstance(model, Policy)}
    staying = {"policy"} if share_weights else set()
    leaving = {name for name, model in computing.items() if model.can_offload and name not in staying}
    sleeps = "sleep" in engine_class.capabilities
    unable = [f"the model of the role {name!r} (no 'offload')" for name in computing.keys() - leaving - staying]
    unable += [] if sleeps else [f"the engine {engine_class.__name__} (no 'sleep')"]
    if unable:
        told = f"{' and '.join(sorted(unable))} cannot leave the devices that trainer and engine share"
        if mode == "always":
            raise ConfigError(
                f"cluster.offload is always, but {told}. Choose other backends, or cluster.offload: auto."
            )
        logger.warning("%s; it keeps its memory there while the other side works.", told)
    return DeviceTurns(computing, leaving=frozenset(leaving), trained=frozenset(trained), sleeps=sleeps)


def _on_accelerator(policy: Policy | InitialModel) -> bool:
    """Return whether the policy computes on an accelerator; the driver's own machine may have none."""
    assert not isinstance(policy, InitialModel)
    place: Place = policy.group.call("apply", place_of)[0]
    return not place.device.startswith("cpu")
