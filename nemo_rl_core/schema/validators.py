"""Limits of a field, with errors that a person can act on, and their description for the reference.

Use them as those of `attrs.validators`, in `field(validator=...)`. The validators of attrs work too;
these add the sentence "num_workers must be >= 1, found 0" when a class is built in Python.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import Attribute, frozen

from nemo_rl_core.errors import ConfigError

__all__ = ["choices", "ge", "gt", "le", "limits", "lt", "one_of", "optional", "refuse_unread"]

Validator = Callable[[Any, "Attribute[Any]", Any], object]
"""As attrs calls it: `validator(instance, attribute, value)`."""

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}


@frozen
class _Bound:
    """A value on the right side of a bound."""

    compare_op: str
    bound: float

    def __call__(self, instance: object, attribute: Attribute[Any], value: object) -> None:
        try:
            holds = _OPERATORS[self.compare_op](value, self.bound)
        except TypeError:
            holds = False
        if not holds:
            raise ConfigError(f"{attribute.name} must be {self.compare_op} {self.bound:g}, found {value!r}.")


@frozen
class _OneOf:
    """One of a fixed set of values."""

    options: tuple[Any, ...]

    def __call__(self, instance: object, attribute: Attribute[Any], value: object) -> None:
        if value not in self.options:
            allowed = ", ".join(map(repr, self.options))
            raise ConfigError(f"{attribute.name} must be one of {allowed}, found {value!r}.")


@frozen
class _Optional:
    """None, or what another validator takes."""

    validator: Validator | list[Validator]

    def __call__(self, instance: object, attribute: Attribute[Any], value: object) -> None:
        if value is not None:
            for validator in self.validator if isinstance(self.validator, list) else [self.validator]:
                validator(instance, attribute, value)


def ge(bound: float) -> Validator:
    """Require a value of at least `bound`."""
    return _Bound(">=", bound)


def gt(bound: float) -> Validator:
    """Require a value greater than `bound`."""
    return _Bound(">", bound)


def le(bound: float) -> Validator:
    """Require a value of at most `bound`."""
    return _Bound("<=", bound)


def lt(bound: float) -> Validator:
    """Require a value less than `bound`."""
    return _Bound("<", bound)


def one_of(*options: object) -> Validator:
    """Require one of `options`."""
    return _OneOf(options)


def optional(validator: Validator | list[Validator]) -> Validator:
    """Allow None, or a value that `validator` (or each of a list of them) allows."""
    return _Optional(validator)


def limits(validator: object) -> list[tuple[str, float]]:
    """Return the bounds that a validator sets, such as `[(">", 0), ("<=", 1)]`; validators of attrs work too."""
    bounds: list[tuple[str, float]] = []
    for part in _parts(validator):
        op, bound = getattr(part, "compare_op", None), getattr(part, "bound", None)
        if op in _OPERATORS and bound is not None:
            bounds.append((op, bound))
    return bounds


def choices(validator: object) -> tuple[Any, ...] | None:
    """Return the values that a validator allows, or None if it does not list them."""
    for part in _parts(validator):
        options = getattr(part, "options", None)
        if options is not None:
            return tuple(options)
    return None


def _parts(validator: object) -> list[Any]:
    """The simple validators inside `optional`, lists and `and_`."""
    if validator is None:
        return []
    nested: Sequence[Any] | None = None
    if isinstance(validator, (list, tuple)):
        nested = validator
    elif hasattr(validator, "_validators"):
        nested = validator._validators
    elif hasattr(validator, "validator"):
        nested = [validator.validator]
    return [validator] if nested is None else [p for v in nested for p in _parts(v)]


def refuse_unread(cls: type, root: type, read_as: Mapping[str, str]) -> None:
    """Refuse a configuration class with settings that a run would pass over.

    Args:
        cls: A class that derives from `root`, when it is defined.
        root: What every run reads.
        read_as: Setting to the property by which a run reads it.

    Raises:
        ConfigError: Says which setting, and what to write instead.
    """
    own = vars(cls).get("__annotations__", {})
    for name, read in read_as.items():
        if name in own and getattr(cls, read) is getattr(root, read):
            raise ConfigError(
                f"{cls.__qualname__}.{name} would not be read: a run reads `{read}`, which {cls.__qualname__} does "
                f"not define. Derive it from RolloutRunConfig, which has both, or define the property `{read}`."
            )
    fields = {name for base in cls.__mro__[1:] for name in vars(base).get("__annotations__", {})}
    for name in sorted(fields & (vars(cls).keys() - own.keys())):
        value = vars(cls)[name]
        if not hasattr(value, "__get__"):
            raise ConfigError(
                f"{cls.__qualname__}.{name} = {value!r} is no setting without a type, so it would not be read. Write "
                f"`{name}: {type(value).__name__} = {value!r}`."
            )
