"""Two tokenisations of one text cut into chunks: the shortest stretches that both begin and end with a token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from attrs import frozen

if TYPE_CHECKING:
    from nemo_rl_core.models.tokenizer import Tokenizer


__all__ = ["Alignment", "align", "runs", "token_ends"]

_BROKEN = "\ufffd"


@frozen
class Alignment:
    """The chunk of each token of both sides, from 0; -1 where there is none."""

    student: list[int]
    teacher: list[int]
    num_chunks: int


def align(
    student_ids: Sequence[int],
    student_mask: Sequence[bool],
    teacher_ids: Sequence[int],
    teacher_mask: Sequence[bool],
    *,
    student_tokenizer: Tokenizer,
    teacher_tokenizer: Tokenizer,
) -> Alignment:
    """Align the trained stretches of a conversation, the first with the first, and so on.

    Within a stretch the texts are followed as far as they agree, white space at the beginning aside; tokens that end
    a sequence are aligned with each other. What comes after a difference belongs to no chunk, and neither do bytes that
    are no character: a student may sample half of one, and the teacher reads the sign that stands for it.
    """
    ours, theirs = [-1] * len(student_ids), [-1] * len(teacher_ids)
    done = 0
    for mine, yours in zip(runs(student_mask), runs(teacher_mask), strict=False):
        found, other, count = _align_run(
            list(student_ids[mine]), list(teacher_ids[yours]), student_tokenizer, teacher_tokenizer
        )
        ours[mine] = [chunk + done if chunk >= 0 else -1 for chunk in found]
        theirs[yours] = [chunk + done if chunk >= 0 else -1 for chunk in other]
        done += count
    return Alignment(ours, theirs, done)


def token_ends(tokenizer: Any, token_ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of these tokens, and for each where it ends in it; parts of one character end where that does.

    Each token is decoded behind the one before it, since tokenizers drop the space at the beginning of a text.
    """
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text, ends = "", []
    prefix = begin = 0
    for i in range(len(token_ids)):
        whole = decode(token_ids[prefix : i + 1])
        if whole.endswith(_BROKEN) and i + 1 < len(token_ids):
            continue
        known = decode(token_ids[prefix:begin]) if begin else ""
        text += whole[len(known) :]
        ends += [len(text)] * (i + 1 - begin)
        prefix, begin = begin, i + 1
    return text, ends


def runs(mask: Sequence[bool]) -> list[slice]:
    """The stretches in which the mask is True."""
    parts, at = [], 0
    for trained, group in groupby(bool(m) for m in mask):
        length = sum(1 for _ in group)
        if trained:
            parts.append(slice(at, at + length))
        at += length
    return parts


def _align_run(
    student_ids: list[int], teacher_ids: list[int], student_tokenizer: Tokenizer, teacher_tokenizer: Tokenizer
) -> tuple[list[int], list[int], int]:
    sides = ((student_ids, student_tokenizer), (teacher_ids, teacher_tokenizer))
    ended = [bool(ids) and ids[-1] == tokenizer.eos_token_id for ids, tokenizer in sides]
    read = [
        _without_space(*token_ends(tokenizer, ids[:-1] if end else ids))
        for (ids, tokenizer), end in zip(sides, ended, strict=True)
    ]
    texts = [text for text, _ in read]
    differ = (i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
    common = next(differ, min(map(len, texts)))
    cuts = sorted(end for end in set(read[0][1]) & set(read[1][1]) if 0 < end <= common)
    whole = [i for i, (a, b) in enumerate(pairwise([0, *cuts])) if _BROKEN not in texts[0][a:b]]
    number = {i: n for n, i in enumerate(whole)}
    chunks = [[number.get(_chunk(cuts, end), -1) for end in ends] for _, ends in read]
    complete = texts[0] == texts[1] and all(ended)
    for side, end in zip(chunks, ended, strict=True):
        side += [len(whole) if complete else -1] * end
    return chunks[0], chunks[1], len(whole) + complete


def _chunk(cuts: Sequence[int], end: int) -> int:
    index = bisect_left(cuts, end)
    return index if index < len(cuts) else -1


def _without_space(text: str, ends: list[int]) -> tuple[str, list[int]]:
    stripped = text.lstrip()
    lead = len(text) - len(stripped)
    # A token of white space alone goes with the first character.
    return stripped, [max(end - lead, 1) for end in ends]
