"""Round trips through plain data and YAML, difference, reference, schema and arithmetic."""

from __future__ import annotations

import collections
import enum
import json
import subprocess
import sys

import attrs
import pytest
import yaml
from attrs import frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl_core.config import arithmetic, describe, diff, finalize, json_schema, load_config, to_dict, to_yaml
from nemo_rl_core.config.describing.dump import NOT_SET
from nemo_rl_core.config.formats._yaml import parse_yaml
from nemo_rl_core.config.structure import structure
from nemo_rl_core.schema import (
    ComponentChoice,
    DatasetConfig,
    GenerationConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
    RunConfig,
)
from nemo_rl_core.schema import run as schema

words = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    [
        "yes",
        "1e-6",
        "0x1f",
        "null",
        "~",
        "- a",
        "a: b",
        "#x",
        "2024-01-01",
        "010",
        ".5",
        "1_0",
        "true",
        "",
        "\x85",
        "a\u2028b",
        "\r",
        "a\n b\n",
    ]
)
numbers = st.floats(min_value=0, max_value=1e12, allow_nan=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | words,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(words, children, max_size=3),
    max_leaves=6,
)


@st.composite
def configs(draw, cls):
    return cls(
        model=draw(words),
        learning_rate=draw(st.none() | numbers),
        seed=draw(st.integers()),
        num_prompts_per_step=draw(st.integers(1, 10**6)),
        policy=PolicyConfig(
            precision=draw(st.sampled_from(["float32", "bfloat16"])),
            max_grad_norm=draw(st.none() | st.floats(1e-9, 1e9)),
            optimizer=OptimizerConfig(
                lr=draw(numbers),
                betas=(draw(numbers), draw(numbers)),
                options=draw(st.dictionaries(words, plain, max_size=3)),
            ),
        ),
        generation=GenerationConfig(stop=tuple(draw(st.lists(words, max_size=3)))),
        rollouts=RolloutConfig(record=draw(st.booleans())),
        loss=ComponentChoice(name=draw(words), options=draw(st.dictionaries(words, plain, max_size=2))),
        plugins=draw(st.dictionaries(words, words, max_size=2)),
    )


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_configuration_survives_the_round_trip(toy, registry, tmp_path_factory, data):
    config = data.draw(configs(toy.Config))
    assert structure(to_dict(config), toy.Config) == (config, [])
    assert structure(json.loads(json.dumps(to_dict(config))), toy.Config) == (config, [])
    for text in (to_yaml(config), to_yaml(config, docs=True), to_yaml(config, defaults=False)):
        tree, _, mistakes = parse_yaml(text, "f")
        assert mistakes == []
        assert structure(tree, toy.Config) == (config, [])


def test_a_final_configuration_survives_the_round_trip(registry, toy):
    config = finalize(toy.Config(model="m", policy=PolicyConfig(options={"depth": 3})), resolver=registry)
    assert load_config(to_dict(config), resolver=registry) == config
    again = load_config(parse_yaml(to_yaml(config, docs=True, defaults=False), "f")[0], resolver=registry)
    assert finalize(again, resolver=registry) == config


def test_text_that_other_yaml_readers_take_for_something_else_is_quoted():
    text = to_yaml(GenerationConfig(stop=("yes", "1e-6", "010", "12:30", "null", "plain")))
    assert yaml.safe_load(text)["stop"] == ["yes", "1e-6", "010", "12:30", "null", "plain"]


class Colour(enum.Enum):
    RED = "red"


def test_python_objects_become_names():
    tree = to_dict(
        DatasetConfig(source=collections.OrderedDict, options={"f": json.dumps, "c": Colour.RED, "o": object()})
    )
    assert tree["source"] == "collections:OrderedDict"
    assert tree["options"] == {"f": "json:dumps", "c": "red", "o": "<builtins.object>"}
    assert to_dict(DatasetConfig(source=lambda: 1))["source"].startswith("<")


def test_without_defaults_only_changes_are_left(toy):
    assert to_dict(toy.Config(model="m", policy=PolicyConfig(num_workers=2)), defaults=False) == {
        "algorithm": "toy",
        "model": "m",
        "policy": {"num_workers": 2},
    }
    assert to_yaml(PolicyConfig(), defaults=False) == "{}\n"


