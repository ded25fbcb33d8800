"""Refit: loads the policy's weights into the engine, before a step or while it samples."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from nemo_rl_core.errors import WorkerDied
from nemo_rl_core.registry import PluginCall

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from nemo_rl_core.protocols.generation_backend import GenerationBackend
    from nemo_rl_core.training.setup.parts import RunParts

__all__ = ["Refit"]

_LATE_S = 10.0
"""Slack added to the deadline of a request."""


class Refit:
    """Loads new weights into the generation backend.

    With a staleness bound of 0 no request is in flight. Above it, either the engine takes the weights under the
    requests that it has (they go on, and their completions carry the first and the last version); or the requests that
    it has are finished first while new ones wait, so that each completion is of one version and an episode of several
    turns may span two.

    Args:
        parts: What the run is made of.
    """

    def __init__(self, parts: RunParts) -> None:
        self.parts = parts
        self.version = -1
        """Of the engine's weights; -1 before the first refit."""

    def is_due(self, version: int) -> bool:
        """Whether there is an engine, and it has other weights than those of `version`, or was restarted, or slept."""
        parts = self.parts
        if parts.weight_sync is None or parts.generation is None:
            return False
        return self.version != version or parts.turns.slept or getattr(parts.generation, "needs_refit", False)

    def bring_to(self, version: int) -> None:
        """Load the policy's weights and stamp them with `version`.

        Raises:
            DeadlineExceeded: The engine, the trainer or the requests before the update took too long.
            InvariantViolation: The engine's weights differ from the trainer's afterwards.
        """
        parts = self.parts
        assert parts.generation is not None
        with self._between_requests():
            self._load(parts.generation, version)
        self.version = version
        if parts.runner is not None:
            parts.runner.engine.weight_version = version

    def of_restarted(self) -> AbstractContextManager[None]:
        """While the trainer stands still: an engine that was started again may get its weights."""
        refits = getattr(self.parts.generation, "refits", None)
        if refits is None or self.parts.weight_sync is None:
            return nullcontext()
        limit = self.parts.config.generation.refit_timeout_s
        restarted: AbstractContextManager[None] = refits(
            lambda engine: self._load(engine, self.version), timeout_s=limit
        )
        return restarted

    def _load(self, engine: GenerationBackend, version: int) -> None:
        parts = self.parts
        assert parts.weight_sync is not None
        try:
            with parts.turns.refitting(engine), PluginCall("weight_syncs", parts.weight_sync, "sync"):
                parts.weight_sync.sync(
                    parts.policy.group,
                    engine,
                    version=version,
                    share=parts.share_weights,
                    timeout_s=parts.config.generation.refit_timeout_s,
                )
        except WorkerDied:
            if not getattr(engine, "waits_to_start", False):
                raise
            self._load(engine, version)  # the models leave first, so that it can start

    def _between_requests(self) -> AbstractContextManager[None]:
        rollouts = self.parts.config.rollouts
        if rollouts.staleness == 0 or self.parts.in_flight_updates or self.parts.runner is None:
            return nullcontext()
        # Each request has a deadline of its own; only one that outlives it is worth stopping for.
        limit_s = 1.1 * rollouts.generation_timeout_s + _LATE_S
        return self.parts.runner.engine.traffic.stopped(limit_s, unless=self._nobody_samples)

    def _nobody_samples(self) -> bool:
        """Every engine died: what was asked of them is answered after this refit."""
        return bool(getattr(self.parts.generation, "needs_all_weights", False))
