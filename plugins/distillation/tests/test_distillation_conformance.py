"""The losses and the advantages of this package against the contracts of their kinds, option by option."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.testing import AdvantageContract, LossContract, RewardContract
from nemo_rl_plugins_distillation.advantages import OnPolicyDistillationAdvantages, OnPolicyDistillationConfig
from nemo_rl_plugins_distillation.chunks import NEVER
from nemo_rl_plugins_distillation.forward_kl import ForwardKLLoss
from nemo_rl_plugins_distillation.jensen_shannon import JensenShannonLoss
from nemo_rl_plugins_distillation.loss_config import (
    DivergenceConfig,
    JensenShannonConfig,
    MixedKLConfig,
    ProjectedKLConfig,
    SortedProbabilitiesConfig,
)
from nemo_rl_plugins_distillation.mixed_kl import MixedKLLoss
from nemo_rl_plugins_distillation.projected_kl import ProjectedKLLoss
from nemo_rl_plugins_distillation.reverse_kl import ReverseKLLoss
from nemo_rl_plugins_distillation.reward import unscored
from nemo_rl_plugins_distillation.sorted_probabilities import SortedProbabilitiesLoss

torch.set_num_threads(1)

CASES = {
    "forward": ForwardKLLoss(),
    "forward-bucket": ForwardKLLoss(DivergenceConfig(tail="bucket")),
    "forward-warm": ForwardKLLoss(DivergenceConfig(temperature=2.0)),
    "reverse": ReverseKLLoss(),
    "reverse-zero": ReverseKLLoss(DivergenceConfig(tail="zero")),
    "mixed": MixedKLLoss(),
    "mixed-zero-nll": MixedKLLoss(MixedKLConfig(tail="zero", nll_weight=0.1)),
    "jensen": JensenShannonLoss(),
    "jensen-zero": JensenShannonLoss(JensenShannonConfig(tail="zero", beta=0.3)),
}


def poison(batch, *names):
    """Inf where nothing is trained: the kit does so only with fields of one number a token."""
    for name in names:
        outside = (~batch["loss_mask"]).view(-1, *(1,) * (batch[name].ndim - 1))
        batch.set_tokens(name, batch[name].masked_fill(outside, torch.inf))


class TestTeacherLosses(LossContract):
    @pytest.fixture(params=CASES.values(), ids=list(CASES))
    def loss(self, request):
        return request.param

    def add_fields(self, batch, generator):
        """Two teachers that name three tokens each, weighed differently in each sequence."""
        logits = torch.randn(batch.num_tokens, 2, 7, generator=generator, dtype=torch.float64)
        top = torch.log_softmax(logits, -1).topk(3, dim=-1)
        batch.set_tokens("top_ids", top.indices)
        batch.set_tokens("teacher_top_logprobs", top.values)
        poison(batch, "teacher_top_logprobs")
        weights = torch.rand(len(batch), 1, generator=generator, dtype=torch.float64)
        batch.set_sequences("teacher_weights", torch.cat([weights, 1 - weights], 1))


def add_chunks(batch, generator):
    """Chunks of two tokens, some tokens without one; the values of a chunk for each."""
    chunk = torch.div(batch.position_ids, 2, rounding_mode="floor")
    batch.set_tokens("chunk_ids", torch.where(batch.position_ids % 5 == 4, -1, chunk))
    per_chunk = torch.rand(len(batch), 8, 4, generator=generator, dtype=torch.float64)
    return per_chunk[batch.sequence_index, chunk]


class TestProjectedKL(LossContract):
    @pytest.fixture(
        params=[
            ProjectedKLConfig(),
            ProjectedKLConfig(forward_weight=0.3, tail="bucket"),
            ProjectedKLConfig(nll_weight=0.1),
        ],
        ids=["forward", "mixed-bucket", "nll"],
    )
    def loss(self, request):
        return ProjectedKLLoss(request.param)

    def add_fields(self, batch, generator):
        """Four columns of the teacher, of which the last has no preimage; each other has two."""
        values = add_chunks(batch, generator)
        teacher = (values / (values.sum(-1, keepdim=True) + 0.3)).log()
        teacher[:, 3] = NEVER
        ids = torch.randint(7, (batch.num_tokens, 4, 2), generator=generator)
        weights = torch.rand(batch.num_tokens, 4, 2, generator=generator, dtype=torch.float64) / 8
        batch.set_tokens("top_ids", ids)
        batch.set_tokens("projection_weights", weights)
        batch.set_tokens("teacher_top_logprobs", teacher)
        poison(batch, "projection_weights", "teacher_top_logprobs")


class TestSortedProbabilities(LossContract):
    @pytest.fixture(
        params=[
            SortedProbabilitiesConfig(),
            SortedProbabilitiesConfig(match_vocabulary=False),
            SortedProbabilitiesConfig(matched_weight=0.5, sorted_weight=2.0, nll_weight=0.1),
        ],
        ids=["matched", "ranks", "weights"],
    )
    def loss(self, request):
        return SortedProbabilitiesLoss(request.param)

    def add_fields(self, batch, generator):
        values = add_chunks(batch, generator)
        teacher = (values / (values.sum(-1, keepdim=True) + 0.3)).log()
        teacher[:, 2:] = NEVER
        own = torch.stack([torch.randperm(7, generator=generator)[:4] for _ in range(batch.num_tokens)])
        matched = torch.stack([torch.randperm(7, generator=generator)[:4] for _ in range(batch.num_tokens)])
        batch.set_tokens("top_ids", torch.stack([matched, own], 1))
        batch.set_tokens("teacher_top_logprobs", teacher)
        batch.set_tokens("teacher_sorted", (values / 8).sort(-1, descending=True).values)
        batch.set_tokens("student_unmatched", own % 3 > 0)
        poison(batch, "teacher_top_logprobs", "teacher_sorted")


class TestOnPolicyDistillation(AdvantageContract):
    baseline = "none"
    per_token = True

    @pytest.fixture(params=[None, 0.4], ids=["plain", "clipped"])
    def advantage(self, request):
        return OnPolicyDistillationAdvantages(OnPolicyDistillationConfig(clip=request.param))

    def add_fields(self, batch, generator):
        found = -2 * torch.rand(batch.num_tokens, generator=generator)
        batch.set_tokens("teacher_logprobs", found.masked_fill(~batch["loss_mask"], torch.inf))


class TestUnscored(RewardContract):
    @pytest.fixture
    def reward(self):
        return unscored
