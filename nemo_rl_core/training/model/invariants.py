"""Checks that are on by default in every run.

What is asserted: on the first on-policy update the ratio is 1 and nothing is clipped; trainer and engine
agree on the logprobs of what was sampled; some group carries a signal; the weights that sample are those
that were trained (the weight sync compares fingerprints); loss and gradient norm are finite (`Policy`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nemo_rl_core.errors import InvariantViolation

if TYPE_CHECKING:
    from nemo_rl_core.schema import InvariantsConfig

__all__ = ["Invariants"]

logger = logging.getLogger(__name__)
_MISMATCH = "token_mult_prob_error"
_RATIO_TOLERANCE = 1e-3


class Invariants:
    """Looks at the metrics of each step.

    Args:
        config: Thresholds.
    """

    def __init__(self, config: InvariantsConfig) -> None:
        self.config = config
        self._steps_without_signal = 0

    def check_first_update(self, metrics: Mapping[str, float]) -> None:
        """The first optimizer update after sampling with the same weights: ratio 1, nothing clipped.

        Raises:
            InvariantViolation: The ratio's mean is off 1, or tokens were clipped.
        """
        if not self.config.enabled:
            return
        ratio = metrics.get("probs_ratio", 1.0)
        clipped = metrics.get("clip_fraction", 0.0)
        if abs(ratio - 1.0) > _RATIO_TOLERANCE or clipped > 0.01:
            raise InvariantViolation(
                f"On the first on-policy update the probability ratio must be 1 and nothing clipped; found mean "
                f"ratio {ratio:.6f} and clipped fraction {clipped:.4f}. The logprobs of the old policy and of the "
                "forward pass disagree: check the sampling temperature, dropout, and the attention of packed "
                "sequences."
            )

    def check_mismatch(self, metrics: Mapping[str, float], *, may_abort: bool = True, stale: bool = False) -> None:
        """Engine and trainer logprobs of the sampled tokens: warn, then stop.

        Args:
            metrics: Of the step.
            may_abort: False only warns: recorded rollouts may come from other weights.
            stale: Some rollouts are of older weights, whose logprobs differ from the trainer's as they should.

        Raises:
            InvariantViolation: The mismatch is above `mismatch_abort`.
        """
        error = metrics.get(_MISMATCH)
        if not self.config.enabled or error is None:
            return
        text = (
            f"mean exp|trainer logprob - engine logprob| is {error:.4f} (1 is perfect). Usual causes: weights that "
            "were not loaded by the engine, another temperature or top-p/top-k on one side, low precision."
        )
        if stale:
            bound = self.config.mismatch_abort or self.config.mismatch_warn
            if error > bound:
                logger.warning(
                    "%s Older weights sampled some of the rollouts, which explains a part: lower rollouts.staleness or "
                    "the learning rate, or compare with a run of staleness 0.",
                    text,
                )
            return
        if may_abort and self.config.mismatch_abort is not None and error > self.config.mismatch_abort:
            raise InvariantViolation(
                f"Stopped: {text} The bound is invariants.mismatch_abort={self.config.mismatch_abort:g}."
            )
        if error > self.config.mismatch_warn:
            logger.warning("%s The warning bound is invariants.mismatch_warn=%g.", text, self.config.mismatch_warn)

    def check_signal(self, zero_variance_fraction: float | None) -> None:
        """Alarm when no group's rewards vary for `zero_signal_steps` steps in a row."""
        if not self.config.enabled or zero_variance_fraction is None:
            return
        self._steps_without_signal = self._steps_without_signal + 1 if zero_variance_fraction >= 1.0 else 0
        if self._steps_without_signal and self._steps_without_signal % self.config.zero_signal_steps == 0:
            logger.warning(
                "In the last %d steps every group's rewards were all equal, so nothing is learned. Check the reward "
                "on the rollouts in the run folder, the difficulty of the tasks, and max_new_tokens (a truncated "
                "answer scores nothing).",
                self._steps_without_signal,
            )

    def state_dict(self) -> dict[str, int]:
        """For the checkpoint."""
        return {"steps_without_signal": self._steps_without_signal}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the state from a checkpoint."""
        self._steps_without_signal = int(state.get("steps_without_signal", 0))
