"""PPO's clipped surrogate.

Legend: B sequences, N tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.models.numerics.kl import kl_estimate
from nemo_rl_core.protocols.loss import Denominator, LossSums, Metric, per_token
from nemo_rl_plugins_ppo.config import ClippedSurrogateConfig

if TYPE_CHECKING:
    from nemo_rl_core.protocols.loss import ModelOutputs
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["MAX_LOG_RATIO", "ClippedSurrogateLoss"]

MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8: beyond it a ratio is held, so that inf * 0 cannot make nan."""


class ClippedSurrogateLoss:
    """-min(ratio * A, clip(ratio) * A) for each sampled token (arXiv:1707.06347 eq. 7), minus an entropy, plus a KL.

    Dual clip: arXiv:1912.09729. Without `logprobs` in the batch (one optimizer step for each batch of rollouts) the
    policy before the step is the current one: the ratio is 1, with its gradient.

    Args:
        config: See `ClippedSurrogateConfig`.
    """

    config_class: ClassVar[type] = ClippedSurrogateConfig

    def __init__(self, config: ClippedSurrogateConfig | None = None) -> None:
        self.config = config or ClippedSurrogateConfig()
        self.denominator: Denominator = "tokens" if self.config.aggregation == "token" else "sequences"
        self.needs = frozenset({"logprobs", "entropy"} if self.config.entropy_coef > 0 else {"logprobs"})

    @property
    def corrects_importance(self) -> bool:
        """Whether rollouts of other weights than the current ones may be trained on."""
        return bool(self.config.ratio_against == "rollout")

    @property
    def conformance(self) -> Mapping[str, bool]:
        """For its kit: the gradient of the KL is that of its expectation; an entropy is raised beside the surrogate."""
        return {
            "differentiable": self.config.reference_kl_beta == 0,
            "only_advantages": self.config.entropy_coef == 0,
        }

    @property
    def required_fields(self) -> frozenset[str]:
        """Fields of the batch that a forward pass must add, when several optimizer steps take one batch."""
        start = {"logprobs"} if self.config.ratio_against == "step_start" else set()
        return frozenset(start | ({"ref_logprobs"} if self.config.reference_kl_beta > 0 else set()))

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum the loss over the trained tokens of one micro-batch.

        Args:
            outputs: With `logprobs` [N], and `entropy` [N] if it is weighted.
            batch: With `advantages` [N] and `rollout_logprobs` [N]; `logprobs` [N] of the policy before the step, if
                it takes more than one; `ref_logprobs` [N] for the KL. All read where `loss_mask` [N] is True.

        Raises:
            ShapeMismatch: An output is not [N].
        """
        config, dropped = self.config, ~batch["loss_mask"]
        logprobs = per_token(outputs.logprobs, batch, "outputs.logprobs").masked_fill(dropped, 0.0)
        sampled = batch["rollout_logprobs"].masked_fill(dropped, 0.0)
        start = batch["logprobs"].masked_fill(dropped, 0.0) if "logprobs" in batch else logprobs.detach()
        advantages = batch["advantages"].masked_fill(dropped, 0.0)
        against = start if config.ratio_against == "step_start" else sampled
        ratio = _ratio(logprobs, against)
        terms = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(*self._bounds))
        if config.ratio_clip_c is not None:
            bounded = torch.minimum(terms, -advantages * config.ratio_clip_c)
            terms = torch.where(advantages < 0, bounded, terms)
        mask = batch["loss_mask"]
        metrics = {
            **self._ratio_metrics(ratio.detach(), advantages, mask),
            "actor_loss": _mean(terms, mask),
            # A mismatch that is not finite is a fault of the engine and is meant to be seen.
            "token_mult_prob_error": _mean((start - sampled).detach().abs().exp(), mask),
        }
        if config.entropy_coef > 0:
            entropy = per_token(outputs.entropy, batch, "outputs.entropy").masked_fill(dropped, 0.0)
            terms = terms - config.entropy_coef * entropy
            metrics["entropy"] = _mean(entropy, mask)
        if config.reference_kl_beta > 0:
            reference = batch["ref_logprobs"].masked_fill(dropped, 0.0)
            kl = kl_estimate(reference - logprobs, config.reference_kl_type, bound=MAX_LOG_RATIO)
            terms = terms + config.reference_kl_beta * kl * _ratio(logprobs, logprobs.detach())
            metrics["reference_kl"] = _mean(kl, mask)
        if config.aggregation == "sequence":
            terms = terms / batch.expand_to_tokens(batch.sum_per_sequence(mask.to(terms.dtype)).clamp(min=1))
        return LossSums(terms.masked_fill(dropped, 0.0).sum(), metrics)

    @property
    def _bounds(self) -> tuple[float, float]:
        return 1 - self.config.ratio_clip_min, 1 + self.config.ratio_clip_max

    def _ratio_metrics(self, ratio: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, Metric]:
        """Return metrics of the ratio [N]; a token counts as clipped if the clip takes its gradient away."""
        low, high = self._bounds
        clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
        # Against the engine's logprobs it is not exactly 1 on the first update, and so has another name.
        prefix = "rollout_" if self.config.ratio_against == "rollout" else ""
        log_ratio = ratio.log()
        return {
            f"{prefix}probs_ratio": _mean(ratio, mask),
            f"{prefix}clip_fraction": _mean(clipped.to(ratio.dtype), mask),
            f"{prefix}approx_kl": _mean(log_ratio.expm1() - log_ratio, mask),
        }


def _ratio(logprobs: Tensor, against: Tensor) -> Tensor:
    return (logprobs - against).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _mean(values: Tensor, mask: Tensor) -> Metric:
    """The mean over trained tokens."""
    return Metric(values.detach().masked_fill(~mask, 0.0).sum(), mask.sum())
