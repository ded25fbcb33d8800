"""The same loss and gradient as TRL's GRPOTrainer on equal inputs (skipped where TRL is not installed)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pytest import approx

from nemo_rl_core.data.batch import BatchedDataDict
from nemo_rl_core.protocols.loss import ModelOutputs
from nemo_rl_core.training.normalize import NormalizedLoss, count_trained
from nemo_rl_plugins_grpo.advantages import GroupRelativeAdvantages
from nemo_rl_plugins_grpo.config import ClippedPGConfig, GroupRelativeConfig
from nemo_rl_plugins_grpo.loss import ClippedPolicyGradientLoss

LENGTHS = [3, 5, 1, 4]
WIDTH = 5


class _Quiet(dict):
    def __missing__(self, key):
        self[key] = []
        return self[key]


def trl_loss(logprobs, mask, advantages, old, ref, *, loss_type, beta, delta, low, high):
    """TRL's loss of completions padded to [B, T], by its own method on a bare object."""
    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer")
    trainer = object.__new__(trainer_module.GRPOTrainer)

    def gather(tensor):
        return tensor

    trainer.__dict__.update(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=False,
        max_completion_length=7,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=gather, gather_for_metrics=gather, reduce=lambda x, **_: x, num_processes=1),
        _metrics={"train": _Quiet()},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
    )
    inputs = {
        "prompt_ids": torch.ones(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.ones_like(mask, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    return trainer._compute_loss(None, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("delta", [None, 1.6])
@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [
        ("dapo", {}),
        ("grpo", {"aggregation": "sequence"}),
        ("dr_grpo", {"aggregation": "constant", "constant_length": 7}),
    ],
)
def test_loss_and_gradient(loss_type, aggregation, delta, beta):
    generator = torch.Generator().manual_seed(11)
    current = -torch.rand(4, WIDTH, generator=generator, dtype=torch.float64) * 2
    old = current + 0.4 * torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)
    ref = current + 0.4 * torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    advantages = torch.tensor([1.0, -0.7, -1.3, 0.4], dtype=torch.float64)

    theirs_in = current.clone().requires_grad_()
    theirs = trl_loss(
        theirs_in, mask, advantages, old, ref, loss_type=loss_type, beta=beta, delta=delta, low=0.2, high=0.28
    )
    theirs.backward()

    batch = BatchedDataDict(
        LENGTHS,
        {
            "loss_mask": torch.ones(sum(LENGTHS), dtype=torch.bool),
            "rollout_logprobs": old[mask],
            "logprobs": old[mask],
            "ref_logprobs": ref[mask],
            "advantages": advantages[:, None].expand(4, WIDTH)[mask],
        },
    )
    config = ClippedPGConfig(
        ratio_clip_max=0.28,
        ratio_clip_c=delta,
        reference_kl_beta=beta,
        reference_kl_gradient="direct",
        **aggregation,
    )
    ours_in = current[mask].clone().requires_grad_()
    ours = NormalizedLoss(ClippedPolicyGradientLoss(config), count_trained(batch))(
        ModelOutputs(logprobs=ours_in), batch
    ).total
    ours.backward()

    assert ours.item() == approx(theirs.item(), rel=1e-6)
    assert ours_in.grad.tolist() == approx(theirs_in.grad[mask].tolist(), rel=1e-6, abs=1e-12)
    assert ours_in.grad.abs().sum() > 0


def test_advantages():
    """TRL: (reward - group mean) / (group std + 1e-4), with Bessel's factor."""
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25, 3.0, 2.0, 2.0, 2.0])
    grouped = rewards.view(-1, 4)
    expected = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    batch = BatchedDataDict(
        [1] * 8,
        {"loss_mask": torch.ones(8, dtype=torch.bool)},
        {"rewards": rewards, "group_ids": torch.arange(2).repeat_interleave(4)},
    )
    estimator = GroupRelativeAdvantages(GroupRelativeConfig(leave_one_out=False, epsilon=1e-4))
    assert estimator(batch).tolist() == approx(expected.flatten().tolist(), rel=1e-5)
