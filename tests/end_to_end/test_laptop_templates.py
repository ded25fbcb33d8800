"""The templates that need no file and no network train as they are."""

from __future__ import annotations

import pytest

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.config.templates import config_templates
from nemo_rl_core.training.run import run
from nemo_rl_core.training.setup.parts import RunInputs

SELF_CONTAINED = [t for t in config_templates() if t.name == "laptop" and "source: reasoning_gym" in t.text]


def test_the_policy_gradient_algorithms_have_one():
    found = {template.algorithm for template in SELF_CONTAINED}
    assert found == {"cispo", "dapo", "dr_grpo", "gspo", "grpo", "ppo", "reinforce_pp", "rloo"}


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])  # the others have the same model, data and lengths
def test_it_trains(algorithm, tmp_path):
    (template,) = (t for t in SELF_CONTAINED if t.algorithm == algorithm)
    changes = ["max_steps=1", "num_prompts_per_step=4", "logging.progress=none", f"run_dir={tmp_path}"]
    result = run(finalize(load_config(template.path, overrides=changes)), RunInputs())
    assert result.step == 1 and result.model_path is not None
