"""Invariants of training: where each bound lies, and that a run asks for each of them."""

from __future__ import annotations

import logging

import pytest

import nemo_rl
from nemo_rl_core.errors import InvariantViolation
from nemo_rl_core.protocols.loss import LossSums, Metric
from nemo_rl_core.schema import InvariantsConfig
from nemo_rl_core.training.model.invariants import Invariants
from nemo_rl_plugins_grpo.losses.clipped import ClippedPolicyGradientLoss

ROWS = [{"prompt": f"{a}+1="} for a in range(8)]


@pytest.mark.parametrize(
    ("metrics", "broken"),
    [
        ({}, False),
        ({"probs_ratio": 1.0009}, False),
        ({"probs_ratio": 0.9991}, False),
        ({"probs_ratio": 1.0011}, True),
        ({"probs_ratio": 0.9989}, True),
        ({"probs_ratio": 1.0, "clip_fraction": 0.01}, False),
        ({"probs_ratio": 1.0, "clip_fraction": 0.011}, True),
    ],
)
def test_the_ratio_of_the_first_update_is_one_to_a_thousandth(metrics, broken):
    invariants = Invariants(InvariantsConfig())
    if broken:
        with pytest.raises(InvariantViolation, match="must be 1 and nothing clipped"):
            invariants.check_first_update(metrics)
    else:
        invariants.check_first_update(metrics)
    Invariants(InvariantsConfig(enabled=False)).check_first_update({"probs_ratio": 2.0})


def alarms(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "rewards were all equal" in r.getMessage()]


def test_the_alarm_comes_after_the_configured_steps_without_a_signal_and_again_after_as_many(caplog):
    invariants = Invariants(InvariantsConfig(zero_signal_steps=3))
    told = []
    for fraction in (1.0, 1.0, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, None):
        invariants.check_signal(fraction)
        told.append(len(alarms(caplog)))
    assert told == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert "In the last 6 steps" in alarms(caplog)[-1]


def test_the_count_goes_on_after_a_resume(caplog):
    before = Invariants(InvariantsConfig(zero_signal_steps=2))
    before.check_signal(1.0)
    after = Invariants(InvariantsConfig(zero_signal_steps=2))
    after.load_state_dict(before.state_dict())
    after.check_signal(1.0)
    assert len(alarms(caplog)) == 1


@pytest.mark.parametrize(
    ("error", "outcome"), [(1.0, "silent"), (1.05, "silent"), (1.051, "warns"), (2.0, "warns"), (2.01, "stops")]
)
def test_a_mismatch_warns_and_then_stops(caplog, error, outcome):
    invariants = Invariants(InvariantsConfig(mismatch_warn=1.05, mismatch_abort=2.0))
    if outcome == "stops":
        with pytest.raises(InvariantViolation, match=r"mismatch_abort=2"):
            invariants.check_mismatch({"token_mult_prob_error": error})
        return
    invariants.check_mismatch({"token_mult_prob_error": error})
    assert bool(caplog.records) == (outcome == "warns")


# -- a run asks for them ------------------------------------------------------------------------------------------


class TellsAnotherRatio(ClippedPolicyGradientLoss):
    """Reports a mean ratio of 1.5, as a trainer does whose forward pass differs from the sampling one."""

    def __call__(self, outputs, batch) -> LossSums:
        sums = super().__call__(outputs, batch)
        ratio = sums.metrics["probs_ratio"]
        return LossSums(sums.total, {**sums.metrics, "probs_ratio": Metric(ratio.total * 1.5, ratio.count)})


@pytest.fixture
def settings(tmp_path):
    return {
        "model": "scratch:qwen2-tiny",
        "num_prompts_per_step": 2,
        "num_generations_per_prompt": 2,
        "max_steps": 2,
        "run_dir": str(tmp_path / "run"),
        "policy": {"max_sequence_length": 24},
        "generation": {"max_new_tokens": 2},
        "logging": {"progress": "none"},
        "checkpointing": {"enabled": False},
    }


def test_a_run_checks_the_ratio_of_its_first_update(settings):
    with pytest.raises(InvariantViolation, match=r"found mean ratio 1\.5"):
        nemo_rl.GRPOTrainer({**settings, "loss": TellsAnotherRatio}).fit(
            ROWS, lambda response: float(len(response) % 2)
        )


def test_a_run_without_a_signal_says_so(settings, caplog):
    caplog.set_level(logging.WARNING)
    nemo_rl.GRPOTrainer({**settings, "invariants": {"zero_signal_steps": 2}}).fit(ROWS, lambda response: 1.0)
    assert len(alarms(caplog)) == 1
