"""Two processes, data-parallel or tensor-parallel, take the steps that one process takes."""

from __future__ import annotations

import sys

import cloudpickle
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_rl_core.errors import CheckpointError, ConfigError, InvariantViolation
from nemo_rl_core.infra.weights.fingerprint import fingerprint
from nemo_rl_core.infra.weights.in_process import InProcessSync
from nemo_rl_core.infra.workers.local import LocalLauncher
from nemo_rl_core.models import load_model
from nemo_rl_core.protocols.launcher import WorkerSpec
from nemo_rl_core.protocols.training_backend import StepPlan
from nemo_rl_core.schema import ClusterConfig, OptimizerConfig, PolicyConfig
from nemo_rl_plugins_dtensor.backend import DTensorBackend
from nemo_rl_plugins_dtensor.config import DTensorConfig
from nemo_rl_plugins_dtensor.parallel import local_part, tensor_plan


@pytest.fixture(scope="module")
def launcher():
    found = LocalLauncher()
    found.setup(ClusterConfig(device="cpu", cpus_per_node=2))
    yield found
    found.shutdown()


@pytest.fixture(scope="module", params=["data", "tensor"])
def group(request, launcher, model_name):
    """Two workers; qwen3 has norms over single heads, whose gradients tensor-parallel ranks must add up."""
    tensor = 2 if request.param == "tensor" else 1
    found = launcher.launch(_spec(model_name("qwen3"), tensor_parallel_size=tensor))
    yield found
    found.shutdown()


def _spec(model, **policy):
    config = PolicyConfig(
        model_name=model,
        num_workers=2,
        options=DTensorConfig(),
        optimizer=OptimizerConfig(lr=1e-3),
        max_grad_norm=0.05,
        **policy,
    )
    return WorkerSpec(role="policy", factory=DTensorBackend, config=config, num_workers=2, timeout_s=60.0)


def _arguments(group, batch, loss):
    """Uneven shards: the last has an empty micro-batch, so that its rank must still take part."""
    out = []
    axes = group.call("parallel_axes", timeout_s=60)[0]
    for index, size in [(rank // axes["tp"], axes["dp"]) for rank in range(group.size)]:
        mine = list(range(len(batch)))[index::size]
        plan = [mine[:3], mine[3:]] if index == 0 else [mine, []]
        out.append((batch, loss, StepPlan(micro_batches=plan)))
    return out


@pytest.fixture
def make_shipped_loss(make_loss):
    cloudpickle.register_pickle_by_value(sys.modules[make_loss.__module__])
    return make_loss


class _Engine:
    dtype = torch.float32

    def update_weights(self, version, tensors, *, share=False):
        self.weights = {name: tensor.clone() for name, tensor in tensors}

    def fingerprint(self):
        return fingerprint(self.weights.items())


def _sizes(backend):
    """Bytes on this rank between two steps, as planned and as they are."""
    planned = backend.memory(backend.config, load_model(backend.config.model_name, dtype=torch.float32, empty=True))
    states = [v for state in backend.optimizer.state.values() for v in state.values()]
    found = sum(local_part(tensor).nbytes for tensor in (*backend.weights.values(), *states))
    return found, planned.weights + planned.optimizer


def test_three_steps_equal_those_of_one_process(group, make_backend, make_shipped_loss, batch, tmp_path):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    loss = make_shipped_loss(batch)
    alone = make_backend("qwen3", lr=1e-3, max_grad_norm=0.05)
    for _ in range(3):
        results = group.call_each("train_step", _arguments(group, batch, loss), timeout_s=60)
        expected = alone.train_step(batch, loss, StepPlan(micro_batches=[range(8)]))
        assert results[0].grad_norm == results[1].grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for found in group.call("get_logprobs", batch, timeout_s=60):
        torch.testing.assert_close(found, alone.get_logprobs(batch), rtol=1e-5, atol=1e-5)
    engine = _Engine()
    report = InProcessSync().sync(group, engine, version=3, share=True, timeout_s=60)
    weights = dict(alone.export_weights())
    assert engine.weights.keys() == weights.keys()
    assert report.num_bytes == sum(t.numel() * 4 for t in weights.values())
    for name, tensor in weights.items():
        torch.testing.assert_close(engine.weights[name], tensor, rtol=1e-5, atol=1e-5)
    group.call("export_model", tmp_path, timeout_s=60)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).named_parameters())
    assert all(torch.equal(loaded[n], t) for n, t in engine.weights.items())
    found, planned = map(max, zip(*group.call("apply", _sizes, timeout_s=60), strict=True))
    assert found == pytest.approx(planned, rel=0.03)


