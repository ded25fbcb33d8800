"""Two processes, however they share the model, take the steps that one process takes."""

from __future__ import annotations

import socket
import sys

import attrs
import cloudpickle
import pytest
import torch

from nemo_rl_core.errors import CheckpointError, InvariantViolation
from nemo_rl_core.infra.weights.fingerprint import fingerprint
from nemo_rl_core.infra.workers.local import InProcessGroup, LocalLauncher
from nemo_rl_core.models import load_model
from nemo_rl_core.protocols.launcher import WorkerSpec
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.schema import ClusterConfig, OptimizerConfig, PolicyConfig
from nemo_rl_core.testing.conformance.cases.reference import WeightedLoss
from nemo_rl_core.training.model.policy import Policy
from nemo_rl_plugins_megatron.backend import MegatronBackend
from nemo_rl_plugins_megatron.config import MegatronConfig
from nemo_rl_plugins_megatron.pretrained import WeightFiles

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("megatron_parallel"), pytest.mark.timeout(300)]

LAYOUTS = {
    # name: (shape, options, tensor_parallel_size); 97 tokens, so the vocabulary is filled up with one row
    "tensor and sequence": ("qwen3", {}, 2),
    "pipeline of tied embeddings": ("qwen2", {"pipeline_parallel_size": 2}, 1),
    "context": ("llama", {"context_parallel_size": 2, "distributed_optimizer": False}, 1),
    "experts": ("qwen3_moe", {"expert_parallel_size": 2}, 1),
}
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-4)
BUDGET = 20


class Anew(MegatronBackend):
    """A backend that is set up again in the same processes."""

    def setup(self, config, context):
        self.context = context

    def become(self, config, port):
        """At a port of its own: what the store of the last group still holds would be taken for the next one's."""
        self.shutdown()
        self.names, take = set(), WeightFiles.take
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                WeightFiles, "take", lambda files, name, *rest: self.names.add(name) or take(files, name, *rest)
            )
            super().setup(config, attrs.evolve(self.context, master_port=port))

    def masters(self):
        """By weight, the part of the float32 copy that is here."""
        names = {id(weight): name for name, weight in self.weights.parameters.items()}
        return {names[id(one.weight)]: (one.part, one.tensors["param"].flatten()) for one in self.optimizer.shares()}

    def names_read(self):
        """Of the Hugging Face files."""
        return self.names


