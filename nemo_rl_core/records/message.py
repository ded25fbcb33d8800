"""Messages between an environment and a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

__all__ = ["Message", "Task"]


class Message(TypedDict, total=False):
    """One turn of a conversation in the chat format of Hugging Face templates."""

    role: str
    content: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str


Task = Mapping[str, Any]
"""One row of a dataset. `prompt` is a string or a list of messages; everything else is the row's own
(`answer`, `metadata`, ...)."""
