"""The losses and the advantages of this package against the contracts of their kinds, option by option."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.testing import AdvantageContract, LossContract
from nemo_rl_plugins_ppo.config import ClippedSurrogateConfig, ClippedValueConfig, GAEConfig
from nemo_rl_plugins_ppo.gae import GeneralizedAdvantages
from nemo_rl_plugins_ppo.policy_loss import ClippedSurrogateLoss
from nemo_rl_plugins_ppo.value_loss import ClippedValueLoss

torch.set_num_threads(1)

SURROGATES = {
    "default": {},
    "sequence": {"aggregation": "sequence"},
    "clip-higher": {"ratio_clip_max": 0.28, "ratio_clip_c": 3.0},
    "against-rollout": {"ratio_against": "rollout"},
    "entropy": {"entropy_coef": 0.01},
}
STRAIGHT_THROUGH = {kind: {"reference_kl_beta": 0.1, "reference_kl_type": kind} for kind in ("k1", "k2", "k3")}
VALUES = {
    "default": {},
    "no-clip": {"clip_range": None},
    "tight": {"clip_range": 0.01, "scale": 0.5},
    "sequence": {"aggregation": "sequence"},
}


class TestClippedSurrogateLoss(LossContract):
    @pytest.fixture(params=SURROGATES.values(), ids=list(SURROGATES))
    def loss(self, request):
        return ClippedSurrogateLoss(ClippedSurrogateConfig(**request.param))

    def test_ratio_one_step_is_reinforce(self, loss):
        if loss.config.entropy_coef > 0:
            pytest.skip("the entropy is raised beside the surrogate")
        super().test_ratio_one_step_is_reinforce(loss)


class TestSurrogateThatStopsGradients(LossContract):
    """The gradient of its KL is that of the expectation, not of the value."""

    differentiable = False

    @pytest.fixture(params=STRAIGHT_THROUGH.values(), ids=list(STRAIGHT_THROUGH))
    def loss(self, request):
        return ClippedSurrogateLoss(ClippedSurrogateConfig(**request.param))


class TestClippedValueLoss(LossContract):
    @pytest.fixture(params=VALUES.values(), ids=list(VALUES))
    def loss(self, request):
        return ClippedValueLoss(ClippedValueConfig(**request.param))

    def add_fields(self, batch, generator):
        for name in ("values", "returns"):
            batch.set_tokens(name, torch.randn(batch.num_tokens, generator=generator, dtype=torch.float64))


class _WithCritic(AdvantageContract):
    per_token = True

    def add_fields(self, batch, generator):
        batch.set_tokens("values", torch.rand(batch.num_tokens, generator=generator))
        batch.set_tokens("token_rewards", -0.1 * torch.rand(batch.num_tokens, generator=generator))
        batch.set_sequences("final_values", torch.rand(len(batch), generator=generator))


class TestGeneralizedAdvantages(_WithCritic):
    baseline = "none"

    @pytest.fixture(
        params=[
            {},
            {"gamma": 0.9, "policy_lambda": 0.5},
            {"length_adaptive_alpha": 0.5},
            {"bootstrap_truncated": True},
        ],
        ids=str,
    )
    def advantage(self, request):
        return GeneralizedAdvantages(GAEConfig(whiten=False, **request.param))


class TestWhitenedAdvantages(_WithCritic):
    baseline = "batch"

    @pytest.fixture(params=[{}, {"whiten_rewards": True}, {"whiten": False, "whiten_rewards": True}], ids=str)
    def advantage(self, request):
        return GeneralizedAdvantages(GAEConfig(**request.param))
