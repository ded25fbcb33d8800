"""Limit on the failed rollouts of a run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from nemo_rl_core.errors import EnvironmentFailure
from nemo_rl_core.records.rollout import RolloutError, RolloutGroup

__all__ = ["check_failures"]

logger = logging.getLogger(__name__)


def check_failures(groups: Sequence[RolloutGroup], max_failed_fraction: float, *, warn: bool = True) -> None:
    """Warn of failed rollouts, or stop when there are too many.

    Raises:
        EnvironmentFailure: More than `max_failed_fraction` failed, or all; counts the most frequent errors.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    errors = [rollout.error for rollout in rollouts if rollout.error is not None]
    if not errors:
        return
    counted = Counter(errors).most_common(3)
    listing = "; ".join(f"{count} x {_told(error)}" for error, count in counted)
    if len(errors) > max_failed_fraction * len(rollouts) or len(errors) == len(rollouts):
        first = counted[0][0]
        start = f"{first.origin}: {first.type}: {first.message}. " if first.origin else ""
        raise EnvironmentFailure(
            f"{start}{len(errors)} of {len(rollouts)} rollouts failed; rollouts.max_failed_fraction="
            f"{max_failed_fraction:g} allows fewer. Most frequent: {listing}. Mend the reward, the environment or the "
            "data, or raise the bound."
        )
    if warn:
        logger.warning("%d of %d rollouts failed and are left out: %s", len(errors), len(rollouts), listing)


def _told(error: RolloutError) -> str:
    by = f" ({error.origin})" if error.origin else ""
    return f"{error.stage}: {error.type}: {error.message}{by}"
