"""Declarations of a component for its kit: its attributes `conformance` and `example`.

`nemo-rl plugins check` has no test file to sub-class a contract in. So whatever a sub-class would say the component may
say: `conformance` maps names of the contract to values, or to functions in place of its methods (without `self`).

    class MyLoss:
        conformance = {"differentiable": False, "add_fields": add_labels}

`example` is what it is checked with where its defaults do not do: options, or keywords of the case of its kind.

    class MySource:
        @staticmethod
        def example(folder):
            (folder / "rows.txt").write_text("a, b")
            return {"path": str(folder / "rows.txt")}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.testing.pytest_plugin import is_fixture

__all__ = ["declarable", "example_of", "overlaid", "take_declarations"]

_KITS = "nemo_rl_core.testing.conformance"
_OF_THE_KIT = frozenset({"declared_by", "from_component", "kind", "mistake_in", "subject"})


def declarable(contract: type) -> dict[str, Any]:
    """Return the names that `conformance` may set for this contract, with their defaults."""
    found: dict[str, Any] = {}
    for base in reversed(contract.__mro__[:-1]):
        found.update(vars(base))
    return {
        name: value
        for name, value in found.items()
        if not name.startswith(("_", "test_"))
        and name not in _OF_THE_KIT
        and not is_fixture(value)
        and not isinstance(value, property)
    }


def take_declarations(test: object, component: object) -> str | None:
    """Apply the component's declarations to `test`, an object of a contract.

    Attributes that the class of the test defines take precedence: its author set them for this very test.

    Returns:
        What is wrong with the attribute, in words, or None.
    """
    said = getattr(component, "conformance", None)
    if said is None or isinstance(said, property):  # of a class, before it is made with options
        return None
    name = getattr(component, "__name__", type(component).__name__)
    if not isinstance(said, Mapping):
        return f"`conformance` of {name} is {said!r:.60}, not a mapping"
    known = declarable(type(test))
    unknown = sorted(str(key) for key in said if key not in known)
    if unknown:
        return f"`conformance` of {name} says {', '.join(unknown)}; its contract knows {', '.join(sorted(known))}"
    own = {key for base in type(test).__mro__ if not base.__module__.startswith(_KITS) for key in vars(base)}
    for key, value in said.items():
        if callable(known[key]) and not callable(value):
            return f"`conformance` of {name} says {key} = {value!r:.60}, not a function"
        if key not in own:
            setattr(test, key, value)
    return None


def example_of(component: object, folder: Path) -> Mapping[str, Any]:
    """Return the `example` of a component: a mapping, or the result of a function that takes an empty folder.

    Raises:
        NemoRLError: It is neither.
    """
    example = getattr(component, "example", None)
    found = example(folder) if callable(example) else example
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        name = getattr(component, "__name__", type(component).__name__)
        raise NemoRLError(f"`example` of {name} gives {found!r:.60}, not a mapping.")
    return found


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; `above` takes precedence."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = overlaid(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged
