"""Losses against a teacher's likeliest tokens, by numbers worked by hand and against torch and TRL."""

from __future__ import annotations

import math

import pytest
import torch
from pytest import approx
from torch.nn.functional import kl_div

from nemo_rl_core.errors import ConfigError, ShapeMismatch
from nemo_rl_core.protocols.loss import Loss, ModelOutputs
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_plugins_distillation.forward_kl import ForwardKLLoss
from nemo_rl_plugins_distillation.jensen_shannon import JensenShannonLoss
from nemo_rl_plugins_distillation.loss_config import DivergenceConfig, JensenShannonConfig, MixedKLConfig
from nemo_rl_plugins_distillation.mixed_kl import MixedKLLoss
from nemo_rl_plugins_distillation.reverse_kl import ReverseKLLoss

torch.set_num_threads(1)
LOG = math.log
LOSSES = {
    "forward": (ForwardKLLoss, DivergenceConfig),
    "reverse": (ReverseKLLoss, DivergenceConfig),
    "mixed": (MixedKLLoss, MixedKLConfig),
    "jensen": (JensenShannonLoss, JensenShannonConfig),
}
STUDENT = [0.5, 0.3, 0.2]
TEACHER = [0.6, 0.3, 0.1]


def make(name, **options):
    loss_class, config_class = LOSSES[name]
    return loss_class(config_class(**options))


def one_token(name, student, teacher, k, **options):
    """Loss and gradient by the student's logits at one token with these probabilities; the teacher names k."""
    logits = torch.tensor(student, dtype=torch.float64).log().requires_grad_()
    log_p = torch.log_softmax(logits, -1)
    ids = torch.arange(k).view(1, 1, k)
    batch = BatchedDataDict(
        [1],
        {
            "loss_mask": torch.tensor([True]),
            "top_ids": ids,
            "teacher_top_logprobs": torch.tensor(teacher, dtype=torch.float64)[:k].log().view(1, 1, k),
        },
        {"teacher_weights": torch.ones(1, 1)},
    )
    outputs = ModelOutputs(
        top_logprobs=log_p[:k].view(1, 1, k), entropy=-(log_p.exp() * log_p).sum()[None], logprobs=log_p[:1]
    )
    sums = make(name, **options)(outputs, batch)
    (grad,) = torch.autograd.grad(sums.total, logits)
    return sums.total.item(), grad.tolist()


# Of the teacher's likeliest two, 0.6 and 0.3: renormalised 2/3 and 1/3, the student's 0.5 and 0.3 become 5/8 and 3/8.
FORWARD_TOP = 2 / 3 * LOG((2 / 3) / 0.625) + 1 / 3 * LOG((1 / 3) / 0.375)
REVERSE_TOP = 0.625 * LOG(0.625 / (2 / 3)) + 0.375 * LOG(0.375 / (1 / 3))
# With the rest (0.2 and 0.1) as a third token the two distributions are whole again.
FORWARD_ALL = 0.6 * LOG(0.6 / 0.5) + 0.1 * LOG(0.1 / 0.2)
REVERSE_ALL = 0.5 * LOG(0.5 / 0.6) + 0.2 * LOG(0.2 / 0.1)
# tail zero: the teacher's 2/3 and 1/3 against the student's 0.5 and 0.3; outside 0.2 (log 0.2 + 100).
FORWARD_ZERO = 2 / 3 * LOG((2 / 3) / 0.5) + 1 / 3 * LOG((1 / 3) / 0.3)
REVERSE_ZERO = 0.5 * LOG(0.5 / (2 / 3)) + 0.3 * LOG(0.3 / (1 / 3)) + 0.2 * (LOG(0.2) + 100)


@pytest.mark.parametrize(
    ("name", "tail", "expected"),
    [
        ("forward", "renormalize", FORWARD_TOP),
        ("reverse", "renormalize", REVERSE_TOP),
        ("mixed", "renormalize", 0.5 * FORWARD_TOP + 0.5 * REVERSE_TOP),
        ("forward", "bucket", FORWARD_ALL),
        ("reverse", "bucket", REVERSE_ALL),
        ("mixed", "bucket", 0.5 * FORWARD_ALL + 0.5 * REVERSE_ALL),
        ("forward", "zero", FORWARD_ZERO),
        ("reverse", "zero", REVERSE_ZERO),
        ("mixed", "zero", 0.5 * FORWARD_ZERO + 0.5 * REVERSE_ZERO),
    ],
)
def test_by_hand(name, tail, expected):
    assert one_token(name, STUDENT, TEACHER, 2, tail=tail)[0] == approx(expected, abs=1e-9)


