"""KTO: answers judged alone as good or bad, against how far the policy has moved at large.

Source: Ethayarajh et al., arXiv:2402.01306, eq. 7 and 8. Departure: the KL is estimated over the whole global batch of
a step, whatever its micro-batches and ranks.

Legend: B sequences, N tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from nemo_rl_core.protocols.loss import Denominator, LossSums, Metric
from nemo_rl_plugins_dpo.config import KTOConfig
from nemo_rl_plugins_dpo.pairs import logprob_sums

if TYPE_CHECKING:
    from nemo_rl_core.protocols.loss import ModelOutputs
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["KTOLoss"]


class KTOLoss:
    """weight (1 - sigmoid(+-beta (log-ratio - KL))), plus for good answers; the mean over the answers of the batch."""

    config_class: ClassVar[type] = KTOConfig
    labelled: ClassVar[bool] = True
    """It reads single answers with a verdict, not pairs."""
    denominator: Denominator = "sequences"
    needs: frozenset[str] = frozenset({"logprobs"})
    required_fields: frozenset[str] = frozenset({"ref_logprobs"})
    conformance: ClassVar[Mapping[str, Any]] = {
        "add_fields": lambda batch, generator: batch.set_sequences("kl_estimate", torch.full((len(batch),), 0.2))
    }

    def __init__(self, config: KTOConfig | None = None) -> None:
        self.config = config or KTOConfig()

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum over the answers of one micro-batch.

        Args:
            outputs: `logprobs` [N].
            batch: `loss_mask`, `ref_logprobs` [N], `is_chosen` [B] bool (good), `kl_estimate` [B] (the same number for
                every sequence, >= 0, without gradient). Masked positions may hold anything.

        Raises:
            ShapeMismatch: A field is not [N].
        """
        config: Any = self.config
        trained = batch.sum_per_sequence(batch["loss_mask"].long()) > 0
        sums = logprob_sums(outputs.logprobs, batch, "outputs.logprobs")
        ratios = (sums - logprob_sums(batch["ref_logprobs"], batch, "ref_logprobs"))[trained]
        good = batch["is_chosen"][trained]
        sign = good.to(ratios.dtype) * 2 - 1
        weight = good * config.desirable_weight + ~good * config.undesirable_weight
        utility = (sign * config.beta * (ratios - batch["kl_estimate"][trained])).sigmoid()
        rewards, logps = config.beta * ratios.detach(), sums[trained].detach()
        metrics = {
            f"{name}/{side}": Metric(values[chosen].sum(), chosen.sum())
            for name, values in (("rewards", rewards), ("logps", logps))
            for side, chosen in (("chosen", good), ("rejected", ~good))
        }
        metrics["kl"] = Metric(batch["kl_estimate"][trained].sum(), len(good))
        # Whether an answer's reward lies on its side of the point at which the loss turns, the KL.
        right = (rewards > config.beta * batch["kl_estimate"][trained]) == good
        metrics["rewards/accuracies"] = Metric(right.to(rewards.dtype).sum(), len(good))
        return LossSums((weight * (1 - utility)).sum(), metrics)
