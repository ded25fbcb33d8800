"""The same loss and gradient as TRL's trainers on equal inputs (skipped where TRL is not installed).

Beside them, what differs on purpose, with the size of the difference.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pytest import approx

from nemo_rl_core.protocols.loss import ModelOutputs
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.training.model.normalize import NormalizedLoss, count_trained
from nemo_rl_plugins_grpo.advantage_config import GroupRelativeConfig, RLOOAdvantagesConfig
from nemo_rl_plugins_grpo.advantages.grpo import GroupRelativeAdvantages
from nemo_rl_plugins_grpo.advantages.rloo import RLOOAdvantages
from nemo_rl_plugins_grpo.config import RewardKLConfig
from nemo_rl_plugins_grpo.losses.cispo import CISPOLoss
from nemo_rl_plugins_grpo.losses.clipped import ClippedPolicyGradientLoss
from nemo_rl_plugins_grpo.losses.dr_grpo import DrGRPOLoss
from nemo_rl_plugins_grpo.losses.gspo import GSPOLoss
from nemo_rl_plugins_grpo.losses.reinforce import ReinforceLoss
from nemo_rl_plugins_grpo.reward_kl import take_kl_from_rewards

LENGTHS = [3, 5, 1, 4]
WIDTH = 5
MASK = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
ADVANTAGES = torch.tensor([1.0, -0.7, -1.3, 0.4], dtype=torch.float64)


class _Quiet(dict):
    def __missing__(self, key):
        self[key] = []
        return self[key]


def bare(module, name, logprobs, **settings):
    """A trainer of TRL without its set-up, whose model gives `logprobs` [B, T]."""
    trainer = object.__new__(getattr(pytest.importorskip(f"trl.trainer.{module}"), name))

    def gather(tensor):
        return tensor

    trainer.__dict__.update(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        max_completion_length=7,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=gather, gather_for_metrics=gather, reduce=lambda x, **_: x, num_processes=1),
        _metrics={"train": _Quiet()},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
        **settings,
    )
    return trainer


def completions(mask=MASK):
    ones = torch.ones(len(mask), 1, dtype=torch.long)
    return {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": torch.ones_like(mask, dtype=torch.long),
        "completion_mask": mask.long(),
    }


def grpo_loss(logprobs, old, ref, rollout, *, rows=slice(None), **settings):
    """The loss of TRL's GRPOTrainer for completions padded to [B, T]."""
    defaults = {"loss_type": "dapo", "importance_sampling_level": "token", "beta": 0.0, "low": 0.2, "high": 0.28}
    found = {**defaults, "delta": None, "tis": None, "bias_correction": False, **settings}
    trainer = bare(
        "grpo_trainer",
        "GRPOTrainer",
        logprobs[rows],
        beta=found["beta"],
        loss_type=found["loss_type"],
        importance_sampling_level=found["importance_sampling_level"],
        epsilon_low=found["low"],
        epsilon_high=found["high"],
        args=SimpleNamespace(
            delta=found["delta"], use_bias_correction_kl=found["bias_correction"], steps_per_generation=1
        ),
    )
    inputs = {
        **completions(MASK[rows]),
        "advantages": ADVANTAGES[rows],
        "old_per_token_logps": old[rows],
        "ref_per_token_logps": ref[rows],
        "num_items_in_batch": MASK.sum(),
    }
    if found["tis"] is not None:
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        trainer.vllm_importance_sampling_mode = "token_truncate"
        inputs["importance_sampling_ratio"] = (old - rollout).exp().clamp(max=found["tis"])[rows]
    return trainer._compute_loss(None, inputs)


def cases():
    """Current, old, reference and sampling logprobs [B, T]."""
    generator = torch.Generator().manual_seed(11)

    def near(base):
        return base + 0.4 * torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)

    current = -torch.rand(4, WIDTH, generator=generator, dtype=torch.float64) * 2
    old, ref = near(current), near(current)
    return current, old, ref, near(old)


def our_batch(old, ref, rollout):
    return BatchedDataDict(
        LENGTHS,
        {
            "loss_mask": torch.ones(sum(LENGTHS), dtype=torch.bool),
            "rollout_logprobs": rollout[MASK],
            "logprobs": old[MASK],
            "ref_logprobs": ref[MASK],
            "advantages": ADVANTAGES[:, None].expand(4, WIDTH)[MASK],
        },
    )


