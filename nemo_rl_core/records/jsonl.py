"""Rollouts as JSON lines, one per line. We read them back exactly; NeMo Gym tools read them in part.

Each line has the keys that NeMo Gym writes (`responses_create_params.input`, `response.output` with
`prompt_token_ids`, `generation_token_ids` and `generation_log_probs` on the policy's messages, `reward`,
`_ng_task_index`, `_ng_rollout_index`) and under `nemo_rl_record` what those leave out. Sampled tokens and their
logprobs are written once, on the messages. Floats are written by `repr`, so they come back bit for bit.
What JSON does not have is written as its nearest: tuples as lists, numpy scalars as numbers, other
objects as their `str`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import attrs

from nemo_rl_core.errors import DataError
from nemo_rl_core.records.gym_jsonl import rollout_from_gym
from nemo_rl_core.records.message import Message
from nemo_rl_core.records.rollout import Rollout, RolloutError, RolloutGroup, Turn

__all__ = ["group_from_dict", "group_to_dict", "read_groups", "write_groups"]

_FORMAT = 1
_OWN_KEY = "nemo_rl_record"


def write_groups(path: str | Path, groups: Iterable[RolloutGroup], *, append: bool = False) -> None:
    """Write the groups, one rollout a line, in order.

    Args:
        path: The file; its folder is made.
        groups: What to write.
        append: Add to the file instead of replacing it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a" if append else "w", encoding="utf-8") as file:
        for group in groups:
            _write_group(file, group)


def read_groups(path: str | Path) -> list[RolloutGroup]:
    """Read what `write_groups` wrote, or rollouts that NeMo Gym wrote.

    Rows of NeMo Gym are grouped by `_ng_task_index`, or each is its own group without one. Their turns
    have tokens only if the row has.

    Raises:
        DataError: The file cannot be read, or a line is cut off or not a rollout; names file and line.
    """
    source = Path(path)
    groups: list[RolloutGroup] = []
    by_task: dict[int, RolloutGroup] = {}
    for number, row in _rows(source):
        where = f"{source}:{number}"
        try:
            if _OWN_KEY in row:
                _add_own(groups, row)
            else:
                _add_gym(groups, by_task, row)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise DataError(
                f"{where}: this line is JSON but not a rollout ({type(error).__name__}: {error})."
            ) from error
    return groups


def group_to_dict(group: RolloutGroup) -> dict[str, Any]:
    """The group as plain data."""
    return {**_group_fields(group), "rollouts": [_rollout_to_dict(r) for r in group.rollouts]}


def group_from_dict(data: Mapping[str, Any]) -> RolloutGroup:
    """Make the group again from the data of `group_to_dict`."""
    return RolloutGroup(
        group_id=data["group_id"],
        task_id=data["task_id"],
        weight_version=data["weight_version"],
        rollouts=[_rollout_from_dict(r) for r in data["rollouts"]],
    )


# -- lines ------------------------------------------------------------------------------------------


def _write_group(file: TextIO, group: RolloutGroup) -> None:
    header = {"format": _FORMAT, **_group_fields(group), "size": len(group.rollouts)}
    if not group.rollouts:
        file.write(_dump({_OWN_KEY: {**header, "rollout": None}}))
    for position, rollout in enumerate(group.rollouts):
        file.write(_dump(_line(group, rollout, {**header, "position": position})))


def _dump(row: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(row, default=_plain, separators=(",", ":"))
    except TypeError:  # a key that JSON does not have
        text = json.dumps(_with_string_keys(row), default=_plain, separators=(",", ":"))
    return text + "\n"


def _with_string_keys(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _with_string_keys(item) for key, item in value.items()}
    return [_with_string_keys(item) for item in value] if isinstance(value, (list, tuple)) else value


def _line(group: RolloutGroup, rollout: Rollout, header: dict[str, Any]) -> dict[str, Any]:
    own = _rollout_to_dict(rollout)
    output: list[dict[str, Any]] = []
    prompt: list[Message] = []
    for segment, own_segment in zip(rollout.segments, own["segments"], strict=True):
        output.extend(_output_items(segment, own_segment, len(output)))
    for turn in rollout.segments[0] if rollout.segments else []:
        if turn.sampled:
            break
        prompt.append(turn.message)
    return {
        "_ng_task_index": group.group_id,
        "_ng_rollout_index": rollout.index,
        "responses_create_params": {"input": [{"type": "message", **message} for message in prompt]},
        "response": {"object": "response", "output": output},
        "reward": None if rollout.failed else rollout.reward,
        _OWN_KEY: {**header, "rollout": own},
    }


def _output_items(segment: list[Turn], own_segment: list[dict[str, Any]], start: int) -> list[dict[str, Any]]:
    """Gym items of what follows the prompt; sampled tokens move out of our own turns into them."""
    items: list[dict[str, Any]] = []
    before: list[int] = []
    sampled_yet = False
    for turn, own in zip(segment, own_segment, strict=True):
        if turn.sampled:
            sampled_yet = True
            items.append(
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": turn.message.get("content", "")}],
                    "prompt_token_ids": list(before),
                    "generation_token_ids": own.pop("token_ids"),
                    "generation_log_probs": own.pop("logprobs"),
                }
            )
            own["output"] = start + len(items) - 1
        elif sampled_yet:
            items.append({"type": "message", **turn.message})
        before += turn.token_ids
    return items


