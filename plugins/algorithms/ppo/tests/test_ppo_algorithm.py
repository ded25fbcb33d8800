"""The parts of the algorithm: what it asks for, what it puts where, and which steps it takes when."""

from __future__ import annotations

import pytest
import torch
from pytest import approx

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import load_model, load_tokenizer
from nemo_rl_core.protocols.algorithm import AlgorithmContext
from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.registry import get_registry
from nemo_rl_core.testing.conformance.cases.algorithm_case import StandIn, handmade_groups
from nemo_rl_plugins_ppo.algorithm import PPO
from nemo_rl_plugins_ppo.minibatches import split_rollouts
from nemo_rl_plugins_ppo.summary import explained_variance

MODEL = "scratch:qwen2-tiny"


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make(**fields):
    settings = {"algorithm": "ppo", "model": MODEL, "policy": {"max_sequence_length": 64}, **fields}
    settings.setdefault("generation", {"max_new_tokens": 4})

    def resolve(kind, choice):
        return get_registry().resolve(kind, choice.name).load()(choice.options)

    context = AlgorithmContext(tokenizer=load_tokenizer(MODEL), resolve=resolve, max_sequence_length=64)
    return PPO(finalize(load_config(settings)), context)


def filled(algorithm, below=0.0):
    batch = algorithm.build_batch(handmade_groups())
    models = {"policy": StandIn(0.0), "critic": StandIn(0.0), "reference": StandIn(below)}
    algorithm.fill_batch(batch, models)
    return batch


def test_it_has_a_critic_and_only_on_demand_a_reference():
    roles = make().models
    assert list(roles) == ["critic"]
    assert roles["critic"].trained
    assert roles["critic"].config.head == "scalar"
    assert roles["critic"].config.model_name is None  # the policy's
    for fields in ({"reward_kl_beta": 0.1}, {"loss": {"name": "ppo_clip", "options": {"reference_kl_beta": 0.1}}}):
        algorithm = make(**fields)
        assert set(algorithm.models) == {"critic", "reference"}
        assert not algorithm.models["reference"].trained
        assert algorithm.models["reference"].config == algorithm.config.policy


def test_old_logprobs_are_wanted_only_for_several_updates_or_a_kl_in_the_reward():
    assert make().required_fields == {"logprobs"}
    assert make(epochs_per_step=1).required_fields == frozenset()
    assert make(epochs_per_step=1, reward_kl_beta=0.1).required_fields == {"logprobs", "ref_logprobs"}


@torch.no_grad()
def test_values_are_those_of_the_text_before_each_token():
    """Against a critic that is shown nothing but the prefix."""
    from nemo_rl_core.schema import PolicyConfig
    from nemo_rl_plugins_dtensor.backend import DTensorBackend

    backend = DTensorBackend()
    backend.setup(PolicyConfig(model_name=MODEL, head="scalar"), WorkerContext(num_threads=1))

    class Critic(StandIn):
        def values(self, batch):
            return backend.get_values(batch, [list(range(len(batch)))])

    algorithm = make(epochs_per_step=1)
    batch = algorithm.build_batch(handmade_groups((2, 2)))
    algorithm.fill_batch(batch, {"policy": StandIn(0.0), "critic": Critic(0.0)})
    plain = load_model(MODEL, dtype=torch.float32, head="scalar")
    for row, (ids, mask, values) in enumerate(
        zip(*(batch.unpack(name) for name in ("input_ids", "loss_mask", "values")), strict=True)
    ):
        for t in mask.nonzero().squeeze(1).tolist():
            expected = plain.score(plain.model(input_ids=ids[None, :t]).last_hidden_state)[0, -1, 0]
            assert float(values[t]) == approx(float(expected), abs=1e-5)
        final = plain.score(plain.model(input_ids=ids[None]).last_hidden_state)[0, -1, 0]
        assert float(batch["final_values"][row]) == approx(float(final), abs=1e-5)
    backend.shutdown()


