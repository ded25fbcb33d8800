"""Negative log likelihood."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from nemo_rl_core.protocols.loss import Denominator, LossSums, Metric, per_token

if TYPE_CHECKING:
    from nemo_rl_core.protocols.loss import ModelOutputs
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["NLLConfig", "NLLLoss"]


@frozen(kw_only=True)
class NLLConfig:
    """The loss `nll` has no options."""


class NLLLoss:
    """-log p(token), the mean over the trained tokens of the global batch, in nats."""

    config_class: ClassVar[type] = NLLConfig
    denominator: Denominator = "tokens"
    needs: frozenset[str] = frozenset({"logprobs"})

    def __init__(self, config: NLLConfig | None = None) -> None:
        self.config = config

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum over the trained tokens of one micro-batch.

        Args:
            outputs: `logprobs` [N].
            batch: `loss_mask` [N]; masked positions may hold anything.

        Raises:
            ShapeMismatch: `outputs.logprobs` is not [N].
        """
        mask = batch["loss_mask"]
        total = -per_token(outputs.logprobs, batch, "outputs.logprobs").masked_fill(~mask, 0.0).sum()
        return LossSums(total, {"nll": Metric(total.detach(), mask.sum())})
