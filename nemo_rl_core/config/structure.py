"""Strict conversion of plain data into attrs classes: coerces nothing and reports every mistake.

The conversion is a cattrs converter whose hooks raise `Refused`, which carries a mistake for every value
that does not fit; `structure` turns a tree into an object and those mistakes.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import attrs

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.schema import ComponentChoice
from nemo_rl_core.schema.fields import alternatives, default_of, fields_of, type_name
from nemo_rl_core.schema.mistakes import Key, Mistake, suggest
from nemo_rl_core.schema.validators import choices, limits

if TYPE_CHECKING:
    from cattrs import Converter

__all__ = ["Refused", "allowed_values", "first_sentence", "structure", "structure_partially", "without"]

Hook = Callable[[Any, Any], Any]


class Refused(ValueError):
    """Raised by the hooks: the values that do not fit, relative to the object being structured."""

    def __init__(self, *mistakes: Mistake) -> None:
        super().__init__("; ".join(m.problem for m in mistakes))
        self.mistakes = mistakes


def structure(tree: Any, cls: Any) -> tuple[Any, list[Mistake]]:
    """`tree` as an object of `cls` (None if it has mistakes), and the mistakes."""
    try:
        return _converter().structure(tree, cls), []
    except Refused as refused:
        return None, list(refused.mistakes)


def structure_partially(tree: object, cls: object) -> tuple[Any, list[Mistake]]:
    """As `structure`, but values that do not fit are left at their defaults where that is possible."""
    built, mistakes = structure(tree, cls)
    if not mistakes or not isinstance(tree, Mapping):
        return built, mistakes
    for m in mistakes:
        tree = without(tree, m.keys)
    return structure(tree, cls)[0], mistakes


@cache
def _converter() -> Converter:
    from cattrs import Converter  # a third of the import time of this package; used when a file is loaded

    converter = Converter()
    later_wins: list[tuple[Callable[[Any], bool], Callable[[Any], Hook]]] = [
        (lambda tp: isinstance(tp, type), lambda tp: _instance_hook),
        (lambda tp: isinstance(tp, type) and issubclass(tp, enum.Enum), lambda tp: _enum_hook),
        (lambda tp: isinstance(tp, type) and issubclass(tp, os.PathLike), lambda tp: _path_hook),
        (lambda tp: get_origin(tp) is Literal, lambda tp: _literal_hook),
        (_is_mapping, lambda tp: _mapping_hook(tp, converter)),
        (_is_sequence, lambda tp: _sequence_hook(tp, converter)),
        (lambda tp: len(alternatives(tp)) > 1, lambda tp: _union_hook(tp, converter)),
        (lambda tp: isinstance(tp, type) and attrs.has(tp), lambda tp: _class_hook(tp, converter)),
        (lambda tp: tp is ComponentChoice, lambda tp: _choice_hook(converter)),
        (lambda tp: tp is Any or tp is object, lambda tp: lambda value, _: value),
        (_is_callable, lambda tp: _callable_hook),
    ]
    for scalar in _SCALARS:  # cattrs looks these up by class before it asks the predicates
        converter.register_structure_hook(scalar, _scalar_hook)
    converter.register_structure_hook(Path, _path_hook)
    for predicate, factory in later_wins:
        converter.register_structure_hook_factory(predicate, factory)
    return converter


# -- values -----------------------------------------------------------------------------------------------

_SCALARS = (int, float, bool, str, type(None))


def _scalar_hook(value: Any, tp: Any) -> object:
    if issubclass(tp, enum.Enum):  # `class E(str, Enum)`
        return _enum_hook(value, tp)
    if tp is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, tp) and not (tp is int and isinstance(value, bool)):
        return value
    raise Refused(Mistake(problem=_expected(tp, value), fix=_conversion(tp, value)))


def _conversion(tp: object, value: object) -> str | None:
    """How a value of the wrong type was probably meant."""
    if isinstance(value, str) and tp in (int, float, bool):
        text = value.strip().lower()
        if tp is bool:
            word = {"yes": "true", "on": "true", "true": "true", "1": "true"}.get(text)
            word = word or {"no": "false", "off": "false", "false": "false", "0": "false"}.get(text)
            return f"Write {word}, without quotes." if word else None
        try:
            number = float(text)
        except ValueError:
            return None
        return f"Write {text} without quotes." if tp is float or number.is_integer() else None
    if tp is int and isinstance(value, float) and value.is_integer():
        return f"Write {int(value)}."
    if tp is str and isinstance(value, (int, float)):
        return f"Quote it: {str(value).lower()!r}."
    return None


def _instance_hook(value: Any, tp: Any) -> object:
    try:
        fits = isinstance(value, tp)
    except TypeError:  # a protocol that cannot be checked
        return value
    if fits:
        return value
    raise Refused(Mistake(problem=_expected(tp, value)))


def _callable_hook(value: object, tp: object) -> object:
    if callable(value):
        return value
    raise Refused(Mistake(problem=f"expected a Python callable, found {_show(value)}"))


def _enum_hook(value: Any, tp: Any) -> object:
    if isinstance(value, tp):
        return value
    return tp(_one_of(value, [member.value for member in tp]))


def _path_hook(value: object, tp: object) -> object:
    if isinstance(value, (str, os.PathLike)):
        return Path(value)
    raise Refused(Mistake(problem=f"expected a path, found {_show(value)}"))


def _literal_hook(value: object, tp: object) -> object:
    return _one_of(value, get_args(tp))


def _one_of(value: object, allowed: Sequence[Any]) -> object:
    for choice in allowed:
        if choice == value and type(choice) is type(value):
            return choice
    meant = suggest(value, allowed) if isinstance(value, str) else None
    raise Refused(Mistake(problem=f"{_show(value)} is not one of the choices", suggestion=meant))


# -- containers -------------------------------------------------------------------------------------------


def _is_mapping(tp: object) -> bool:
    base = get_origin(tp) or tp
    return isinstance(base, type) and issubclass(base, Mapping)


def _is_sequence(tp: object) -> bool:
    base = get_origin(tp) or tp
    return isinstance(base, type) and issubclass(base, (Sequence, set, frozenset)) and base not in (str, bytes)


def _is_callable(tp: object) -> bool:
    return (get_origin(tp) or tp) is Callable


def _mapping_hook(tp: object, converter: Converter) -> Hook:
    args = get_args(tp) or (Any, Any)

    def hook(value: object, _: object) -> object:
        if not isinstance(value, Mapping):
            raise Refused(Mistake(problem=_expected(tp, value)))
        result: dict[Any, Any] = {}
        mistakes: list[Mistake] = []
        for key, child in value.items():
            for part, part_type in ((key, args[0]), (child, args[1])):
                mistakes += _try(converter, part, part_type, key, result)
        if mistakes:
            raise Refused(*mistakes)
        return result

    return hook


def _sequence_hook(tp: Any, converter: Converter) -> Hook:
    base, args = get_origin(tp) or tp, get_args(tp)
    fixed = base is tuple and bool(args) and args[-1] is not Ellipsis
    make: Callable[[Any], Any] = next((t for t in (tuple, frozenset, set) if issubclass(base, t)), list)

    def hook(value: object, _: object) -> object:
        if not isinstance(value, (list, tuple, set, frozenset)):
            fix = f"Write a list: [{_show(value).strip(chr(39))}]." if isinstance(value, _SCALARS[:-1]) else None
            raise Refused(Mistake(problem=_expected(tp, value), fix=fix))
        if fixed and len(value) != len(args):
            raise Refused(Mistake(problem=f"expected {len(args)} values, found {len(value)}: {_show(value)}"))
        result: dict[Any, Any] = {}
        mistakes: list[Mistake] = []
        for i, child in enumerate(value):
            mistakes += _try(converter, child, args[i] if fixed else args[0] if args else Any, i, result)
        if mistakes:
            raise Refused(*mistakes)
        return make(result.values())

    return hook


def _try(converter: Converter, value: Any, tp: Any, key: Key, into: dict[Any, Any]) -> list[Mistake]:
    try:
        into[key] = converter.structure(value, tp)
    except Refused as refused:
        return [m.under(key) for m in refused.mistakes]
    return []


def _union_hook(tp: object, converter: Converter) -> Hook:
    arms = alternatives(tp)
    others = [arm for arm in arms if arm is not type(None)]

    def hook(value: object, _: object) -> object:
        if value is None and len(others) < len(arms):
            return None
        refusals: list[Refused] = []
        for arm in others:
            try:
                return converter.structure(value, arm)
            except Refused as refused:
                refusals.append(refused)
        deepest = max(refusals, key=lambda r: max(len(m.keys) for m in r.mistakes))
        if len(others) == 1 or any(m.keys for m in deepest.mistakes):
            raise deepest
        raise Refused(Mistake(problem=_expected(tp, value)))

    return hook


# -- classes ----------------------------------------------------------------------------------------------


def _choice_hook(converter: Converter) -> Hook:
    fields = _class_hook(ComponentChoice, converter)

    def hook(value: object, _: object) -> object:
        if value is None or isinstance(value, (bool, int, float, list)):
            if value is None:
                return ComponentChoice()
            fix = "Write its name, or {name: ..., options: {...}}."
            raise Refused(Mistake(problem=f"expected a component, found {_show(value)}", fix=fix))
        if isinstance(value, (dict, ComponentChoice)):
            return fields(value, ComponentChoice)
        return ComponentChoice(name=value)

    return hook


def _class_hook(cls: Any, converter: Converter) -> Hook:
    def hook(value: Any, _: Any) -> Any:
        actual, given = cls, value
        if isinstance(value, cls):  # built in Python: its values are looked at as closely
            actual = type(value)
            given = {f.name: getattr(value, f.name) for f in fields_of(actual)}
        if not isinstance(given, Mapping):
            if attrs.has(type(value)):
                raise Refused(Mistake(problem=f"expected {cls.__name__}, found {type(value).__name__}"))
            raise Refused(Mistake(problem=f"expected a mapping of settings, found {_show(value)}"))
        built, mistakes = _build(actual, given, converter)
        if mistakes:
            raise Refused(*mistakes)
        return built

    return hook


def _build(cls: Any, given: Mapping[Any, Any], converter: Converter) -> tuple[Any, list[Mistake]]:
    fields = {f.name: f for f in fields_of(cls)}
    values: dict[str, Any] = {}
    mistakes = [_unknown(key, cls, fields) for key in given if key not in fields]
    for name, f in fields.items():
        if name in given:
            found = _field(f, _over_default(f, given[name]), converter, values)
            mistakes += [_annotate(m, cls, f) for m in found]
        elif f.default is attrs.NOTHING:
            mistakes.append(_annotate(Mistake(keys=(name,), problem="this setting is missing"), cls, f))
    defaults = {name: default_of(f) for name, f in fields.items() if name not in given}
    mistakes += [_annotate(m, cls, fields[str(m.keys[0])]) for m in _validated(cls, fields, values, defaults)]
    if mistakes:
        return None, mistakes
    try:
        return cls(**{fields[name].alias or name: value for name, value in values.items()}), []
    except (ValueError, TypeError, NemoRLError) as error:  # what __attrs_post_init__ refuses
        return None, [Mistake(problem=str(error), error=error)]


def _over_default(f: attrs.Attribute[Any], value: object) -> object:
    """A choice without a name, or with the name that stands by default, keeps the default's options under its own."""
    default = default_of(f)
    if "kind" not in f.metadata or not isinstance(default, ComponentChoice) or default.name is None:
        return value
    if isinstance(value, str) and value == default.name:
        return default
    if not isinstance(value, Mapping) or value.get("name") not in (None, default.name):
        return value
    below, above = default.options, value.get("options")
    if not isinstance(below, Mapping) or not (above is None or isinstance(above, Mapping)):
        return value
    return {**value, "name": default.name, "options": {**below, **(above or {})}}


