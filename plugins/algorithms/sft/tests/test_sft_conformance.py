"""The loss of this package against the contract of losses."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.testing import LossContract
from nemo_rl_plugins_sft.loss import NLLLoss

torch.set_num_threads(1)


class TestNLLLoss(LossContract):
    @pytest.fixture
    def loss(self):
        return NLLLoss()
