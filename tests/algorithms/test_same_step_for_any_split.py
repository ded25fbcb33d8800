"""The loss and the gradient norm of every loss of the algorithms, however its batch is cut up.

One step in this process, in one packed row, is what the others are compared with: several micro-batches, a padded
batch, two data-parallel processes with several micro-batches each, and two tensor-parallel ones. All through the
core's `Policy`, which shards, cuts and divides. Two processes are started once and set up anew for each model.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import attrs
import cloudpickle
import pytest
import torch
from pytest import approx

from nemo_rl_core.infra.workers.local import InProcessGroup, LocalLauncher
from nemo_rl_core.machine.place import free_port
from nemo_rl_core.models import load_model, load_model_config
from nemo_rl_core.models.numerics.over_vocabulary import OutputLayer
from nemo_rl_core.protocols.launcher import WorkerContext, WorkerSpec
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.registry import get_registry
from nemo_rl_core.schema import ClusterConfig, OptimizerConfig, PolicyConfig
from nemo_rl_core.training.model.policy import Policy
from nemo_rl_plugins_distillation.whole_vocabulary import SHARES, WholeVocabulary, hidden_field
from nemo_rl_plugins_dtensor.backend import DTensorBackend
from nemo_rl_plugins_dtensor.config import DTensorConfig

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("split")]

LENGTHS = [9, 14, 5, 21, 17, 8, 12, 6, 19, 7]
"""Five groups of two."""
SMALL = 32
"""Token budget of a micro-batch, less than most groups together."""
KL = {"reference_kl_beta": 0.1}
LANGUAGE = {
    "nll": ("nll", {}),
    "clipped_pg": ("clipped_pg", KL),
    "clipped_pg, sequence": ("clipped_pg", {"aggregation": "sequence", "correction": "tis", "correction_max": 1.5}),
    "clipped_pg, masked sequences": (
        "clipped_pg",
        {"correction": "seq_mask_tis", "correction_min": 0.9, "correction_max": 1.1},
    ),
    "dr_grpo": ("dr_grpo", {"constant_length": 20}),
    "gspo": ("gspo", {"ratio_clip_min": 0.2, "ratio_clip_max": 0.2, **KL}),
    "gspo, tokens": ("gspo", {"ratio_clip_min": 0.2, "ratio_clip_max": 0.2, "aggregation": "token"}),
    "cispo": ("cispo", {"positive_nll_weight": 0.1}),
    "reinforce": ("reinforce", {}),
    "ppo_clip": ("ppo_clip", {"entropy_coef": 0.01, **KL}),
    "dpo": ("dpo", {}),
    "cdpo": ("cdpo", {}),
    "robust_dpo": ("robust_dpo", {}),
    "ipo": ("ipo", {}),
    "dpo_hinge": ("dpo_hinge", {}),
    "dpo_norm": ("dpo_norm", {}),
    "rpo": ("rpo", {}),
    "kto": ("kto", {"desirable_weight": 1.3}),
    "orpo": ("orpo", {}),
    "simpo": ("simpo", {}),
    "forward_kl": ("forward_kl", {"nll_weight": 0.1}),
    "reverse_kl": ("reverse_kl", {"tail": "zero"}),
    "mixed_kl": ("mixed_kl", {"tail": "bucket"}),
    "jensen_shannon": ("jensen_shannon", {}),
    "forward_kl, whole vocabulary": ("forward_kl", {"nll_weight": 0.1}),
    "jensen_shannon, whole vocabulary": ("jensen_shannon", {"temperature": 1.3}),
    "projected_kl": ("projected_kl", {}),
    "sorted_probabilities": ("sorted_probabilities", {}),
}
SCALAR = {
    "bradley_terry": ("bradley_terry", {"margin_weight": 1.0, "center_coefficient": 0.1}),
    "ppo_value": ("ppo_value", {}),
}
HEADS = {"lm": LANGUAGE, "scalar": SCALAR}
CASES = [(head, case) for head, cases in HEADS.items() for case in cases]


class Again(DTensorBackend):
    """A backend that is set up again in the same processes."""

    def setup(self, config, context: WorkerContext) -> None:
        self.context = context
        super().setup(config, context)

    def set_up_again(self, config, port: int) -> None:
        """At a port of its own: what the store of the first group still holds would be taken for the second's."""
        super().setup(config, attrs.evolve(self.context, master_port=port))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with each head, its weights large enough that losses are away from their symmetric points."""
    shape = load_model_config("scratch:qwen2-tiny").to_dict() | {"num_key_value_heads": 2}
    source = tmp_path_factory.mktemp("shape")
    (source / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    found = {}
    for head in HEADS:
        folder = tmp_path_factory.mktemp(head)
        model = load_model(f"scratch:{source}", dtype=torch.float32, head=head)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        model.save_pretrained(folder)
        found[head] = str(folder)
    return found


def random_batch() -> BatchedDataDict:
    """What every algorithm might have filled in; about two thirds of the tokens are trained."""
    rng = torch.Generator().manual_seed(5)
    batch = BatchedDataDict(LENGTHS)
    batch.set_tokens("input_ids", torch.randint(4, 90, (batch.num_tokens,), generator=rng))
    batch.set_tokens("loss_mask", (torch.rand(batch.num_tokens, generator=rng) > 0.3) & (batch.position_ids > 0))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    # Of a policy near the one that is trained, which is near to uniform over 99 tokens.
    for name in ("logprobs", "ref_logprobs", "rollout_logprobs"):
        batch.set_tokens(name, -4.5 + 0.5 * normal(batch.num_tokens))
    for name in ("advantages", "values", "returns"):
        batch.set_tokens(name, normal(batch.num_tokens))
    sequences = len(LENGTHS)
    batch.set_sequences("group_ids", torch.arange(sequences // 2).repeat_interleave(2))
    batch.set_sequences("is_chosen", torch.tensor([True, False] * (sequences // 2)))
    batch.set_sequences("margins", torch.arange(sequences // 2).repeat_interleave(2) * 0.2)
    batch.set_sequences("rewards", (normal(sequences) > 0).float())
    batch.set_sequences("kl_estimate", torch.full((sequences,), 0.05))
    batch.set_sequences("teacher_weights", torch.tensor([[0.7, 0.3]]).expand(sequences, -1).clone())
    return batch


def add_teachers(batch: BatchedDataDict, loss: str) -> None:
    """What the losses of distillation compare, drawn at random: two teachers, or chunks of two tokens."""
    rng, tokens = torch.Generator().manual_seed(6), batch.num_tokens
    chunk = torch.div(batch.position_ids, 2, rounding_mode="floor")
    batch.set_tokens("chunk_ids", chunk)
    per_chunk = torch.rand(len(batch), 11, 4, generator=rng)[batch.sequence_index, chunk]
    teacher = (per_chunk / (per_chunk.sum(-1, keepdim=True) + 0.3)).log()
    if loss == "projected_kl":
        batch.set_tokens("top_ids", torch.randint(90, (tokens, 4, 2), generator=rng))
        batch.set_tokens("projection_weights", torch.rand(tokens, 4, 2, generator=rng) / 8)
        batch.set_tokens("teacher_top_logprobs", teacher)
    elif loss == "sorted_probabilities":
        batch.set_tokens("top_ids", torch.rand(tokens, 2, 90, generator=rng).topk(4).indices)
        batch.set_tokens("teacher_top_logprobs", teacher)
        batch.set_tokens("teacher_sorted", (per_chunk / 8).sort(-1, descending=True).values)
        batch.set_tokens("student_unmatched", torch.rand(tokens, 4, generator=rng) > 0.3)
    else:
        top = torch.randn(tokens, 2, 99, generator=rng).log_softmax(-1).topk(5)
        batch.set_tokens("top_ids", top.indices)
        batch.set_tokens("teacher_top_logprobs", top.values)


def add_hidden_states(batch: BatchedDataDict) -> list[OutputLayer]:
    """What two teachers of other sizes give in place of their logits; the second has a padded vocabulary."""
    rng, tokens = torch.Generator().manual_seed(7), batch.num_tokens
    layers = []
    for index, (width, vocabulary) in enumerate(((8, 104), (12, 128))):
        batch.set_tokens(hidden_field(index), torch.randn(tokens, width, generator=rng))
        layers.append(OutputLayer(weight=torch.randn(vocabulary, width, generator=rng)))
    batch.set_tokens(SHARES, batch.expand_to_tokens(batch["teacher_weights"]))
    return layers


def steps(policy: Policy, head: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Loss and gradient norm of a step with each loss; a learning rate of 0 keeps the weights."""
    found = {}
    for case, (name, options) in HEADS[head].items():
        component = get_registry().resolve("losses", name).load()
        batch = random_batch()
        add_teachers(batch, name)
        loss = component(component.config_class(**options))
        if "whole vocabulary" in case:
            loss = WholeVocabulary(loss, [policy.keep(layer) for layer in add_hidden_states(batch)])
        metrics = policy.train_step(batch, loss)
        found[head, case] = metrics["loss"], metrics["grad_norm"]
    return found


