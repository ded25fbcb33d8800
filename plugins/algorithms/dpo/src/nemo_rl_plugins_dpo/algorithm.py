"""Preference optimisation without a reward model: the rows, the reference, and a loss chosen by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nemo_rl_core.data.preferences import labelled_answers, preference_pair
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.algorithm import AlgorithmContext, BaseAlgorithm, ModelRole
from nemo_rl_plugins_dpo.config import DPOConfig

if TYPE_CHECKING:
    from nemo_rl_core.protocols.algorithm import Model
    from nemo_rl_core.protocols.loss import Loss
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["DPO"]


class DPO(BaseAlgorithm):
    """Direct preference optimisation (arXiv:2305.18290) and its relatives.

    The loss decides what is read and run: one with "ref_logprobs" among its `required_fields` gets the reference (the
    policy as it was before the run); one that is `labelled` gets single answers and an estimate of the KL, any other
    gets pairs.
    """

    config_class: ClassVar[type] = DPOConfig
    feed: ClassVar[Literal["rollouts", "examples"]] = "examples"
    example: ClassVar[Mapping[str, Any]] = {
        "rows": [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "no"} for a in range(5) for b in range(5)],
        "target": None,
    }
    """For its kit: pairs that a tiny model learns to tell apart."""

    def __init__(self, config: DPOConfig, context: AlgorithmContext) -> None:
        from nemo_rl_core.data.encoding import ConversationEncoder

        super().__init__(config, context)
        self.loss: Loss = context.resolve("losses", config.loss)
        self._loss_fields: frozenset[str] = frozenset(getattr(self.loss, "required_fields", ()))
        self._labelled: bool = getattr(self.loss, "labelled", False)
        if self._labelled and config.batch_size < 2:
            raise ConfigError(
                f"batch_size is {config.batch_size}, but the loss estimates a KL from prompts with answers of other "
                "rows of the batch. Set batch_size to 2 or more."
            )
        self._encoder = ConversationEncoder(
            context.tokenizer,
            max_length=context.max_sequence_length,
            train_on=config.train_on,
            chat_template_kwargs=config.data.chat_template_kwargs,
        )

    @property
    def models(self) -> Mapping[str, ModelRole]:
        """The reference, if the loss reads its logprobs."""
        return {"reference": ModelRole(config=self.config.policy)} if "ref_logprobs" in self._loss_fields else {}

    @property
    def required_fields(self) -> frozenset[str]:
        """What the loss requires."""
        return self._loss_fields

    def build_batch(self, items: Sequence[Mapping[str, Any]]) -> BatchedDataDict:
        """Tokenise rows; one longer than the context loses its end, and `truncated` [B] says so.

        Raises:
            DataError: A row is no preference (see `nemo_rl_core.data.preferences`), or has no token.
        """
        from nemo_rl_core.data.preference_batch import preference_batch

        places = [f"example {i} of the batch" for i in range(len(items))]
        if not self._labelled:
            pairs = [preference_pair(row, where=at) for row, at in zip(items, places, strict=True)]
            return preference_batch(pairs, self._encoder)
        from nemo_rl_plugins_dpo.labelled import labelled_batch

        rows = [labelled_answers(row, where=at) for row, at in zip(items, places, strict=True)]
        return labelled_batch(rows, self._encoder)

    def fill_batch(self, batch: BatchedDataDict, models: Mapping[str, Model]) -> None:
        """Add the logprobs of the reference, and for a labelled loss the estimate of the KL."""
        super().fill_batch(batch, models)
        if self._labelled:
            from nemo_rl_plugins_dpo.labelled import add_kl_estimate

            add_kl_estimate(batch, models["policy"], models["reference"])

    def finish_batch(self, batch: BatchedDataDict) -> Mapping[str, float]:
        """Lengths, and the shares of sequences cut off and of sequences left without anything to train."""
        num_sequences = max(len(batch), 1)
        trained = batch.sum_per_sequence(batch["loss_mask"].long())
        return {
            "trained_tokens": float(trained.sum()),
            "mean_length": batch.num_tokens / num_sequences,
            "truncated_fraction": float(batch["truncated"].sum()) / num_sequences,
            "untrained_fraction": float((trained == 0).sum()) / num_sequences,
        }
