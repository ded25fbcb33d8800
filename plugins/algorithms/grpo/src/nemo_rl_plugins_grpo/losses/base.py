"""What every policy-gradient loss has beside its surrogate.

Terms are added up as the options say, weighted for the mismatch of trainer and engine, and joined by a KL to a
reference policy and by the negative log-likelihood of rewarded responses.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from nemo_rl_core.models.numerics.kl import kl_estimate
from nemo_rl_core.protocols.loss import Denominator, LossSums, Metric
from nemo_rl_plugins_grpo.losses.correction import correct, importance_weights
from nemo_rl_plugins_grpo.losses.kl import reference_kl
from nemo_rl_plugins_grpo.losses.positive import positive_nll, unopposed_direction
from nemo_rl_plugins_grpo.losses.ratio import log_ratio, ratio_metrics, ratio_of
from nemo_rl_plugins_grpo.losses.tokens import Tokens, mean_over_tokens, read_tokens, token_scale

if TYPE_CHECKING:
    from nemo_rl_core.protocols.loss import ModelOutputs
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["PolicyGradientLoss", "RatioLoss"]


class PolicyGradientLoss(ABC):
    """A loss of the family; a subclass says what the term of each token is.

    Args:
        config: An object of `config_class`; None is its defaults.
    """

    config_class: ClassVar[type]
    needs: frozenset[str] = frozenset({"logprobs"})

    def __init__(self, config: Any = None) -> None:
        self.config = self.config_class() if config is None else config
        self.denominator: Denominator = "tokens" if self.config.aggregation == "token" else "sequences"

    @abstractmethod
    def policy_terms(self, tokens: Tokens, batch: BatchedDataDict) -> tuple[Tensor, dict[str, Metric]]:
        """[N] the surrogate of each token (0 where masked, not yet corrected), and its metrics."""

    @property
    def reads_start(self) -> bool:
        """Whether the policy at the start of the step is asked for, when it is not the current one."""
        return bool(self.config.correction != "none")

    @property
    def corrects_importance(self) -> bool:
        """Whether rollouts of other weights than the current ones may be trained on."""
        return bool(self.config.correction != "none")

    @property
    def conformance(self) -> dict[str, Any]:
        """For its kit: whether the gradient is that of the value, and what else than the advantages moves a token."""
        said: dict[str, Any] = {"differentiable": not self._stops_gradients}
        if self.config.positive_nll_weight > 0:
            unopposed = functools.partial(unopposed_direction, threshold=self.config.positive_nll_threshold)
            said |= {"only_advantages": False, "wanted": unopposed}
        return said

    @property
    def _stops_gradients(self) -> bool:
        """Whether the gradient is on purpose not that of the value."""
        return bool(self.config.reference_kl_beta > 0 and self.config.reference_kl_gradient != "direct")

    @property
    def required_fields(self) -> frozenset[str]:
        """Fields of the batch that a forward pass must add, when several optimizer steps take one batch."""
        fields = {"ref_logprobs"} if self.config.reference_kl_beta > 0 else set()
        return frozenset(fields | ({"logprobs"} if self.reads_start else set()))

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum the loss over the trained tokens of one micro-batch.

        Args:
            outputs: `logprobs` [N] of the current policy.
            batch: `loss_mask`, `rollout_logprobs`, `advantages`; `logprobs` when not on policy; `ref_logprobs`
                when `reference_kl_beta` > 0; `raw_rewards` or `rewards` [B] when `positive_nll_weight` > 0. Masked
                positions may hold anything.

        Returns:
            The sum (over tokens, or over sequences of what `aggregation` makes of each) and its metrics.

        Raises:
            ShapeMismatch: `outputs.logprobs` is not [N].
        """
        config = self.config
        tokens = read_tokens(outputs, batch, reference=config.reference_kl_beta > 0)
        scale = token_scale(tokens.mask, batch, aggregation=config.aggregation, constant_length=config.constant_length)
        terms, metrics = self.policy_terms(tokens, batch)
        weights, mismatch_metrics = self._mismatch(tokens, batch)
        if weights is not None:
            terms = terms * weights
        total = (terms * scale).sum()
        count = scale.sum()
        metrics["actor_loss"] = Metric(total.detach(), count)
        if tokens.ref_logprobs is not None:
            penalty = (self._reference_kl(tokens, tokens.ref_logprobs) * scale).sum()
            total = total + config.reference_kl_beta * penalty
            metrics["kl_penalty"] = Metric(penalty.detach(), count)
        if config.positive_nll_weight > 0:
            nll, metrics["positive_nll"] = positive_nll(tokens, batch, threshold=config.positive_nll_threshold)
            total = total + config.positive_nll_weight * (nll * scale).sum()
        return LossSums(total, {**metrics, **mismatch_metrics})

    def correction_log_ratio(self, tokens: Tokens, batch: BatchedDataDict) -> Tensor:
        """[N] log of the weight for the mismatch of trainer and engine, before it is bounded."""
        return tokens.start_logprobs - tokens.rollout_logprobs

    def _mismatch(self, tokens: Tokens, batch: BatchedDataDict) -> tuple[Tensor | None, dict[str, Metric]]:
        """[N] the correction, or None; and the metrics of trainer against engine, which are always made."""
        config, mask = self.config, tokens.mask
        bounds = {"low": config.correction_min, "high": config.correction_max}
        correction = correct(self.correction_log_ratio(tokens, batch), batch, kind=config.correction, **bounds)
        difference = tokens.start_logprobs - tokens.rollout_logprobs
        current = tokens.logprobs.detach()
        sampled = importance_weights(current - tokens.rollout_logprobs)
        metrics = {
            # A mismatch that is not finite is a fault of the engine and is meant to be seen.
            "token_mult_prob_error": mean_over_tokens(difference.abs().exp(), mask),
            "gen_kl_error": mean_over_tokens(kl_estimate(difference, "k3"), mask),
            "sampling_importance_ratio": mean_over_tokens(importance_weights(difference), mask),
            "approx_entropy": mean_over_tokens(-sampled * current, mask),
        }
        if correction is not None:
            metrics["correction_weight"] = mean_over_tokens(correction, mask)
        return correction, metrics

    def _reference_kl(self, tokens: Tokens, ref_logprobs: Tensor) -> Tensor:
        """[N] the penalty of each token, given [N] logprobs of the reference."""
        return reference_kl(
            tokens.logprobs,
            ref_logprobs,
            tokens.rollout_logprobs,
            kind=self.config.reference_kl_type,
            gradient=self.config.reference_kl_gradient,
            input_clamp=self.config.kl_input_clamp,
            output_clamp=self.config.kl_output_clamp,
        )


