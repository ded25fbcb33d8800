"""Three steps with one, two and four processes: the same losses and weights, however they share model and batch.

For both training backends, through the core's `Policy`. The processes are started once and set up anew for each layout,
at a port of its own: what the store of a finished process group still holds would be taken for the next one's. The
layouts of Megatron-core hand one checkpoint on to each other.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import attrs
import cloudpickle
import pytest
import torch

from nemo_rl_core.infra.workers.local import InProcessGroup, LocalLauncher
from nemo_rl_core.machine.place import free_port
from nemo_rl_core.protocols.launcher import WorkerContext, WorkerSpec
from nemo_rl_core.schema import ClusterConfig, OptimizerConfig, PolicyConfig
from nemo_rl_core.testing.conformance.cases.reference import WeightedLoss, ragged_batch
from nemo_rl_core.training.model.policy import Policy
from nemo_rl_plugins_dtensor.backend import DTensorBackend
from nemo_rl_plugins_dtensor.config import DTensorConfig
from nemo_rl_plugins_megatron.backend import MegatronBackend
from nemo_rl_plugins_megatron.config import MegatronConfig

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes"), pytest.mark.timeout(600)]

BACKENDS = {"dtensor": (DTensorBackend, DTensorConfig), "megatron": (MegatronBackend, MegatronConfig)}
DENSE = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 97,  # no tensor-parallel size divides it
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}
EXPERTS = {
    **DENSE,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "mlp_only_layers": [0],
    "tie_word_embeddings": False,
}
SHARED = {**DENSE, "num_key_value_heads": 2}  # two of four ranks to a key-value head
SHAPES = {"dense": DENSE, "shared": SHARED, "experts": EXPERTS}
LAYOUTS: dict[str, tuple[str, int, str, int, dict[str, Any]]] = {
    # name: (backend, processes, shape, tensor_parallel_size, options)
    "dtensor dp2": ("dtensor", 2, "dense", 1, {}),
    "dtensor dp4": ("dtensor", 4, "dense", 1, {}),
    "dtensor tp2 dp2": ("dtensor", 4, "dense", 2, {}),
    "dtensor tp4": ("dtensor", 4, "dense", 4, {}),
    "megatron dp2": ("megatron", 2, "dense", 1, {}),
    "megatron cp2 tp2": ("megatron", 4, "dense", 2, {"context_parallel_size": 2}),
    "megatron tp2 dp2": ("megatron", 4, "dense", 2, {}),
    "megatron pp2 dp2": ("megatron", 4, "dense", 1, {"pipeline_parallel_size": 2, "distributed_optimizer": False}),
    "megatron tp2 pp2": ("megatron", 4, "dense", 2, {"pipeline_parallel_size": 2}),
    "megatron pp4": ("megatron", 4, "dense", 1, {"pipeline_parallel_size": 4}),
    "megatron tp4": ("megatron", 4, "shared", 4, {}),
    "megatron ep2 pp2": ("megatron", 4, "experts", 1, {"expert_parallel_size": 2, "pipeline_parallel_size": 2}),
    "megatron ep2 tp2 dp2": (
        "megatron",
        4,
        "experts",
        2,
        {"expert_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
}
BUDGET = 20
TIMEOUT = 120.0


class Anew:
    """A worker that is made another backend in another layout without a new process."""

    inner: Any = None

    def setup(self, config: PolicyConfig, context: WorkerContext) -> None:
        self.context = context

    def become(self, backend: str, config: PolicyConfig, port: int) -> None:
        self.shutdown()
        self.inner = BACKENDS[backend][0]()
        self.inner.setup(config, attrs.evolve(self.context, master_port=port))

    def shutdown(self) -> None:
        if self.inner is not None:
            self.inner.shutdown()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.fixture(scope="module")
def model_name(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    for name, shape in SHAPES.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return lambda name: f"scratch:{root / name}"


def config_of(name: str, backend: str, processes: int = 1, tensor: int = 1, **options: Any) -> PolicyConfig:
    return PolicyConfig(
        model_name=name,
        num_workers=processes,
        tensor_parallel_size=tensor,
        options=BACKENDS[backend][1](**options),
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-4, weight_decay=0.1),
        max_grad_norm=0.5,
    )


def weights_of(group: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in group.iterate("export_weights", timeout_s=TIMEOUT)}


@attrs.frozen
class Run:
    """Three steps, or those after them, of one layout."""

    losses: list[dict[str, float]]
    weights: dict[str, torch.Tensor]

    @classmethod
    def of(cls, group: Any, *, num_steps: int = 3, leaves: bool = False) -> Run:
        """With `leaves` the model waits in the host's memory between two steps."""
        policy, batch = Policy(group, token_budget=BUDGET), ragged_batch(vocab_size=97, seed=1)
        losses = []
        for _ in range(num_steps):
            losses.append(policy.train_step(batch, WeightedLoss()))
            if leaves:
                policy.offload()
                policy.reload()
        return cls(losses, weights_of(group))

    def assert_close(self, expected: Run) -> None:
        for found, one in zip(self.losses, expected.losses, strict=True):
            assert found == pytest.approx(one, rel=1e-5, abs=1e-6)
        assert self.weights.keys() == expected.weights.keys()
        for name, tensor in expected.weights.items():
            torch.testing.assert_close(self.weights[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def runs(model_name, tmp_path_factory):
    """By layout: the three steps, the weights that a checkpoint gave, and two steps from there."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    torch.set_num_threads(1)
    folders = (tmp_path_factory.mktemp("checkpoint") for _ in itertools.count())
    found: dict[str, dict[str, Any]] = {}
    latest = {}
    for backend, shape in (("dtensor", "dense"), *(("megatron", shape) for shape in SHAPES)):
        worker = BACKENDS[backend][0]()
        worker.setup(config_of(model_name(shape), backend), WorkerContext())
        group = InProcessGroup(worker)
        one = found[f"{backend} {shape}"] = {"three": Run.of(group)}
        if backend == "megatron":
            latest[shape] = next(folders)
            Policy(group, token_budget=BUDGET).save(latest[shape])
            one["loaded"], one["after"] = weights_of(group), Run.of(group, num_steps=2)
        worker.shutdown()
    for count in (2, 4):
        launcher = LocalLauncher()
        launcher.setup(ClusterConfig(device="cpu", cpus_per_node=count))
        spec = WorkerSpec(role="policy", factory=Anew, config=PolicyConfig(), num_workers=count, timeout_s=TIMEOUT)
        group = launcher.launch(spec)
        for layout, (backend, processes, shape, tensor, options) in LAYOUTS.items():
            if processes != count:
                continue
            config = config_of(model_name(shape), backend, processes, tensor, **options)
            group.call("become", backend, config, free_port(), timeout_s=TIMEOUT)
            one = found[layout] = {"three": Run.of(group, leaves=True)}
            if backend == "megatron":
                policy = Policy(group, token_budget=BUDGET)
                policy.load(latest[shape])
                one["loaded"] = weights_of(group)
                latest[shape] = next(folders)
                policy.save(latest[shape])
                one["after"] = Run.of(group, num_steps=2)
        launcher.shutdown()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps_are_those_of_one_process(runs, layout):
    backend, _, shape, *_ = LAYOUTS[layout]
    runs[layout]["three"].assert_close(runs[f"{backend} {shape}"]["three"])


def test_the_two_backends_take_the_same_steps(runs):
    runs["megatron dense"]["three"].assert_close(runs["dtensor dense"]["three"])


@pytest.mark.parametrize("layout", [name for name, case in LAYOUTS.items() if case[0] == "megatron"])
def test_a_checkpoint_that_went_through_other_layouts_continues(runs, layout):
    found, expected = runs[layout], runs[f"megatron {LAYOUTS[layout][2]}"]
    assert all(torch.equal(found["loaded"][name], tensor) for name, tensor in expected["loaded"].items())
    found["after"].assert_close(expected["after"])