def _plain(value: object) -> object:
    """Return the nearest value that JSON has."""
    for method in ("tolist", "item"):
        if hasattr(value, method):
            return getattr(value, method)()
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    return dict(value) if isinstance(value, Mapping) else str(value)


def _rows(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with source.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse(f"{source}:{number}", line)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: the file cannot be read ({type(error).__name__}: {error}).") from error


def _parse(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        cut = "" if line.endswith("\n") else " It is the last line and has no end: the file was cut off."
        raise DataError(
            f"{where}: not a line of JSON (column {error.colno}: {error.msg}).{cut} Remove the line to read the rest."
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}.")
    return row


def _add_own(groups: list[RolloutGroup], row: dict[str, Any]) -> None:
    own = row[_OWN_KEY]
    fields = {name: own[name] for name in ("group_id", "task_id", "weight_version")}
    if own["rollout"] is None or own["position"] == 0 or not groups or _group_fields(groups[-1]) != fields:
        groups.append(RolloutGroup(**fields, rollouts=[]))
    if own["rollout"] is None:
        return
    output = row["response"]["output"]
    for segment in own["rollout"]["segments"]:
        for turn in segment:
            if "output" in turn:
                item = output[turn.pop("output")]
                turn["token_ids"] = item["generation_token_ids"]
                turn["logprobs"] = item["generation_log_probs"]
    groups[-1].rollouts.append(_rollout_from_dict(own["rollout"]))


def _add_gym(groups: list[RolloutGroup], by_task: dict[int, RolloutGroup], row: dict[str, Any]) -> None:
    group_id = row.get("_ng_task_index")
    group = by_task.get(group_id) if group_id is not None else None
    if group is None:
        number = len(groups) if group_id is None else int(group_id)
        group = RolloutGroup(group_id=number, task_id=str(number), rollouts=[])
        groups.append(group)
        if group_id is not None:
            by_task[group_id] = group
    group.rollouts.append(rollout_from_gym(row, task_id=group.task_id, index=len(group.rollouts)))


# -- records as plain data --------------------------------------------------------------------------


def _group_fields(group: RolloutGroup) -> dict[str, Any]:
    return {"group_id": group.group_id, "task_id": group.task_id, "weight_version": group.weight_version}


def _rollout_to_dict(rollout: Rollout) -> dict[str, Any]:
    error = rollout.error
    return {
        "rollout_id": rollout.rollout_id,
        "task_id": rollout.task_id,
        "index": rollout.index,
        "seed": rollout.seed,
        "task": dict(rollout.task),
        "segments": [[_turn_to_dict(turn) for turn in segment] for segment in rollout.segments],
        "rewards": dict(rollout.rewards),
        "terminated": rollout.terminated,
        "truncated": rollout.truncated,
        "error": None if error is None else attrs.asdict(error),
        "info": dict(rollout.info),
        "timing_s": dict(rollout.timing_s),
    }


def _rollout_from_dict(data: Mapping[str, Any]) -> Rollout:
    fields = dict(data)
    fields["segments"] = [[Turn(**turn) for turn in segment] for segment in fields["segments"]]
    fields["error"] = None if fields["error"] is None else RolloutError(**fields["error"])
    return Rollout(**fields)


def _turn_to_dict(turn: Turn) -> dict[str, Any]:
    data: dict[str, Any] = {"message": dict(turn.message), "token_ids": list(turn.token_ids), "sampled": turn.sampled}
    if turn.sampled or turn.logprobs:
        data["logprobs"] = list(turn.logprobs)
    for name in ("finish_reason", "weight_version", "last_weight_version"):
        value = getattr(turn, name)
        if value is not None:
            data[name] = value
    return data
