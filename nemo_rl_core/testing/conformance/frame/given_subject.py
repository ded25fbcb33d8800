"""What `run_kit` is given to test: a class, an object or case of it, or a callable that makes one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.testing.conformance.frame.declared import example_of

if TYPE_CHECKING:
    from nemo_rl_core.registry import ComponentRef

__all__ = ["maker_of"]

_DATA = (type(None), str, bytes, bool, int, float, complex, Mapping, list, tuple, set, frozenset)


class _Contract(Protocol):
    """The part of a `Contract` that says what it tests."""

    kind: ClassVar[str]
    subject: ClassVar[str]

    @classmethod
    def from_component(cls, ref: ComponentRef, options: Mapping[str, Any], example: Mapping[str, Any]) -> object: ...

    @classmethod
    def mistake_in(cls, subject: object) -> str | None: ...


def maker_of(contract: type[_Contract], given: object, folder: Path) -> Callable[[], object]:
    """Return a function without arguments that makes the subject, a new one for each clause if possible.

    Args:
        contract: What the subject is tested by.
        given: See `run_kit`.
        folder: Empty, for the `example` of a class.

    Raises:
        NemoRLError: It is neither a class, an object or case to test, nor a callable without arguments; or its class
            cannot be made without options.
    """
    if isinstance(given, type):
        return _maker_of_class(contract, given, folder)
    if callable(given) and _needs_nothing(given):
        return given
    mistake = "it is plain data" if isinstance(given, _DATA) else contract.mistake_in(given)
    if mistake is None:
        return lambda: given
    kind = contract.kind.replace("_", " ")
    raise NemoRLError(
        f"run_kit({contract.__name__}, ...) wants what the fixture `{contract.subject}` would return (a class of the "
        f"{kind}, an object, or a case of it) or a callable without arguments that returns that. It got {given!r:.80}. "
        "For an installed component by its name there is check_component."
    )


def _maker_of_class(contract: type[_Contract], component: type, folder: Path) -> Callable[[], object]:
    """Return a maker for a class: the subject itself, made without arguments, or made with its `example`."""
    from nemo_rl_core.registry import get_registry

    if contract.mistake_in(component) is None:
        return lambda: component
    if _needs_nothing(component):
        return component
    ref, example = get_registry().resolve(contract.kind, component), example_of(component, folder)
    contract.from_component(ref, {}, example)  # a mistake is one error, not one for each clause
    return lambda: contract.from_component(ref, {}, example)


def _needs_nothing(function: Callable[..., object]) -> bool:
    """Return whether the function can be called without arguments."""
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # of a builtin without a signature
        return True
    return True
