"""The algorithm keeps the contract of its kind: with a reference, without one, and with single answers."""

from __future__ import annotations

import pytest

from nemo_rl_core.testing import AlgorithmCase, AlgorithmContract
from nemo_rl_plugins_dpo.algorithm import DPO

PAIRS = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "no"} for a in range(5) for b in range(5)]
ANSWERS = [
    {"prompt": f"{a}+{b}=", "completion": str(a + b) if good else "no", "label": good}
    for a in range(5)
    for b in range(5)
    for good in (True, False)
]


class TestDPO(AlgorithmContract):
    @pytest.fixture
    def algorithm(self):
        return AlgorithmCase(component=DPO, rows=PAIRS, target=None)


class TestSimPO(AlgorithmContract):
    """No reference."""

    @pytest.fixture
    def algorithm(self):
        return AlgorithmCase(component=DPO, config={"loss": "simpo"}, rows=PAIRS, target=None)


class TestKTO(AlgorithmContract):
    """Single answers and a KL estimate."""

    loss_margin = 0.1

    @pytest.fixture
    def algorithm(self):
        loss = {"name": "kto", "options": {"beta": 0.5}}
        target = lambda row: row["completion"]  # noqa: E731
        return AlgorithmCase(component=DPO, config={"loss": loss}, rows=ANSWERS, target=target)
