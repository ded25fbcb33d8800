"""Types that plugin authors use in their option classes, beside those of the core's own tree."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
from attrs import field, frozen
from attrs.validators import in_, matches_re, max_len, min_len

from nemo_rl_core.config import describe, json_schema, to_dict
from nemo_rl_core.config.formats._json import parse_json
from nemo_rl_core.config.formats._yaml import parse_yaml
from nemo_rl_core.config.structure import structure
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.schema import ComponentChoice, component
from nemo_rl_core.schema.validators import gt, lt, one_of, optional


class Mode(enum.Enum):
    FAST = "fast"
    EXACT = "exact"


class Level(int, enum.Enum):
    LOW = 1
    HIGH = 2


@frozen(kw_only=True)
class Inner:
    rate: float = field(default=0.5, validator=[gt(0), lt(1)])


@frozen(kw_only=True)
class Options:
    mode: Mode = Mode.FAST
    level: Level = Level.LOW
    folder: Path | None = None
    reward: Callable[..., float] = math.fsum
    either: int | str = 0
    inner: Inner | None = None
    many: Sequence[Inner] = ()
    by_name: Mapping[str, Inner] = attrs.Factory(dict)
    tags: frozenset[str] = frozenset()
    size: int | Literal["auto"] = "auto"
    colour: str = field(default="red", validator=one_of("red", "green"))
    shape: str = field(default="round", validator=in_(["round", "flat"]))
    word: str = field(default="abc", validator=matches_re(r"[a-z]+"))
    pair: list[int] = field(factory=lambda: [1, 2], validator=[min_len(2), max_len(2)])
    upper: str = field(default="a", converter=str.upper)
    maybe: float | None = field(default=None, validator=optional([gt(0), lt(1)]))
    source: attrs.Attribute | None = None


def built(**tree):
    value, mistakes = structure(tree, Options)
    assert mistakes == []
    return value


def problems(**tree):
    return [(m.path, m.problem, m.suggestion) for m in structure(tree, Options)[1]]


def test_values_that_fit():
    options = built(
        mode="exact",
        level=2,
        folder="a/b",
        either="x",
        inner={"rate": 0.25},
        many=[{"rate": 0.1}, Inner(rate=0.2)],
        by_name={"x": {"rate": 0.3}},
        tags=["a", "b", "a"],
        size=4,
        upper="b",
    )
    assert options == Options(
        mode=Mode.EXACT,
        level=Level.HIGH,
        folder=Path("a/b"),
        either="x",
        inner=Inner(rate=0.25),
        many=[Inner(rate=0.1), Inner(rate=0.2)],
        by_name={"x": Inner(rate=0.3)},
        tags=frozenset("ab"),
        size=4,
        upper="b",
    )
    assert options.upper == "B"
    assert structure(options, Options) == (options, [])


@pytest.mark.parametrize(
    ("tree", "path", "problem", "suggestion"),
    [
        ({"mode": "fsat"}, "mode", "'fsat' is not one of the choices", "fast"),
        ({"level": 3}, "level", "3 is not one of the choices", None),
        ({"folder": 1}, "folder", "expected a path, found 1", None),
        ({"reward": "f"}, "reward", "expected a Python callable, found 'f'", None),
        ({"either": 1.5}, "either", "expected integer or text, found 1.5", None),
        ({"inner": {"rat": 1}}, "inner.rat", "unknown key", "rate"),
        ({"inner": {"rate": 1}}, "inner.rate", "must be < 1, found 1.0", None),
        ({"many": [{}, {"rate": 0}]}, "many[1].rate", "must be > 0, found 0.0", None),
        ({"by_name": {"x": {"rate": "y"}}}, "by_name.x.rate", "expected number, found 'y'", None),
        ({"tags": "a"}, "tags", "expected list of text, found 'a'", None),
        ({"size": "atuo"}, "size", "expected integer or one of auto, found 'atuo'", None),
        ({"colour": "rde"}, "colour", "'rde' is not one of the choices", "red"),
        ({"shape": "rund"}, "shape", "'rund' is not one of the choices", "round"),
        ({"upper": 3}, "upper", "3 is refused: ", None),
        ({"maybe": 2}, "maybe", "must be > 0 and < 1, found 2.0", None),
        ({"source": 1}, "source", "expected Attribute, found 1", None),
    ],
)
def test_values_that_do_not(tree, path, problem, suggestion):
    (found,) = problems(**tree)
    assert (found[0], found[2]) == (path, suggestion)
    assert found[1].startswith(problem)


@pytest.mark.parametrize("tree", [{"word": "A1"}, {"pair": [1]}, {"pair": [1, 2, 3]}])
def test_validators_of_attrs_speak_for_themselves(tree):
    ((path, problem, _),) = problems(**tree)
    assert path == next(iter(tree))
    assert problem


def test_a_key_that_is_no_text():
    assert problems(**{"by_name": {1: {}}}) == [("by_name[1]", "expected text, found 1", None)]


@frozen(kw_only=True)
class Checked:
    low: int = 0
    high: int = 1

    def __attrs_post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")


@frozen(kw_only=True)
class Outer:
    inner: Checked = attrs.Factory(Checked)


def test_what_a_post_init_refuses_is_a_mistake_of_the_object():
    _, mistakes = structure({"inner": {"low": 3}}, Outer)
    assert [(m.path, m.problem) for m in mistakes] == [("inner", "low=3 is above high=1")]


def test_annotations_that_cannot_be_resolved_name_the_class():
    @frozen
    class Lost:
        x: NotImportedAnywhere  # noqa: F821

    with pytest.raises(ConfigError, match=r"Lost.*NotImportedAnywhere"):
        structure({}, Lost)


def test_the_reference_names_them():
    rows = {row.path: row for row in describe(Options)}
    assert rows["colour"].allowed == "one of red, green"
    assert rows["size"].type == "integer or one of auto"
    assert rows["maybe"].allowed == "number > 0 and < 1 or null"
    properties = json_schema(Options)["properties"]
    assert properties["mode"]["enum"] == ["fast", "exact"]
    assert properties["colour"]["enum"] == ["red", "green"]
    assert properties["by_name"]["additionalProperties"]["properties"]["rate"]["exclusiveMaximum"] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("? [a, b]\n: 1\n", "single word"),
        ("a:\n  <<: 3\n", "takes a mapping"),
        ("a: !!int x\n", "not a number"),
        ("[" * 2000, "not valid YAML"),
        ("a: " + "[" * 2000 + "]" * 2000, "nested too deeply"),
        (
            "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(7)),
            "more than 100,000 values",
        ),
    ],
    ids=["complex key", "merge", "tag", "open", "deep", "bomb"],
)
def test_hostile_yaml(text, words):
    _, _, mistakes = parse_yaml(text, "f")
    assert any(words in m.problem for m in mistakes) or (words == "not valid YAML" and mistakes)


def test_hostile_json():
    _, _, mistakes = parse_json("[" * 100_000 + "]" * 100_000, "f")
    assert [m.problem for m in mistakes] == ["nested too deeply"]


def test_plain_values_keep_their_kind(tmp_path: Path) -> Any:
    value, _, _ = parse_yaml("a: .inf\nb: -.INF\nc: 0o17\nd: !!str 5\ne: 'x'\nf: .nan\n", "f")
    assert (value["a"], value["b"], value["c"], value["d"], value["e"]) == (math.inf, -math.inf, 15, "5", "x")
    assert math.isnan(value["f"])


@frozen(kw_only=True)
class ClipOptions:
    clip: float = 0.2
    low: float = 0.1


@frozen(kw_only=True)
class Preset:
    """A class whose component has options of its own."""

    loss: ComponentChoice = component("losses", "clip", clip=0.3, low=0.1)


@pytest.mark.parametrize(
    ("given", "name", "options"),
    [
        ({}, "clip", {"clip": 0.3, "low": 0.1}),
        ("clip", "clip", {"clip": 0.3, "low": 0.1}),
        ({"options": {"low": 0.2}}, "clip", {"clip": 0.3, "low": 0.2}),
        ({"name": None, "options": None}, "clip", {"clip": 0.3, "low": 0.1}),
        ({"name": "clip", "options": {"low": 0.2}}, "clip", {"clip": 0.3, "low": 0.2}),
        ("other", "other", {}),
        ({"name": "other", "options": {"low": 0.2}}, "other", {"low": 0.2}),
        (ComponentChoice(name="clip", options={"low": 0.2}), "clip", {"low": 0.2}),  # built in Python: as it is
    ],
)
def test_options_are_laid_over_those_of_the_default_component(given, name, options):
    built, mistakes = structure({"loss": given} if given != {} else {}, Preset)
    assert mistakes == []
    assert (built.loss.name, built.loss.options) == (name, options)


def test_a_dump_without_defaults_gives_the_same_options_back():
    options = ClipOptions(clip=0.2, low=0.1)  # the class's defaults, and not the preset's
    built = Preset(loss=ComponentChoice(name="clip", options=options))
    dumped = to_dict(built, defaults=False)
    assert structure(dumped, Preset)[0].loss.options == {"clip": 0.2, "low": 0.1}
    assert to_dict(Preset(), defaults=False) == {}
