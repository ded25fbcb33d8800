"""YAML, JSON, TOML, mappings and Python say the same; files extend files; overrides win."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_rl_core.config import load_config
from nemo_rl_core.config.formats._yaml import parse_scalar, parse_yaml
from nemo_rl_core.schema import ComponentChoice, InvalidConfig, OptimizerConfig, PolicyConfig

YAML = """
algorithm: toy
model: tiny            # a shorthand
max_steps: 5
num_prompts_per_step: 16
policy:
  optimizer: {lr: 1e-5, betas: [0.9, 0.95]}
  options: {depth: 3}
generation: {stop: ["\\n", "</s>"]}
loss: {name: clip, options: {clip: 0.3}}
logging: {loggers: [lines]}
cluster: {roles: {policy: 2}}
"""
TREE = {
    "algorithm": "toy",
    "model": "tiny",
    "max_steps": 5,
    "num_prompts_per_step": 16,
    "policy": {"optimizer": {"lr": 1e-5, "betas": [0.9, 0.95]}, "options": {"depth": 3}},
    "generation": {"stop": ["\n", "</s>"]},
    "loss": {"name": "clip", "options": {"clip": 0.3}},
    "logging": {"loggers": ["lines"]},
    "cluster": {"roles": {"policy": 2}},
}
TOML = """
algorithm = "toy"
model = "tiny"
max_steps = 5
num_prompts_per_step = 16
generation.stop = ["\\n", "</s>"]
logging.loggers = ["lines"]
[policy.optimizer]
lr = 1e-5
betas = [0.9, 0.95]
[policy.options]
depth = 3
[loss]
name = "clip"
options = { clip = 0.3 }
[cluster.roles]
policy = 2
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_all_forms_are_equal(tmp_path, registry, toy):
    python = toy.Config(
        model="tiny",
        max_steps=5,
        num_prompts_per_step=16,
        policy=PolicyConfig(optimizer=OptimizerConfig(lr=1e-5, betas=(0.9, 0.95)), options=toy.BackendOptions(depth=3)),
        generation={"stop": ["\n", "</s>"]},
        loss=ComponentChoice(name="clip", options=toy.LossOptions(clip=0.3)),
        logging={"loggers": ["lines"]},
        cluster={"roles": {"policy": 2}},
    )
    sources = [
        write(tmp_path, "a.yaml", YAML),
        write(tmp_path, "a.json", json.dumps(TREE, indent=2)),
        str(write(tmp_path, "a.toml", TOML)),
        TREE,
        python,
    ]
    configs = [load_config(source, resolver=registry) for source in sources]
    assert all(config == configs[0] for config in configs)
    assert type(configs[0]) is toy.Config
    assert configs[0].policy.optimizer.betas == (0.9, 0.95)
    assert configs[0].policy.options == toy.BackendOptions(depth=3)
    assert configs[0].loss.options == toy.LossOptions(clip=0.3)


def test_overrides_equal_values_in_the_file(registry):
    base = {"algorithm": "toy", "model": "tiny"}
    text = [
        "max_steps=5",
        "num_prompts_per_step=16",
        "policy.optimizer.lr=1e-5",
        "policy.optimizer.betas=[0.9, 0.95]",
        "policy.options={depth: 3}",
        r'generation.stop=["\n", "</s>"]',
        "loss.options.clip=0.3",
        "logging.loggers=[lines]",
        "cluster.roles.policy=2",
    ]
    code = {
        "max_steps": 5,
        "num_prompts_per_step": 16,
        "policy.optimizer": {"lr": 1e-5, "betas": (0.9, 0.95)},
        "policy.options.depth": 3,
        "generation.stop": ["\n", "</s>"],
        "loss": ComponentChoice(name="clip", options={"clip": 0.3}),
        "logging.loggers": ["lines"],
        "cluster": {"roles": {"policy": 2}},
    }
    expected = load_config(TREE, resolver=registry)
    assert load_config(base, overrides=text, resolver=registry) == expected
    assert load_config(base, overrides=code, resolver=registry) == expected


def test_an_empty_override_is_null(registry):
    config = load_config(TREE, overrides=["policy.max_grad_norm="], resolver=registry)
    assert config.policy.max_grad_norm is None


def test_an_override_changes_one_item_of_a_list(registry):
    config = load_config(TREE, overrides=["generation.stop.1=END"], resolver=registry)
    assert config.generation.stop == ("\n", "END")