def test_a_loss_of_one_rank_that_is_not_finite_stops_all_and_changes_nothing(group, make_shipped_loss, batch):
    before = group.call("get_logprobs", batch, timeout_s=60)[0].clone()
    batch["advantages"][torch.where(batch["loss_mask"])[0][0]] = torch.inf
    with pytest.raises(InvariantViolation, match=r"\[policy rank 0\].*weights were not changed"):
        group.call_each("train_step", _arguments(group, batch, make_shipped_loss(batch)), timeout_s=60)
    assert torch.equal(group.call("get_logprobs", batch, timeout_s=60)[0], before)


def test_resuming_is_bit_equal_and_a_damaged_file_is_named(group, make_shipped_loss, batch, tmp_path):
    arguments = _arguments(group, batch, make_shipped_loss(batch))
    group.call("save_checkpoint", tmp_path, timeout_s=60)
    expected = group.call_each("train_step", arguments, timeout_s=60)
    weights = [t.clone() for _, t in group.iterate("export_weights", timeout_s=60)]
    of_rank = group.call("apply", lambda backend: fingerprint(backend.export_weights()), timeout_s=60)
    assert of_rank[0] == of_rank[1]  # "exports_on_every_rank"
    group.call("load_checkpoint", tmp_path, timeout_s=60)
    assert group.call_each("train_step", arguments, timeout_s=60) == expected
    again = [t.clone() for _, t in group.iterate("export_weights", timeout_s=60)]
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    file = tmp_path / "trainer-rank1.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"\[policy rank 1\].*trainer-rank1\.pt is truncated"):
        group.call("load_checkpoint", tmp_path, timeout_s=60)


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("gpt2", 2, r"No tensor-parallel plan is known for GPT2LMHeadModel.*tensor_parallel_size: 1"),
        ("qwen2", 4, r"tensor_parallel_size is 4, but Qwen2ForCausalLM has num_key_value_heads=2"),
    ],
)
def test_a_model_that_cannot_be_split_is_a_clear_error(model_name, family, size, message):
    with pytest.raises(ConfigError, match=message):
        tensor_plan(load_model(model_name(family), dtype=torch.float32), size)


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_ranks_that_share_prefixes_take_the_step_of_whole_sequences(
    launcher, model_name, make_backend, make_shipped_loss, make_batch, tensor_parallel_size
):
    batch = make_batch([15, 17, 14, 20, 16, 13])
    prompt = batch.position_ids < 12
    batch["input_ids"][prompt] = torch.arange(12).repeat(len(batch))
    batch.set_tokens("loss_mask", ~prompt)
    loss = make_shipped_loss(batch)
    alone = make_backend("qwen3", lr=1e-3, max_grad_norm=0.05, options=DTensorConfig(share_prefixes=False))
    assert len(make_backend("qwen3").network.row(batch, device="cpu", only_trained=True).input_ids) == 12 + 17
    ranks = launcher.launch(_spec(model_name("qwen3"), tensor_parallel_size=tensor_parallel_size))
    try:
        for _ in range(2):
            results = ranks.call_each("train_step", _arguments(ranks, batch, loss), timeout_s=60)
            expected = alone.train_step(batch, loss, StepPlan(micro_batches=[range(len(batch))]))
            assert results[0].grad_norm == results[1].grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        for found in ranks.call("get_logprobs", batch, timeout_s=60):
            torch.testing.assert_close(found, alone.get_logprobs(batch), rtol=1e-5, atol=1e-5)
    finally:
        ranks.shutdown()
