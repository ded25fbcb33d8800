"""The losses and advantages of this package against the contracts of their kinds, option by option."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.testing import AdvantageContract, LossContract
from nemo_rl_plugins_grpo.advantage_config import (
    GDPOAdvantagesConfig,
    GroupRelativeConfig,
    PassAtKConfig,
    RawConfig,
    ReinforcePPAdvantagesConfig,
    RLOOAdvantagesConfig,
)
from nemo_rl_plugins_grpo.advantages.gdpo import GDPOAdvantages
from nemo_rl_plugins_grpo.advantages.grpo import GroupRelativeAdvantages
from nemo_rl_plugins_grpo.advantages.pass_at_k import PassAtKAdvantages
from nemo_rl_plugins_grpo.advantages.raw import RawAdvantages
from nemo_rl_plugins_grpo.advantages.reinforce_pp import ReinforcePPAdvantages
from nemo_rl_plugins_grpo.advantages.rloo import RLOOAdvantages
from nemo_rl_plugins_grpo.loss_config import (
    CISPOLossConfig,
    ClippedPGConfig,
    DrGRPOLossConfig,
    GSPOLossConfig,
    ReinforceLossConfig,
)
from nemo_rl_plugins_grpo.losses.cispo import CISPOLoss
from nemo_rl_plugins_grpo.losses.clipped import ClippedPolicyGradientLoss
from nemo_rl_plugins_grpo.losses.dr_grpo import DrGRPOLoss
from nemo_rl_plugins_grpo.losses.gspo import GSPOLoss
from nemo_rl_plugins_grpo.losses.reinforce import ReinforceLoss

torch.set_num_threads(1)

TIS = {"correction": "tis", "correction_max": 1.02}
ICEPOP = {"correction": "icepop", "correction_min": 0.95, "correction_max": 1.05}


def variants(**options):
    """Fixture parameters of options by a short name."""
    return {"params": list(options.values()), "ids": list(options)}


class TestClippedPolicyGradientLoss(LossContract):
    @pytest.fixture(
        **variants(
            default={},
            sequence={"aggregation": "sequence"},
            constant={"aggregation": "constant", "constant_length": 8},
            clip_higher={"ratio_clip_min": 0.2, "ratio_clip_max": 0.28, "ratio_clip_c": 3.0},
            against_rollout={"ratio_against": "rollout"},
            importance={"correction": "importance"},
            tis=TIS,
            icepop=ICEPOP,
            seq_mask_tis={**ICEPOP, "correction": "seq_mask_tis"},
            kl_k1={"reference_kl_beta": 0.1, "reference_kl_type": "k1", "reference_kl_gradient": "direct"},
            kl_k2={"reference_kl_beta": 0.1, "reference_kl_type": "k2", "reference_kl_gradient": "direct"},
            kl_k3={"reference_kl_beta": 0.1, "reference_kl_type": "k3", "reference_kl_gradient": "direct"},
            on_policy={"force_on_policy_ratio": True},
            kl_unbiased={"reference_kl_beta": 0.1},
            positive_nll={"positive_nll_weight": 0.1},
            positive_nll_sequence={"positive_nll_weight": 0.1, "aggregation": "sequence"},
            kl_importance={"reference_kl_beta": 0.1, "reference_kl_gradient": "importance"},
        )
    )
    def loss(self, request):
        return ClippedPolicyGradientLoss(ClippedPGConfig(**request.param))


class TestDrGRPOLoss(LossContract):
    @pytest.fixture(**variants(default={}, length={"constant_length": 8}))
    def loss(self, request):
        return DrGRPOLoss(DrGRPOLossConfig(**request.param))


class TestGSPOLoss(LossContract):
    @pytest.fixture(
        **variants(
            default={},
            wide={"ratio_clip_min": 0.2, "ratio_clip_max": 0.2},
            product={"length_normalized": False, "ratio_clip_min": 0.2, "ratio_clip_max": 0.2},
            token={"aggregation": "token"},
            against_rollout={"ratio_against": "rollout"},
            tis=TIS,
            icepop=ICEPOP,
            kl={"reference_kl_beta": 0.1},
        )
    )
    def loss(self, request):
        return GSPOLoss(GSPOLossConfig(**request.param))


class TestCISPOLoss(LossContract):
    @pytest.fixture(
        **variants(
            default={},
            tight={"ratio_clip_min": 0.05, "ratio_clip_max": 0.05},
            sequence={"aggregation": "sequence"},
            against_rollout={"ratio_against": "rollout"},
            tis=TIS,
        )
    )
    def loss(self, request):
        return CISPOLoss(CISPOLossConfig(**request.param))


class TestReinforceLoss(LossContract):
    @pytest.fixture(**variants(default={}, token={"aggregation": "token"}, tis=TIS, kl={"reference_kl_beta": 0.1}))
    def loss(self, request):
        return ReinforceLoss(ReinforceLossConfig(**request.param))


# -- advantages ------------------------------------------------------------------------------------------------


class TestGroupRelativeAdvantages(AdvantageContract):
    @pytest.fixture(params=[(True, True), (True, False), (False, True), (False, False)], ids=str)
    def advantage(self, request):
        normalize, leave_one_out = request.param
        return GroupRelativeAdvantages(GroupRelativeConfig(normalize=normalize, leave_one_out=leave_one_out))


class TestRLOOAdvantages(AdvantageContract):
    @pytest.fixture(params=[False, True], ids=["default", "whiten"])
    def advantage(self, request):
        return RLOOAdvantages(RLOOAdvantagesConfig(whiten=request.param))


class TestReinforcePPAdvantages(AdvantageContract):
    @pytest.fixture(**variants(default={}, group_baseline={"group_baseline": True}))
    def advantage(self, request):
        return ReinforcePPAdvantages(ReinforcePPAdvantagesConfig(**request.param))


class TestReinforcePPGroupBaselineOnly(AdvantageContract):
    @pytest.fixture
    def advantage(self):
        return ReinforcePPAdvantages(ReinforcePPAdvantagesConfig(group_baseline=True, whiten=False))


class TestReinforcePPByToken(AdvantageContract):
    """With rewards of single tokens."""

    per_token = True

    def add_fields(self, batch, generator):
        batch.set_tokens("token_rewards", -torch.rand(batch.num_tokens, generator=generator) / 10)

    @pytest.fixture
    def advantage(self):
        return ReinforcePPAdvantages()


class TestGDPOAdvantages(AdvantageContract):
    @pytest.fixture(
        **variants(
            default={}, groups_only={"whiten": False}, weights={"weights": {"score": 2.0}, "leave_one_out": True}
        )
    )
    def advantage(self, request):
        return GDPOAdvantages(GDPOAdvantagesConfig(**request.param))


class TestRawAdvantages(AdvantageContract):
    @pytest.fixture(params=[False, True], ids=["default", "whiten"])
    def advantage(self, request):
        return RawAdvantages(RawConfig(whiten=request.param))


class TestPassAtKAdvantages(AdvantageContract):
    @pytest.fixture(params=[1, 2, 4])
    def advantage(self, request):
        return PassAtKAdvantages(PassAtKConfig(k=request.param))