def test_weight_of_the_mixed_loss():
    found, _ = one_token("mixed", STUDENT, TEACHER, 3, forward_weight=0.2)
    assert found == approx(0.2 * FORWARD_ALL + 0.8 * REVERSE_ALL)


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        # forward: p_student - p_teacher, within the top k for renormalize, over everything else for the others
        ("renormalize", [5 / 8 - 2 / 3, 3 / 8 - 1 / 3, 0.0]),
        ("bucket", [-0.1, 0.0, 0.1]),
        ("zero", [0.5 - 2 / 3, 0.3 - 1 / 3, 0.2]),
    ],
)
def test_gradient_of_the_forward_kl(tail, expected):
    assert one_token("forward", STUDENT, TEACHER, 2, tail=tail)[1] == approx(expected, abs=1e-9)


def test_gradient_of_the_reverse_kl():
    """p_student (log p_student - log p_teacher - KL)."""
    terms = [LOG(0.5 / 0.6), 0.0, LOG(0.2 / 0.1)]
    expected = [p * (term - REVERSE_ALL) for p, term in zip(STUDENT, terms, strict=True)]
    assert one_token("reverse", STUDENT, TEACHER, 3)[1] == approx(expected, abs=1e-9)
    assert one_token("reverse", STUDENT, TEACHER, 2, tail="bucket")[1] == approx(expected, abs=1e-9)


def test_gradient_of_the_reverse_kl_with_a_teacher_that_has_nothing_outside():
    """The same formula over the whole vocabulary with log p_teacher = -100 at the third token."""
    terms = [LOG(0.5 / (2 / 3)), LOG(0.3 / (1 / 3)), LOG(0.2) + 100]
    expected = [p * (term - REVERSE_ZERO) for p, term in zip(STUDENT, terms, strict=True)]
    assert one_token("reverse", STUDENT, TEACHER, 2, tail="zero")[1] == approx(expected, rel=1e-9)


def test_outside_logprob():
    found, _ = one_token("reverse", STUDENT, TEACHER, 2, tail="zero", outside_logprob=-10.0)
    assert found == approx(REVERSE_ZERO - 0.2 * 90)


def test_jensen_shannon_by_hand():
    """beta 0.25: the mixture is 0.525, 0.3, 0.175."""
    teacher = 0.6 * LOG(0.6 / 0.525) + 0.1 * LOG(0.1 / 0.175)
    student = 0.5 * LOG(0.5 / 0.525) + 0.2 * LOG(0.2 / 0.175)
    expected = 0.25 * teacher + 0.75 * student
    assert one_token("jensen", STUDENT, TEACHER, 3, beta=0.25)[0] == approx(expected)
    assert one_token("jensen", STUDENT, TEACHER, 2, beta=0.25, tail="bucket")[0] == approx(expected)


def test_jensen_shannon_with_a_teacher_that_has_nothing_outside():
    beta, total = 0.25, 0.0
    for t, s in ((2 / 3, 0.5), (1 / 3, 0.3), (0.0, 0.2)):
        m = beta * t + (1 - beta) * s
        total += (beta * t * LOG(t / m) if t else 0.0) + (1 - beta) * s * LOG(s / m)
    assert one_token("jensen", STUDENT, TEACHER, 2, beta=beta, tail="zero")[0] == approx(total)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_equal_distributions_are_at_the_minimum(name, k, tail):
    value, grad = one_token(name, TEACHER, TEACHER, k, tail=tail)
    assert value == approx(0.0, abs=1e-12)
    assert grad == approx([0.0] * 3, abs=1e-12)


def test_the_likelihood_of_the_tokens_is_added():
    plain, with_nll = (one_token("forward", STUDENT, TEACHER, 3, nll_weight=w)[0] for w in (0.0, 0.1))
    assert with_nll - plain == approx(-0.1 * LOG(0.5))


# -- whole distributions ------------------------------------------------------------------------------------------


def random_case(vocabulary=11, k=11, temperature=1.0, num_teachers=1):
    """Logits of student and teachers at 6 tokens of which 4 are trained, and the batch and outputs of the loss."""
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(6, vocabulary, generator=generator, dtype=torch.float64).requires_grad_()
    teachers = 2 * torch.randn(6, num_teachers, vocabulary, generator=generator, dtype=torch.float64)
    top = torch.log_softmax(teachers / temperature, -1).topk(k, dim=-1)
    batch = BatchedDataDict(
        [4, 2],
        {
            "loss_mask": torch.tensor([False, True, True, True, False, True]),
            "top_ids": top.indices,
            "teacher_top_logprobs": top.values,
        },
        {"teacher_weights": torch.full((2, num_teachers), 1 / num_teachers)},
    )
    log_p = torch.log_softmax(student / temperature, -1)
    outputs = ModelOutputs(
        top_logprobs=log_p.gather(1, top.indices.flatten(1)).view(top.indices.shape),
        entropy=-(log_p.exp() * log_p).sum(-1),
    )
    return student, teachers, batch, outputs


def against(student, teachers, temperature=1.0):
    """Log-softmax of both at the trained tokens."""
    trained = [1, 2, 3, 5]
    ours = torch.log_softmax(student[trained] / temperature, -1)
    return ours, torch.log_softmax(teachers[trained, 0] / temperature, -1)


