"""Settings of training and validation data."""

from __future__ import annotations

from typing import Any

from attrs import Factory, field, frozen

from nemo_rl_core.schema.validators import ge, optional

__all__ = ["DataConfig", "DatasetConfig"]


@frozen(kw_only=True)
class DatasetConfig:
    """Source of rows, and how a row becomes a prompt."""

    source: Any = None
    """Dataset component (`huggingface`, `jsonl`, ...); or a file, folder or hub name, from which the component
    is chosen; or, in Python, the rows themselves."""
    options: Any = field(factory=dict, metadata={"options_of": ("datasets", "source"), "open": True})
    """Settings of the dataset component, structured by its `config_class`."""
    columns: dict[str, str] = Factory(dict)
    """Column in the data for each name that the run uses, such as `{prompt: question, answer: solution}`."""
    prompt_template: str | None = None
    """Python format string over the row's columns, such as "Solve: {question}"."""
    system_prompt: str | None = None
    """Text of a system message before each prompt. None adds no message."""
    limit: int | None = field(default=None, validator=optional(ge(1)))
    """Number of rows to use, from the first. None uses all."""


@frozen(kw_only=True)
class DataConfig:
    """Training and validation data."""

    train: DatasetConfig = Factory(DatasetConfig)
    """Rows to train on."""
    validation: DatasetConfig | None = None
    """Rows to validate on. None means no validation data."""
    shuffle: bool = True
    """Whether to take the training rows in a new order each epoch, determined by `seed`."""
    chat_template: str | None = None
    """Jinja chat template, or the path of one. None takes the tokenizer's; if it has none, the contents of
    the messages are joined without markup."""
    chat_template_kwargs: dict[str, Any] = Factory(dict)
    """Further variables for the chat template."""
