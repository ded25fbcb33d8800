"""`nemo-rl config` with the real registry: what it prints and how it exits."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from nemo_rl_core.cli.config import app
from nemo_rl_core.config import load_config
from nemo_rl_core.config.formats._yaml import parse_yaml
from nemo_rl_core.registry import get_registry
from nemo_rl_core.schema import InvalidConfig

YAML = """\
algorithm: toy_of_cli
model: m
max_steps: 3
policy:
  backend: plain_of_cli
  options: {depth: 3}
generation: {backend: plain_of_cli}
loss: clip_of_cli
"""


class Dynamic:
    """A component whose members cannot be told from its class, so that the registry takes it as it is."""

    def __getattr__(self, name):
        raise AttributeError(name)


@pytest.fixture(autouse=True)
def registered(toy):
    """The toy algorithm and what it chooses, as user code registers them."""
    registry = get_registry()

    def made_of(config_class):
        return type("Component", (Dynamic,), {"config_class": config_class, "__module__": __name__})

    components = {
        ("algorithms", "toy_of_cli"): made_of(toy.Config),
        ("training_backends", "plain_of_cli"): made_of(toy.BackendOptions),
        ("generation_backends", "plain_of_cli"): made_of(toy.BackendOptions),
        ("losses", "clip_of_cli"): made_of(toy.LossOptions),
    }
    for (kind, name), component in components.items():
        registry.register(kind, name, component)
    yield
    for kind, name in components:
        registry.unregister(kind, name)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def test_a_valid_file(file):
    result = invoke("validate", file)
    assert (result.exit_code, "is valid" in result.output) == (0, True)
    result = invoke("validate", file, "--json")
    assert json.loads(result.stdout) == {"valid": True, "algorithm": "toy_of_cli", "mistakes": []}


def test_mistakes_for_a_program(file):
    result = invoke("validate", file, "seed=x", "policy.options.dept=1", "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert found["valid"] is False
    assert [(m["path"], m["file"], m["suggestion"]) for m in found["mistakes"]] == [
        ("seed", "command line", None),
        ("policy.options.dept", "command line", "depth"),
    ]


def test_mistakes_for_a_person_reach_the_error_boundary(file):
    result = invoke("validate", file, "seed=x")
    assert isinstance(result.exception, InvalidConfig)


def test_show_prints_what_loads_back(file):
    for docs in ([], ["--docs"]):
        result = invoke("show", file, "num_prompts_per_step=2", *docs)
        assert result.exit_code == 0
        tree, _, mistakes = parse_yaml(result.stdout, "out")
        assert mistakes == []
        assert load_config(tree).num_prompts_per_step == 2
        assert "rollouts per step" in result.stdout
    assert "# Number of processes, one per device, that train the model." in invoke("show", file, "--docs").stdout


def test_show_as_json_holds_the_arithmetic(file):
    found = json.loads(invoke("show", file, "--format", "json", "--changed").stdout)
    assert found["config"]["policy"]["options"] == {"depth": 3}
    assert found["arithmetic"][1] == {
        "quantity": "rollouts per step",
        "value": 32,
        "unit": "rollouts",
        "why": "8 prompts x 4 each",
    }


def test_diff(file, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("extends: run.yaml\nseed: 7\n")
    result = invoke("diff", file, other, "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (1, [{"path": "seed", "left": 42, "right": 7}])
    result = invoke("diff", file, other)
    assert (result.exit_code, "seed" in result.stdout, "42" in result.stdout) == (1, True, True)
    assert invoke("diff", file, file).exit_code == 0


def test_schema_of_an_algorithm_a_component_and_every_run():
    assert "num_prompts_per_step" in json.loads(invoke("schema", "--algorithm", "toy_of_cli").stdout)["properties"]
    found = json.loads(invoke("schema", "--kind", "losses", "--name", "clip_of_cli").stdout)
    assert found["properties"]["clip"]["exclusiveMinimum"] == 0
    assert "policy" in json.loads(invoke("schema").stdout)["properties"]
    assert "together" in str(invoke("schema", "--kind", "losses").exception)
    assert "not both" in str(invoke("schema", "--algorithm", "toy_of_cli", "--kind", "losses").exception)
