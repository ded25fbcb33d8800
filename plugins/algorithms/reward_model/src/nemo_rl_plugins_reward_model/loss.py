"""The Bradley-Terry loss of pairs of scores.

Source: Ouyang et al., arXiv:2203.02155, eq. 1; the margin as in Llama 2, arXiv:2307.09288, eq. 2; centring as in
Eisenstein et al., arXiv:2312.09244, sec. 2.

Legend: P pairs, B = 2 P sequences, N tokens of one micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from nemo_rl_core.protocols.loss import Denominator, LossSums, Metric, per_token
from nemo_rl_plugins_reward_model.config import BradleyTerryConfig

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.protocols.loss import ModelOutputs
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["BradleyTerryLoss"]


class BradleyTerryLoss:
    """-log sigmoid(chosen score - rejected score - margin), the mean over the pairs of the global batch.

    The score of a sequence is the model's value at its last trained token.
    """

    config_class: ClassVar[type] = BradleyTerryConfig
    denominator: Denominator = "groups"
    unit: ClassVar[str] = "group"
    needs: frozenset[str] = frozenset({"values"})

    def __init__(self, config: BradleyTerryConfig | None = None) -> None:
        self.config = config or BradleyTerryConfig()

    @property
    def reads_margins(self) -> bool:
        """Whether each row must say how much better its chosen answer is."""
        return self.config.margin_weight > 0

    def __call__(self, outputs: ModelOutputs, batch: BatchedDataDict) -> LossSums:
        """Sum over the pairs of one micro-batch.

        Args:
            outputs: `values` [N].
            batch: `loss_mask` [N], `group_ids` and `is_chosen` [B], `margins` [B] with `margin_weight`. Masked
                positions may hold anything.

        Raises:
            ShapeMismatch: `outputs.values` is not [N], or the sequences are not pairs.
        """
        from torch.nn.functional import logsigmoid

        from nemo_rl_core.data.preference_batch import pair_positions

        first, second = pair_positions(batch)
        scores = _scores(outputs, batch)
        chosen, rejected = scores[first], scores[second]
        distance = chosen - rejected
        wanted = self.config.margin_weight * batch["margins"][first] if self.reads_margins else 0.0
        terms = -logsigmoid(distance - wanted)
        if self.config.center_coefficient > 0:
            terms = terms + self.config.center_coefficient * (chosen + rejected).square()
        values_of = {
            "rewards/chosen": chosen.detach(),
            "rewards/rejected": rejected.detach(),
            "rewards/margins": distance.detach(),
            "accuracy": (distance > 0).to(distance.dtype),
        }
        return LossSums(terms.sum(), {name: Metric(values.sum(), len(first)) for name, values in values_of.items()})


def _scores(outputs: ModelOutputs, batch: BatchedDataDict) -> Tensor:
    """[B] the value at each sequence's last trained token; of one without any, that of the batch's first token."""
    import torch

    values, mask = per_token(outputs.values, batch, "outputs.values"), batch["loss_mask"]
    places = torch.arange(len(mask), device=mask.device).masked_fill(~mask, 0)
    last = places.new_zeros(len(batch)).scatter_reduce(0, batch.sequence_index, places, "amax")
    return values.masked_fill(~mask, 0.0)[last]
