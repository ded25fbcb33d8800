"""What would be passed over in silence is refused where it is defined; what hooks a plugin has is told unimported."""

from __future__ import annotations

import json

import pytest
from attrs import field, frozen

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.environment import Environment, EnvironmentStep
from nemo_rl_core.registry._verify import shortcoming
from nemo_rl_core.registry.explaining._hook_source import implemented_hooks
from nemo_rl_core.schema import RolloutRunConfig, RunConfig


def test_a_group_size_that_no_run_would_read_is_refused():
    with pytest.raises(ConfigError, match=r"Own\.num_generations_per_prompt would not be read.*RolloutRunConfig"):

        @frozen(kw_only=True)
        class Own(RunConfig):
            num_generations_per_prompt: int = 8


def test_a_default_without_a_type_is_refused():
    with pytest.raises(ConfigError, match="Write `num_prompts_per_step: int = 4`"):

        @frozen(kw_only=True)
        class Own(RolloutRunConfig):
            num_prompts_per_step = 4


def test_what_is_read_is_accepted():
    @frozen(kw_only=True)
    class Own(RolloutRunConfig):
        num_generations_per_prompt: int = field(default=5)

    @frozen(kw_only=True)
    class Other(RunConfig):
        num_generations_per_prompt: int = 3

        @property
        def group_size(self) -> int:
            return self.num_generations_per_prompt

    assert (Own().group_size, Other().group_size) == (5, 3)


def test_an_environment_need_not_write_a_constructor():
    class Plain(Environment):
        config_class = dict

        def reset(self, task, seed):
            return [{"role": "user", "content": self.config["greeting"]}]

        def step(self, message):
            return EnvironmentStep(terminated=True)

    assert shortcoming("environments", Plain) is None
    made = Plain({"greeting": "hello"}, "context")
    assert made.reset({}, 0)[0]["content"] == "hello" and made.context == "context"


def test_a_constructor_of_another_kind_is_told():
    class Own(Environment):
        config_class = dict

        def __init__(self):
            pass

        def reset(self, task, seed):
            return []

        def step(self, message):
            return EnvironmentStep(terminated=True)

    assert "which cannot be called as the core does, Class(config, context)" in shortcoming("environments", Own)


SOURCE = """
raise RuntimeError("imported")
def on_step_end(run): ...
def helper(): ...
@hookimpl(specname="on_run_end")
def whatever(run): ...
class Base:
    def on_error(self, run, error): ...
class Plugin(Base):
    def nemo_rl_rewards(self): ...
plugin = Plugin()
"""


@pytest.mark.parametrize(
    ("value", "hooks"),
    [
        ("hooked.inner", ["on_run_end", "on_step_end"]),
        ("hooked.inner:Plugin", ["nemo_rl_rewards", "on_error"]),
        ("hooked.inner:plugin", ["nemo_rl_rewards", "on_error"]),
        ("hooked.missing", None),
    ],
)
def test_hooks_are_read_from_the_source(site, value, hooks):
    site.module("hooked.__init__", "raise RuntimeError('imported')")
    site.module("hooked.inner", SOURCE)
    assert implemented_hooks(value) == hooks


def test_the_listing_shows_them(cli):
    cli.site.install("hook-dist", entry_points={"hooks": {"h": "hk_pkg"}}, modules={"hk_pkg": SOURCE})
    allowed = {"NEMO_RL_PLUGINS": "hook-dist"}
    (row,) = (r for r in json.loads(cli("plugins", "list", "--json", **allowed).stdout) if r["name"] == "h")
    assert row["hooks"] == ["on_run_end", "on_step_end"]
    assert "hooks of hook-dist: h: on_run_end, on_step_end" in cli("plugins", "list", **allowed).stdout