@pytest.mark.parametrize("tail", ["renormalize", "bucket", "zero"])
def test_all_of_the_vocabulary_is_the_kl_of_torch(tail):
    student, teachers, batch, outputs = random_case()
    ours, theirs = against(student, teachers)
    forward = kl_div(ours, theirs, log_target=True, reduction="sum")
    reverse = kl_div(theirs, ours, log_target=True, reduction="sum")
    for name, expected in (("forward", forward), ("reverse", reverse), ("mixed", (forward + reverse) / 2)):
        found = make(name, tail=tail)(outputs, batch).total
        # bucket: a rest of 1e-7 stands for none, and is gone before the fifth decimal
        assert found.item() == approx(expected.item(), rel=1e-6), name
        (grad,), (wanted,) = (torch.autograd.grad(x, student, retain_graph=True) for x in (found, expected))
        torch.testing.assert_close(grad, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_temperature_divides_the_logits_and_the_square_restores_the_size(temperature):
    student, teachers, batch, outputs = random_case()
    ours, theirs = against(student, teachers, temperature)
    expected = temperature**2 * kl_div(ours, theirs, log_target=True, reduction="sum")
    assert (make("forward", temperature=temperature)(outputs, batch).total).item() == approx(expected.item())


def test_a_bucket_is_never_above_the_whole_divergence():
    """Merging tokens loses information: KL of the merged is at most KL of all, and grows with k."""
    for name in ("forward", "reverse", "jensen"):
        values = [
            (make(name, tail="bucket")(case[3], case[2]).total).item()
            for case in (random_case(k=k) for k in (1, 4, 8, 11))
        ]
        assert values == sorted(values)


def test_several_teachers_are_weighed():
    student, teachers, batch, outputs = random_case(num_teachers=2)
    batch.set_sequences("teacher_weights", torch.tensor([[0.25, 0.75], [1.0, 0.0]]))
    found = make("forward")(outputs, batch).total.item()
    log_p = torch.log_softmax(student, -1)
    each = [
        kl_div(log_p, torch.log_softmax(teachers[:, t], -1), log_target=True, reduction="none").sum(-1) for t in (0, 1)
    ]
    expected = sum(0.25 * each[0][i] + 0.75 * each[1][i] for i in (1, 2, 3)) + each[0][5]
    assert found == approx(expected.item())


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_against_the_gkd_trainer_of_trl(beta, temperature):
    """Equal in loss and gradient; at another temperature ours is larger by its square, on purpose."""
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    student, teachers, batch, outputs = random_case()
    labels = torch.where(batch["loss_mask"], 1, -100)[None]
    theirs = trainer.generalized_jsd_loss(
        student[None], teachers[None, :, 0], labels=labels, beta=beta, temperature=temperature
    )
    ours = make("jensen", beta=beta, temperature=temperature)(outputs, batch).total / 4
    assert ours.item() == approx(temperature**2 * theirs.item(), rel=1e-6)
    (mine,), (other,) = (torch.autograd.grad(x, student, retain_graph=True) for x in (ours, theirs))
    torch.testing.assert_close(mine, temperature**2 * other, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("name", "beta"), [("forward", 0), ("reverse", 1)])
def test_the_ends_of_the_gkd_trainer_of_trl(name, beta):
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    student, teachers, batch, outputs = random_case()
    labels = torch.where(batch["loss_mask"], 1, -100)[None]
    theirs = trainer.generalized_jsd_loss(student[None], teachers[None, :, 0], labels=labels, beta=beta)
    assert (make(name)(outputs, batch).total / 4).item() == approx(theirs.item(), rel=1e-6)


# -- what is declared, and mistakes -------------------------------------------------------------------------------


def test_needs():
    assert all(isinstance(make(name), Loss) for name in LOSSES)
    assert make("mixed").needs == {"top_logprobs"}
    assert make("mixed", tail="zero", nll_weight=0.1).needs == {"top_logprobs", "entropy", "logprobs"}
    assert make("forward", tail="zero").needs == {"top_logprobs"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("forward", {"tail": "drop"}, "tail must be one of"),
        ("forward", {"temperature": 0.0}, "temperature must be > 0"),
        (
            "forward",
            {"temperature": 2.0, "tail": "bucket"},
            r"cannot be applied to tail 'bucket'.*generation.temperature",
        ),
        ("reverse", {"outside_logprob": 1.0}, "outside_logprob must be <= 0"),
        ("reverse", {"nll_weight": -1.0}, "nll_weight must be >= 0"),
        ("mixed", {"forward_weight": 1.2}, "forward_weight must be <= 1"),
        ("jensen", {"beta": 1.0}, "beta must be < 1"),
    ],
)
def test_mistakes(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make(name, **options)


def test_shapes_are_checked():
    _, _, batch, outputs = random_case()
    outputs.top_logprobs = outputs.top_logprobs[:, :, :3]
    with pytest.raises(ShapeMismatch, match=r"\[6, 1, 3\], teacher_top_logprobs \[6, 1, 11\]"):
        make("forward")(outputs, batch)
