"""Preference rows: two answers to one prompt, or one answer with a verdict.

Read are, by their columns:

- `{prompt, chosen, rejected}`, each a text or messages (`context` serves as `prompt`);
- `{chosen, rejected}`, whole conversations that hold the prompt (their longest common beginning);
- `{prompt or context, response1, response2, overall_preference}`, as in HelpSteer3: below 0 the first is better;
- `{prompt or context, completions: [{rank or score, completion}, ...]}`: the best against the worst;
- `{prompt, completion, label}`: one answer, good (true) or bad.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from nemo_rl_core.errors import DataError
from nemo_rl_core.records.message import Message

__all__ = ["LabelledAnswer", "PreferencePair", "labelled_answers", "preference_pair"]

_PROMPTS = ("prompt", "context")
_ANSWERS = ("completion", "response")


@frozen(kw_only=True)
class PreferencePair:
    """Two answers to one prompt, the better one first."""

    prompt: Sequence[Message]
    chosen: Sequence[Message]
    """Answer without the prompt; at least one message."""
    rejected: Sequence[Message]
    margin: float | None = None
    """How much better the chosen answer is, >= 0, where the row says so: its column `margin`, the distance of the
    two scores or ranks, or the size of `overall_preference`."""
    tie: bool = False
    """The row calls the answers equally good; then which is `chosen` means nothing."""


@frozen(kw_only=True)
class LabelledAnswer:
    """One answer and whether it is wanted."""

    prompt: Sequence[Message]
    answer: Sequence[Message]
    good: bool


def preference_pair(row: Mapping[str, Any], *, where: str = "a row") -> PreferencePair:
    """The pair in a row of any of the paired forms.

    Args:
        row: Columns by name; not changed.
        where: Which row, for errors.

    Raises:
        DataError: The row is of none of the forms, or what a column holds is not what its name promises.
    """
    if "chosen" in row and "rejected" in row:
        return _chosen_rejected(row, where)
    if "overall_preference" in row and "response1" in row and "response2" in row:
        return _two_responses(row, where)
    if "completions" in row:
        return _ranked(row, where)
    raise DataError(
        f"{_sentence(where)} is no preference: it has {_names(row)}. Give `chosen` and `rejected` (with a `prompt`, or "
        "as whole conversations), `completions` with their `rank` or `score`, or `response1`, `response2` and "
        "`overall_preference`. Columns of other names are mapped, as in `columns: {chosen: better, rejected: worse}`."
    )


def labelled_answers(row: Mapping[str, Any], *, where: str = "a row") -> list[LabelledAnswer]:
    """The answers in a row with a verdict on each: one of a `label` row, two of a preference.

    Raises:
        DataError: The row is of none of the forms; a label is no truth value.
    """
    answer = next((row[name] for name in _ANSWERS if name in row), None)
    if answer is None or "label" not in row:
        if "label" in row or answer is not None:
            raise DataError(
                f"{_sentence(where)} has {_names(row)}; an answer with a verdict needs `prompt`, `completion` and "
                "`label`."
            )
        pair = preference_pair(row, where=where)
        if pair.tie:
            return []
        return [
            LabelledAnswer(prompt=pair.prompt, answer=pair.chosen, good=True),
            LabelledAnswer(prompt=pair.prompt, answer=pair.rejected, good=False),
        ]
    label = row["label"]
    if label not in (True, False):  # 0 and 1 are equal to these
        raise DataError(f"The column `label` of {where} holds {label!r:.40}; it must be true or false.")
    prompt = _prompt(row, where)
    return [LabelledAnswer(prompt=prompt, answer=_answer(answer, prompt, "completion", where), good=bool(label))]


# -- the forms ---------------------------------------------------------------------------------------


def _chosen_rejected(row: Mapping[str, Any], where: str) -> PreferencePair:
    if any(name in row for name in _PROMPTS):
        prompt = _prompt(row, where)
        chosen = _answer(row["chosen"], prompt, "chosen", where)
        rejected = _answer(row["rejected"], prompt, "rejected", where)
    else:
        prompt, chosen, rejected = _split(row, where)
    margin = _number(row, "margin", where)
    if margin is None and "score_chosen" in row and "score_rejected" in row:
        best, worst = _number(row, "score_chosen", where), _number(row, "score_rejected", where)
        margin = None if best is None or worst is None else best - worst
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, margin=margin)


def _split(row: Mapping[str, Any], where: str) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and answers of two whole conversations."""
    both = [_conversation(row[name], name, where) for name in ("chosen", "rejected")]
    shared = 0
    limit = min(len(messages) for messages in both) - 1  # the answer is one message at least
    while shared < limit and both[0][shared] == both[1][shared]:
        shared += 1
    if shared == 0:
        raise DataError(
            f"`chosen` and `rejected` of {where} have no message in common, so there is no prompt. Give the column "
            "`prompt`, or begin both with the same messages."
        )
    return both[0][:shared], both[0][shared:], both[1][shared:]