def test_a_kl_in_the_reward_is_paid_at_each_sampled_token():
    """The stand-in for the reference gives every sampled token 0.3 nats less: k1 is 0.3."""
    options = {"name": "gae", "options": {"whiten": False, "gae_lambda": 1.0}}
    algorithm = make(reward_kl_beta=0.5, advantage=options)
    batch = filled(algorithm, below=0.3)
    metrics = algorithm.finish_batch(batch)
    mask = batch["loss_mask"]
    assert metrics["reward_kl"] == approx(0.3, rel=1e-4)
    assert batch["token_rewards"][mask].tolist() == approx([-0.15] * int(mask.sum()), rel=1e-4)
    assert not batch["token_rewards"][~mask].any()
    first = batch.unpack("returns")[0][batch.unpack("loss_mask")[0]]
    paid = [-0.15 * left for left in range(len(first), 0, -1)]
    assert first.tolist() == approx([float(batch["rewards"][0]) + p for p in paid], rel=1e-4)


def test_updates_in_their_order():
    algorithm = make(updates_per_step=2, epochs_per_step=2, critic_epochs_per_step=3)
    batch = filled(algorithm)
    algorithm.finish_batch(batch)
    updates = algorithm.updates(batch)
    assert [u.model for u in updates] == (["critic"] * 2 + ["policy"] * 2) * 2 + ["critic"] * 2
    assert all(u.loss is (algorithm.value_loss if u.model == "critic" else algorithm.loss) for u in updates)
    for start in range(0, len(updates), 2):  # each pass has every sequence once
        indices = [i for u in updates[start : start + 2] for i in u.indices]
        assert sorted(indices) == list(range(len(batch)))


def test_the_policy_waits_for_the_critic():
    algorithm = make(critic_warmup_steps=2, epochs_per_step=1)
    batch = filled(algorithm)
    trained = [[u.model for u in algorithm.updates(batch)] for _ in range(3)]
    assert trained == [["critic"], ["critic"], ["critic", "policy"]]
    resumed = make(critic_warmup_steps=2, epochs_per_step=1)
    resumed.load_state_dict(algorithm.state_dict())
    assert [u.model for u in resumed.updates(batch)] == ["critic", "policy"]


def test_minibatches_follow_from_seed_and_step():
    first, second = split_rollouts(10, 3, seed=(7, 1)), split_rollouts(10, 3, seed=(7, 1))
    assert first == second
    assert split_rollouts(10, 3, seed=(7, 2)) != first
    assert split_rollouts(10, 3, seed=(8, 1)) != first
    assert sorted(i for part in first for i in part) == list(range(10))
    assert [len(part) for part in first] == [3, 3, 4]
    assert split_rollouts(4, 1, seed=(7, 1)) == [[0, 1, 2, 3]]
    assert split_rollouts(4, 2, seed=None) == [[0, 1], [2, 3]]
    assert split_rollouts(2, 5, seed=None) == [[0], [1]]
    assert split_rollouts(0, 2, seed=(1, 1)) == []


def test_steps_have_other_minibatches_unless_told_not_to():
    for shuffled in (True, False):
        algorithm = make(updates_per_step=2, epochs_per_step=1, shuffle_minibatches=shuffled)
        batch = filled(algorithm)
        steps = [[list(u.indices) for u in algorithm.updates(batch)] for _ in range(2)]
        assert (steps[0] != steps[1]) is shuffled


def test_the_schedule_of_the_critic_ends_with_the_run():
    critic = {"scheduler": {"name": "cosine"}}
    algorithm = make(critic=critic, max_steps=10, updates_per_step=2, critic_epochs_per_step=3)
    assert algorithm.models["critic"].config.scheduler.total_steps == 60


def test_an_estimator_without_returns_is_refused():
    with pytest.raises(ConfigError, match=r"'grpo' gives no returns to train the critic on"):
        make(advantage={"name": "grpo"})


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == approx(1.0)
    assert explained_variance(torch.zeros(4), returns) == approx(0.0)
    assert explained_variance(returns + 5, returns) == approx(1.0)  # of the variance, not of the mean
    assert explained_variance(-returns, returns) == approx(1 - 4)
    assert explained_variance(returns, torch.ones(4)) is None
    assert explained_variance(returns[:1], returns[:1]) is None


def test_a_batch_without_trained_tokens_has_no_metrics():
    algorithm = make()
    batch = filled(algorithm)
    batch.set_tokens("loss_mask", torch.zeros_like(batch["loss_mask"]))
    assert algorithm.finish_batch(batch) == {}
