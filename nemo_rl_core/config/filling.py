"""Values that follow from others: shorthands, and blanks that `finalize` fills."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs

from nemo_rl_core.schema import RunConfig
from nemo_rl_core.schema.fields import default_of, fields_of, same, shorthands
from nemo_rl_core.schema.mistakes import Mistake, path_of

__all__ = ["DERIVED", "filled", "value_at"]

Path = tuple[str, ...]

_MAX_NEW_TOKENS = 512


def _total_steps(config: RunConfig) -> int | None:
    """Optimizer steps of the run; None where nothing needs them."""
    if config.policy.scheduler.name == "constant" or config.max_steps is None:
        return None
    return config.max_steps * config.num_updates_per_step


def _max_new_tokens(config: RunConfig) -> int:
    """Half of the context at most: the prompt needs room."""
    return min(_MAX_NEW_TOKENS, max(1, config.policy.max_sequence_length // 2))


DERIVED: dict[Path, tuple[Path, Callable[[RunConfig], Any]]] = {
    ("generation", "model_name"): (("policy", "model_name"), lambda c: c.policy.model_name),
    ("generation", "precision"): (("policy", "precision"), lambda c: c.policy.precision),
    ("generation", "max_sequence_length"): (
        ("policy", "max_sequence_length"),
        lambda c: c.policy.max_sequence_length,
    ),
    ("generation", "max_new_tokens"): (("policy", "max_sequence_length"), _max_new_tokens),
    ("max_epochs",): (("max_steps",), lambda c: 1 if c.max_steps is None else None),
    ("policy", "scheduler", "total_steps"): (("max_steps",), _total_steps),
}
"""Path of a value that is filled when it is None, to the value it follows and how it is found."""


def filled(config: RunConfig) -> tuple[RunConfig, list[Mistake]]:
    """`config` with shorthands applied and blanks filled, and shorthands that contradict the long form."""
    mistakes: list[Mistake] = []
    for short, long in shorthands(type(config)).items():
        value = getattr(config, short)
        if value is None:
            continue
        old, default = _with_default(config, long)
        if not same(old, value) and not same(old, default):
            problem = f"{short} is {value!r} but {path_of(long)} is {old!r}; {short} is a shorthand for it"
            mistakes.append(Mistake(keys=(short,), problem=problem, fix="Keep one of the two.", related=(long,)))
            continue
        config = _evolved(config, long, value)
    for path, (_, find) in DERIVED.items():
        if value_at(config, path) is None:
            config = _evolved(config, path, find(config))
    return config, mistakes


def value_at(config: object, path: Iterable[str]) -> Any:
    """The value at `path`."""
    for name in path:
        config = getattr(config, name)
    return config


def _with_default(config: object, path: Sequence[str]) -> tuple[Any, Any]:
    """The value at `path` and the default of its field."""
    *parents, name = path
    node = value_at(config, parents)
    return getattr(node, name), default_of(next(f for f in fields_of(type(node)) if f.name == name))


def _evolved(config: Any, path: Sequence[str], value: Any) -> Any:
    name, *rest = path
    return attrs.evolve(config, **{name: _evolved(getattr(config, name), rest, value) if rest else value})
