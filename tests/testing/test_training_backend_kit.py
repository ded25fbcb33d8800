"""The kit of training backends, tried on backends that are broken in one thing each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from nemo_rl_core.testing import TrainingBackendContract, run_kit
from nemo_rl_core.testing.conformance.frame.kit import clauses
from nemo_rl_plugins_dtensor.backend import DTensorBackend

sys.path.insert(0, str(Path(__file__).parent))
from broken_training_backends import BROKEN


class OneProcess(TrainingBackendContract):
    num_processes = 0


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_a_broken_backend_is_there_for_each_clause():
    assert set(BROKEN) == set(clauses(TrainingBackendContract))


def test_a_sound_backend_passes():
    report = run_kit(OneProcess, lambda: DTensorBackend)
    assert report.passed, {r.clause: r.message for r in report.results if r.outcome != "passed"}
    assert [r.clause for r in report.results if r.outcome == "skipped"] == ["data_parallel"]


@pytest.mark.parametrize(("clause", "broken"), [(c, b) for c, backends in BROKEN.items() for b in backends])
def test_a_broken_backend_is_caught(clause, broken):
    (result,) = run_kit(TrainingBackendContract, lambda: broken, only=[clause]).results
    assert result.outcome == "failed", f"{broken.__name__} passes {clause}"
    assert result.message
