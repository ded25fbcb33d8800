"""Every loss of this package against the contract of losses."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.testing import LossContract
from nemo_rl_plugins_dpo.config import DPOLossConfig, IPOConfig
from nemo_rl_plugins_dpo.losses.cdpo import ConservativeDPOLoss
from nemo_rl_plugins_dpo.losses.hinge import HingeDPOLoss
from nemo_rl_plugins_dpo.losses.ipo import IPOLoss
from nemo_rl_plugins_dpo.losses.kto import KTOLoss
from nemo_rl_plugins_dpo.losses.normalized import NormalizedDPOLoss
from nemo_rl_plugins_dpo.losses.orpo import ORPOLoss
from nemo_rl_plugins_dpo.losses.robust import RobustDPOLoss
from nemo_rl_plugins_dpo.losses.rpo import RPOLoss
from nemo_rl_plugins_dpo.losses.sigmoid import DPOLoss
from nemo_rl_plugins_dpo.losses.simpo import SimPOLoss

torch.set_num_threads(1)

LOSSES = {
    "dpo": DPOLoss(),
    "dpo-nll": DPOLoss(DPOLossConfig(nll_weight=0.3)),
    "rpo": RPOLoss(),
    "hinge": HingeDPOLoss(),
    "ipo": IPOLoss(),
    "ipo-sums": IPOLoss(IPOConfig(average_logprobs=False, beta=0.05)),
    "cdpo": ConservativeDPOLoss(),
    "robust": RobustDPOLoss(),
    "norm": NormalizedDPOLoss(),
    "orpo": ORPOLoss(),
    "simpo": SimPOLoss(),
}


class TestPairLosses(LossContract):
    @pytest.fixture(params=LOSSES.values(), ids=list(LOSSES))
    def loss(self, request):
        return request.param


class TestKTOLoss(LossContract):
    @pytest.fixture
    def loss(self):
        return KTOLoss()
