"""The teachers of a run: which models they are, which rows they teach, and what they say of a batch.

Legend: B sequences, N tokens, T teachers of one row, K ids, E hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_rl_core.errors import ConfigError, DataError
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.algorithm import ModelRole

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.models.tokenizer import Tokenizer
    from nemo_rl_core.protocols.algorithm import Model
    from nemo_rl_core.records.batch import BatchedDataDict
    from nemo_rl_core.schema import PolicyConfig
    from nemo_rl_plugins_distillation.config import TeacherConfig
    from nemo_rl_plugins_distillation.whole_vocabulary import WholeVocabulary

__all__ = ["Teachers", "check_same_tokenizer"]


class Teachers:
    """One teacher, several that are weighed, or several of which each row has one.

    Args:
        teachers: By name.
        policy: The student's configuration, which stands in for what a teacher leaves out.
        column: Column of the data that names a row's teacher.
    """

    def __init__(self, teachers: Mapping[str, TeacherConfig], policy: PolicyConfig, *, column: str | None) -> None:
        self.names = list(teachers)
        self.column = column
        self._models = {name: teacher.as_model(policy) for name, teacher in teachers.items()}
        total = sum(teacher.weight for teacher in teachers.values())
        self.weights = [teacher.weight / total for teacher in teachers.values()]

    def roles(self, capabilities: frozenset[str] = frozenset()) -> dict[str, ModelRole]:
        """The models that they are, by name; their backends need these capabilities."""
        return {name: ModelRole(config=config, capabilities=capabilities) for name, config in self._models.items()}

    def assign(self, batch: BatchedDataDict, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add `teacher_weights` [B, T] and, if each row has its own teacher, `teacher_index` [B].

        Args:
            batch: To add to.
            rows: The row of the data that each sequence comes from.

        Raises:
            DataError: A row names no teacher, or one that there is not.
        """
        import torch

        if self.column is None:
            batch.set_sequences("teacher_weights", torch.tensor(self.weights).expand(len(batch), -1))
            return
        names = [row.get(self.column) for row in rows]
        for i, name in enumerate(names):
            if name not in self.names:
                raise DataError(
                    f"Row {i} of the batch has {name!r} in its column {self.column!r} (teacher_column), which names no "
                    f"teacher. The teachers are: {', '.join(self.names)}."
                )
        batch.set_sequences("teacher_index", torch.tensor([self.names.index(str(name)) for name in names]))
        batch.set_sequences("teacher_weights", torch.ones(len(batch), 1))

    def fill_top(self, batch: BatchedDataDict, models: Mapping[str, Model], k: int) -> None:
        """Add `top_ids` and `teacher_top_logprobs` [N, T, K] of the tokens that the teachers find likeliest.

        K is less than `k` where the vocabulary is.
        """
        import torch

        pairs = [
            self._of_rows(batch, index, lambda part, m=models[n]: m.top_logprobs(part, k)) for index, n in self._each()
        ]
        width = min(ids.shape[-1] for ids, _ in pairs)
        ids, logprobs = (torch.stack([pair[side][:, :width] for pair in pairs], 1) for side in (0, 1))
        if self.column is not None:  # zeros in the rows of the others
            ids, logprobs = ids.sum(1, keepdim=True), logprobs.sum(1, keepdim=True)
        batch.set_tokens("top_ids", ids)
        batch.set_tokens("teacher_top_logprobs", logprobs)

    def fill_hidden(self, batch: BatchedDataDict, models: Mapping[str, Model], loss: WholeVocabulary) -> None:
        """Add `teacher_hidden_<i>` [N, E] of each teacher and `teacher_shares` [N, T], its weight at each token.

        The first time the teachers' output layers are given to the workers of the student, which compute the loss.
        """
        import torch

        from nemo_rl_plugins_distillation.whole_vocabulary import SHARES, hidden_field

        shares = batch["teacher_weights"]
        if self.column is not None:
            shares = torch.nn.functional.one_hot(batch["teacher_index"], len(self.names)).float()
        batch.set_tokens(SHARES, batch.expand_to_tokens(shares))
        for index, name in self._each():
            hidden = self._of_rows(batch, index, lambda part, m=models[name]: (m.hidden_states(part),))
            batch.set_tokens(hidden_field(index), hidden[0])
        if not loss.layers:
            loss.layers = [models["policy"].keep(models[name].output_layer()) for name in self.names]

    def fill_logprobs(self, batch: BatchedDataDict, models: Mapping[str, Model]) -> None:
        """Add `teacher_logprobs` [N] of the batch's tokens, the weighted mean over the teachers of a row."""
        import torch

        logprobs = [
            self._of_rows(batch, index, lambda part, m=models[n]: (m.logprobs(part),))[0] for index, n in self._each()
        ]
        weights = torch.tensor(self.weights if self.column is None else [1.0] * len(logprobs))
        batch.set_tokens("teacher_logprobs", (torch.stack(logprobs, 1) * weights).sum(1))

    def _each(self) -> list[tuple[int, str]]:
        return list(enumerate(self.names))

    def _of_rows(self, batch: BatchedDataDict, index: int, ask: Any) -> tuple[Tensor, ...]:
        """Return what a teacher says of its rows, [N] or [N, k] each, and 0 in the others."""
        from nemo_rl_core.records.batch import BatchedDataDict as Batch

        bare = Batch(batch.lengths, {name: batch[name] for name in ("input_ids", "loss_mask")})
        if "rollout_logprobs" in batch:
            bare.set_tokens("rollout_logprobs", batch["rollout_logprobs"])
        if self.column is None:
            return tuple(ask(bare))
        mine = batch["teacher_index"] == index
        answers = ask(bare.select(mine.nonzero().squeeze(1)))
        places = batch.expand_to_tokens(mine).nonzero().squeeze(1)
        return tuple(a.new_zeros(batch.num_tokens, *a.shape[1:]).index_copy(0, places, a) for a in answers)


def check_same_tokenizer(student: Tokenizer, teachers: Mapping[str, TeacherConfig], student_name: str | None) -> None:
    """Refuse a teacher whose token ids mean something else.

    Raises:
        ConfigError: Its vocabulary differs.
    """
    ours: dict[str, int] | None = None
    for name, teacher in teachers.items():
        source = teacher.tokenizer_name or teacher.model_name
        if source is None or source == student_name:
            continue
        ours = ours if ours is not None else _vocabulary(student)
        theirs = _vocabulary(load_tokenizer(source))
        if ours != theirs:
            differing = sorted(ours.items() ^ theirs.items(), key=str)
            raise ConfigError(
                f"The tokenizer of {name} ({source}) differs from the student's in {len(differing)} entries, such as "
                f"{differing[0]!r}, so that their token ids cannot be compared. Use algorithm: "
                "cross_tokenizer_distillation, or a teacher of the same family."
            )


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    return dict(tokenizer.get_vocab())