def config_of(folders, head: str, **changes: Any) -> PolicyConfig:
    plain = PolicyConfig(
        model_name=folders[head],
        head=head,
        options=DTensorConfig(),
        optimizer=OptimizerConfig(lr=0.0),
        max_grad_norm=None,
    )
    return attrs.evolve(plain, **changes)


def alone(folders, *, token_budget: int = 10_000, **options: Any) -> dict[tuple[str, str], tuple[float, float]]:
    found = {}
    for head in HEADS:
        backend = DTensorBackend()
        backend.setup(config_of(folders, head, options=DTensorConfig(**options)), WorkerContext())
        found |= steps(Policy(InProcessGroup(backend), token_budget=token_budget), head)
        backend.shutdown()
    return found


@pytest.fixture(scope="module")
def expected(folders):
    torch.set_num_threads(1)
    return alone(folders)


@pytest.fixture(scope="module")
def measured(folders, expected):
    """By split: loss and gradient norm by case."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    found = {
        "micro-batches": alone(folders, token_budget=SMALL),
        "padded": alone(folders, token_budget=60, attention="padded"),
        "data-parallel": {},
        "tensor-parallel": {},
    }
    launcher = LocalLauncher()
    launcher.setup(ClusterConfig(device="cpu", cpus_per_node=2))
    group = None
    for head in HEADS:
        for split, size in (("data-parallel", 1), ("tensor-parallel", 2)):
            config = config_of(folders, head, num_workers=2, tensor_parallel_size=size)
            if group is None:
                spec = WorkerSpec(role="policy", factory=Again, config=config, num_workers=2, timeout_s=60.0)
                group = launcher.launch(spec)
            else:
                group.call("shutdown", timeout_s=30.0)
                group.call("set_up_again", config, free_port(), timeout_s=60.0)
            policy = Policy(group, token_budget=SMALL if size == 1 else 10_000)
            found[split] |= steps(policy, head)
    launcher.shutdown()
    return found


@pytest.mark.parametrize("split", ["micro-batches", "padded", "data-parallel", "tensor-parallel"])
@pytest.mark.parametrize(("head", "case"), CASES, ids=[case for _, case in CASES])
def test_a_step_is_the_same_for_any_split(expected, measured, head, case, split):
    loss, norm = expected[head, case]
    found_loss, found_norm = measured[split][head, case]
    assert found_loss == approx(loss, rel=1e-5, abs=1e-6)
    assert found_norm == approx(norm, rel=1e-5)
    assert norm > 1e-3


def test_every_loss_that_is_shipped_is_here():
    ours = {ref.name for ref in get_registry().entries("losses") if (ref.distribution or "").startswith("nemo-rl-")}
    assert ours == {name for cases in HEADS.values() for name, _ in cases.values()}
