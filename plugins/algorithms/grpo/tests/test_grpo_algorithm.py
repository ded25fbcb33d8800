"""From rollout groups to a batch with advantages, by hand."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from pytest import approx

from nemo_rl_core.protocols.algorithm import Algorithm, AlgorithmContext
from nemo_rl_core.protocols.loss import LossSums, ModelOutputs
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.records.rollout import Rollout, RolloutError, RolloutGroup, Turn
from nemo_rl_core.schema import ComponentChoice, GenerationConfig
from nemo_rl_core.training.model.normalize import NormalizedLoss, count_trained
from nemo_rl_plugins_grpo.advantages.grpo import GroupRelativeAdvantages
from nemo_rl_plugins_grpo.algorithm import GRPO
from nemo_rl_plugins_grpo.config import (
    AdvantageClipConfig,
    DynamicSamplingConfig,
    GRPOConfig,
    RewardScalingConfig,
    RewardShapingConfig,
)
from nemo_rl_plugins_grpo.loss_config import ClippedPGConfig
from nemo_rl_plugins_grpo.losses.clipped import ClippedPolicyGradientLoss
from nemo_rl_plugins_grpo.minibatches import split_by_groups
from nemo_rl_plugins_grpo.shaping import response_lengths

COMPONENTS = {
    ("losses", "clipped_pg"): (ClippedPolicyGradientLoss, ClippedPGConfig),
    ("advantages", "grpo"): (GroupRelativeAdvantages, GroupRelativeAdvantages.config_class),
}


def resolve(kind, choice):
    if not isinstance(choice.name, str):
        return choice.name()
    component, config_class = COMPONENTS[kind, choice.name]
    return component(config_class(**choice.options) if isinstance(choice.options, dict) else choice.options)


def make(loss=None, **fields):
    if loss is not None:
        fields["loss"] = ComponentChoice(name="clipped_pg", options=loss)
    context = AlgorithmContext(tokenizer=None, resolve=resolve, max_sequence_length=64)
    return GRPO(GRPOConfig(**fields), context)


def group(group_id, rewards, *, lengths=None, truncated=()):
    """A group whose rollouts have a prompt of two tokens and `lengths` sampled tokens (one by default)."""
    rollouts = []
    for i, reward in enumerate(rewards):
        n = lengths[i] if lengths else 1
        prompt = Turn(message={"role": "user", "content": "?"}, token_ids=[1, 2], sampled=False)
        answer = Turn(
            message={"role": "assistant", "content": "!"},
            token_ids=[3] * n,
            sampled=True,
            logprobs=[-0.5] * n,
            weight_version=0,
        )
        failed = reward is None
        rollouts.append(
            Rollout(
                rollout_id=f"{group_id}/{i}",
                task_id=str(group_id),
                index=i,
                seed=0,
                segments=[[prompt, answer]],
                rewards={} if failed else {"score": reward},
                truncated=i in truncated,
                error=RolloutError(stage="score", type="ValueError", message="no") if failed else None,
            )
        )
    return RolloutGroup(group_id=group_id, task_id=str(group_id), rollouts=rollouts)


def finished(algorithm, groups):
    batch = algorithm.build_batch(groups)
    return batch, algorithm.finish_batch(batch)


def per_sequence(batch):
    """The advantage of each sequence's last (sampled) token."""
    return batch["advantages"][batch.offsets[1:] - 1].tolist()


def test_it_is_an_algorithm():
    algorithm = make()
    assert isinstance(algorithm, Algorithm)
    assert algorithm.feed == "rollouts"
    assert GRPO.config_class is GRPOConfig
    assert (GRPOConfig().num_items_per_step, GRPOConfig().group_size) == (32, 16)


def test_a_step_by_hand():
    batch, metrics = finished(make(), [group(3, [1, 0]), group(5, [2, 2]), group(9, [0, 4])])
    assert per_sequence(batch) == approx([1, -1, 0, 0, -4, 4])
    assert batch["advantages"][batch["loss_mask"]].tolist() == approx([1, -1, 0, 0, -4, 4])
    assert batch["advantages"][~batch["loss_mask"]].abs().sum() == 0
    assert metrics["zero_variance_groups"] == approx(1 / 3)
    assert (metrics["advantages/mean"], metrics["advantages/min"], metrics["advantages/max"]) == approx((0, -4, 4))
    assert metrics["shaped_reward"] == approx(9 / 6)


