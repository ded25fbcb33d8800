"""Reader of rollouts in the rows that NeMo Gym writes (OpenAI Responses items)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl_core.records.message import Message
from nemo_rl_core.records.rollout import Rollout, Turn

__all__ = ["rollout_from_gym"]

_OWN_KEYS = frozenset({"responses_create_params", "response", "reward", "reward_components"})


def rollout_from_gym(row: Mapping[str, Any], *, task_id: str, index: int) -> Rollout:
    """One row as a rollout; its task is every other column of the row, and `prompt`.

    Items that the policy generated become sampled turns, with tokens where the item carries them; tool
    outputs become messages of role `tool`. A row whose output is a list of conversations is read as its
    last one.
    """
    prompt = [_message(item) for item in _items(row["responses_create_params"].get("input") or [])]
    output: Sequence[Any] = (row.get("response") or {}).get("output") or []
    if output and isinstance(output[0], list):
        output = output[-1]
        prompt, output = _split_conversation(prompt, output)
    segments = _segments(prompt, output)
    components = row.get("reward_components")
    rewards = dict(components) if components else {"reward": float(row["reward"])}
    task = {key: value for key, value in row.items() if key not in _OWN_KEYS and not key.startswith("_ng_")}
    position = int(row.get("_ng_rollout_index", index))
    return Rollout(
        rollout_id=f"{task_id}/{position}",
        task_id=task_id,
        index=position,
        seed=0,
        task={"prompt": prompt, **task},
        segments=segments,
        rewards={str(k): float(v) for k, v in rewards.items()},
        terminated=True,
        truncated=bool((row.get("response") or {}).get("incomplete_details")),
    )


def _items(value: str | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [{"role": "user", "content": value}] if isinstance(value, str) else list(value)


def _split_conversation(prompt: list[Message], output: Sequence[Any]) -> tuple[list[Message], Sequence[Any]]:
    """A whole conversation as output: what stands before the policy's first item is the prompt."""
    start = 0
    while start < len(output) and not _is_sampled(output[start]):
        start += 1
    return prompt or [_message(item) for item in output[:start]], output[start:]


def _is_sampled(item: Mapping[str, Any]) -> bool:
    kind = item.get("type", "message")
    return kind in ("reasoning", "function_call") or (kind == "message" and item.get("role") == "assistant")


def _segments(prompt: list[Message], output: Sequence[Mapping[str, Any]]) -> list[list[Turn]]:
    """Turns of the conversation; a prompt that does not continue the tokens so far begins a new segment."""
    segments = [[Turn(message=message, token_ids=[], sampled=False) for message in prompt]]
    so_far: list[int] = []
    for item in output:
        tokens = item.get("generation_token_ids")
        if tokens is not None:
            before = [int(i) for i in item.get("prompt_token_ids") or []]
            if before[: len(so_far)] != so_far:
                history = [turn.message for turn in segments[-1]]
                segments.append([Turn(message=message, token_ids=[], sampled=False) for message in history])
                so_far = []
            _give_tokens(segments[-1], before[len(so_far) :])
            so_far = before + [int(i) for i in tokens]
        segments[-1].append(
            Turn(
                message=_message(item),
                token_ids=[int(i) for i in tokens or []],
                sampled=_is_sampled(item),
                logprobs=[float(x) for x in item.get("generation_log_probs") or []],
            )
        )
    return segments


def _give_tokens(segment: list[Turn], token_ids: list[int]) -> None:
    """Prompt tokens belong to the last turn that was not sampled."""
    if not token_ids:
        return
    if not segment or segment[-1].sampled:
        segment.append(Turn(message={"role": "system", "content": ""}, token_ids=token_ids, sampled=False))
    else:
        segment[-1].token_ids = token_ids


def _message(item: Mapping[str, Any]) -> Message:
    kind = item.get("type", "message")
    if kind == "function_call":
        function = {"name": item.get("name", ""), "arguments": item.get("arguments", "")}
        call = {"type": "function", "id": item.get("call_id", ""), "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        return {"role": "tool", "content": _text(item.get("output")), "tool_call_id": str(item.get("call_id", ""))}
    if kind == "reasoning":
        return {"role": "assistant", "content": _text(item.get("content") or item.get("summary"))}
    return {"role": str(item.get("role", "user")), "content": _text(item.get("content"))}


def _text(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_text(part.get("text") if isinstance(part, Mapping) else part) for part in content)
    return json.dumps(content)
