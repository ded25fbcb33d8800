"""Verification that a loaded component is what its kind requires."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from nemo_rl_core.registry.discovery._kinds import KINDS

__all__ = ["Contract", "contract", "shortcoming"]


class Contract:
    """What a kind's protocol asks of a component.

    A method of the protocol whose body is `...` must be written by the component; one with a body is a
    default that a sub-class of the protocol inherits. Attributes marked `ClassVar` must be there; other
    attributes may be set when the component is made, so they are not looked for.
    """

    def __init__(self, protocol: type) -> None:
        self.protocol = protocol
        own = {k: v for k, v in vars(protocol).items() if not k.startswith("_") or k == "__call__"}
        self.methods = tuple(k for k, v in own.items() if inspect.isfunction(v) or isinstance(v, property))
        annotations = vars(protocol).get("__annotations__", {})
        self.class_attributes = tuple(k for k, v in annotations.items() if "ClassVar" in str(v))
        self.stubs = frozenset(_stubs(protocol))

    def missing(self, component: object) -> list[str]:
        """Members that the component lacks, in the protocol's order."""
        cls = component if isinstance(component, type) else type(component)
        if _is_dynamic(cls):
            return []
        found: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            if base is not self.protocol:  # an annotation promises that instances will have it
                found.update(dict.fromkeys(vars(base).get("__annotations__", {})))
            found.update(vars(base))
        if cls is not component:
            found.update(getattr(component, "__dict__", {}))
        return [name for name in (*self.class_attributes, *self.methods) if not self._provided(name, found)]

    def misfit(self, component: object) -> str | None:
        """The first method that cannot be called as the protocol says, or None."""
        cls = component if isinstance(component, type) else type(component)
        for name in self.methods:
            promised = inspect.getattr_static(self.protocol, name)
            own = inspect.getattr_static(cls, name, None)
            if own is promised or not (inspect.isfunction(promised) and inspect.isfunction(own)):
                continue
            parameters = list(inspect.signature(promised).parameters.values())
            if {p.kind for p in parameters} >= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
                continue  # called with whatever arguments the component names
            arguments = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
            keywords = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
            problem = _binding(name, own, arguments, keywords)
            if problem is not None:
                return problem
        return None

    def _provided(self, name: str, found: dict[str, Any]) -> bool:
        if name not in found:
            return False
        return not (name in self.stubs and found[name] is vars(self.protocol)[name])


def _is_dynamic(cls: type) -> bool:
    """Whether the members of its objects cannot be told from the class."""
    return any("__getattr__" in vars(base) for base in cls.__mro__)


def _stubs(protocol: type) -> list[str]:
    """Names of the methods whose body is only a docstring and `...`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(protocol)))
    except (OSError, SyntaxError):  # no source at hand: nothing is taken for a stub
        return []
    definition = tree.body[0]
    functions = [n for n in getattr(definition, "body", []) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [f.name for f in functions if isinstance(f.body[-1], ast.Expr) and _is_ellipsis(f.body[-1].value)]


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis


@functools.cache
def contract(kind: str) -> Contract | None:
    """The contract of a kind; None for kinds without a protocol (anything callable)."""
    path = KINDS[kind].protocol
    if path is None:
        return None
    module, _, attribute = path.partition(":")
    return Contract(getattr(importlib.import_module(module), attribute))


def shortcoming(kind: str, component: object) -> str | None:
    """What keeps `component` from being of this kind, or None.

    A function is taken as a factory or as the component itself; only classes and instances can be
    compared with the protocol before they are used.
    """
    label = KINDS[kind].label
    if isinstance(component, ModuleType):
        return f"it is the module {component.__name__}, not a {label}; name the class: `{component.__name__}:<class>`"
    if kind == "callbacks":
        return None
    if not callable(component) and not isinstance(component, type):
        rules = contract(kind)
        if rules is None or rules.missing(component):
            return f"it is {component!r:.80} of type {type(component).__name__}, not a class or a function"
    rules = contract(kind)
    if rules is None or inspect.isroutine(component) or isinstance(component, functools.partial):
        return None
    missing = rules.missing(component)
    name = getattr(component, "__name__", type(component).__name__)
    if missing:
        return f"{name} is not {_a(label)}: it lacks {', '.join(missing)} (see {KINDS[kind].protocol})"
    if _is_dynamic(component if isinstance(component, type) else type(component)):
        return None
    problem = _config_class(component) or _construction(kind, component) or rules.misfit(component)
    return problem and f"{name} {problem} (see {KINDS[kind].protocol})"


def _a(label: str) -> str:
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"


def _config_class(component: object) -> str | None:
    """What is wrong with the class of its options."""
    found = inspect.getattr_static(component, "config_class", None)
    if found is None or isinstance(found, property | types.MemberDescriptorType):
        return None
    if isinstance(found, type) and (issubclass(found, dict) or "__attrs_attrs__" in vars(found)):
        return None
    shown = f"{found.__module__}.{found.__qualname__}" if isinstance(found, type) else repr(found)
    return f"has the config_class {shown}, which is not an attrs class: decorate it with @attrs.frozen(kw_only=True)"


_CONSTRUCTED_WITH = {
    "algorithms": ("config", "context"),
    "environments": ("config", "context"),
    "training_backends": (),
    "generation_backends": (),
}
"""What the core makes a component with."""


def _construction(kind: str, component: object) -> str | None:
    """How its constructor differs from the call that the core makes."""
    arguments = _CONSTRUCTED_WITH.get(kind)
    if arguments is None or not isinstance(component, type):
        return None
    return _binding("", component, arguments, {})


def _binding(
    name: str, function: Callable[..., object], arguments: Sequence[str], keywords: Mapping[str, Any]
) -> str | None:
    """Why `function(*arguments, **keywords)` is no call of it, or None."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return None
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        asked = ", ".join([*(a for a in arguments if a != "self"), *(f"{key}=..." for key in keywords)])
        what = f"has the method {name}{signature}" if name else f"is made by {signature}"
        return f"{what}, which cannot be called as the core does, {name or 'Class'}({asked}): {error}"
    return None
