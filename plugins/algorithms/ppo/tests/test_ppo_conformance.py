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
    **{kind: {"reference_kl_beta": 0.1, "reference_kl_type": kind} for kind in ("k1", "k2", "k3")},
}
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


class TestClippedValueLoss(LossContract):
    @pytest.fixture(params=VALUES.values(), ids=list(VALUES))
    def loss(self, request):
        return ClippedValueLoss(ClippedValueConfig(**request.param))

    def add_fields(self, batch, generator):
        for name in ("values", "returns"):
            batch.set_tokens(name, torch.randn(batch.num_tokens, generator=generator, dtype=torch.float64))


class TestGeneralizedAdvantages(AdvantageContract):
    @pytest.fixture(
        params=[
            {},
            {"whiten_rewards": True},
            {"whiten": False, "whiten_rewards": True},
            {"whiten": False},
            {"whiten": False, "gamma": 0.9, "policy_lambda": 0.5},
            {"whiten": False, "length_adaptive_alpha": 0.5},
            {"whiten": False, "bootstrap_truncated": True},
        ],
        ids=str,
    )
    def advantage(self, request):
        return GeneralizedAdvantages(GAEConfig(**request.param))
