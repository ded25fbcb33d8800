"""What a loss may ask for, from the hidden states of the last pipeline stage.

Legend: N tokens of the micro-batch, R tokens of this rank's row, M tokens whose logprob this rank computes, E hidden
size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nemo_rl_core.models.numerics.logprobs import LogitTransform, VocabularyShard
from nemo_rl_core.models.numerics.vocabulary_head import VOCABULARY_OUTPUTS, differentiable_logits, vocabulary_outputs
from nemo_rl_plugins_megatron._megatron import mappings

if TYPE_CHECKING:
    from nemo_rl_plugins_megatron.model import PolicyModel
    from nemo_rl_plugins_megatron.parallel import Ranks
    from nemo_rl_plugins_megatron.rows import Row

__all__ = ["TokenOutputs"]


class TokenOutputs:
    """The head of the model on this rank.

    Args:
        model: This rank's part, of the last pipeline stage.
        ranks: This process's place.
        vocab_size: V without the rows that fill it up.
        chunk_size: Tokens whose logits are held at a time.
        is_scalar: One number for each token in place of the vocabulary.
    """

    def __init__(self, model: PolicyModel, ranks: Ranks, *, vocab_size: int, chunk_size: int, is_scalar: bool) -> None:
        self.model = model
        self.ranks = ranks
        self.vocab_size = vocab_size
        self.chunk_size = chunk_size
        self.is_scalar = is_scalar

    @property
    def gives(self) -> frozenset[str]:
        """What it can be asked for."""
        return frozenset({"values"}) if self.is_scalar else VOCABULARY_OUTPUTS

    def __call__(
        self, hidden: Tensor, row: Row, *, temperature: float = 1.0, needs: frozenset[str], top_k: int = 0
    ) -> dict[str, Tensor]:
        """Outputs of a micro-batch.

        Args:
            hidden: [R, 1, E], or [R / tensor-parallel size, 1, E] where those ranks share the tokens.
            row: The micro-batch.
            temperature: Divides the logits; 0 counts as 1, as when tokens are drawn greedily.
            needs: Of `gives`.
            top_k: Also give the `top_ids` and `top_logprobs` [N, top_k] of the likeliest tokens, without gradient.

        Returns:
            Per need a tensor [N] (logits: [N, V], top_logprobs: [N, ...] as the row's `top_ids`), equal on all ranks;
            0 where no value is wanted. `anchor` [] is 0 with a gradient path to the parameters.
        """
        hidden = self._all_tokens(hidden.squeeze(1))
        out = {"anchor": hidden[:1].sum().float() * 0.0}
        if self.is_scalar:
            if "values" in needs:
                here = (row.places >= 0).nonzero().squeeze(1)
                values = nn.functional.linear(hidden.index_select(0, row.places[here]), self.model.score.weight)
                out["values"] = self._spread(values.float().squeeze(-1), here, row.num_tokens)
            return out
        predictors = hidden.index_select(0, row.predictors)
        weight = self.model.vocabulary_weight
        transform = LogitTransform(temperature=temperature or 1.0)
        found = vocabulary_outputs(
            predictors,
            weight[: self._num_rows],
            row.targets,
            needs=needs,
            transform=transform,
            chunk_size=self.chunk_size,
            top_ids=row.top_ids,
            top_k=top_k,
            shard=self._shard,
        )
        if "logits" in needs:
            logits = nn.functional.linear(predictors, weight)
            whole = mappings.gather_from_tensor_model_parallel_region(logits)[:, : self.vocab_size]
            found["logits"] = differentiable_logits(transform, whole.float())
        return out | {name: self._spread(values, row.wanted, row.num_tokens) for name, values in found.items()}

    def _all_tokens(self, hidden: Tensor) -> Tensor:
        """[R, E] on every tensor-parallel rank; the vocabulary's ranks each have a part of its gradient."""
        if self.model.config.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(  # type: ignore[no-any-return]
                hidden, tensor_parallel_output_grad=not self.is_scalar
            )
        return hidden if self.is_scalar else mappings.copy_to_tensor_model_parallel_region(hidden)

    @property
    def _first_row(self) -> int:
        return self.ranks.tp_index * -(-self.vocab_size // self.ranks.tp_size)

    @property
    def _num_rows(self) -> int:
        """Rows of this rank that are tokens."""
        share = -(-self.vocab_size // self.ranks.tp_size)
        return min(share, self.vocab_size - self._first_row)

    @property
    def _shard(self) -> VocabularyShard | None:
        if self.ranks.tp_size == 1:
            return None
        return VocabularyShard(start=self._first_row, group=self.ranks.tp_group)

    def _spread(self, values: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
        """[M, ...] values of some tokens to [N, ...] of all, those of the other context-parallel ranks included."""
        out = values.new_zeros(num_tokens, *values.shape[1:]).index_copy(0, tokens, values)
        if self.ranks.cp_size == 1:
            return out
        # Every rank takes the loss of all tokens, so the gradient of its own values is what it has.
        return torch.as_tensor(mappings.reduce_from_tensor_model_parallel_region(out, group=self.ranks.cp_group))
