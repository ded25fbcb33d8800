"""The clipped policy-gradient loss: PPO's surrogate with the options of GRPO and DAPO.

Legend: B sequences, N tokens of one micro-batch. Three policies may differ: the *current* one (with
gradient), the one at the *start* of this step's updates (`logprobs`), and the one that *sampled*
(`rollout_logprobs`, of the engine).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_core._errors import ShapeMismatch
from nemo_rl_core.protocols.loss import Denominator, LossSums, Metric
from nemo_rl_plugins_grpo.config import ClippedPGConfig
from nemo_rl_plugins_grpo.correction import correct, importance_weights
from nemo_rl_plugins_grpo.kl import kl_estimate, reference_kl

if TYPE_CHECKING:
    from nemo_rl_core.data.batch import BatchedDataDict
    from nemo_rl_core.protocols.loss import ModelOutputs

__all__ = ["ClippedPolicyGradientLoss"]

_MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8: beyond it a ratio is held, so that inf * 0 cannot make nan."""


@frozen(eq=False)
class _Tokens:
    """The fields of a micro-batch with every masked position set to 0. All [N]."""

    mask: Tensor
    logprobs: Tensor
    start_logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None


class ClippedPolicyGradientLoss:
    """-min(ratio * A, clip(ratio) * A) for each token, corrected, with a KL to a reference policy.

    Sources: PPO, arXiv:1707.06347 eq. 7; token mean and separate bounds, DAPO, arXiv:2503.14476; dual
    clip, arXiv:1912.09729; constant divisor, Dr. GRPO, arXiv:2503.20783.

    With one optimizer step for each batch of rollouts, the policy at the start of the step is the
    current one: then `logprobs` need not be in the batch, the ratio is exp(l - detached l) (1, with the
    gradient of l), and the detached l stands in the metrics of the mismatch, too.

    Args:
        config: See `ClippedPGConfig`.
    """

    config_class: ClassVar[type] = ClippedPGConfig
    needs: frozenset[str] = frozenset({"logprobs"})

    def __init__(self, config: ClippedPGConfig | None = None) -> None:
        self.config = config or ClippedPGConfig()
        self.denominator: Denominator = "tokens" if self.config.aggregation == "token" else "sequences"

    @property
    def required_fields(self) -> frozenset[str]:
        """Fields of the batch that a forward pass must add, when several optimizer steps take one batch."""
        config = self.config
        fields = set()
        if config.reference_kl_beta > 0:
            fields.add("ref_logprobs")
        without_start = config.force_on_policy_ratio or config.ratio_against == "rollout"
        if not without_start and not (config.disable_ratio and config.correction == "none"):
            fields.add("logprobs")
        return frozenset(fields)

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum the loss over the trained tokens of one micro-batch.

        Args:
            outputs: `logprobs` [N] of the current policy.
            batch: `loss_mask`, `rollout_logprobs`, `advantages`; `logprobs` when not on policy;
                `ref_logprobs` when `reference_kl_beta` > 0. Masked positions may hold anything.

        Returns:
            The sum (over tokens, or of the means of sequences) and its metrics.

        Raises:
            ShapeMismatch: `outputs.logprobs` is not [N].
        """
        tokens = self._tokens(outputs, batch)
        scale = self._token_scale(tokens.mask, batch)
        terms, metrics = self._policy_terms(tokens)
        weights, mismatch_metrics = self._mismatch(tokens, batch)
        if weights is not None:
            terms = terms * weights
        actor = (terms * scale).sum()
        total = actor
        count = scale.sum()
        metrics["actor_loss"] = Metric(actor.detach(), count)
        if tokens.ref_logprobs is not None:
            penalty = (self._reference_kl(tokens) * scale).sum()
            total = actor + self.config.reference_kl_beta * penalty
            metrics["kl_penalty"] = Metric(penalty.detach(), count)
        return LossSums(total, {**metrics, **mismatch_metrics})

    def _tokens(self, outputs: ModelOutputs, batch: BatchedDataDict) -> _Tokens:
        mask = batch["loss_mask"]
        if outputs.logprobs is None or outputs.logprobs.shape != mask.shape:
            found = None if outputs.logprobs is None else list(outputs.logprobs.shape)
            raise ShapeMismatch(
                f"outputs.logprobs has shape {found}, loss_mask {list(mask.shape)}; both must be [N], "
                "one entry for each token of the micro-batch."
            )
        dropped = ~mask
        # Masking comes before any arithmetic: an inf or nan that meets exp() or a product first would
        # still reach the gradient as 0 * inf.
        clean = {name: batch[name].masked_fill(dropped, 0.0) for name in ("rollout_logprobs", "advantages")}
        logprobs = outputs.logprobs.masked_fill(dropped, 0.0)
        start = batch["logprobs"].masked_fill(dropped, 0.0) if "logprobs" in batch else logprobs.detach()
        ref = batch["ref_logprobs"].masked_fill(dropped, 0.0) if self.config.reference_kl_beta > 0 else None
        return _Tokens(mask, logprobs, start, clean["rollout_logprobs"], clean["advantages"], ref)

    def _token_scale(self, mask: Tensor, batch: BatchedDataDict) -> Tensor:
        """[N] what each token's term counts: 0 where masked; sums to what the denominator counts."""
        scale = mask.to(torch.float32)
        if self.config.aggregation == "sequence":
            return scale / batch.expand_to_tokens(batch.sum_per_sequence(scale).clamp(min=1))
        if self.config.constant_length is not None:
            return scale / self.config.constant_length
        return scale

    def _policy_terms(self, tokens: _Tokens) -> tuple[Tensor, dict[str, Metric]]:
        """[N] the surrogate of each token, not yet corrected; and the metrics of the ratio."""
        advantages = tokens.advantages
        if self.config.disable_ratio:
            return -advantages * tokens.logprobs, {}
        ratio = self._ratio(tokens)
        low, high = 1 - self.config.ratio_clip_min, 1 + self.config.ratio_clip_max
        terms = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
        if self.config.ratio_clip_c is not None:
            bounded = torch.minimum(terms, -advantages * self.config.ratio_clip_c)
            terms = torch.where(advantages < 0, bounded, terms)
        metrics = _ratio_metrics(ratio.detach(), advantages, tokens.mask, low, high)
        if self.config.ratio_against == "rollout":  # not 1 on the first update, and so another name
            metrics = {f"rollout_{name}": metric for name, metric in metrics.items()}
        return terms, metrics

    def _ratio(self, tokens: _Tokens) -> Tensor:
        against = tokens.start_logprobs
        if self.config.ratio_against == "rollout":
            against = tokens.rollout_logprobs
        if self.config.force_on_policy_ratio:
            against = tokens.logprobs.detach()
        return (tokens.logprobs - against).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()

    def _mismatch(self, tokens: _Tokens, batch: BatchedDataDict) -> tuple[Tensor | None, dict[str, Metric]]:
        """[N] the correction, or None; and the metrics of trainer against engine, which are always made."""
        log_ratio = tokens.start_logprobs - tokens.rollout_logprobs
        weights = importance_weights(log_ratio)
        config = self.config
        correction = correct(
            weights, log_ratio, batch, kind=config.correction, low=config.correction_min, high=config.correction_max
        )
        mask = tokens.mask
        current = tokens.logprobs.detach()
        sampled = importance_weights(current - tokens.rollout_logprobs)
        metrics = {
            # A mismatch that is not finite is a fault of the engine and is meant to be seen.
            "token_mult_prob_error": _mean(log_ratio.abs().exp(), mask),
            "gen_kl_error": _mean(kl_estimate(log_ratio, "k3"), mask),
            "sampling_importance_ratio": _mean(weights, mask),
            "approx_entropy": _mean(-sampled * current, mask),
        }
        if correction is not None:
            metrics["correction_weight"] = _mean(correction, mask)
        return correction, metrics

    def _reference_kl(self, tokens: _Tokens) -> Tensor:
        assert tokens.ref_logprobs is not None
        return reference_kl(
            tokens.logprobs,
            tokens.ref_logprobs,
            tokens.rollout_logprobs,
            kind=self.config.reference_kl_type,
            gradient=self.config.reference_kl_gradient,
            input_clamp=self.config.kl_input_clamp,
            output_clamp=self.config.kl_output_clamp,
        )


def _mean(values: Tensor, mask: Tensor) -> Metric:
    """The mean over trained tokens."""
    return Metric(values.masked_fill(~mask, 0.0).sum(), mask.sum())


def _ratio_metrics(ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> dict[str, Metric]:
    """Metrics of the ratio; a token counts as clipped if the clip takes its gradient away."""
    clipped_low = (ratio < low) & (advantages < 0)
    clipped_high = (ratio > high) & (advantages > 0)
    metrics = {
        "probs_ratio": _mean(ratio, mask),
        "clip_fraction_low": _mean(clipped_low.to(ratio.dtype), mask),
        "clip_fraction_high": _mean(clipped_high.to(ratio.dtype), mask),
        "clip_fraction": _mean((clipped_low | clipped_high).to(ratio.dtype), mask),
    }
    if ratio.numel():
        # inf and -inf are the neutral elements: a micro-batch without trained tokens moves neither.
        metrics["probs_ratio_min"] = Metric(ratio.masked_fill(~mask, torch.inf).amin(), reduction="min")
        metrics["probs_ratio_max"] = Metric(ratio.masked_fill(~mask, -torch.inf).amax(), reduction="max")
    return metrics
