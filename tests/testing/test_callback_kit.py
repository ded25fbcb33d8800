"""The contract of a callback against callbacks broken on purpose, one at least for each clause."""

from __future__ import annotations

import pytest

from nemo_rl_core.testing import CallbackContract, run_kit
from nemo_rl_core.testing.conformance.frame.kit import clauses
from nemo_rl_core.training.callbacks import Callback


class Sound(Callback):
    """Keeps the best reward of a run and asks for a checkpoint when there is a better one."""

    def on_run_start(self, run):
        self.best = float("-inf")
        self.rollouts = 0

    def on_rollouts(self, run, groups):
        self.rollouts += sum(len(group.rollouts) for group in groups)

    def on_step_end(self, metrics, run):
        reward = metrics.get("train/reward")
        if reward is not None and reward > self.best:
            self.best = reward
            run.checkpoint_requested = True


class Deaf(Callback):
    def step_end(self, run):
        pass


class Misspelled(Sound):
    def on_stepend(self, run):
        pass


class AsksForTheModel(Sound):
    def on_train_step(self, run, model):
        pass


class Async(Sound):
    async def on_train_step(self, run):
        pass


class CriticalInWords(Sound):
    critical = "yes"


class RaisesInTheRun(Sound):
    def on_refit(self, version):
        raise RuntimeError(f"version {version}")


class RaisesInTheRunAndIsCritical(RaisesInTheRun):
    critical = True


class CountsOnRewards(Sound):
    def on_rollouts(self, groups):
        self.mean = sum(group.rewards[0] for group in groups) / len(groups)


class CountsOnAStep(Sound):
    steps = 0

    def on_step_end(self, metrics, run):
        super().on_step_end(metrics, run)
        self.steps += 1

    def on_run_end(self, run):
        self.per_step = run.weight_version / self.steps


class CountsOnAStart(Sound):
    def on_error(self, error):
        self.lost = self.best


class CountsOnAMetric(Sound):
    def on_step_end(self, metrics, run):
        run.stop_requested = metrics["train/reward"] > 0.95


class StartsOnce(Sound):
    def on_run_start(self, run):
        if hasattr(self, "best"):
            raise RuntimeError("already started")
        super().on_run_start(run)


class EditsTheStep(Sound):
    def on_step_end(self, metrics, run):
        run.step += 1


class EditsTheMetrics(Sound):
    def on_train_step(self, metrics):
        metrics["train/perplexity"] = 2 ** metrics.pop("train/loss", 0.0)


class ForgetsTheHistory(Sound):
    def on_step_end(self, metrics, run):
        run.history.clear()


class DropsAGroup(Sound):
    def on_rollouts(self, groups):
        groups.pop()


BROKEN = {
    "listens_to_something": [Deaf],
    "hooks_exist": [Misspelled],
    "arguments_are_known": [AsksForTheModel],
    "registers": [Async, Misspelled],
    "says_whether_it_is_critical": [CriticalInWords],
    "whole_run": [RaisesInTheRun, RaisesInTheRunAndIsCritical],
    "failed_rollouts": [CountsOnRewards],
    "run_without_a_step": [CountsOnAStep],
    "failed_run": [CountsOnAStart],
    "metrics_may_be_missing": [CountsOnAMetric],
    "second_run": [StartsOnce],
    "leaves_the_run_alone": [EditsTheStep, EditsTheMetrics, ForgetsTheHistory, DropsAGroup],
}


def test_a_sound_callback_passes_every_clause():
    report = run_kit(CallbackContract, Sound)
    assert [result for result in report.results if result.outcome != "passed"] == []


def test_every_clause_has_a_broken_callback():
    assert set(BROKEN) == set(clauses(CallbackContract))


@pytest.mark.parametrize(("clause", "broken"), [(c, b) for c, many in BROKEN.items() for b in many])
def test_a_broken_callback_fails_its_clause(clause, broken):
    report = run_kit(CallbackContract, broken, only=[clause])
    assert report.failed == (clause,), report


def test_the_sentence_names_who_raised():
    (result,) = run_kit(CallbackContract, RaisesInTheRun, only=["whole_run"]).results
    assert "on_refit raised RuntimeError: version 1" in result.message
