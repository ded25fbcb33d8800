"""Two vocabularies: which tokens have the same text, and which tokens of one make up a token of the other.

Legend: V student's vocabulary, U teacher's vocabulary, P pairs, R preimages.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor

from nemo_rl_core.errors import ConfigError

if TYPE_CHECKING:
    from nemo_rl_core.models.tokenizer import Tokenizer


__all__ = ["Projection", "match_texts", "num_ids", "token_texts"]


@frozen(eq=False)
class Projection:
    """A sparse matrix [V, U] that takes a distribution of the student to the teacher's vocabulary.

    Args:
        student_ids: [P] int64.
        teacher_ids: [P] int64.
        weights: [P] float32; those of one student's token sum to 1 (or 0 if nothing of it can be said).
        num_teacher_ids: U.
    """

    student_ids: Tensor
    teacher_ids: Tensor
    weights: Tensor
    num_teacher_ids: int

    @staticmethod
    def by_text(student: Any, teacher: Any) -> Projection:
        """Each token of the student onto the teacher's tokens of its text, in equal shares.

        Equal shares, since the distributions of a chunk are averaged: where the student needs one token and the teacher
        two, each of the teacher's two has half of the average.
        """
        theirs = token_texts(teacher)
        id_of = {text: i for i, text in reversed(list(enumerate(theirs))) if text is not None}
        texts = [(i, text) for i, text in enumerate(token_texts(student)) if text is not None]
        split = [text for _, text in texts if text not in id_of]
        pieces = teacher(split, add_special_tokens=False)["input_ids"] if split else []
        found = dict(zip(split, pieces, strict=True))
        pairs: list[tuple[int, int, float]] = []
        for i, text in texts:
            ids = [id_of[text]] if text in id_of else found[text]
            if "".join(theirs[j] or "" for j in ids) == text:  # else a tokenizer that writes it otherwise
                pairs += [(i, j, 1 / len(ids)) for j in ids]
        if student.eos_token_id is not None and teacher.eos_token_id is not None:
            pairs.append((student.eos_token_id, teacher.eos_token_id, 1.0))
        ours, other, weights = zip(*pairs, strict=True) if pairs else ((), (), ())
        return Projection(
            torch.tensor(ours, dtype=torch.int64),
            torch.tensor(other, dtype=torch.int64),
            torch.tensor(weights, dtype=torch.float32),
            len(theirs),
        )

    @staticmethod
    def load(path: str | Path, *, num_teacher_ids: int) -> Projection:
        """Read a safetensors file with `student_ids`, `teacher_ids` and `weights` [P].

        Raises:
            ConfigError: The file cannot be read, or holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
            ids = [tensors[name].to(torch.int64) for name in ("student_ids", "teacher_ids")]
            made = Projection(ids[0], ids[1], tensors["weights"].float(), num_teacher_ids)
        except (OSError, SafetensorError, KeyError) as error:
            raise ConfigError(
                f"The projection {path} cannot be read ({type(error).__name__}: {error}). It must be a safetensors "
                "file with student_ids, teacher_ids and weights, one entry for each pair of tokens."
            ) from error
        sizes = {tuple(t.shape) for t in (*ids, made.weights)}
        if len(sizes) > 1 or (ids[1].numel() and int(ids[1].max()) >= num_teacher_ids):
            raise ConfigError(
                f"The projection {path} does not fit: shapes {sorted(sizes)}, teacher ids up to {int(ids[1].max())} of "
                f"{num_teacher_ids}. Make it for these two tokenizers."
            )
        return made

    def save(self, path: str | Path) -> None:
        """Write the file that `load` reads."""
        from safetensors.torch import save_file

        names = ("student_ids", "teacher_ids", "weights")
        save_file({name: getattr(self, name) for name in names}, path)

    def preimages(self, limit: int) -> tuple[Tensor, Tensor]:
        """[U, R] student's ids that are projected onto each of the teacher's, and [U, R] weights, 0 where none.

        R is at most `limit`; those of the largest weight are kept, of equals the lower ids.
        """
        order = torch.argsort(self.weights, descending=True, stable=True)
        order = order[torch.argsort(self.teacher_ids[order], stable=True)]
        theirs = self.teacher_ids[order]
        count = torch.bincount(theirs, minlength=self.num_teacher_ids)
        rank = torch.arange(len(order)) - (count.cumsum(0) - count)[theirs]
        kept = rank < limit
        width = max(1, min(limit, int(count.max()) if count.numel() else 1))
        ids = torch.zeros(self.num_teacher_ids, width, dtype=torch.int64)
        weights = torch.zeros(self.num_teacher_ids, width)
        ids[theirs[kept], rank[kept]] = self.student_ids[order][kept]
        weights[theirs[kept], rank[kept]] = self.weights[order][kept]
        return ids, weights


def match_texts(student: Tokenizer, teacher: Tokenizer) -> tuple[Tensor, Tensor]:
    """Tokens of equal text: [U] the student's id of each of the teacher's or -1, and [V] bool of those matched."""
    ours, theirs = token_texts(student), token_texts(teacher)
    id_of = {text: i for i, text in reversed(list(enumerate(ours))) if text is not None}
    matched = torch.tensor([id_of.get(text, -1) if text is not None else -1 for text in theirs], dtype=torch.int64)
    if student.eos_token_id is not None and teacher.eos_token_id is not None:
        matched[teacher.eos_token_id] = student.eos_token_id
    has = torch.zeros(len(ours), dtype=torch.bool)
    has[matched[matched >= 0]] = True
    return matched, has


def token_texts(tokenizer: Any) -> list[str | None]:
    """What each token adds to a text; None for special tokens and for parts of a character."""
    anchor = tokenizer.encode("a", add_special_tokens=False)
    known = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    special = set(tokenizer.all_special_ids)
    decoded = tokenizer.batch_decode([[*anchor, i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    texts = [text.removeprefix(known) if text.startswith(known) else None for text in decoded]
    return [None if i in special or not text or "\ufffd" in text else text for i, text in enumerate(texts)]


def num_ids(tokenizer: Any) -> int:
    """Size of the vocabulary, special tokens with it."""
    return len(tokenizer)