def _two_responses(row: Mapping[str, Any], where: str) -> PreferencePair:
    prompt = _prompt(row, where)
    first, second = (_answer(row[name], prompt, name, where) for name in ("response1", "response2"))
    preference = _number(row, "overall_preference", where)
    if preference is None:
        raise DataError(f"The column `overall_preference` of {where} is empty; it must be a number.")
    if preference < 0:
        return PreferencePair(prompt=prompt, chosen=first, rejected=second, margin=-preference)
    return PreferencePair(prompt=prompt, chosen=second, rejected=first, margin=preference, tie=preference == 0)


def _ranked(row: Mapping[str, Any], where: str) -> PreferencePair:
    prompt, completions = _prompt(row, where), row["completions"]
    if isinstance(completions, str | Mapping) or not isinstance(completions, Sequence) or len(completions) < 2:
        raise DataError(
            f"The column `completions` of {where} must list two or more answers; it holds {completions!r:.60}."
        )
    places: list[tuple[float, int]] = []
    for index, item in enumerate(completions):
        at = f"completion {index} of {where}"
        if not isinstance(item, Mapping) or not any(name in item for name in _ANSWERS):
            raise DataError(f"{_sentence(at)} is {item!r:.60}; it needs `completion` and `rank` or `score`.")
        rank, score = _number(item, "rank", at), _number(item, "score", at)
        if rank is None and score is None:
            raise DataError(f"{_sentence(at)} has neither a `rank` (0 is best) nor a `score` (the highest is best).")
        places.append((rank if rank is not None else -(score or 0.0), index))
    (best, first), (worst, last) = min(places), max(places)
    answers = [next(item[name] for name in _ANSWERS if name in item) for item in completions]
    return PreferencePair(
        prompt=prompt,
        chosen=_answer(answers[first], prompt, "completions", where),
        rejected=_answer(answers[last], prompt, "completions", where),
        margin=worst - best,
        tie=worst == best,
    )


# -- columns -----------------------------------------------------------------------------------------


def _prompt(row: Mapping[str, Any], where: str) -> list[Message]:
    value = next((row[name] for name in _PROMPTS if name in row), None)
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if value is None:
        raise DataError(
            f"{_sentence(where)} has no `prompt`: it has {_names(row)}. Name it, as in `columns: {{prompt: question}}`."
        )
    return _conversation(value, "prompt", where)


def _answer(value: object, prompt: Sequence[Message], column: str, where: str) -> list[Message]:
    """The messages that answer; a whole conversation loses the prompt it repeats."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    messages = _conversation(value, column, where)
    if len(messages) > len(prompt) and messages[: len(prompt)] == list(prompt):
        messages = messages[len(prompt) :]
    if not any(message.get("role") == "assistant" for message in messages):
        raise DataError(f"The column `{column}` of {where} has no assistant message, so there is nothing to prefer.")
    return messages


def _conversation(value: object, column: str, where: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        fix = " Give the `prompt` beside it." if isinstance(value, str) else ""
        raise DataError(
            f"The column `{column}` of {where} holds {value!r:.60}; expected a list of messages such as "
            f"[{{'role': 'user', 'content': '...'}}].{fix}"
        )
    messages: list[Message] = []
    for index, raw in enumerate(value):
        if not isinstance(raw, Mapping) or "role" not in raw:
            raise DataError(
                f"Message {index} in the column `{column}` of {where} is {raw!r:.60}; each needs 'role' and 'content'."
            )
        message: Any = {name: found for name, found in raw.items() if found is not None}
        message.setdefault("content", "")
        messages.append(message)
    return messages


def _number(row: Mapping[str, Any], column: str, where: str) -> float | None:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise DataError(f"The column `{column}` of {where} holds {value!r:.40}; it must be a number.")
    return float(value)


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in row) or "no column"


def _sentence(where: str) -> str:
    return where[:1].upper() + where[1:]
