"""Every kind of mistake: all at once, each with its path, place, value, what is allowed and the fix."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from nemo_rl_core.config import load_config, to_dict
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.schema import GenerationConfig, InvalidConfig, PolicyConfig, RunConfig
from nemo_rl_core.schema.mistakes import suggest

GOOD = {"algorithm": "toy", "model": "m"}


def mistakes_of(source, registry, **options):
    with pytest.raises(InvalidConfig) as caught:
        load_config(source, resolver=registry, **options)
    return caught.value.mistakes


def one(source, registry, **options):
    found = mistakes_of(source, registry, **options)
    assert len(found) == 1, [m.render() for m in found]
    return found[0]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# -- values --------------------------------------------------------------------------------------------------


def test_an_unknown_key_names_the_one_that_was_meant(registry):
    m = one({**GOOD, "policy": {"num_worker": 2}}, registry)
    assert (m.path, m.problem, m.suggestion) == ("policy.num_worker", "unknown key", "num_workers")


def test_an_unknown_key_like_no_other_lists_what_there_is(registry):
    m = one({**GOOD, "data": {"zzz": 1}}, registry)
    assert m.suggestion is None
    assert "train, validation, shuffle" in m.allowed


@pytest.mark.parametrize(
    ("tree", "path", "problem", "fix"),
    [
        ({"seed": 4.7}, "seed", "expected integer, found 4.7", None),
        ({"seed": 1e3}, "seed", "expected integer, found 1000.0", "Write 1000."),
        ({"seed": True}, "seed", "expected integer, found true", None),
        ({"seed": "3"}, "seed", "expected integer, found '3'", "Write 3 without quotes."),
        ({"seed": None}, "seed", "expected integer, found null", None),
        ({"learning_rate": "1e-5"}, "learning_rate", "expected number, found '1e-5'", "Write 1e-5 without quotes."),
        ({"name": 12}, "name", "expected text, found 12", "Quote it: '12'."),
        (
            {"data": {"shuffle": "false"}},
            "data.shuffle",
            "expected true or false, found 'false'",
            "Write false, without quotes.",
        ),
        ({"data": {"shuffle": 0}}, "data.shuffle", "expected true or false, found 0", None),
        (
            {"data": {"shuffle": "yes"}},
            "data.shuffle",
            "expected true or false, found 'yes'",
            "Write true, without quotes.",
        ),
        (
            {"generation": {"stop": "END"}},
            "generation.stop",
            "expected list of text, found 'END'",
            "Write a list: [END].",
        ),
        ({"generation": {"stop": ["a", 1]}}, "generation.stop[1]", "expected text, found 1", "Quote it: '1'."),
        (
            {"policy": {"optimizer": {"betas": [0.9]}}},
            "policy.optimizer.betas",
            "expected 2 values, found 1: [0.9]",
            None,
        ),
        ({"policy": 3}, "policy", "expected a mapping of settings, found 3", None),
        ({"cluster": {"roles": {"policy": "x"}}}, "cluster.roles.policy", "expected integer, found 'x'", None),
        ({"cluster": {"roles": [1]}}, "cluster.roles", "expected mapping of text to integer, found [1]", None),
        ({"policy": {"num_workers": 0}}, "policy.num_workers", "must be >= 1, found 0", None),
        ({"generation": {"top_p": 1.5}}, "generation.top_p", "must be <= 1, found 1.5", None),
        ({"generation": {"top_p": float("nan")}}, "generation.top_p", "must be > 0, found nan", None),
        ({"policy": {"max_grad_norm": 0}}, "policy.max_grad_norm", "must be > 0, found 0.0", None),
        ({"loss": {"options": {"clip": -1}}}, "loss.options.clip", "must be > 0, found -1.0", None),
        ({"loss": 3}, "loss", "expected a component, found 3", "Write its name, or {name: ..., options: {...}}."),
        ({"policy": {"options": {"depth": 0}}}, "policy.options.depth", "must be >= 1, found 0", None),
        ({"policy": {"options": [1]}}, "policy.options", "expected a mapping of settings, found [1]", None),
    ],
)
def test_values_that_do_not_fit(registry, tree, path, problem, fix):
    m = one({**GOOD, **tree}, registry)
    assert (m.path, m.problem, m.fix) == (path, problem, fix)


def test_what_is_allowed_says_type_range_and_meaning(registry):
    m = one({**GOOD, "rollouts": {"environment_timeout_s": 0}}, registry)
    assert m.allowed == "number > 0 (Seconds that one reset or step of an environment may take)"
    m = one({**GOOD, "policy": {"max_grad_norm": "x"}}, registry)
    assert m.allowed.startswith("number > 0 or null")


def test_a_wrong_choice_names_the_right_ones(registry):
    m = one({**GOOD, "policy": {"precision": "bfloat"}}, registry)
    assert m.suggestion == "bfloat16"
    assert m.allowed.startswith("one of float32, bfloat16")


def test_an_integer_is_a_number_and_a_list_is_a_tuple(registry):
    config = load_config({**GOOD, "learning_rate": 1, "generation": {"stop": ["a"]}}, resolver=registry)
    assert config.learning_rate == 1.0
    assert type(config.learning_rate) is float
    assert config.generation.stop == ("a",)


# -- components ------------------------------------------------------------------------------------------------


def test_options_are_those_of_the_chosen_component(registry):
    tree = {
        **GOOD,
        "policy": {"options": {"dept": 1, "mode": "grap"}},
        "environment": {"name": "maze", "options": {"x": 1}},
    }
    found = mistakes_of(tree, registry)
    assert {m.path: m.suggestion for m in found} == {
        "policy.options.dept": "depth",
        "policy.options.mode": "graph",
        "environment.options.x": None,
    }


def test_a_component_without_a_class_takes_any_options(registry):
    config = load_config({**GOOD, "environment": {"name": "shop", "options": {"x": [1]}}}, resolver=registry)
    assert config.environment.options == {"x": [1]}


def test_unknown_components_join_the_list(registry):
    tree = {
        **GOOD,
        "policy": {"backend": "plian"},
        "loss": "clp",
        "seed": "x",
        "logging": {"loggers": ["lines", "nope"]},
    }
    found = {m.path: m for m in mistakes_of(tree, registry)}
    assert set(found) == {"policy.backend", "loss.name", "seed", "logging.loggers[1].name"}
    assert found["policy.backend"].suggestion == "plain"
    assert found["loss.name"].suggestion == "clip"
    assert found["loss.name"].problem == "No losses named 'clp'"


def test_a_broken_component_is_a_mistake_only_where_it_is_chosen(registry):
    m = one({**GOOD, "generation": {"backend": "broken"}}, registry)
    assert (m.path, m.problem) == ("generation.backend", "broken 1.0 fails to import: no libfoo")
    load_config(GOOD, resolver=registry)


def test_only_plugin_errors_give_their_exit_code(registry):
    with pytest.raises(InvalidConfig) as caught:
        load_config({**GOOD, "loss": "clp"}, resolver=registry)
    assert caught.value.exit_code == 3
    with pytest.raises(InvalidConfig) as caught:
        load_config({**GOOD, "loss": "clp", "seed": "x"}, resolver=registry)
    assert caught.value.exit_code == 2


def test_options_without_a_component(registry):
    m = one({**GOOD, "reward": {"options": {"x": 1}}}, registry)
    assert m.path == "reward.options"
    m = one({**GOOD, "environment": {"options": {"x": 1}}}, registry)
    assert (m.path, m.problem) == ("environment.name", "Two environments are installed.")


def test_data_is_not_taken_for_a_component(registry):
    for source in ("data/train.jsonl", "openai/gsm8k", "squad", [{"prompt": "1"}]):
        config = load_config(
            {**GOOD, "data": {"train": {"source": source, "options": {"split": "x"}}}}, resolver=registry
        )
        assert config.data.train.options == {"split": "x"}
    m = one({**GOOD, "data": {"train": {"source": "jsonl", "options": {"split": "x"}}}}, registry)
    assert m.path == "data.train.options.split"


def test_unknown_algorithm(registry):
    m = one({"algorithm": "toyy", "model": "m", "num_prompts_per_step": 1}, registry)
    assert (m.path, m.suggestion) == ("algorithm", "toy")
    found = mistakes_of({"algoritm": "toy", "model": "m", "seed": "x"}, registry)
    assert [m.path for m in found] == ["algorithm", "seed"]
    assert "algoritm" in found[0].problem
    assert found[0].allowed == "toy, toy2"


def test_two_algorithms_may_share_a_class(registry, toy):
    config = load_config({**GOOD, "algorithm": "toy2"}, resolver=registry)
    assert (type(config), config.algorithm) == (toy.Config, "toy2")
    assert load_config(config, overrides=["seed=1"], resolver=registry).algorithm == "toy2"
    assert load_config(to_dict(config), config_class=toy.Config, resolver=registry) == config


def test_the_class_given_must_agree_with_the_algorithm(registry, toy):
    m = one({"algorithm": "other", "model": "m"}, registry, config_class=toy.Config)
    assert (m.path, m.fix) == ("algorithm", "Write `algorithm: toy`.")


# -- files -----------------------------------------------------------------------------------------------------


def test_mistakes_of_two_files_and_the_command_line_at_once(tmp_path, registry):
    base = write(tmp_path, "base.yaml", "algorithm: toy\nseed: yes\npolicy:\n  num_workers: 0\n  precision: float32\n")
    top = write(tmp_path, "top.json", '{"extends": "base.yaml",\n "modle": "m",\n "policy": {\n  "precision": "half"}}')
    found = mistakes_of(top, registry, overrides=["rollouts.max_turns=0", "nonsense", "polcy.x=1"])
    assert {(m.path, str(m.position)) for m in found} == {
        ("modle", f"{top}:2"),
        ("policy.precision", f"{top}:4"),
        ("seed", f"{base}:2"),
        ("policy.num_workers", f"{base}:4"),
        ("rollouts.max_turns", "command line"),
        ("", "command line"),
        ("polcy", "command line"),
    }
    assert [m.position.source for m in found][-3:] == ["command line"] * 3


def test_toml_lines(tmp_path, registry):
    text = (
        'algorithm = "toy"\nmodel = "m"\n\n[policy]\nnum_workers = 0\noptimizer.lr = "x"\n'
        '[[data.zzz]]\nnote = """\n[generation]\n"""\n'
    )
    found = mistakes_of(write(tmp_path, "a.toml", text), registry)
    assert [(m.path, m.position.line) for m in found] == [
        ("policy.num_workers", 5),
        ("policy.optimizer.lr", 6),
        ("data.zzz", 7),
    ]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.yaml", "algorithm: toy\nseed: 1\nmodel: m\nseed: 2\n", 4),
        ("a.json", '{"algorithm": "toy", "model": "m",\n"seed": 1,\n"seed": 2}', 3),
        ("a.toml", 'algorithm = "toy"\nmodel = "m"\nseed = 1\nseed = 2\n', 4),
    ],
)
def test_a_key_written_twice(tmp_path, registry, name, text, line):
    m = one(write(tmp_path, name, text), registry)
    assert m.position.line == line
    if name != "a.toml":
        assert m.path == "seed"
        assert f"line {line - 2 if name == 'a.yaml' else line - 1}" in m.problem


@pytest.mark.parametrize(
    ("name", "text", "line", "words"),
    [
        ("a.yaml", "algorithm: toy\nmodel: [a, b\nseed: 1\n", 3, "not valid YAML"),
        ("a.yaml", "algorithm: toy\n\tseed: 1\n", 2, "not valid YAML"),
        ("a.yaml", "algorithm: toy\nseed: !!python/object:os.system 1\n", 2, "not supported"),
        ("a.yaml", "a: &a [*a]\n", 1, "alias contains itself"),
        ("a.json", '{"algorithm": "toy",\n "seed": 1,}', 2, "not valid JSON"),
        ("a.toml", 'algorithm = "toy"\nseed = \n', 2, "not valid TOML"),
        ("a.yaml", "- a\n- b\n", 1, "a configuration is a mapping"),
        ("a.yaml", "algorithm: toy\n---\nseed: 1\n", 2, "not valid YAML"),
    ],
)
def test_bad_syntax_names_the_line(tmp_path, registry, name, text, line, words):
    path = write(tmp_path, name, text)
    found = mistakes_of(path, registry)
    assert [(str(m.position), words in m.problem) for m in found if words in m.problem] == [(f"{path}:{line}", True)]


def test_files_that_cannot_be_read(tmp_path, registry):
    assert "does not exist" in one(tmp_path / "no.yaml", registry).problem
    assert "folder" in one(tmp_path, registry).problem
    assert "unknown file type '.cfg'" in one(write(tmp_path, "a.cfg", ""), registry).problem
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"algorithm: \xff\xfe")
    assert "UTF-8" in one(binary, registry).problem
    nul = tmp_path / "n.yaml"
    nul.write_bytes(b"algorithm: \x00")
    assert "not valid YAML" in one(nul, registry).problem


def test_a_file_the_system_refuses(tmp_path, registry):
    path = write(tmp_path, "a.yaml", "algorithm: toy") / "b.yaml"
    assert one(path, registry).problem == "the file cannot be read: Not a directory"


def test_an_empty_file_lacks_everything(tmp_path, registry):
    assert [m.path for m in mistakes_of(write(tmp_path, "a.yaml", ""), registry)] == ["algorithm"]


def test_extends_in_a_circle(tmp_path, registry, monkeypatch):
    write(tmp_path, "a.yaml", "algorithm: toy\nmodel: m\nextends: b.yaml")
    write(tmp_path, "b.yaml", "seed: 1\nextends: c.yaml")
    write(tmp_path, "c.yaml", "extends: a.yaml")
    monkeypatch.chdir(tmp_path)
    m = one("a.yaml", registry)
    assert "a.yaml -> b.yaml -> c.yaml -> a.yaml" in m.problem
    assert str(m.position) == "c.yaml:1"


def test_a_base_that_is_missing_or_broken_does_not_hide_the_rest(tmp_path, registry):
    top = write(tmp_path, "a.yaml", "algorithm: toy\nextends: [no.yaml, bad.yaml]\nseed: x\n")
    bad = write(tmp_path, "bad.yaml", "model: [\n")
    found = mistakes_of(top, registry)
    assert [(m.path, str(m.position)) for m in found] == [
        ("extends", f"{top}:2"),
        ("seed", f"{top}:3"),
        ("", f"{bad}:2"),
    ]


def test_extends_of_a_wrong_type(tmp_path, registry):
    m = one(write(tmp_path, "a.yaml", "algorithm: toy\nmodel: m\nextends: {a: 1}\n"), registry)
    assert (m.path, m.position.line) == ("extends", 3)


# -- the error itself ------------------------------------------------------------------------------------------


def test_the_message_is_compact_and_complete(tmp_path, registry):
    path = write(tmp_path, "run.yaml", "algorithm: toy\nmodel: m\npolcy: {}\npolicy:\n  num_workers: 0\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, resolver=registry)
    assert str(caught.value) == (
        "2 mistakes in the configuration:\n"
        "\n"
        f"  polcy  ({path}:3)\n"
        "      unknown key; did you mean `policy`?\n"
        "      fix: Write `policy`, or remove it.\n"
        "\n"
        f"  policy.num_workers  ({path}:5)\n"
        "      must be >= 1, found 0\n"
        "      allowed: integer >= 1 (Number of processes, one per device, that train the model)"
    )


def test_the_error_crosses_processes(registry):
    with pytest.raises(InvalidConfig) as caught:
        load_config({**GOOD, "loss": "clp"}, resolver=registry)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.mistakes == caught.value.mistakes
    assert copy.exit_code == caught.value.exit_code


def test_mistakes_as_plain_data(tmp_path, registry):
    path = write(tmp_path, "a.yaml", "algorithm: toy\nmodel: m\nsede: 1\n")
    assert one(path, registry).as_dict() == {
        "path": "sede",
        "file": str(path),
        "line": 3,
        "problem": "unknown key",
        "allowed": None,
        "suggestion": "seed",
        "fix": "Write `seed`, or remove it.",
    }


def test_classes_built_in_python_say_what_is_wrong():
    with pytest.raises(ConfigError, match=r"^num_workers must be >= 1, found 0\.$"):
        PolicyConfig(num_workers=0)
    with pytest.raises(ConfigError, match=r"^top_p must be <= 1, found 2\.$"):
        GenerationConfig(top_p=2)
    with pytest.raises(ConfigError, match=r"^max_steps must be >= 1, found '3'\.$"):
        RunConfig(max_steps="3")


def test_a_source_of_a_wrong_type(registry):
    with pytest.raises(ConfigError, match="found int"):
        load_config(3, resolver=registry)


def test_suggestions():
    assert suggest("Max-Steps", ["max_steps", "seed"]) == "max_steps"
    assert suggest("xyz", ["max_steps"]) is None