@pytest.fixture(scope="module")
def group():
    """Two processes, started once."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    launcher = LocalLauncher()
    launcher.setup(ClusterConfig(device="cpu", cpus_per_node=2))
    spec = WorkerSpec(role="policy", factory=Anew, config=PolicyConfig(), num_workers=2, timeout_s=60.0)
    yield launcher.launch(spec)
    launcher.shutdown()


@pytest.fixture(scope="module", params=list(LAYOUTS))
def run(request, group, model_name, tmp_path_factory):
    """(shape, workers) of one layout, whose weights come from files."""
    shape, options, tensor = LAYOUTS[request.param]
    become(group, model_name(shape), tmp_path_factory.mktemp("files"), options, tensor_parallel_size=tensor)
    return shape, group


def become(group, model, folder, options, **policy):
    """Set the workers up with float32 weights from files."""
    load_model(model, dtype=torch.float32).save_pretrained(folder)
    config = PolicyConfig(
        model_name=str(folder),
        num_workers=2,
        options=MegatronConfig(**options),
        optimizer=OPTIMIZER,
        max_grad_norm=0.5,
        **policy,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group.call("become", config, port, timeout_s=60.0)


def test_a_rank_reads_only_the_weights_it_holds_a_part_of(run):
    shape, group = run
    first, second = group.call("names_read", timeout_s=60)
    if shape == "qwen2":  # two stages, the second with a copy of the embedding as its output layer
        assert first & second == {"model.embed_tokens.weight"}
        assert all(".layers.0." in name for name in first - second)
        assert all(".layers.1." in name for name in second - first - {"model.norm.weight"})
    elif shape == "qwen3_moe":
        assert all(".experts.0." in name or ".experts.1." in name for name in first - second)
        assert all(".experts.2." in name or ".experts.3." in name for name in second - first)
        assert len(first - second) == len(second - first) == 2 * 2 * 3  # layers, experts, weights of each
    else:
        assert first == second
    assert len(first) > 10


def test_steps_outputs_and_weights_are_those_of_one_process(run, make_backend, batch, tmp_path):
    shape, group = run
    ranks = Policy(group, token_budget=BUDGET, temperature=0.8)
    alone = make_backend(shape, optimizer=OPTIMIZER, max_grad_norm=0.5)
    single = Policy(InProcessGroup(alone), token_budget=BUDGET, temperature=0.8)
    for _ in range(3):
        found, expected = ranks.train_step(batch, WeightedLoss()), single.train_step(batch, WeightedLoss())
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    plain = BatchedDataDict(batch.lengths, {"input_ids": batch["input_ids"]})
    torch.testing.assert_close(ranks.logprobs(plain), single.logprobs(plain), rtol=1e-5, atol=1e-5)
    for one, other in zip(ranks.top_logprobs(batch, 5), single.top_logprobs(batch, 5), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    weights = {name: t.clone() for name, t in group.iterate("export_weights", timeout_s=60)}
    of_rank = group.call("apply", lambda backend: fingerprint(backend.export_weights()), timeout_s=60)
    assert of_rank[0] == of_rank[1] == fingerprint(weights.items())  # "exports_on_every_rank"
    expected_weights = dict(alone.export_weights())
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)
    ranks.export_model(tmp_path)
    again = make_backend(model_name=str(tmp_path))
    torch.testing.assert_close(again.get_logprobs(plain, 0.8), ranks.logprobs(plain), rtol=1e-5, atol=1e-5)


def _sizes(backend):
    """Bytes on this rank while it steps, as planned and as they are."""
    empty = load_model(backend.config.model_name, dtype=torch.float32, empty=True)
    planned = backend.memory(backend.config, empty)
    buffers = [*backend.chunk.buffers, *backend.chunk.expert_parallel_buffers]
    states = [tensor for share in backend.optimizer.shares() for tensor in share.tensors.values()]
    tensors = [*backend.model.parameters(), *(buffer.grad_data for buffer in buffers), *states]
    return sum(tensor.nbytes for tensor in tensors), planned.held


def test_planned_memory_is_what_the_tensors_take(run):
    _, group = run
    found, planned = map(max, zip(*group.call("apply", _sizes, timeout_s=60), strict=True))
    assert found == pytest.approx(planned, rel=0.05)


def test_resuming_is_bit_equal_and_a_damaged_file_is_named(run, batch, tmp_path):
    _, group = run
    policy = Policy(group, token_budget=BUDGET)
    policy.save(tmp_path)
    expected = policy.train_step(batch, WeightedLoss())
    weights = [t.clone() for _, t in group.iterate("export_weights", timeout_s=60)]
    policy.load(tmp_path)
    assert policy.train_step(batch, WeightedLoss()) == expected
    again = [t.clone() for _, t in group.iterate("export_weights", timeout_s=60)]
    assert all(map(torch.equal, weights, again))
    file = max((tmp_path / "trainer").iterdir(), key=lambda file: file.stat().st_size)
    assert len(list((tmp_path / "trainer").glob("*.distcp"))) == 2 and file.suffix == ".distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"trainer/{file.name} is truncated"):
        policy.load(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"trainer/{file.name} is missing"):
        policy.load(tmp_path)


def test_a_checkpoint_continues_in_another_layout(run, make_backend, batch, tmp_path):
    shape, group = run
    ranks = Policy(group, token_budget=BUDGET)
    alone = make_backend(shape, optimizer=OPTIMIZER, max_grad_norm=0.5)
    single = Policy(InProcessGroup(alone), token_budget=BUDGET)
    for _ in range(2):
        single.train_step(batch, WeightedLoss())
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    single.save(tmp_path / "one")
    ranks.load(tmp_path / "one")
    assert_equal(group, alone)
    found, expected = ranks.train_step(batch, WeightedLoss()), single.train_step(batch, WeightedLoss())
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    ranks.save(tmp_path / "two")
    single.load(tmp_path / "two")
    assert_equal(group, alone)
    found, expected = ranks.train_step(batch, WeightedLoss()), single.train_step(batch, WeightedLoss())
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def assert_equal(group, alone):
    """The weights are the same bits."""
    weights = {name: t.clone() for name, t in group.iterate("export_weights", timeout_s=60)}
    for name, tensor in alone.export_weights():
        assert torch.equal(weights[name], tensor), name


def test_a_loss_of_one_rank_that_is_not_finite_stops_all_and_changes_nothing(run, batch):
    _, group = run
    policy = Policy(group, token_budget=BUDGET)
    before = policy.logprobs(batch)
    batch["advantages"][torch.where(batch["loss_mask"])[0][0]] = torch.inf
    with pytest.raises(InvariantViolation, match=r"\[policy rank .\].*weights were not changed"):
        policy.train_step(batch, WeightedLoss())
    assert torch.equal(policy.logprobs(batch), before)


def test_bfloat16_on_two_ranks_keeps_float32_masters_and_resumes_bit_equal(
    group, make_backend, model_name, batch, tmp_path
):
    become(group, model_name("qwen2"), tmp_path, {}, precision="bfloat16")
    exact = make_backend("qwen2")
    expected = {name: tensor.bfloat16() for name, tensor in exact.export_weights()}
    assert all(torch.equal(expected[name], t) for name, t in group.iterate("export_weights", timeout_s=60))
    shared = group.call("masters", timeout_s=60)
    test_planned_memory_is_what_the_tensors_take((None, group))
    for name, parameter in exact.weights.parameters.items():
        parts = sorted(((one[name][0].start, one[name][1]) for one in shared), key=lambda part: part[0])
        assert torch.equal(torch.cat([part for _, part in parts]), parameter.detach().flatten()), name
    policy = Policy(group, token_budget=BUDGET)
    policy.train_step(batch, WeightedLoss())
    policy.save(tmp_path)
    metrics = policy.train_step(batch, WeightedLoss())
    weights = [t.clone() for _, t in group.iterate("export_weights", timeout_s=60)]
    policy.load(tmp_path)
    assert policy.train_step(batch, WeightedLoss()) == metrics
    assert all(map(torch.equal, weights, (t for _, t in group.iterate("export_weights", timeout_s=60))))
