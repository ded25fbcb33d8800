"""Divergences over the whole vocabulary, made chunk by chunk, against torch and TRL over the full matrices."""

from __future__ import annotations

import pytest
import torch
from pytest import approx
from torch.nn.functional import kl_div

from nemo_rl_core.errors import ConfigError, ShapeMismatch
from nemo_rl_core.models.numerics.over_vocabulary import OutputLayer, map_vocabulary
from nemo_rl_core.protocols.loss import Loss, ModelOutputs
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.records.shared_value import SharedValue
from nemo_rl_plugins_distillation.forward_kl import ForwardKLLoss
from nemo_rl_plugins_distillation.jensen_shannon import JensenShannonLoss
from nemo_rl_plugins_distillation.loss_config import DivergenceConfig, JensenShannonConfig, MixedKLConfig
from nemo_rl_plugins_distillation.mixed_kl import MixedKLLoss
from nemo_rl_plugins_distillation.projected_kl import ProjectedKLLoss
from nemo_rl_plugins_distillation.reverse_kl import ReverseKLLoss
from nemo_rl_plugins_distillation.whole_vocabulary import WholeVocabulary

torch.set_num_threads(1)
TOKENS, WIDTH, VOCABULARY = 40, 6, 53


class Case:
    """A student and teachers of random weights; every third token is not trained."""

    def __init__(self, vocabularies=(VOCABULARY,), student_vocabulary=VOCABULARY):
        rng = torch.Generator().manual_seed(3)
        self.hidden = torch.randn(TOKENS, WIDTH, generator=rng).requires_grad_()
        self.weight = torch.randn(student_vocabulary, WIDTH, generator=rng).requires_grad_()
        self.mask = torch.arange(TOKENS) % 3 > 0
        self.layers = [OutputLayer(weight=torch.randn(v, i + 2, generator=rng)) for i, v in enumerate(vocabularies)]
        self.theirs = [torch.randn(TOKENS, i + 2, generator=rng) for i in range(len(vocabularies))]
        count = len(vocabularies)
        self.shares = torch.full((TOKENS, count), 1 / count)

    def loss(self, inner, chunk_size=20):
        """The sum, by chunks of 5 tokens."""
        made = WholeVocabulary(inner, [SharedValue(layer) for layer in self.layers])
        tokens = {"loss_mask": self.mask, "teacher_shares": self.shares}
        tokens |= {f"teacher_hidden_{i}": hidden for i, hidden in enumerate(self.theirs)}
        batch = BatchedDataDict([TOKENS], tokens)
        rows = {name: batch[name][self.mask] for name in made.vocabulary_fields}
        found = map_vocabulary(self.hidden[self.mask], self.weight, made.over_vocabulary, rows, chunk_size=chunk_size)
        spread = found.new_zeros(TOKENS, found.shape[1]).index_copy(0, self.mask.nonzero().squeeze(1), found)
        return made(ModelOutputs(over_vocabulary=spread), batch).total

    def logits(self):
        """[N, V] of the student, and of each teacher."""
        return self.hidden @ self.weight.T, [
            h @ layer.weight.T for h, layer in zip(self.theirs, self.layers, strict=True)
        ]

    def same(self, found, expected):
        """Equal in value to 1e-5 and in the norm of the gradient to 1e-4."""
        assert found.item() == approx(expected.item(), rel=1e-5)
        norms = [
            torch.cat([g.flatten() for g in torch.autograd.grad(total, (self.hidden, self.weight))]).norm()
            for total in (found, expected)
        ]
        assert norms[0].item() == approx(norms[1].item(), rel=1e-4)


def divergence(student, teacher, forward_weight):
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return forward_weight * forward + (1 - forward_weight) * kl_div(
        teacher, student, log_target=True, reduction="none"
    ).sum(-1)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_jensen_shannon_is_that_of_the_gkd_trainer_of_trl(beta, temperature):
    """At another temperature ours is larger by its square, on purpose."""
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    case = Case()
    student, (teacher,) = case.logits()
    labels = torch.where(case.mask, 1, -100)[None]
    theirs = trainer.generalized_jsd_loss(
        student[None], teacher[None], labels=labels, beta=beta, temperature=temperature
    )
    ours = case.loss(JensenShannonLoss(JensenShannonConfig(beta=beta, temperature=temperature))) / case.mask.sum()
    case.same(ours, temperature**2 * theirs)


