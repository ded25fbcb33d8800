"""The choice of a component by name, with its options."""

from __future__ import annotations

from typing import Any

from attrs import Factory, field, frozen

__all__ = ["ComponentChoice", "component"]


@frozen(kw_only=True)
class ComponentChoice:
    """The choice of a component by name, with its own options.

    A file has either the bare name (`environment: math`) or `{name: ..., options: {...}}`; Python code may
    also give the component itself. Fields of this type carry `metadata={"kind": <kind>}`.
    """

    name: Any = None
    """Component: `name`, `dist:name`, `module:attr` or a Python object. None takes the kind's installed default."""
    options: Any = Factory(dict)
    """Options of the component, structured by its `config_class`."""


def component(kind: str, default: str | None = None, **options: object) -> Any:
    """Make an attrs field that chooses a component of `kind`, by default `default` with these options.

    Options that are configured without a name, or with this name, override these one by one.
    """
    return field(default=ComponentChoice(name=default, options=options), metadata={"kind": kind})
