"""Subjects of contracts whose components the kit sets up itself: a class and its options."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import attrs
import pytest
from attrs import frozen

from nemo_rl_core.config.components import finished_options
from nemo_rl_core.errors import ConfigError

if TYPE_CHECKING:
    from nemo_rl_core.registry import ComponentRef

__all__ = ["Configured", "Expecting", "configured", "from_reference", "structured"]

Component = TypeVar("Component")


@frozen(kw_only=True)
class Configured(Generic[Component]):
    """A component that is not made yet, and its options."""

    component: type[Component] | ComponentRef
    """The class, or a `ComponentRef` of it; what a launcher in another process can make."""
    options: object = None
    """An instance of its `config_class`."""

    @property
    def loaded(self) -> type[Component]:
        """The class, imported if `component` is a reference."""
        load = None if isinstance(self.component, type) else getattr(self.component, "load", None)
        return load() if callable(load) else cast("type[Component]", self.component)


def configured(subject: type[Component] | Configured[Component], options: Mapping[str, Any]) -> Configured[Component]:
    """Return the subject of a fixture as `Configured`; a plain class gets the options of the contract."""
    if isinstance(subject, Configured):
        return subject
    return Configured(component=subject, options=finished_options(subject, dict(options)))


def from_reference(kind: str, ref: ComponentRef, options: Mapping[str, Any]) -> Configured[object]:
    """Return an installed component with options structured by its `config_class`.

    Raises:
        ConfigError: See `structured`.
    """
    return Configured(component=ref, options=structured(kind, ref, options))


def structured(kind: str, ref: ComponentRef, options: Mapping[str, Any]) -> object:
    """Return the options as an object of the component's `config_class`.

    Raises:
        ConfigError: They do not fit, or some are missing; the message lists every mistake.
    """
    from nemo_rl_core.config.components import resolve_choice
    from nemo_rl_core.schema import ComponentChoice

    choice, mistakes = resolve_choice(ComponentChoice(name=ref, options=dict(options)), kind)
    if not mistakes:
        return choice.options
    told = (attrs.evolve(m, keys=m.keys[m.keys[:1] == ("options",) :]).render() for m in mistakes)
    raise ConfigError(
        "\n\n".join(
            [
                f"The {ref.description} cannot be made with these options. Give them as --option key=value, or "
                "give the component an attribute `example`, the options to check it with:",
                *told,
            ]
        )
    )


class Expecting:
    """A context manager like `pytest.raises` whose failure says in words what was not refused."""

    def __init__(self, error: type[Exception], what: str) -> None:
        self._error, self._what = error, what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            pytest.fail(f"{self._what} was not refused")
        if isinstance(error, self._error):
            return True
        if isinstance(error, Exception):
            pytest.fail(f"{self._what} raised {type(error).__name__}, not {self._error.__name__}: {error}")
        return False