def our_loss(loss_class, options, logprobs, batch):
    """Divided over the whole batch."""
    loss = NormalizedLoss(loss_class(loss_class.config_class(**options)), count_trained(batch))
    return loss(ModelOutputs(logprobs=logprobs), batch).total


def same(ours, ours_in, theirs, theirs_in):
    """Loss, gradient and its norm; the gradient is not that of nothing."""
    ours.backward()
    theirs.backward()
    assert ours.item() == approx(theirs.item(), rel=1e-6)
    assert ours_in.grad.tolist() == approx(theirs_in.grad[MASK].tolist(), rel=1e-6, abs=1e-12)
    assert ours_in.grad.norm().item() == approx(theirs_in.grad.norm().item(), rel=1e-6)
    assert ours_in.grad.norm() > 1e-3


SEQUENCE = {"importance_sampling_level": "sequence"}


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize(
    ("loss_class", "options", "settings"),
    [
        (ClippedPolicyGradientLoss, {}, {"loss_type": "dapo"}),
        (ClippedPolicyGradientLoss, {}, {"loss_type": "bnpo"}),
        (ClippedPolicyGradientLoss, {"aggregation": "sequence"}, {"loss_type": "grpo"}),
        (DrGRPOLoss, {"constant_length": 7}, {"loss_type": "dr_grpo"}),
        (ClippedPolicyGradientLoss, {"ratio_clip_c": 1.6}, {"loss_type": "dapo", "delta": 1.6}),
        (ClippedPolicyGradientLoss, {"correction": "tis", "correction_max": 1.1}, {"tis": 1.1}),
        (
            ClippedPolicyGradientLoss,
            {"aggregation": "sequence", "ratio_clip_c": 1.6},
            {"loss_type": "grpo", "delta": 1.6},
        ),
        (GSPOLoss, {"ratio_clip_min": 0.2}, {"loss_type": "grpo", **SEQUENCE}),
        (GSPOLoss, {"ratio_clip_min": 0.2, "aggregation": "token"}, {"loss_type": "dapo", **SEQUENCE}),
        # TRL's bound is the ratio itself, ours the distance from 1
        (CISPOLoss, {"ratio_clip_max": 0.1}, {"loss_type": "cispo", "high": 1.1}),
        (CISPOLoss, {"correction": "tis", "correction_max": 1.1}, {"loss_type": "cispo", "high": 5.0, "tis": 1.1}),
    ],
)
def test_every_loss_type_of_grpo_that_both_have(loss_class, options, settings, beta):
    current, old, ref, rollout = cases()
    theirs_in, ours_in = current.clone().requires_grad_(), current[MASK].clone().requires_grad_()
    clip = {} if loss_class is CISPOLoss else {"ratio_clip_max": 0.28}
    options = {**clip, "reference_kl_beta": beta, "reference_kl_gradient": "direct", **options}
    theirs = grpo_loss(theirs_in, old, ref, rollout, beta=beta, **settings)
    same(our_loss(loss_class, options, ours_in, our_batch(old, ref, rollout)), ours_in, theirs, theirs_in)


def test_a_kl_weighted_by_importance():
    current, old, ref, _ = cases()
    theirs_in, ours_in = current.clone().requires_grad_(), current[MASK].clone().requires_grad_()
    options = {"ratio_clip_max": 0.28, "reference_kl_beta": 0.05, "reference_kl_gradient": "importance"}
    theirs = grpo_loss(theirs_in, old, ref, old, beta=0.05, bias_correction=True)
    same(our_loss(ClippedPolicyGradientLoss, options, ours_in, our_batch(old, ref, old)), ours_in, theirs, theirs_in)