def test_overrides_on_a_configuration_built_in_python(registry, toy):
    config = toy.Config(model="tiny", policy=PolicyConfig(num_workers=2))
    changed = load_config(config, overrides={"policy.tensor_parallel_size": 2}, resolver=registry)
    assert (changed.policy.num_workers, changed.policy.tensor_parallel_size) == (2, 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-0.25", -0.25),
        ("3", 3),
        ("010", 10),
        ("0x10", 16),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("~", None),
        ("", None),
        ("'1e-6'", "1e-6"),
        ("[1, a]", [1, "a"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = parse_scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_yaml_merge_keys_give_way_to_own_keys():
    text = "base: &b\n  x: 1\n  y: 1\nown:\n  y: 2\n  <<: *b\n"
    value, positions, mistakes = parse_yaml(text, "f")
    assert value["own"] == {"x": 1, "y": 2}
    assert (positions["own", "y"].line, positions["own", "x"].line) == (5, 2)
    assert mistakes == []


def test_extends_merges_and_the_later_wins(tmp_path, registry):
    (tmp_path / "base").mkdir()
    write(
        tmp_path / "base",
        "a.yaml",
        "algorithm: toy\nmodel: one\nseed: 1\npolicy: {num_workers: 4, options: {depth: 5}}",
    )
    write(tmp_path / "base", "b.json", '{"seed": 2, "extends": "a.yaml", "policy": {"num_workers": 2}}')
    write(tmp_path, "c.toml", "max_steps = 3")
    top = write(tmp_path, "top.yaml", "extends: [base/b.json, c.toml]\nname: top\npolicy: {options: {mode: graph}}")
    config = load_config(top, resolver=registry)
    assert (config.seed, config.max_steps, config.name, config.model) == (2, 3, "top", "one")
    assert config.policy.num_workers == 2
    assert (config.policy.options.depth, config.policy.options.mode) == (5, "graph")


def test_extends_in_a_mapping_starts_from_the_current_folder(tmp_path, registry, monkeypatch):
    write(tmp_path, "a.yaml", "algorithm: toy\nmodel: one")
    monkeypatch.chdir(tmp_path)
    assert load_config({"extends": "a.yaml", "seed": 7}, resolver=registry).model == "one"


def test_another_component_drops_the_options_of_the_former(tmp_path, registry):
    write(tmp_path, "a.yaml", "algorithm: toy\nmodel: m\nloss: {name: clip, options: {clip: 0.5}}")
    top = write(tmp_path, "b.yaml", "extends: a.yaml\nloss: {name: other}")
    assert load_config(top, resolver=registry).loss == ComponentChoice(name="other", options={})
    same = load_config(tmp_path / "a.yaml", overrides=["loss.name=clip"], resolver=registry)
    assert same.loss.options.clip == 0.5
    bare = load_config(
        {"algorithm": "toy", "model": "m", "loss": "clip"}, overrides=["loss.options.clip=0.7"], resolver=registry
    )
    assert (bare.loss.name, bare.loss.options.clip) == ("clip", 0.7)


def test_a_later_shorthand_wins_over_an_earlier_long_form(tmp_path, registry):
    write(tmp_path, "a.yaml", "algorithm: toy\npolicy: {model_name: one, optimizer: {lr: 1e-4}}")
    top = write(tmp_path, "b.yaml", "extends: a.yaml\nmodel: two\nlearning_rate: 2e-4")
    config = load_config(top, resolver=registry)
    assert (config.model, config.policy.model_name) == ("two", None)
    again = load_config(top, overrides=["policy.model_name=three"], resolver=registry)
    assert (again.model, again.policy.model_name) == (None, "three")


def test_a_byte_order_mark_and_unicode_are_read(tmp_path, registry):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfalgorithm: toy\nmodel: m\nname: \xc3\xbcber\n")
    assert load_config(path, resolver=registry).name == "über"


def test_json_escapes_and_lines(tmp_path, registry):
    path = write(tmp_path, "a.json", '{"algorithm": "toy",\n\t"model": "\\ud83d\\ude00\\/",\n"seed": "x"}')
    with pytest.raises(InvalidConfig) as caught:
        load_config(path, resolver=registry)
    assert [(m.path, m.position.line) for m in caught.value.mistakes] == [("seed", 3)]


def test_config_class_takes_the_place_of_the_algorithm(registry, toy):
    config = load_config({"model": "m"}, config_class=toy.Config, resolver=registry)
    assert config == load_config({"algorithm": "toy", "model": "m"}, resolver=registry)
