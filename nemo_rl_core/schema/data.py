"""Settings of the data."""

from __future__ import annotations

from typing import Any

from attrs import Factory, field, frozen

from nemo_rl_core.schema.validators import ge, optional

__all__ = ["DataConfig", "DatasetConfig"]


@frozen(kw_only=True)
class DatasetConfig:
    """Where rows come from and how a row becomes a prompt."""

    source: Any = None
    """Dataset component (`huggingface`, `jsonl`, ...), a file or folder or hub name (the source is told from
    it), or rows in Python."""
    options: Any = field(factory=dict, metadata={"options_of": ("datasets", "source"), "open": True})
    """Settings of the dataset component, structured by its `config_class`."""
    columns: dict[str, str] = Factory(dict)
    """Our name to the column's name in the data, such as `{prompt: question, answer: solution}`."""
    prompt_template: str | None = None
    """Python format string over the row's columns, such as "Solve: {question}"."""
    system_prompt: str | None = None
    """Text of a system message put before each prompt; None is none."""
    limit: int | None = field(default=None, validator=optional(ge(1)))
    """Use only the first rows."""


@frozen(kw_only=True)
class DataConfig:
    """Training and validation data."""

    train: DatasetConfig = Factory(DatasetConfig)
    """Rows to train on."""
    validation: DatasetConfig | None = None
    """Rows to validate on; None is none."""
    shuffle: bool = True
    """Take the training rows in a new order each epoch, fixed by `seed`."""
    chat_template: str | None = None
    """A Jinja chat template, or the path of one; None is the tokenizer's. Without any, the contents of
    the messages are joined as they are."""
    chat_template_kwargs: dict[str, Any] = Factory(dict)
    """Further variables of the chat template."""
