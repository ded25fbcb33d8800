"""The losses and the advantages of this package against the contracts of their kinds, option by option."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.testing import AdvantageContract, LossContract, RewardContract
from nemo_rl_plugins_distillation.advantages import OnPolicyDistillationAdvantages, OnPolicyDistillationConfig
from nemo_rl_plugins_distillation.conformance import hidden_layers
from nemo_rl_plugins_distillation.forward_kl import ForwardKLLoss
from nemo_rl_plugins_distillation.jensen_shannon import JensenShannonLoss
from nemo_rl_plugins_distillation.loss_config import (
    DivergenceConfig,
    JensenShannonConfig,
    MixedKLConfig,
    ProjectedKLConfig,
    SortedProbabilitiesConfig,
)
from nemo_rl_plugins_distillation.mixed_kl import MixedKLLoss
from nemo_rl_plugins_distillation.projected_kl import ProjectedKLLoss
from nemo_rl_plugins_distillation.reverse_kl import ReverseKLLoss
from nemo_rl_plugins_distillation.reward import unscored
from nemo_rl_plugins_distillation.sorted_probabilities import SortedProbabilitiesLoss
from nemo_rl_plugins_distillation.whole_vocabulary import WholeVocabulary

torch.set_num_threads(1)

CASES = {
    "forward": ForwardKLLoss(),
    "forward-bucket": ForwardKLLoss(DivergenceConfig(tail="bucket")),
    "forward-warm": ForwardKLLoss(DivergenceConfig(temperature=2.0)),
    "reverse": ReverseKLLoss(),
    "reverse-zero": ReverseKLLoss(DivergenceConfig(tail="zero")),
    "mixed": MixedKLLoss(),
    "mixed-zero-nll": MixedKLLoss(MixedKLConfig(tail="zero", nll_weight=0.1)),
    "jensen": JensenShannonLoss(),
    "jensen-zero": JensenShannonLoss(JensenShannonConfig(tail="zero", beta=0.3)),
}


class TestTeacherLosses(LossContract):
    @pytest.fixture(params=CASES.values(), ids=list(CASES))
    def loss(self, request):
        return request.param


class TestWholeVocabulary(LossContract):
    @pytest.fixture(params=["forward", "reverse", "mixed-zero-nll", "jensen", "forward-warm"])
    def loss(self, request):
        return WholeVocabulary(CASES[request.param], hidden_layers())


class TestProjectedKL(LossContract):
    @pytest.fixture(
        params=[
            ProjectedKLConfig(),
            ProjectedKLConfig(forward_weight=0.3, tail="bucket"),
            ProjectedKLConfig(nll_weight=0.1),
        ],
        ids=["forward", "mixed-bucket", "nll"],
    )
    def loss(self, request):
        return ProjectedKLLoss(request.param)


class TestSortedProbabilities(LossContract):
    @pytest.fixture(
        params=[
            SortedProbabilitiesConfig(),
            SortedProbabilitiesConfig(match_vocabulary=False),
            SortedProbabilitiesConfig(matched_weight=0.5, sorted_weight=2.0, nll_weight=0.1),
        ],
        ids=["matched", "ranks", "weights"],
    )
    def loss(self, request):
        return SortedProbabilitiesLoss(request.param)


class TestOnPolicyDistillation(AdvantageContract):
    @pytest.fixture(params=[None, 0.4], ids=["plain", "clipped"])
    def advantage(self, request):
        return OnPolicyDistillationAdvantages(OnPolicyDistillationConfig(clip=request.param))


class TestUnscored(RewardContract):
    @pytest.fixture
    def reward(self):
        return unscored