class RatioLoss(PolicyGradientLoss):
    """A loss with an importance ratio of current to old policy.

    With one optimizer step for each batch of rollouts, the policy at the start of the step is the
    current one: then `logprobs` need not be in the batch, the ratio is exp(l - detached l) (1, with the
    gradient of l), and the detached l stands in the metrics of the mismatch, too.
    """

    @property
    def reads_start(self) -> bool:
        """Unless the ratio is forced to 1 or taken against the engine."""
        return not (self.config.force_on_policy_ratio or self.config.ratio_against == "rollout")

    @property
    def corrects_importance(self) -> bool:
        """With a correction, or with the ratio taken against the engine."""
        return super().corrects_importance or bool(self.config.ratio_against == "rollout")

    @property
    def _stops_gradients(self) -> bool:
        """Also where the ratio is forced to 1."""
        return super()._stops_gradients or bool(self.config.force_on_policy_ratio)

    @abstractmethod
    def ratio_terms(self, ratio: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """[N] the surrogate; [N] bool where the lower and [N] bool where the upper bound acted."""

    def ratio(self, tokens: Tokens, batch: BatchedDataDict) -> Tensor:
        """[N] by token."""
        return ratio_of(log_ratio(tokens, self.config))

    @property
    def bounds(self) -> tuple[float, float]:
        """Of the ratio."""
        return 1 - self.config.ratio_clip_min, 1 + self.config.ratio_clip_max

    def policy_terms(self, tokens: Tokens, batch: BatchedDataDict) -> tuple[Tensor, dict[str, Metric]]:
        """[N] the terms of the subclass, and the metrics of the ratio."""
        ratio = self.ratio(tokens, batch)
        terms, low, high = self.ratio_terms(ratio, tokens)
        metrics = ratio_metrics(ratio.detach(), low, high, tokens)
        if self.config.ratio_against == "rollout":  # not 1 on the first update, and so another name
            metrics = {f"rollout_{name}": metric for name, metric in metrics.items()}
        return terms, metrics
