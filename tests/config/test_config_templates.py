"""Every template of an installed algorithm is a configuration that a run could start from."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from nemo_rl_core.cli.config import app
from nemo_rl_core.config import load_config
from nemo_rl_core.config.formats._yaml import parse_yaml
from nemo_rl_core.config.templates import config_template, config_templates
from nemo_rl_core.errors import ConfigError, PluginNotFound
from nemo_rl_core.registry import get_registry

TEMPLATES = config_templates()
SHIPPED = sorted(
    ref.name for ref in get_registry().entries("algorithms") if (ref.distribution or "").startswith("nemo-rl-")
)
BY_ALGORITHM = {
    name: [t for t in TEMPLATES if t.algorithm == name] for name in sorted({t.algorithm for t in TEMPLATES})
}


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: f"{t.algorithm}-{t.name}")
def test_a_template_is_valid(template, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_rewards.py").write_text("def score(response, answer):\n    return float(answer in response)\n")
    out = tmp_path / "run.yaml"
    written = invoke("new", template.algorithm, "--template", template.name, "--out", out)
    assert written.exit_code == 0, written.output
    checked = invoke("validate", out)
    assert checked.exit_code == 0, f"{checked.output}\n{checked.exception}"
    assert load_config(out).algorithm == template.algorithm
    assert template.summary and len(template.summary) < 120


@pytest.mark.parametrize("algorithm", SHIPPED)
def test_every_algorithm_of_ours_has_five_templates_and_a_default(algorithm):
    names = [template.name for template in BY_ALGORITHM[algorithm]]
    assert len(names) >= 5 and names[0] == "default"
    assert "lora" in names and "multi_gpu" in names


def test_the_default_is_printed_as_it_is():
    found = invoke("new", "grpo")
    assert found.exit_code == 0 and found.output == config_template("grpo").text
    tree = parse_yaml(found.output, "x.yaml")
    assert tree


def test_a_file_is_not_overwritten_unasked(tmp_path):
    out = tmp_path / "deep" / "run.yaml"
    assert invoke("new", "sft", "-o", out).exit_code == 0
    with pytest.raises(ConfigError, match=r"run.yaml exists. Name another file, or replace it with --overwrite"):
        CliRunner().invoke(app, ["new", "sft", "-o", str(out)], catch_exceptions=False)
    assert invoke("new", "sft", "-t", "lora", "-o", out, "--overwrite").exit_code == 0
    assert out.read_text() == config_template("sft", "lora").text


def test_the_list_names_algorithm_template_and_purpose():
    found = invoke("templates", "sft").output.splitlines()
    assert found[0].startswith("sft default") and "Chats from a file" in found[0]
    rows = json.loads(invoke("templates", "--json").output)
    assert {"grpo", "sft"} <= {row["algorithm"] for row in rows}


def test_unknown_names_are_told_with_what_there_is():
    with pytest.raises(ConfigError, match=r"'grpo' has no template 'lorra'. Did you mean 'lora'\?"):
        config_template("grpo", "lorra")
    with pytest.raises(ConfigError, match=r"has no template 'zzz'. It has: default, "):
        config_template("grpo", "zzz")
    with pytest.raises(PluginNotFound):
        config_template("gpro")


def test_user_code_and_packages_without_templates_have_none():
    from nemo_rl_plugins_sft.algorithm import SFT

    class Mine(SFT):
        pass

    get_registry().register("algorithms", "mine_without_templates", Mine)
    try:
        assert config_templates("mine_without_templates") == []
        with pytest.raises(ConfigError, match="brings no templates"):
            config_template("mine_without_templates")
    finally:
        get_registry().unregister("algorithms", "mine_without_templates")


def test_listing_imports_no_plugin_and_no_torch():
    code = (
        "import sys\nfrom nemo_rl_core.config.templates import config_templates\nassert config_templates()\n"
        "assert not [m for m in sys.modules if m == 'torch' or m.startswith('nemo_rl_plugins')], 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
