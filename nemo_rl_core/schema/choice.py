"""A component chosen by name, and its options."""

from __future__ import annotations

from typing import Any

from attrs import Factory, field, frozen

__all__ = ["ComponentChoice", "component"]


@frozen(kw_only=True)
class ComponentChoice:
    """A component chosen by name, with its own options.

    In a file either the bare name (`environment: math`) or `{name: ..., options: {...}}`; in Python also
    the component itself. Fields of this type carry `metadata={"kind": <kind>}`.
    """

    name: Any = None
    """`name`, `dist:name`, `module:attr` or a Python object; None is the installed default of the kind."""
    options: Any = Factory(dict)
    """Structured by the component's `config_class`."""


def component(kind: str, default: str | None = None, **options: Any) -> Any:
    """An attrs field that chooses a component of `kind`, by default `default` with these options.

    Options that are configured without a name, or with this name, are laid over these.
    """
    return field(default=ComponentChoice(name=default, options=options), metadata={"kind": kind})
