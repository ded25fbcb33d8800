"""Tool calls: parsed from a policy's text, and converted for the chat API and chat templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl_core.errors import DataError
from nemo_rl_core.records.seeds import stable_seed

__all__ = ["parse_tool_calls", "with_parsed_arguments"]

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_ID_DIGITS = 9  # some chat templates take ids of exactly nine letters and digits


def parse_tool_calls(text: str, *, seed: int = 0) -> tuple[str, list[dict[str, Any]]]:
    r"""Split an answer into text and calls of tools.

    A call is written as Hermes and Qwen models do: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`; the end
    of the answer closes the last one too.

    Args:
        text: What the policy said.
        seed: Makes the ids, which are equal for equal text and seed.

    Returns:
        The text before the first call, and the calls in the form of the chat API (`arguments` is JSON text). An answer
        in which a call cannot be read is text as a whole: whoever runs the agent sees what went wrong.
    """
    bodies = _CALL.findall(text)
    parsed = [_parse(body) for body in bodies]
    if not parsed or None in parsed:
        return text, []
    calls = []
    for number, call in enumerate(parsed):
        assert call is not None
        name, arguments = call
        identity = f"{stable_seed(seed, text, number):09x}"[-_ID_DIGITS:]
        calls.append({"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return text[: text.index("<tool_call>")].rstrip(), calls


def _parse(body: str) -> tuple[str, str] | None:
    try:
        call = json.loads(body)
    except ValueError:
        return None
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        return call["name"], arguments
    return (call["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, Mapping) else None


def with_parsed_arguments(calls: Sequence[Any]) -> list[dict[str, Any]]:
    """Calls of tools as chat templates take them: arguments are a mapping instead of its JSON text.

    Raises:
        DataError: A call has no function with a name.
    """
    return [_templated(call) for call in calls]


def _templated(call: object) -> dict[str, Any]:
    if (
        not isinstance(call, Mapping)
        or not isinstance(function := call.get("function"), Mapping)
        or not isinstance(function.get("name"), str)
    ):
        raise DataError(f"A call of a tool is a mapping with a function that has a name; found {call!r:.200}.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments or "{}")
        except ValueError:
            read = arguments
        arguments = read if isinstance(read, Mapping) else arguments
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}