def test_its_step_is_reinforce_with_those_advantages():
    """Through the loss and the global division, on policy: the gradient of each token is -A / tokens."""
    algorithm = make()
    batch, _ = finished(algorithm, [group(0, [1, 0], lengths=[3, 1])])
    logprobs = batch["rollout_logprobs"].clone().requires_grad_()
    loss = NormalizedLoss(algorithm.loss, count_trained(batch))
    loss(ModelOutputs(logprobs=logprobs), batch).total.backward()
    assert logprobs.grad.tolist() == approx([0, 0, -0.25, -0.25, -0.25, 0, 0, 0.25])


def test_failed_rollouts_are_not_in_the_baseline():
    batch, _ = finished(make(), [group(0, [1, None, 0])])
    assert len(batch) == 2
    assert per_sequence(batch) == approx([1, -1])


def test_advantages_are_clipped():
    batch, _ = finished(make(advantage_clip=AdvantageClipConfig(low=-2.0, high=1.0)), [group(0, [0, 4])])
    assert per_sequence(batch) == approx([-2, 1])
    batch, _ = finished(make(advantage_clip=AdvantageClipConfig(low=0.5)), [group(0, [0, 4])])
    assert batch["advantages"][~batch["loss_mask"]].abs().sum() == 0  # not raised to the lower bound


def test_overlong_filtering_keeps_the_baseline_and_drops_the_tokens():
    algorithm = make(overlong_filtering=True)
    batch, metrics = finished(algorithm, [group(0, [1, 0, 0], lengths=[2, 3, 3], truncated={1})])
    plain, _ = finished(make(), [group(0, [1, 0, 0], lengths=[2, 3, 3], truncated={1})])
    assert per_sequence(batch) == per_sequence(plain)
    assert batch.sum_per_sequence(batch["loss_mask"].long()).tolist() == [2, 0, 3]
    assert metrics["overlong_filtered_fraction"] == approx(1 / 3)
    assert count_trained(batch).tokens == 5
    assert plain.sum_per_sequence(plain["loss_mask"].long()).tolist() == [2, 3, 3]


def test_all_filtered_is_a_step_of_zero():
    algorithm = make(overlong_filtering=True)
    batch, metrics = finished(algorithm, [group(0, [1, 0], truncated={0, 1})])
    loss = NormalizedLoss(algorithm.loss, count_trained(batch))
    assert loss(ModelOutputs(logprobs=batch["rollout_logprobs"]), batch).total.item() == 0.0
    assert metrics["overlong_filtered_fraction"] == 1.0


def test_reward_scaling():
    scaling = RewardScalingConfig(enabled=True, source_min=0, source_max=2, target_min=-1, target_max=1)
    batch, metrics = finished(make(reward_scaling=scaling), [group(0, [0, 1, 5, -3])])
    assert batch["rewards"].tolist() == approx([-1, 0, 1, -1])
    assert batch["raw_rewards"].tolist() == [0, 1, 5, -3]
    assert metrics["shaped_reward"] == approx(-0.25)


def test_overlong_shaping():
    # longest 10, buffer 4: nothing up to 6 tokens, then a quarter of the penalty for each token more
    shaping = RewardShapingConfig(enabled=True, overlong_buffer_length=4, overlong_penalty=2.0)
    algorithm = make(reward_shaping=shaping, generation=GenerationConfig(max_new_tokens=10))
    batch, _ = finished(algorithm, [group(0, [1] * 5, lengths=[2, 6, 7, 8, 10])])
    assert batch["rewards"].tolist() == approx([1, 1, 0.5, 0, -1])
    shorter = evolve(shaping, max_response_length=8)
    batch, _ = finished(make(reward_shaping=shorter), [group(0, [1, 1], lengths=[4, 6])])
    assert batch["rewards"].tolist() == approx([1, 0])


def test_the_length_of_a_forked_rollout_is_that_of_all_its_sequences():
    forked = group(0, [1, 1], lengths=[3, 7])
    forked.rollouts[0].segments *= 2
    batch = make().build_batch([forked])
    assert response_lengths(batch).tolist() == [6, 6, 7]


def test_stop_properly_takes_the_place_of_the_length_penalty():
    shaping = RewardShapingConfig(enabled=True, overlong_buffer_length=1, stop_properly_penalty_coef=0.25)
    algorithm = make(reward_shaping=shaping, generation=GenerationConfig(max_new_tokens=2))
    batch, _ = finished(algorithm, [group(0, [1, 1], lengths=[2, 2], truncated={1})])
    assert batch["rewards"].tolist() == approx([1, 0.25])


