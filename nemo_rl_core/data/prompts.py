"""Conversion of rows to prompts: column mapping, templates, chat and NeMo Gym rows.

For rollouts a row becomes a *task* (`prompt` plus the row's own columns); for supervised data it becomes
an *example* (the same, with its answer still in it) that `sft_messages` reads as a conversation.
"""

from __future__ import annotations

import json
import logging
import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

from attrs import Factory, field, frozen

from nemo_rl_core.errors import DataError
from nemo_rl_core.records.message import Message
from nemo_rl_core.schema import DatasetConfig

__all__ = ["RowFormat", "gym_messages", "sft_messages"]

_log = logging.getLogger(__name__)

_PROMPT_NAMES = ("problem", "question", "instruction", "query")
"""Columns taken for the prompt when a row has no `prompt` and nothing is configured."""
_RESPONSE_NAMES = ("response", "completion", "output", "answer")
"""Columns taken for the reply of a prompt/response row, first found."""


@frozen(kw_only=True)
class RowFormat:
    """Converts rows to tasks or examples; made from a `DatasetConfig`."""

    columns: Mapping[str, str] = Factory(dict)
    """Our name to the column's name in the data."""
    prompt_template: str | None = None
    """Format string over the row's columns."""
    system_prompt: str | None = None
    """Put in front of every conversation, in place of the row's own system message if it has one."""
    source: str = field(default="the dataset")
    """Named in errors."""

    @classmethod
    def from_config(cls, config: DatasetConfig, *, source: str = "the dataset") -> RowFormat:
        """The format that a dataset's configuration asks for."""
        return cls(
            columns=config.columns,
            prompt_template=config.prompt_template,
            system_prompt=config.system_prompt,
            source=source,
        )

    def task(self, row: Mapping[str, Any], *, where: str = "a row") -> dict[str, Any]:
        """The row as an environment takes it: `prompt` (string or messages) and its own columns.

        The prompt is, first found: the template; the column mapped to `prompt`; the input of a NeMo Gym
        row; the column `prompt`; a `messages` column (a trailing assistant message is cut off and becomes
        `answer` if the row has none); a column named problem, question, instruction or query.

        Args:
            row: Columns by name; not changed.
            where: Which row, for errors.

        Raises:
            DataError: A column is missing or is not what its name promises; says what the row has.
        """
        task = self._mapped(row, where)
        if self.prompt_template is not None:
            task["prompt"] = self._filled(task, where)
        elif "prompt" not in self.columns and _asks_by_input(task):
            task["prompt"] = gym_messages(task["responses_create_params"], where=f"{where} of {self.source}")
        elif "prompt" in task:
            task["prompt"] = self._prompt(task["prompt"], where)
        elif "messages" in task:
            messages = self._messages(task.pop("messages"), "messages", where)
            if messages and messages[-1].get("role") == "assistant":
                task.setdefault("answer", messages.pop().get("content", ""))
            task["prompt"] = messages
        elif "responses_create_params" in task:
            task["prompt"] = gym_messages(task["responses_create_params"], where=f"{where} of {self.source}")
        else:
            task["prompt"] = self._guessed_prompt(task, where)
        if self.system_prompt is not None:
            task["prompt"] = self._with_system(task["prompt"])
        return task

    def example(self, row: Mapping[str, Any], *, where: str = "a row") -> dict[str, Any]:
        """The row as supervised training takes it: columns mapped, template and system prompt applied.

        Raises:
            DataError: As `task`.
        """
        example = self._mapped(row, where)
        if self.prompt_template is not None:
            example["prompt"] = self._filled(example, where)
            example.pop("messages", None)
        for name in ("messages", "prompt"):
            if name in example and self.system_prompt is not None:
                value = example[name]
                example[name] = self._with_system(value if isinstance(value, str) else self._prompt(value, where))
        return example

    def _mapped(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        if not isinstance(row, Mapping):
            raise DataError(
                f"{_at(where, self.source)} is a {type(row).__name__}, not a mapping of columns. "
                "Each row must be a dict such as {'prompt': ..., 'answer': ...}."
            )
        task = dict(row)
        missing = {ours: theirs for ours, theirs in self.columns.items() if theirs not in row}
        if missing:
            wanted = ", ".join(f"{theirs!r} (for {ours})" for ours, theirs in sorted(missing.items()))
            raise DataError(
                f"{_at(where, self.source)} has no column {wanted}. It has: {_names(row)}. "
                "Correct `columns` of this dataset."
            )
        task.update({ours: row[theirs] for ours, theirs in self.columns.items()})
        return task

    def _filled(self, task: Mapping[str, Any], where: str) -> str:
        template = cast(str, self.prompt_template)
        try:
            wanted = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
            missing = sorted({n.split(".")[0].split("[")[0] for n in wanted} - set(task))
            if not missing:
                return template.format_map(task)
        except (ValueError, IndexError, KeyError, AttributeError, TypeError) as e:
            raise DataError(
                f"prompt_template {template!r} cannot be filled from {where}: {e}. "
                "A literal brace is written twice: {{ and }}."
            ) from e
        raise DataError(
            f"prompt_template {template!r} names {_quoted(missing)}, which {_at(where, self.source, first=False)} "
            f"does not have. It has: {_names(task)}. A literal brace is written twice: {{{{ and }}}}."
        )

    def _prompt(self, value: object, where: str) -> str | list[Message]:
        if isinstance(value, str):
            return value
        return self._messages(value, "prompt", where)

    def _messages(self, value: object, column: str, where: str) -> list[Message]:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise DataError(
                f"Column {column!r} of {_at(where, self.source, first=False)} is a {type(value).__name__}; expected "
                "a list of messages such as [{'role': 'user', 'content': '...'}]"
                + (" or a string." if column == "prompt" else ".")
            )
        messages = [_message(m) if isinstance(m, Mapping) else m for m in value]
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise DataError(
                    f"Message {i} in column {column!r} of {_at(where, self.source, first=False)} is {message!r:.80}; "
                    "each message needs 'role' and 'content'."
                )
        return messages

    def _guessed_prompt(self, task: Mapping[str, Any], where: str) -> str | list[Message]:
        columns = [name for name in _PROMPT_NAMES if name in task]
        if len(columns) == 1:
            _log.debug("taking column %r of %s as the prompt", columns[0], self.source)
            return self._prompt(task[columns[0]], where)
        raise DataError(
            f"{_at(where, self.source)} has no column 'prompt'"
            + (f", and {_quoted(columns)} could each be it" if columns else "")
            + f". It has: {_names(task)}. Name the column, as in `columns: {{prompt: "
            f"{columns[0] if columns else next(iter(task), 'question')}}}`, or give a `prompt_template`."
        )

    def _with_system(self, prompt: str | Sequence[Message]) -> list[Message]:
        system: Message = {"role": "system", "content": cast(str, self.system_prompt)}
        if isinstance(prompt, str):
            return [system, {"role": "user", "content": prompt}]
        return [system, *(m for m in prompt if m.get("role") != "system")]


def sft_messages(row: Mapping[str, Any], *, where: str = "a row") -> list[Message]:
    """The conversation to learn from in a supervised row.

    Args:
        row: With `messages` (chat format), or `prompt` (string or messages) and one of `response`,
            `completion`, `output`, `answer` (string or messages).
        where: Which row, for errors.

    Raises:
        DataError: The row has neither, or nothing in it was said by the assistant.
    """
    form = RowFormat(source="the dataset")
    if "messages" in row:
        messages = form._messages(row["messages"], "messages", where)
    else:
        reply = next((row[name] for name in _RESPONSE_NAMES if name in row), None)
        if "prompt" not in row or reply is None:
            raise DataError(
                f"{_at(where, form.source)} is neither a chat (`messages`) nor a prompt with its response. It has: "
                f"{_names(row)}. Name the columns, as in `columns: {{prompt: question, response: answer}}`."
            )
        prompt = form._prompt(row["prompt"], where)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if isinstance(reply, str):
            messages.append({"role": "assistant", "content": reply})
        else:
            messages.extend(form._messages(reply, "response", where))
    if not any(m.get("role") == "assistant" for m in messages):
        raise DataError(f"{_at(where, form.source)} has no assistant message, so there is nothing to learn from it.")
    return messages


def gym_messages(params: Any, *, where: str = "a row") -> list[Message]:
    """Messages of a NeMo Gym row's `responses_create_params` (an OpenAI Responses call).

    `instructions` become the system message; function calls and their outputs become tool calls and tool
    messages; reasoning items are left out, for a chat template has no place for them.

    Raises:
        DataError: There is no `input`, or an item of it is of an unknown kind.
    """
    items = params.get("input") if isinstance(params, Mapping) else None
    if items is None:
        raise DataError(
            f"{where[:1].upper()}{where[1:]} has `responses_create_params` without `input`, so it asks nothing. If "
            "its prompt is still to be made, give a `prompt_template`."
        )
    messages: list[Message] = []
    if params.get("instructions"):
        messages.append({"role": "system", "content": str(params["instructions"])})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for item in items:
        _add_item(messages, item, where)
    return messages


def _asks_by_input(task: Mapping[str, Any]) -> bool:
    params = task.get("responses_create_params")
    return isinstance(params, Mapping) and bool(params.get("input"))


def _add_item(messages: list[Message], item: Mapping[str, Any], where: str) -> None:
    kind = item.get("type") or "message"
    if kind == "message" and "role" in item:
        role = "system" if item["role"] == "developer" else item["role"]
        messages.append({"role": role, "content": _text(item.get("content"))})
    elif kind == "function_call":
        function = {"name": item.get("name", ""), "arguments": _arguments(item.get("arguments", "{}"))}
        call = {"id": item.get("call_id", ""), "type": "function", "function": function}
        if messages and messages[-1].get("role") == "assistant":
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    elif kind == "function_call_output":
        output = item.get("output", "")
        messages.append(
            {
                "role": "tool",
                "tool_call_id": item.get("call_id", ""),
                "content": output if isinstance(output, str) else _text(output),
            }
        )
    elif kind != "reasoning":
        raise DataError(
            f"{where[:1].upper()}{where[1:]} has an input item of kind {kind!r}. Known: message, function_call, "
            "function_call_output, reasoning."
        )


def _message(raw: Mapping[str, Any]) -> Message:
    """A message without the empty fields that a table's columns force on it."""
    message = {name: value for name, value in raw.items() if value is not None}
    message.setdefault("content", "")
    return cast(Message, message)


def _arguments(value: object) -> Any:
    """Arguments of a function call as templates take them: an object; text that is not JSON stays text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _text(content: Any) -> str:
    """Text of a Responses content: a string, or parts that carry `text`."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


def _at(where: str, source: str, *, first: bool = True) -> str:
    text = f"{where} of {source}"
    return text[:1].upper() + text[1:] if first else text


def _names(row: Mapping[str, Any]) -> str:
    return _quoted(row) if row else "nothing"


def _quoted(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name in names)
