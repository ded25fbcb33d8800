"""Refits between a trainer and an engine of one process."""

from __future__ import annotations

import time

import pytest
import torch

from nemo_rl_core.errors import DeadlineExceeded, GenerationError, InvariantViolation
from nemo_rl_core.infra.weights.fingerprint import fingerprint
from nemo_rl_core.infra.weights.in_process import InProcessSync, InProcessSyncConfig
from nemo_rl_core.infra.workers.local import InProcessGroup


class Trainer:
    def __init__(self):
        self.weights = {"a": torch.randn(30, 40), "b": torch.randn(7)}

    def export_weights(self):
        yield from self.weights.items()

    def shutdown(self):
        pass


class Engine:
    dtype = torch.float32

    def __init__(self):
        self.weights = {}
        self.version = 0

    def update_weights(self, version, tensors, *, share=False):
        self.weights = {n: t if share else t.clone() for n, t in tensors}
        self.version = version

    def fingerprint(self):
        return fingerprint(self.weights.items())


class HalfEngine(Engine):
    dtype = torch.bfloat16


class LossyEngine(Engine):
    """Forgets to load one tensor, as engines have done."""

    def update_weights(self, version, tensors, *, share=False):
        super().update_weights(version, tensors, share=share)
        self.weights["b"] = torch.zeros(7)


class SlowEngine(Engine):
    def update_weights(self, version, tensors, *, share=False):
        list(tensors)
        time.sleep(30)


class FussyEngine(Engine):
    def update_weights(self, version, tensors, *, share=False):
        raise GenerationError("no weight of that name")


@pytest.fixture
def trainer():
    return Trainer()


def _sync(trainer, engine, *, share=False, timeout_s=10.0, config=None):
    return InProcessSync(config).sync(InProcessGroup(trainer), engine, version=4, share=share, timeout_s=timeout_s)


def test_sharing_copies_nothing_and_follows_the_trainer(trainer):
    engine = Engine()
    report = _sync(trainer, engine, share=True)
    assert (report.version, report.num_tensors, report.num_bytes) == (4, 2, 0)
    assert report.fingerprint == engine.fingerprint()
    trainer.weights["a"].zero_()
    assert engine.weights["a"].abs().sum() == 0


def test_copying_leaves_the_engine_its_own(trainer):
    engine = Engine()
    report = _sync(trainer, engine)
    assert report.num_bytes == (30 * 40 + 7) * 4
    trainer.weights["a"].zero_()
    assert engine.weights["a"].abs().sum() > 0


@pytest.mark.parametrize("share", [True, False])
def test_an_engine_of_another_type_gets_and_compares_its_own_type(trainer, share):
    engine = HalfEngine()
    report = _sync(trainer, engine, share=share)
    assert engine.weights["a"].dtype == torch.bfloat16
    assert report.num_bytes == (30 * 40 + 7) * 2


def test_an_engine_that_loses_a_tensor_is_found_out(trainer):
    with pytest.raises(InvariantViolation, match=r"weight version 4 the engine's weights differ"):
        _sync(trainer, LossyEngine())
    _sync(trainer, LossyEngine(), config=InProcessSyncConfig(check_fingerprint=False))


def test_the_deadline_names_the_side_that_hangs(trainer):
    with pytest.raises(DeadlineExceeded, match=r"0.2 s while waiting for the engine .*after 2 tensors"):
        _sync(trainer, SlowEngine(), timeout_s=0.2)

    def slow():
        yield "a", trainer.weights["a"]
        time.sleep(30)

    trainer.export_weights = slow
    with pytest.raises(DeadlineExceeded, match=r"waiting for the trainer .*after 1 tensors"):
        _sync(trainer, Engine(), timeout_s=0.2)


def test_what_the_engine_raises_reaches_the_caller(trainer):
    with pytest.raises(GenerationError, match="no weight of that name"):
        _sync(trainer, FussyEngine())