def _field(f: attrs.Attribute[Any], value: object, converter: Converter, into: dict[str, Any]) -> list[Mistake]:
    if f.converter is None:
        return _try(converter, value, f.type or Any, f.name, into)
    try:
        f.converter(value)  # type: ignore[operator]
    except (ValueError, TypeError, NemoRLError) as error:
        return [Mistake(keys=(f.name,), problem=f"{_show(value)} is refused: {error}", error=error)]
    into[f.name] = value
    return []


def _validated(
    cls: Any, fields: Mapping[str, attrs.Attribute[Any]], values: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[Mistake]:
    """Run every validator, so that all report; attrs itself would stop at the first."""
    draft = cls.__new__(cls)
    known = {name: value for name, value in {**defaults, **values}.items() if value is not attrs.NOTHING}
    for name, value in known.items():
        object.__setattr__(draft, name, value)
    mistakes: list[Mistake] = []
    for name, value in known.items():  # defaults too: a default may not go with what another field says
        f = fields[name]
        if f.validator is None or f.converter is not None:
            continue
        for validator in getattr(f.validator, "_validators", None) or [f.validator]:
            problem = _problem(validator, draft, f, value)
            if problem is not None:
                meant = suggest(value, choices(validator) or ()) if isinstance(value, str) else None
                mistakes.append(Mistake(keys=(name,), problem=problem, suggestion=meant))
                break
    return mistakes


def _problem(validator: Any, draft: Any, f: attrs.Attribute[Any], value: Any) -> str | None:
    """What a validator says against a value."""
    try:
        validator(draft, f, value)
    except (ValueError, TypeError) as error:
        bounds = " and ".join(f"{op} {bound:g}" for op, bound in limits(validator))
        if bounds:
            return f"must be {bounds}, found {_show(value)}"
        if choices(validator) is not None:
            return f"{_show(value)} is not one of the choices"
        return str(error.args[0] if error.args else error)
    except AttributeError:
        return None  # it looks at a value that has a mistake of its own
    return None


def _unknown(key: Any, cls: object, fields: Mapping[str, Any]) -> Mistake:
    meant = suggest(key, fields)
    fix = f"Write `{meant}`, or remove it." if meant else "Remove it."
    known = None if meant else ", ".join(fields) or "nothing; it has no settings"
    return Mistake(keys=(key,), problem="unknown key", allowed=known, suggestion=meant, fix=fix)


def _annotate(m: Mistake, cls: object, f: attrs.Attribute[Any]) -> Mistake:
    """Add what the field allows, if the mistake is in this very field."""
    if len(m.keys) != 1 or m.allowed is not None:
        return m
    from nemo_rl_core.schema.field_docs import field_docs

    doc = first_sentence(field_docs(cls).get(f.name, ""))
    allowed = allowed_values(f)
    return attrs.evolve(m, allowed=f"{allowed} ({doc})" if doc else allowed)


def allowed_values(f: attrs.Attribute[Any]) -> str:
    """Type, choices and range of a field, such as `integer >= 1`."""
    options = choices(f.validator)
    if options is not None:
        return "one of " + ", ".join(map(str, options))
    bounds = " and ".join(f"{op} {bound:g}" for op, bound in limits(f.validator))
    name = type_name(f.type)
    if not bounds:
        return name
    first, *rest = name.split(" or ")
    return " or ".join([f"{first} {bounds}", *rest])


def first_sentence(doc: str) -> str:
    """The first sentence of a field's documentation."""
    for mark in ("; ", ". "):
        doc = doc.split(mark)[0]
    return doc.rstrip(".")


def _expected(tp: object, value: object) -> str:
    return f"expected {type_name(tp)}, found {_show(value)}"


def _show(value: object) -> str:
    """A value as it may be written, cut to one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def without(tree: object, keys: Sequence[Key]) -> Any:
    """A copy of `tree` without the value at `keys`."""
    if not keys:
        return {}
    key, *rest = keys
    if attrs.has(type(tree)):
        tree = {f.name: getattr(tree, f.name) for f in fields_of(type(tree))}
    if isinstance(tree, Mapping):
        if rest and key in tree and not isinstance(tree[key], (list, tuple)):
            return {**tree, key: without(tree[key], rest)}
        return {k: v for k, v in tree.items() if k != key}
    return tree
