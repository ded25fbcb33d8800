"""What `offload` gives back, and that nothing is lost by it."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.errors import InvariantViolation
from nemo_rl_core.models import load_model
from nemo_rl_core.protocols.training_backend import StepPlan
from nemo_rl_plugins_dtensor.config import DTensorConfig, LoRAConfig

VARIANTS = {
    "float32": {},
    "bfloat16 with masters": {"precision": "bfloat16"},
    "adapters": {"options": DTensorConfig(lora=LoRAConfig(rank=4))},
    "frozen": {"trained": False},
}


@pytest.fixture
def step(batch, make_loss):
    def take(backend):
        return backend.train_step(batch, make_loss(batch), StepPlan(micro_batches=[[0, 1, 2, 3], [4, 5, 6, 7]]))

    return take


def held(backend):
    """Every tensor that lives between two steps, found by another way than the backend's."""
    found = [*backend.model.state_dict().values()]
    if backend.masters is not None:
        found += backend.masters.masters
    if backend.optimizer is not None:
        found += [v for s in backend.optimizer.state_dict()["state"].values() for v in s.values() if torch.is_tensor(v)]
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_storage_is_emptied_and_the_next_step_is_the_same(make_backend, step, batch, variant):
    backend, other = make_backend(**VARIANTS[variant]), make_backend(**VARIANTS[variant])
    trained = backend.config.trained
    for running in (backend, other):
        if trained:
            step(running)
    tensors, before = held(backend), backend.get_logprobs(batch)
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) > 0
    for _ in range(2):
        backend.offload()
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 0
        assert all(p.grad is None for p in backend.parameters)
        backend.reload()
    assert torch.equal(backend.get_logprobs(batch), before)
    if trained:
        assert step(backend) == step(other)
    for mine, theirs in zip(held(backend), held(other), strict=True):
        assert torch.equal(mine, theirs)


def test_a_model_that_is_away_says_so(make_backend, step, batch, tmp_path):
    backend = make_backend()
    backend.offload()
    uses = (
        lambda: step(backend),
        lambda: backend.get_logprobs(batch),
        backend.get_output_layer,
        lambda: list(backend.export_weights()),
        lambda: backend.save_checkpoint(tmp_path),
        lambda: backend.load_checkpoint(tmp_path),
    )
    for use in uses:
        with pytest.raises(InvariantViolation, match="role 'policy' waits in the host's memory"):
            use()
    assert not list(tmp_path.iterdir())


MEASURED = {
    **VARIANTS,
    "bfloat16 alone": {"precision": "bfloat16", "options": DTensorConfig(master_weights=False)},
    "adapters in bfloat16": {"precision": "bfloat16", "options": DTensorConfig(lora=LoRAConfig(rank=4))},
    "frozen in bfloat16": {"trained": False, "precision": "bfloat16"},
}


@pytest.mark.parametrize("variant", MEASURED)
def test_planned_memory_is_what_the_tensors_take(make_backend, step, variant):
    backend = make_backend(**MEASURED[variant])
    gradients = []
    if backend.optimizer is not None:
        backend.optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.nbytes for p in backend._trained()))
        step(backend)
    planned = backend.memory(backend.config, load_model(backend.config.model_name, dtype=torch.float32, empty=True))
    assert sum(gradients) == pytest.approx(planned.gradients, rel=0.01)
    tensors = {id(tensor.untyped_storage()): tensor.nbytes for tensor in held(backend)}
    assert sum(tensors.values()) == pytest.approx(planned.weights + planned.optimizer, rel=0.01)
