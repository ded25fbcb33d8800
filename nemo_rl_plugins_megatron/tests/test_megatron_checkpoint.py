"""A checkpoint of another run is refused with what differs; of the same run it goes on, however the state is held."""

from __future__ import annotations

import itertools

import pytest
import torch
from pytest import approx

from nemo_rl_core.backends import sealed_file
from nemo_rl_core.errors import CheckpointError
from nemo_rl_core.infra.workers.local import InProcessGroup
from nemo_rl_core.schema import OptimizerConfig
from nemo_rl_core.testing.conformance.cases.reference import WeightedLoss
from nemo_rl_core.training.model.policy import Policy
from nemo_rl_plugins_megatron.config import MegatronConfig

ADAM, SGD = (OptimizerConfig(name=f"torch.optim.{name}", lr=1e-2) for name in ("Adam", "SGD"))
MOMENTUM = OptimizerConfig(name="torch.optim.SGD", lr=1e-2, options={"momentum": 0.9})
WHOLE = MegatronConfig(distributed_optimizer=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": "qwen2"}, "other parameters"),
        ({"precision": "bfloat16"}, "its precision is 'float32', here it is 'bfloat16'"),
        (
            {"optimizer": SGD, "options": WHOLE},
            r"its optimizer is 'torch\.optim\.AdamW', here it is 'torch\.optim\.SGD'",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(make_backend, tmp_path, change, reason):
    make_backend().save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f"does not fit this run.*{reason}"):
        make_backend(**change).load_checkpoint(tmp_path)


def test_a_checkpoint_of_one_file_per_worker_is_refused(make_backend, tmp_path):
    sealed_file.write(tmp_path / "trainer.pt", {"format": 1})
    with pytest.raises(CheckpointError, match="its format is 1, here it is 2"):
        make_backend().load_checkpoint(tmp_path)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("optimizer", "distributed", "num_steps"),
    [
        (OptimizerConfig(lr=1e-2), (True, False, True), 2),
        (OptimizerConfig(lr=1e-2), (True, False, True), 0),
        (ADAM, (True, True), 2),
        (SGD, (False, False), 2),
        (MOMENTUM, (False, False), 2),
        (MOMENTUM, (False, False), 0),
    ],
)
def test_it_continues_bit_for_bit_with_and_without_the_distributed_optimizer(
    make_backend, batch, tmp_path, precision, optimizer, distributed, num_steps
):
    backends = [
        make_backend(
            "qwen2",
            precision=precision,
            optimizer=optimizer,
            seed=seed,
            options=MegatronConfig(distributed_optimizer=one),
        )
        for seed, one in enumerate(distributed)
    ]
    policies = [Policy(InProcessGroup(backend), token_budget=100) for backend in backends]
    for _ in range(num_steps):
        policies[0].train_step(batch, WeightedLoss())
    for policy, after in itertools.pairwise(policies):
        policy.save(tmp_path)
        after.load(tmp_path)
    same = [backend for backend, one in zip(backends, distributed, strict=True) if one is distributed[0]]
    others = [backend for backend in backends if backend not in same]
    check_weights(backends[0], others, exact=True)
    for _ in range(2):
        results = [policy.train_step(batch, WeightedLoss()) for policy in policies]
        assert all(result == approx(results[0], rel=1e-6 if precision == "float32" else 1e-2) for result in results)
    check_weights(backends[0], same[1:], exact=True)
    check_weights(backends[0], others, exact=False)  # the distributed optimizer adds the norm up in another order


def check_weights(expected, backends, *, exact):
    weights = {name: tensor.clone() for name, tensor in expected.export_weights()}
    for backend in backends:
        for name, tensor in backend.export_weights():
            if exact:
                assert torch.equal(weights[name], tensor), name
            else:
                torch.testing.assert_close(tensor, weights[name])


def test_the_random_state_is_that_of_the_save(make_backend, tmp_path):
    backend = make_backend()
    backend.save_checkpoint(tmp_path)
    expected = torch.rand(3)
    backend.load_checkpoint(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_scalar_head_is_in_the_checkpoint(make_backend, batch, tmp_path):
    backend, other = (make_backend(head="scalar", seed=seed) for seed in (0, 1))
    backend.save_checkpoint(tmp_path)
    assert not torch.equal(other.get_values(batch), backend.get_values(batch))
    other.load_checkpoint(tmp_path)
    assert torch.equal(other.get_values(batch), backend.get_values(batch))


def test_a_folder_that_cannot_be_written_is_named(make_backend, tmp_path):
    (tmp_path / "trainer").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"Cannot make the folder .*trainer.*FileExistsError"):
        make_backend().save_checkpoint(tmp_path)