def test_bnpo_depends_on_the_micro_batches_and_ours_does_not():
    """TRL's "bnpo" divides by the tokens of each micro-batch: cut in two, the loss of this batch changes by a third."""
    current, old, ref, rollout = cases()
    whole = grpo_loss(current, old, ref, rollout, loss_type="bnpo").item()
    halves = [grpo_loss(current, old, ref, rollout, loss_type="bnpo", rows=slice(i, i + 2)).item() for i in (0, 2)]
    batch = our_batch(old, ref, rollout)
    loss = NormalizedLoss(ClippedPolicyGradientLoss(), count_trained(batch))
    parts = [
        loss(ModelOutputs(logprobs=current[i : i + 2][MASK[i : i + 2]]), batch.select([i, i + 1])).total.item()
        for i in (0, 2)
    ]
    assert sum(parts) == approx(loss(ModelOutputs(logprobs=current[MASK]), batch).total.item(), rel=1e-6)
    assert abs(sum(halves) / 2 / whole - 1) > 0.1


# -- RLOO ----------------------------------------------------------------------------------------------------------


def rloo_loss(logprobs, old):
    trainer = bare("rloo_trainer", "RLOOTrainer", logprobs, epsilon_low=0.2, epsilon_high=0.28)
    return trainer._compute_loss(None, {**completions(), "advantages": ADVANTAGES, "old_logps": (old * MASK).sum(1)})


def test_rloo_off_policy_is_the_product_of_ratios():
    current, old, ref, _ = cases()
    old = current + 0.2 * (old - current)
    theirs_in, ours_in = current.clone().requires_grad_(), current[MASK].clone().requires_grad_()
    options = {"length_normalized": False, "ratio_clip_min": 0.2, "ratio_clip_max": 0.28}
    ours = our_loss(GSPOLoss, options, ours_in, our_batch(old, ref, old))
    same(ours, ours_in, rloo_loss(theirs_in, old), theirs_in)


def test_rloo_on_policy_is_reinforce():
    """The gradient is the same; the value differs, as TRL's is -mean(A) and ours -mean(A * logprob)."""
    current, _, ref, _ = cases()
    theirs_in, ours_in = current.clone().requires_grad_(), current[MASK].clone().requires_grad_()
    ours = our_loss(ReinforceLoss, {}, ours_in, our_batch(current, ref, current))
    theirs = rloo_loss(theirs_in, current)
    ours.backward()
    theirs.backward()
    assert ours_in.grad.tolist() == approx(theirs_in.grad[MASK].tolist(), rel=1e-6)
    assert theirs.item() == approx(-ADVANTAGES.mean().item())
    assert ours.item() == approx(-(ADVANTAGES * (current * MASK).sum(1)).mean().item())


# -- advantages, by the formulas of TRL's trainers -----------------------------------------------------------------


def rewards_in_groups(rewards):
    fields = {"rewards": rewards, "group_ids": torch.arange(len(rewards) // 4).repeat_interleave(4)}
    return BatchedDataDict([1] * len(rewards), {"loss_mask": torch.ones(len(rewards), dtype=torch.bool)}, fields)


REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.25, 3.0, 2.0, 2.0, 2.0])


def test_group_relative_advantages():
    """(reward - group mean) / (group std + 1e-4), with Bessel's factor."""
    grouped = REWARDS.view(-1, 4)
    expected = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    estimator = GroupRelativeAdvantages(GroupRelativeConfig(leave_one_out=False, epsilon=1e-4))
    assert estimator(rewards_in_groups(REWARDS)).tolist() == approx(expected.flatten().tolist(), rel=1e-5)


@pytest.mark.parametrize("whiten", [False, True])
def test_rloo_advantages_with_the_kl_in_the_reward(whiten):
    """reward - beta * sum(old - ref), minus the mean of the others; normalised over the batch with 1e-4."""
    generator = torch.Generator().manual_seed(2)
    policy, ref = -torch.rand(8, generator=generator), -torch.rand(8, generator=generator)
    rewards = (REWARDS - 0.05 * (policy - ref)).view(-1, 4)
    expected = rewards - (rewards.sum(1, keepdim=True) - rewards) / 3
    if whiten:
        expected = (expected - expected.mean()) / (expected.std() + 1e-4)
    batch = rewards_in_groups(REWARDS)
    batch.set_tokens("rollout_logprobs", policy)
    batch.set_tokens("ref_logprobs", ref)
    take_kl_from_rewards(batch, RewardKLConfig(beta=0.05))
    estimator = RLOOAdvantages(RLOOAdvantagesConfig(whiten=whiten))
    assert estimator(batch).tolist() == approx(expected.flatten().tolist(), rel=1e-4)