@pytest.mark.parametrize(("loss", "beta"), [(ForwardKLLoss, 0), (ReverseKLLoss, 1)])
def test_the_ends_are_those_of_the_gkd_trainer_of_trl(loss, beta):
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    case = Case()
    student, (teacher,) = case.logits()
    labels = torch.where(case.mask, 1, -100)[None]
    theirs = trainer.generalized_jsd_loss(student[None], teacher[None], labels=labels, beta=beta)
    case.same(case.loss(loss()) / case.mask.sum(), theirs)


@pytest.mark.parametrize("tail", ["renormalize", "bucket", "zero"])
def test_the_tail_is_nothing(tail):
    """mixed_kl against torch, whatever is said of a tail that there is not."""
    case = Case()
    student, (teacher,) = case.logits()
    found = case.loss(MixedKLLoss(MixedKLConfig(tail=tail, forward_weight=0.3)))
    case.same(found, divergence(student, teacher, 0.3)[case.mask].sum())


def test_the_length_of_the_chunks_changes_nothing():
    case = Case()
    case.same(case.loss(ReverseKLLoss(), chunk_size=4), case.loss(ReverseKLLoss(), chunk_size=4000))


def test_teachers_of_other_widths_each_with_its_weight_at_each_token():
    """A teacher without weight at a token is not looked at there, so that its row may hold anything."""
    case = Case(vocabularies=(VOCABULARY, VOCABULARY))
    case.shares = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.0, 1.0], [0.6, 0.4]]).repeat(TOKENS // 4, 1)
    student, teachers = case.logits()
    each = torch.stack([divergence(student, teacher, 1.0) for teacher in teachers], 1)
    expected = (each * case.shares)[case.mask].sum()
    for i in (0, 1):
        case.theirs[i] = case.theirs[i].masked_fill((case.shares[:, i] == 0)[:, None], torch.nan)
    case.same(case.loss(ForwardKLLoss()), expected)


@pytest.mark.parametrize(("ours", "theirs"), [(53, 60), (60, 53)])
def test_a_padded_vocabulary_is_cut_to_the_tokens_of_both(ours, theirs):
    case = Case(vocabularies=(theirs,), student_vocabulary=ours)
    student, (teacher,) = case.logits()
    case.same(case.loss(ForwardKLLoss()), divergence(student[:, :53], teacher[:, :53], 1.0)[case.mask].sum())


# -- what is declared, and mistakes -------------------------------------------------------------------------------


def test_needs():
    made = WholeVocabulary(MixedKLLoss(MixedKLConfig(nll_weight=0.1)), [SharedValue(None)])
    assert isinstance(made, Loss)
    assert made.needs == {"over_vocabulary", "logprobs"}
    assert WholeVocabulary(ForwardKLLoss()).needs == {"over_vocabulary"}
    assert made.vocabulary_fields == ("teacher_shares", "teacher_hidden_0")


def test_a_loss_of_another_kind():
    with pytest.raises(ConfigError, match=r"ProjectedKLLoss is not one of forward_kl.*set top_k to a number"):
        WholeVocabulary(ProjectedKLLoss())


def test_shapes_are_checked():
    batch = BatchedDataDict([2], {"loss_mask": torch.tensor([False, True]), "teacher_shares": torch.ones(2, 2)})
    with pytest.raises(ShapeMismatch, match=r"shape \[2, 1\], teacher_shares \[2, 2\]"):
        WholeVocabulary(ForwardKLLoss())(ModelOutputs(over_vocabulary=torch.zeros(2, 1)), batch)


def test_nll_is_added():
    made = WholeVocabulary(ForwardKLLoss(DivergenceConfig(nll_weight=0.5)))
    batch = BatchedDataDict([2], {"loss_mask": torch.tensor([False, True]), "teacher_shares": torch.ones(2, 1)})
    outputs = ModelOutputs(over_vocabulary=torch.tensor([[9.0], [0.25]]), logprobs=torch.tensor([-9.0, -2.0]))
    assert made(outputs, batch).total.item() == approx(0.25 + 0.5 * 2.0)