def test_diff_names_each_setting(toy):
    left = toy.Config(model="a", generation=GenerationConfig(stop=("x",)), cluster=schema.ClusterConfig(roles={"p": 1}))
    right = attrs.evolve(left, model="b", generation=GenerationConfig(stop=("x", "y")), cluster=schema.ClusterConfig())
    assert [(d.path, d.left, d.right) for d in diff(left, right)] == [
        ("model", "a", "b"),
        ("generation.stop", ["x"], ["x", "y"]),
        ("cluster.roles.p", 1, NOT_SET),
        ("cluster.roles", NOT_SET, {}),
    ]
    assert diff(left, left) == []
    assert [d.path for d in diff({"a": 1}, {"a": True})] == ["a"]


SCHEMA_CLASSES = [getattr(schema, name) for name in schema.__all__ if isinstance(getattr(schema, name), type)]


@pytest.mark.parametrize("cls", SCHEMA_CLASSES, ids=lambda c: c.__name__)
def test_every_setting_is_documented(cls):
    assert [row.path for row in describe(cls) if not row.doc] == []


def test_rows_of_the_reference(toy):
    rows = {row.path: row for row in describe(toy.Config)}
    assert rows["policy.num_workers"].allowed == "integer >= 1"
    assert rows["policy.num_workers"].default == 1
    assert rows["policy.max_grad_norm"].allowed == "number > 0 or null"
    assert rows["policy.scheduler.name"].type == "one of constant, linear, cosine"
    assert rows["rollouts.reward_timeout_s"].unit == "seconds"
    assert rows["generation.max_new_tokens"].unit == "tokens"
    assert rows["loss"].type == "one of the losses"
    assert rows["loss"].default == "clip"
    assert rows["logging.loggers"].type == "list of loggers"
    assert rows["generation.top_p"].allowed == "number > 0 and <= 1"
    assert rows["generation.stop"].type == "list of text"
    assert rows["num_prompts_per_step"].doc == "Prompts of one step."
    assert rows["data.validation"].default is None
    assert "data.validation.source" in rows


@frozen(kw_only=True)
class Required:
    size: int
    """A size."""


def test_a_setting_without_a_default_is_required():
    assert describe(Required)[0].default == "(required)"
    assert json_schema(Required)["required"] == ["size"]
    _, mistakes = structure({}, Required)
    assert [(m.path, m.problem, m.allowed) for m in mistakes] == [
        ("size", "this setting is missing", "integer (A size)")
    ]


def test_json_schema_says_what_loading_allows(toy):
    found = json_schema(toy.Config)
    assert found["additionalProperties"] is False
    policy = found["properties"]["policy"]["properties"]
    assert policy["num_workers"] == {
        "description": "Number of processes, one per device, that train the model.",
        "type": "integer",
        "minimum": 1,
        "default": 1,
    }
    assert policy["precision"]["enum"] == ["float32", "bfloat16"]
    assert policy["max_grad_norm"]["anyOf"] == [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]
    assert found["properties"]["loss"]["default"] == "clip"
    json.dumps(found)


def test_arithmetic_worked_by_hand(toy):
    config = toy.Config(
        max_steps=10,
        num_prompts_per_step=8,
        num_generations_per_prompt=6,
        updates_per_step=2,
        generation=GenerationConfig(max_new_tokens=100),
        policy=PolicyConfig(
            num_workers=4, tensor_parallel_size=2, max_sequence_length=300, max_tokens_per_microbatch=1000
        ),
    )
    rows = {row.quantity: row.value for row in arithmetic(config)}
    assert rows == {
        "prompts per step": 8,
        "rollouts per step": 48,
        "rollouts per optimizer step": 24,
        "tokens per step, at most": 48 * 300,
        "new tokens per step, at most": 48 * 100,
        "model replicas": 2,
        "rollouts per replica and optimizer step": 12,
        "micro-batches per optimizer step, at most": 4,  # 3 sequences of 300 tokens in 1000
        "tokens per micro-batch, at most": 1000,
        "steps of the run, at most": 10,
        "optimizer steps of the run, at most": 20,
        "prompts of the run, at most": 80,
    }


def test_importing_the_classes_is_light():
    code = (
        "import sys, nemo_rl_core.config; "
        "print([m for m in ('torch', 'transformers', 'cattrs', 'yaml', 'typer') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_every_public_name_is_there():
    import nemo_rl_core.config as config

    assert [name for name in config.__all__ if not hasattr(config, name)] == []
    assert callable(config.arithmetic)
    assert callable(config.describe)
    with pytest.raises(AttributeError, match="nothing"):
        _ = config.nothing


def test_run_config_alone_knows_no_step():
    with pytest.raises(NotImplementedError, match="num_items_per_step"):
        _ = RunConfig().num_items_per_step
