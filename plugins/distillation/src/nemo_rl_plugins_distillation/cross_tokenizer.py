"""Off-policy distillation from a teacher with another tokenizer: chunks of equal text are compared.

Legend: B sequences, N student's tokens, C chunks of all sequences, K ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_rl_core.data.prompts import sft_messages
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.algorithm import AlgorithmContext
from nemo_rl_plugins_distillation.algorithm import OffPolicyDistillation
from nemo_rl_plugins_distillation.alignment import align
from nemo_rl_plugins_distillation.config import CrossTokenizerConfig

if TYPE_CHECKING:
    from nemo_rl_core.data.batch import BatchedDataDict
    from nemo_rl_core.protocols.algorithm import Model

__all__ = ["CrossTokenizerDistillation"]


class CrossTokenizerDistillation(OffPolicyDistillation):
    """Each row is tokenised twice, by the student's tokenizer and template and by the teacher's."""

    config_class: ClassVar[type] = CrossTokenizerConfig
    served: ClassVar[frozenset[str]] = frozenset({"projected_teacher", "sorted_teacher", "matched_teacher"})

    def __init__(self, config: CrossTokenizerConfig, context: AlgorithmContext) -> None:
        from nemo_rl_core.data.encoding import ConversationEncoder

        super().__init__(config, context)
        source = config.teacher.tokenizer_name or config.teacher.model_name
        self._teacher_tokenizer = load_tokenizer(str(source), chat_template=config.teacher_chat_template)
        self._teacher_encoder = ConversationEncoder(
            self._teacher_tokenizer, max_length=context.max_sequence_length, train_on=config.train_on
        )
        self._comparison = self._compare()

    def check_tokenizers(self) -> None:
        """Any tokenizer will do."""

    def build_batch(self, items: Sequence[Mapping[str, Any]]) -> BatchedDataDict:
        """Tokenise rows for both; the teacher's tokens and chunks stand in lists, one entry for each sequence.

        Raises:
            DataError: A row is not a conversation, or has no token.
        """
        import torch

        batch = super().build_batch(items)
        rows = [sft_messages(row, where=f"example {i} of the batch") for i, row in enumerate(items)]
        theirs = self._teacher_encoder.batch(rows)
        found = [
            align(
                *(tensor.tolist() for tensor in tensors),
                student_tokenizer=self.context.tokenizer,
                teacher_tokenizer=self._teacher_tokenizer,
            )
            for tensors in zip(
                batch.unpack("input_ids"),
                batch.unpack("loss_mask"),
                theirs.unpack("input_ids"),
                theirs.unpack("loss_mask"),
                strict=True,
            )
        ]
        batch.set_tokens("chunk_ids", torch.tensor([chunk for row in found for chunk in row.student]))
        batch.set_sequences("num_chunks", torch.tensor([row.num_chunks for row in found]))
        batch.set_sequences("teacher_input_ids", theirs.unpack("input_ids"))
        batch.set_sequences("teacher_loss_mask", theirs.unpack("loss_mask"))
        batch.set_sequences("teacher_chunk_ids", [torch.tensor(row.teacher) for row in found])
        return batch

    def fill_batch(self, batch: BatchedDataDict, models: Mapping[str, Model]) -> None:
        """Ask the teacher about its own tokens, and bring what it says to the student's."""
        import torch

        from nemo_rl_core.data.batch import BatchedDataDict as Batch

        super().fill_batch(batch, models)
        lists = {name: batch.sequences.pop(f"teacher_{name}") for name in ("input_ids", "loss_mask", "chunk_ids")}
        theirs = Batch([len(ids) for ids in lists["input_ids"]], {name: torch.cat(v) for name, v in lists.items()})
        asked = Batch(theirs.lengths, {name: theirs[name] for name in ("input_ids", "loss_mask")})
        ids, logprobs = models["teacher"].top_logprobs(asked, self.config.top_k)
        self._comparison.fill(batch, theirs, ids, logprobs, models["policy"])

    def _compare(self) -> Any:
        from nemo_rl_plugins_distillation.comparison import ByProjection, ByRank
        from nemo_rl_plugins_distillation.vocabulary import Projection, match_texts, num_ids

        ours, theirs, config = self.context.tokenizer, self._teacher_tokenizer, self.config
        if "projected_teacher" in self._fields:
            projection = (
                Projection.by_text(ours, theirs)
                if config.projection is None
                else Projection.load(config.projection, num_teacher_ids=num_ids(theirs))
            )
            return ByProjection(*projection.preimages(config.max_preimages))
        if config.projection is not None:
            raise ConfigError(f"The loss {config.loss.name!r} uses no projection; remove `projection`.")
        matched = match_texts(ours, theirs) if "matched_teacher" in self._fields else None
        return ByRank(matched, top_k=config.top_k)
