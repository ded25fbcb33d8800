"""Distillation from a teacher with another tokenizer: chunks of equal text are compared.

Legend: B sequences, N student's tokens, C chunks of all sequences, K ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.algorithm import AlgorithmContext
from nemo_rl_core.records.rollout import RolloutGroup
from nemo_rl_plugins_distillation.algorithm import OffPolicyDistillation
from nemo_rl_plugins_distillation.alignment import align, runs
from nemo_rl_plugins_distillation.config import CrossTokenizerConfig
from nemo_rl_plugins_distillation.teacher_algorithm import conversations

if TYPE_CHECKING:
    from nemo_rl_core.protocols.algorithm import Model
    from nemo_rl_core.records.batch import BatchedDataDict

__all__ = ["CrossTokenizerDistillation"]


class CrossTokenizerDistillation(OffPolicyDistillation):
    """Each conversation is tokenised twice, by the student's tokenizer and template and by the teacher's.

    What the student sampled keeps its tokens; its text is tokenised for the teacher.
    """

    config_class: ClassVar[type] = CrossTokenizerConfig
    served: ClassVar[frozenset[str]] = frozenset({"projected_teacher", "sorted_teacher", "matched_teacher"})

    def __init__(self, config: CrossTokenizerConfig, context: AlgorithmContext) -> None:
        from nemo_rl_core.data.encoding import ConversationEncoder

        super().__init__(config, context)
        source = config.teacher.tokenizer_name or config.teacher.model_name
        self._teacher_tokenizer = load_tokenizer(str(source), chat_template=config.teacher_chat_template)
        length = context.max_sequence_length
        self._of_rows = ConversationEncoder(self._teacher_tokenizer, max_length=length, train_on=config.train_on)
        self._of_rollouts = ConversationEncoder(self._teacher_tokenizer, max_length=length)
        self._comparison = self._compare()

    def check_tokenizers(self) -> None:
        """Any tokenizer will do."""

    def build_batch(self, items: Sequence[RolloutGroup] | Sequence[Mapping[str, Any]]) -> BatchedDataDict:
        """Rows or rollouts for both; the teacher's tokens and chunks stand in lists, one entry for each sequence.

        Raises:
            DataError: A row is not a conversation, or has no token.
        """
        import torch

        batch = super().build_batch(items)
        theirs = self._for_teacher(items)
        alignments = [
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
        batch.set_tokens("chunk_ids", torch.tensor([chunk for row in alignments for chunk in row.student]))
        batch.set_sequences("num_chunks", torch.tensor([row.num_chunks for row in alignments]))
        batch.set_sequences("teacher_input_ids", theirs.unpack("input_ids"))
        batch.set_sequences("teacher_loss_mask", theirs.unpack("loss_mask"))
        batch.set_sequences("teacher_chunk_ids", [torch.tensor(row.teacher) for row in alignments])
        return batch

    def _for_teacher(self, items: Sequence[Any]) -> BatchedDataDict:
        """The same sequences in the teacher's tokens; trained are the turns that were sampled, or the answers."""
        groups = [item for item in items if isinstance(item, RolloutGroup)]
        if not groups:
            return self._of_rows.batch(conversations(items))
        segments = [segment for group in groups for rollout in group.valid for segment in rollout.segments]
        theirs = self._of_rollouts.batch([[turn.message for turn in segment] for segment in segments])
        for segment, mask in zip(segments, theirs.unpack("loss_mask"), strict=True):
            said = [turn.sampled for turn in segment if turn.message["role"] == "assistant"]
            for given in runs(mask.tolist())[: said.count(False)]:  # of the prompt, before anything sampled
                mask[given] = False
        return theirs

    def fill_batch(self, batch: BatchedDataDict, models: Mapping[str, Model]) -> None:
        """Ask the teacher about its own tokens, and bring what it says to the student's."""
        import torch

        from nemo_rl_core.records.batch import BatchedDataDict as Batch

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