def test_scaling_comes_before_shaping():
    algorithm = make(
        reward_scaling=RewardScalingConfig(enabled=True, target_max=10.0),
        reward_shaping=RewardShapingConfig(enabled=True, stop_properly_penalty_coef=0.5),
    )
    batch, _ = finished(algorithm, [group(0, [1, 1], truncated={1})])
    assert batch["rewards"].tolist() == approx([10, 5])


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [([1, 0], True), ([1, 1, 1], False), ([0, 0], False), ([1], False), ([1, None], False), ([None], False)],
)
def test_dynamic_sampling_keeps_groups_that_vary(rewards, kept):
    assert make(dynamic_sampling=DynamicSamplingConfig(enabled=True)).keep_group(group(0, rewards)) is kept
    assert make().keep_group(group(0, rewards)) is True


def test_dynamic_sampling_looks_at_rewards_before_shaping():
    algorithm = make(
        dynamic_sampling=DynamicSamplingConfig(enabled=True),
        reward_shaping=RewardShapingConfig(enabled=True, overlong_buffer_length=1),
        generation=GenerationConfig(max_new_tokens=2),
    )
    same = group(0, [1, 1], lengths=[1, 2])
    assert not algorithm.keep_group(same)
    assert make(reward_scaling=RewardScalingConfig(enabled=True)).keep_group(same)


@pytest.mark.parametrize(
    ("fields", "loss", "required", "roles"),
    [
        ({}, {}, set(), set()),
        ({"updates_per_step": 2}, {}, {"logprobs"}, set()),
        ({"epochs_per_step": 2}, {}, {"logprobs"}, set()),
        ({}, {"reference_kl_beta": 0.1}, {"ref_logprobs"}, {"reference"}),
        ({"updates_per_step": 2}, {"reference_kl_beta": 0.1}, {"logprobs", "ref_logprobs"}, {"reference"}),
        ({"updates_per_step": 2}, {"ratio_against": "rollout"}, set(), set()),
    ],
)
def test_what_it_asks_of_the_run_loop(fields, loss, required, roles):
    algorithm = make(loss, **fields)
    assert algorithm.required_fields == required
    assert algorithm.models.keys() == roles


class StrangersLoss:
    """A loss of another package, without our options."""

    denominator = "tokens"
    needs = frozenset({"logprobs"})
    required_fields = frozenset({"ref_logprobs"})

    def __call__(self, outputs, batch):
        return LossSums(outputs.logprobs.sum())


def test_another_loss_and_estimator_take_their_places():
    algorithm = make(advantage=ComponentChoice(name=lambda: lambda batch: batch["loss_mask"].float() * 7))
    batch, _ = finished(algorithm, [group(0, [1, 0])])
    assert per_sequence(batch) == [7, 7]
    other = GRPO(
        GRPOConfig(loss=ComponentChoice(name=StrangersLoss)),
        AlgorithmContext(tokenizer=None, resolve=resolve, max_sequence_length=8),
    )
    assert isinstance(other.loss, StrangersLoss)
    assert other.models.keys() == {"reference"}
    assert other.required_fields == {"ref_logprobs"}


# -- optimizer steps of one batch ------------------------------------------------------------------------


def test_one_update_takes_everything():
    batch, _ = finished(make(), [group(0, [1, 0]), group(1, [1, 0])])
    assert make().minibatches(batch) == [[0, 1, 2, 3]]


def test_updates_take_whole_groups_in_order_and_epochs_repeat_them():
    algorithm = make(updates_per_step=2, epochs_per_step=2)
    batch, _ = finished(algorithm, [group(i, [1, 0, 2][: 2 + i % 2]) for i in range(3)])
    once = [[0, 1], [2, 3, 4, 5, 6]]
    assert algorithm.minibatches(batch) == once + once


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5, 9])
def test_split_by_groups_is_a_partition_of_groups(num_parts):
    ids = torch.tensor([4, 4, 7, 1, 7, 1, 1, 9, 2])
    parts = split_by_groups(ids, num_parts)
    assert len(parts) == min(num_parts, 5)
    assert sorted(i for part in parts for i in part) == list(range(9))
    owners = [{int(ids[i]) for i in part} for part in parts]
    assert sum(map(len, owners)) == 5
    assert max(map(len, owners)) - min(map(len, owners)) <= 1


def test_an_empty_batch_has_no_update():
    assert split_by_groups(torch.zeros(0, dtype=torch.int64), 3) == []


def test_a_batch_without_a_trained_token():
    batch = BatchedDataDict(
        [2, 2],
        {
            "input_ids": torch.ones(4, dtype=torch.int64),
            "loss_mask": torch.zeros(4, dtype=torch.bool),
            "rollout_logprobs": torch.zeros(4),
        },
        {"rewards": torch.tensor([1.0, 0.0]), "group_ids": torch.tensor([0, 0])},
    )
    metrics = make().finish_batch(batch)
    assert all(value == value for value in metrics.values())
    assert batch["advantages"].tolist() == [0] * 4
