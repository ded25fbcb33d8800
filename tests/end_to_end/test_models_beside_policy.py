"""Models beside the policy in real runs: a critic and a reference, placed, trained or frozen, saved and resumed."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from attrs import evolve

import nemo_rl
from nemo_rl_core.backends import sealed_file
from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.algorithm import ModelRole, Update
from nemo_rl_core.protocols.loss import Metric
from nemo_rl_core.training.reporting.record import read_metrics
from nemo_rl_core.training.trainer import Trainer
from nemo_rl_plugins_dtensor.backend import DTensorBackend
from nemo_rl_plugins_ppo.algorithm import PPO

pytestmark = pytest.mark.xdist_group("models")  # one worker makes what they share

SCRIPT = textwrap.dedent(
    """
    import os, signal, sys
    import torch
    torch.set_num_threads(1)
    import nemo_rl
    from nemo_rl_plugins_ppo.policy_loss import ClippedSurrogateLoss

    ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]

    def reward(response):
        return float(any(c.isdigit() for c in response))

    class Kill(nemo_rl.Callback):
        critical = True
        def __init__(self, moment, step):
            self.moment, self.step = moment, step
        def on_step_start(self, run):
            if run.step == self.step and self.moment == "between_the_models":
                plain = ClippedSurrogateLoss.__call__
                def killing(self, outputs, batch):
                    os.kill(os.getpid(), signal.SIGKILL)  # the critic's first steps are done, the policy's are not
                ClippedSurrogateLoss.__call__ = killing
        def on_batch(self, run):
            if run.step == self.step and self.moment == "batch":
                os.kill(os.getpid(), signal.SIGKILL)

    def main():
        run_dir, moment, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
        trainer = nemo_rl.PPOTrainer({
            "model": "scratch:qwen2-tiny", "learning_rate": 1e-3, "critic_learning_rate": 3e-3, "max_steps": 6,
            "run_dir": run_dir, "policy": {"max_sequence_length": 32}, "logging": {"progress": "none"},
            "checkpointing": {"every": 2}, "num_prompts_per_step": 4, "num_generations_per_prompt": 4,
            "updates_per_step": 2, "epochs_per_step": 2, "critic_warmup_steps": 3, "reward_kl_beta": 0.05,
            "critic": {"scheduler": {"name": "linear"}}, "generation": {"max_new_tokens": 4}})
        trainer.fit(ROWS, reward, callbacks=[Kill(moment, step)])

    if __name__ == "__main__":
        main()
    """
)
ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]


def reward(response: str) -> float:
    return float(any(c.isdigit() for c in response))


# -- saved and resumed -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("script") / "run.py"
    path.write_text(SCRIPT)
    return path


def run_script(script: Path, *arguments: object) -> int:
    return subprocess.run([sys.executable, str(script), *map(str, arguments)], check=False, timeout=100).returncode


@pytest.fixture(scope="module")
def uninterrupted(script, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    assert run_script(script, folder, "never", 0) == 0
    return folder


def saved(run_dir: Path, role: str):
    (file,) = (run_dir / "checkpoints" / "step_6" / role).glob("*.pt")
    return sealed_file.read(file)


def assert_equal(mine, other):
    assert type(mine) is type(other)
    if isinstance(mine, torch.Tensor):
        assert torch.equal(mine, other)
    elif isinstance(mine, dict):
        assert mine.keys() == other.keys()
        for key in mine:
            assert_equal(mine[key], other[key])
    elif isinstance(mine, (list, tuple)):
        assert len(mine) == len(other)
        for a, b in zip(mine, other, strict=True):
            assert_equal(a, b)
    else:
        assert mine == other


@pytest.mark.parametrize(("moment", "step"), [("batch", 3), ("between_the_models", 4)])
def test_a_run_with_a_critic_killed_and_resumed_is_the_run_that_was_not(script, uninterrupted, tmp_path, moment, step):
    assert run_script(script, tmp_path, moment, step) == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    assert run_script(script, tmp_path, "never", 0) == 0
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "step_6").iterdir() if p.is_dir()) == ["critic", "policy"]
    for role in ("critic", "policy"):  # weights, optimizer and schedule
        mine, other = saved(tmp_path, role), saved(uninterrupted, role)
        for part in ("weights", "optimizer", "scheduler"):
            assert_equal(mine[part], other[part])
    names = ("train/critic/loss", "train/critic/grad_norm", "train/reward_kl", "reward/mean")
    for mine, other in zip(read_metrics(tmp_path), read_metrics(uninterrupted), strict=True):
        assert {n: mine[n] for n in names} == {n: other[n] for n in names}
        assert mine.get("train/loss") == other.get("train/loss")


def test_the_policy_does_not_move_while_the_critic_warms_up(uninterrupted):
    history = list(read_metrics(uninterrupted))
    assert ["train/loss" in entry for entry in history] == [False] * 3 + [True] * 3
    assert all(entry["train/critic/grad_norm"] > 0 for entry in history)
    # The reference is the policy as it was: no divergence until the policy's first step, and some after it.
    divergence = [entry["train/reward_kl"] for entry in history]
    assert divergence[:4] == [0.0] * 4
    assert all(found != 0.0 for found in divergence[4:])


# -- placed ------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path):
    def make(**changes):
        return {
            "model": "scratch:qwen2-tiny",
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "num_prompts_per_step": 4,
            "num_generations_per_prompt": 4,
            "epochs_per_step": 2,
            "max_steps": 2,
            "run_dir": str(tmp_path / "run"),
            "policy": {"max_sequence_length": 32},
            "generation": {"max_new_tokens": 4},
            "logging": {"progress": "none"},
            "checkpointing": {"enabled": False},
            **changes,
        }

    return make


class Recording(DTensorBackend):
    """A backend that tells what it was made for."""

    made: ClassVar[dict[str, DTensorBackend]] = {}

    def setup(self, config, context):
        super().setup(config, context)
        self.made[context.role] = self

    def shutdown(self):
        """Leave it to be looked at."""


@pytest.fixture
def recording():
    Recording.made = {}
    yield Recording
    for backend in Recording.made.values():
        DTensorBackend.shutdown(backend)


def test_a_role_may_have_another_model_and_another_backend(settings, recording):
    critic = {"model_name": "scratch:qwen2-1m", "backend": recording}
    result = nemo_rl.PPOTrainer(settings(critic=critic)).fit(ROWS, reward)
    assert list(recording.made) == ["critic"]
    size = sum(p.numel() for p in recording.made["critic"].weights.values())
    assert size > 500_000
    assert result.metrics["train/critic/grad_norm"] > 0


def test_a_role_that_says_nothing_has_the_model_and_the_backend_of_the_policy(settings, recording):
    policy = {"backend": recording, "max_sequence_length": 32}
    nemo_rl.PPOTrainer(settings(policy=policy, reward_kl_beta=0.1)).fit(ROWS, reward)
    assert list(recording.made) == ["policy", "critic", "reference"]
    assert {backend.config.model_name for backend in recording.made.values()} == {"scratch:qwen2-tiny"}


def test_a_frozen_role_holds_no_optimizer_and_never_moves(settings, recording):
    policy = {"backend": recording, "max_sequence_length": 32, "precision": "bfloat16"}
    nemo_rl.PPOTrainer(settings(policy=policy, reward_kl_beta=0.1)).fit(ROWS, reward)
    reference, trained = recording.made["reference"], recording.made["policy"]
    assert reference.optimizer is None
    assert reference.masters is None
    assert all(weight.grad is None and not weight.requires_grad for weight in reference.weights.values())
    assert all(weight.dtype == torch.bfloat16 for weight in reference.weights.values())
    assert trained.optimizer is not None
    fresh = Recording()
    from nemo_rl_core.protocols.launcher import WorkerContext

    fresh.setup(finalize(load_config({"algorithm": "ppo", **settings(policy=policy)})).policy, WorkerContext(seed=42))
    for name, weight in fresh.weights.items():
        assert torch.equal(reference.weights[name], weight.to(torch.bfloat16)), name
    assert any(not torch.equal(trained.weights[name], weight) for name, weight in fresh.weights.items())


@pytest.mark.slow
@pytest.mark.timeout(300)  # six processes start: two of each role
def test_two_processes_for_each_role_take_the_steps_of_one(settings, tmp_path):
    def history(num_workers):
        changes = {
            "model": "scratch:qwen2-1m",
            "run_dir": str(tmp_path / str(num_workers)),
            "policy": {"max_sequence_length": 32, "num_workers": num_workers},
            "critic": {"num_workers": num_workers},
            "reward_kl_beta": 0.05,
        }
        return nemo_rl.PPOTrainer(settings(**changes)).fit(ROWS, reward).history

    for mine, other in zip(history(2), history(1), strict=True):
        for name in ("train/loss", "train/critic/loss", "train/critic/grad_norm", "reward/mean", "train/reward_kl"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


# -- several updates of one model --------------------------------------------------------------------------


class OneMoreMetric:
    """The loss of the policy with a metric of its own."""

    def __init__(self, loss):
        self.loss, self.denominator, self.needs = loss, loss.denominator, loss.needs

    def __call__(self, outputs, batch):
        sums = self.loss(outputs, batch)
        return evolve(sums, metrics={**sums.metrics, "only_here": Metric(6.0, 2.0)})


class SecondUpdateSaysMore(PPO):
    def updates(self, batch):
        first, *_, last = [update for update in super().updates(batch) if update.model == "policy"]
        return [first, evolve(last, loss=OneMoreMetric(last.loss))]


def test_a_metric_that_one_of_two_updates_reports_is_not_halved(settings):
    trainer = Trainer(settings(algorithm=SecondUpdateSaysMore, updates_per_step=2, max_steps=1))
    assert trainer.fit(ROWS, reward).metrics["train/only_here"] == 3.0


# -- what a role lacks -------------------------------------------------------------------------------------


class Headless(DTensorBackend):
    capabilities: ClassVar[frozenset[str]] = frozenset({"share_weights"})


class TrainsTheReference(PPO):
    def updates(self, batch):
        return [*super().updates(batch), Update(range(len(batch)), self.loss, "reference")]


class TrainsNobody(PPO):
    def updates(self, batch):
        return [Update(range(len(batch)), self.loss, "judge")]


class SecondPolicy(PPO):
    @property
    def models(self):
        return {**super().models, "policy": ModelRole(config=self.config.policy)}


class AsksThePolicyForValues(PPO):
    def fill_batch(self, batch, models):
        models["policy"].values(batch)


class CriticWithoutHead(PPO):
    @property
    def models(self):
        return {"critic": ModelRole(config=self.config.policy, trained=True)}


class NoReference(PPO):
    required_fields = frozenset({"ref_logprobs"})

    @property
    def models(self):
        return {"critic": ModelRole(config=self.config.critic, trained=True)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"critic": {"backend": Headless}}, r"role 'critic' needs .* scalar head, which .* Headless .*critic.backend"),
        (
            {"algorithm": TrainsTheReference, "reward_kl_beta": 0.1},
            r"trains the model 'reference', which its `models` declares frozen.*Trained are: policy, critic",
        ),
        ({"algorithm": TrainsNobody}, r"trains the model 'judge', which its `models` does not name"),
        ({"algorithm": SecondPolicy}, r"SecondPolicy.models has a role 'policy'"),
        ({"algorithm": AsksThePolicyForValues}, r"role 'policy' does not give values.*head='lm'"),
        ({"algorithm": CriticWithoutHead}, r"role 'critic' does not give values.*head='lm'"),
        ({"algorithm": NoReference}, r"NoReference requires ref_logprobs, but its models have no reference"),
        ({"critic": {"model_name": "scratch:qwen2-huge"}}, r"model 'scratch:qwen2-huge': no shape of that name"),
    ],
)
def test_a_role_that_lacks_what_it_needs_is_named(settings, changes, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        Trainer(settings(**{"algorithm": "ppo", **changes})).fit(ROWS, reward)
