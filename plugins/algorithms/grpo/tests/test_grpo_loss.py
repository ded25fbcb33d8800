"""The clipped policy-gradient loss, by numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pytest import approx

from nemo_rl_core.errors import ConfigError, ShapeMismatch
from nemo_rl_core.models.numerics.kl import kl_estimate
from nemo_rl_core.protocols.loss import Loss, ModelOutputs
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.training.model.normalize import NormalizedLoss, count_trained
from nemo_rl_plugins_grpo.loss_config import ClippedPGConfig
from nemo_rl_plugins_grpo.losses.clipped import ClippedPolicyGradientLoss


def run(options, current, *, lengths=None, mask=None, advantages=None, rollout=None, dtype=torch.float32, **fields):
    """The sums of one batch and the gradient of its current logprobs; fields default to on-policy ones."""
    current = torch.as_tensor(current, dtype=dtype).requires_grad_()
    n = len(current)
    tokens = {
        "loss_mask": torch.ones(n, dtype=torch.bool) if mask is None else torch.as_tensor(mask),
        "advantages": torch.ones(n, dtype=dtype) if advantages is None else torch.as_tensor(advantages, dtype=dtype),
        "rollout_logprobs": current.detach().clone() if rollout is None else torch.as_tensor(rollout, dtype=dtype),
        **{name: torch.as_tensor(value, dtype=dtype) for name, value in fields.items()},
    }
    batch = BatchedDataDict(lengths or [n], tokens)
    sums = ClippedPolicyGradientLoss(ClippedPGConfig(**options))(ModelOutputs(logprobs=current), batch)
    sums.total.backward()
    return sums, current.grad


def value(metric):
    """A metric as it would be logged."""
    return float(metric.total) / float(metric.count) if metric.reduction == "mean" else float(metric.total)


def one_token(ratio, advantage, **options):
    """Loss and d loss / d ratio of one token whose ratio to the start of the step is `ratio`."""
    sums, grad = run(options, [math.log(ratio) - 1], advantages=[advantage], logprobs=[-1.0])
    return sums.total.item(), grad.item() / ratio


def test_it_is_a_loss():
    assert isinstance(ClippedPolicyGradientLoss(), Loss)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad"),
    [
        (1.0, 2.0, -2.0, -2.0),  # on policy: the plain policy gradient
        (1.5, 2.0, -2.6, 0.0),  # above the upper bound, A > 0: capped, no gradient
        (1.5, -2.0, 3.0, 2.0),  # same ratio, A < 0: the pessimistic side is not clipped
        (0.5, 2.0, -1.0, -2.0),  # below the lower bound, A > 0: not clipped
        (0.5, -2.0, 1.6, 0.0),  # below, A < 0: capped, no gradient
        (1.25, 2.0, -2.5, -2.0),  # between 1.2 and 1.3: the upper bound is its own (clip-higher)
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_each_side_of_the_clip(ratio, advantage, loss, grad):
    assert one_token(ratio, advantage, ratio_clip_min=0.2, ratio_clip_max=0.3) == approx((loss, grad), abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad"),
    [
        (4.0, -2.0, 6.0, 0.0),  # 8 bounded to -A * c = 6
        (2.0, -2.0, 4.0, 2.0),  # below c
        (0.5, -2.0, 1.6, 0.0),  # the lower clip is as before
        (4.0, 2.0, -2.4, 0.0),  # A > 0: only the ordinary clip
    ],
)
def test_dual_clip(ratio, advantage, loss, grad):
    assert one_token(ratio, advantage, ratio_clip_c=3.0) == approx((loss, grad), abs=1e-6)


def test_clip_metrics_count_the_tokens_that_lost_their_gradient():
    ratios, advantages = [1.5, 1.5, 0.5, 0.5, 1.0], [1.0, -1.0, 1.0, -1.0, 1.0]
    sums, _ = run({}, [math.log(r) for r in ratios], advantages=advantages, logprobs=[0.0] * 5)
    got = {name: value(sums.metrics[name]) for name in sums.metrics}
    assert got["clip_fraction_high"] == approx(0.2)
    assert got["clip_fraction_low"] == approx(0.2)
    assert got["clip_fraction"] == approx(0.4)
    assert got["probs_ratio"] == approx(1.0)
    assert (got["probs_ratio_min"], got["probs_ratio_max"]) == approx((0.5, 1.5))


@pytest.mark.parametrize("ratio", [0.9, 1.1])
def test_masked_tokens_are_no_extremum(ratio):
    sums, _ = run({}, [math.log(ratio), 0.0], mask=[True, False], logprobs=[0.0, 0.0])
    assert value(sums.metrics["probs_ratio_min"]) == approx(ratio)
    assert value(sums.metrics["probs_ratio_max"]) == approx(ratio)


def test_a_huge_ratio_stays_finite_where_the_advantage_is_zero():
    sums, grad = run({}, [0.0, 0.0], advantages=[0.0, 1.0], logprobs=[-1e4, -1.0])
    assert sums.total.item() == approx(-1.2)
    assert grad.tolist() == [0.0, 0.0]


# -- on policy ------------------------------------------------------------------------------------------


def test_without_old_logprobs_the_gradient_is_that_of_reinforce():
    current, advantages = [-0.5, -2.0, -1.0], [1.0, -3.0, 0.5]
    sums, grad = run({}, current, advantages=advantages)
    assert sums.total.item() == approx(1.5)
    assert grad.tolist() == approx([-1.0, 3.0, -0.5])
    assert value(sums.metrics["probs_ratio_min"]) == value(sums.metrics["probs_ratio_max"]) == 1.0
    assert value(sums.metrics["clip_fraction"]) == 0.0


def test_leaving_the_old_logprobs_out_changes_nothing_on_the_first_step():
    current = [-0.5, -2.0, -1.0]
    options = {"correction": "tis", "correction_max": 1.1}
    common = {"advantages": [1.0, -3.0, 0.5], "rollout": [-0.6, -2.0, -0.9]}
    short, short_grad = run(options, current, **common)
    full, full_grad = run(options, current, logprobs=current, **common)
    assert short.total.item() == full.total.item()
    assert torch.equal(short_grad, full_grad)
    assert {k: value(m) for k, m in short.metrics.items()} == {k: value(m) for k, m in full.metrics.items()}


def test_forcing_the_ratio_ignores_old_logprobs():
    sums, grad = run({"force_on_policy_ratio": True}, [-1.0], advantages=[2.0], logprobs=[-3.0])
    assert (sums.total.item(), grad.item()) == approx((-2.0, -2.0))


def test_ratio_against_the_engine():
    sums, grad = run(
        {"ratio_against": "rollout"}, [math.log(1.1) - 1], advantages=[2.0], rollout=[-1.0], logprobs=[-7.0]
    )
    assert (sums.total.item(), grad.item()) == approx((-2.2, -2.2))
    assert value(sums.metrics["rollout_probs_ratio"]) == approx(1.1)
    assert "probs_ratio" not in sums.metrics  # which the run loop expects to be 1 on the first update


# -- aggregation ----------------------------------------------------------------------------------------

TWO = {"lengths": [1, 3], "advantages": [4.0, 1.0, 2.0, 3.0]}  # term of each token: -advantage


@pytest.mark.parametrize(
    ("options", "denominator", "total", "grad"),
    [
        ({}, "tokens", -10.0, [-4.0, -1.0, -2.0, -3.0]),
        ({"aggregation": "sequence"}, "sequences", -6.0, [-4.0, -1 / 3, -2 / 3, -1.0]),
        ({"aggregation": "constant", "constant_length": 5}, "sequences", -2.0, [-0.8, -0.2, -0.4, -0.6]),
        ({"aggregation": "constant"}, "sequences", -10.0, [-4.0, -1.0, -2.0, -3.0]),
        ({"aggregation": "sum"}, "sequences", -10.0, [-4.0, -1.0, -2.0, -3.0]),
    ],
)
def test_aggregation(options, denominator, total, grad):
    sums, got = run(options, [-1.0] * 4, **TWO)
    assert ClippedPolicyGradientLoss(ClippedPGConfig(**options)).denominator == denominator
    assert sums.total.item() == approx(total)
    assert got.tolist() == approx(grad)


def test_the_mean_of_a_sequence_is_over_its_trained_tokens():
    sums, grad = run({"aggregation": "sequence"}, [-1.0] * 4, mask=[True, False, True, True], **TWO)
    assert sums.total.item() == approx(-6.5)  # 4 + (2 + 3) / 2
    assert grad.tolist() == approx([-4.0, 0.0, -1.0, -1.5])


# -- KL to the reference ---------------------------------------------------------------------------------

# x = ref - current = -0.5; k3 = exp(x) - 1 - x, its derivative by the logprob 1 - exp(x); k2 = x^2 / 2.
K3, DK3 = math.exp(-0.5) - 0.5, 1 - math.exp(-0.5)


@pytest.mark.parametrize(
    ("kind", "gradient", "kl", "grad"),
    [
        ("k1", "direct", 0.5, 1.0),
        ("k2", "direct", 0.125, 0.5),
        ("k3", "direct", K3, DK3),
        ("k1", "unbiased", 0.5, 1.5),  # value + direct gradient: the score function
        ("k2", "unbiased", 0.125, 0.625),
        ("k3", "unbiased", K3, 0.5),  # exactly log(policy / reference): the gradient of KL(policy || ref)
        ("k3", "importance", 2 * K3, 2 * 0.5),  # policy / sampling policy = 2
        ("k1", "importance", 1.0, 3.0),
    ],
)
def test_reference_kl(kind, gradient, kl, grad):
    sums, got = run(
        {"reference_kl_beta": 0.1, "reference_kl_type": kind, "reference_kl_gradient": gradient},
        [-1.0],
        advantages=[0.0],
        rollout=[-1.0 - math.log(2)],
        ref_logprobs=[-1.5],
    )
    assert value(sums.metrics["kl_penalty"]) == approx(kl)
    assert sums.total.item() == approx(0.1 * kl)
    assert got.item() == approx(0.1 * grad)


@pytest.mark.parametrize(
    ("kind", "ref", "kl"),
    [
        ("k1", -101.0, 10.0),  # log-ratio -100 held at -20, then the result at 10
        ("k1", 99.0, -10.0),
        ("k2", -101.0, 10.0),
        ("k3", 2.0, 10.0),  # exp(3) - 4 = 16.1: only the output bound acts
    ],
)
def test_a_bounded_kl_has_no_gradient(kind, ref, kl):
    sums, grad = run(
        {"reference_kl_beta": 1.0, "reference_kl_type": kind}, [-1.0], advantages=[0.0], ref_logprobs=[ref]
    )
    assert (value(sums.metrics["kl_penalty"]), grad.item()) == approx((kl, 0.0))


def test_beyond_the_input_bound_only_there_is_no_gradient():
    options = {"reference_kl_beta": 1.0, "reference_kl_type": "k1", "kl_input_clamp": 2.0}
    sums, grad = run(options, [-1.0, -1.0], advantages=[0.0, 0.0], ref_logprobs=[-6.0, -2.0])
    assert sums.total.item() == approx(2.0 + 1.0)
    assert grad.tolist() == approx([0.0, 2.0])  # 1 (score function) + 1 (direct)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_default_gradient_is_unbiased(kind):
    """Over all tokens of a small vocabulary, the expected gradient is that of the exact KL."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64), 0)
    logp = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    loss = ClippedPolicyGradientLoss(
        ClippedPGConfig(reference_kl_beta=1.0, reference_kl_type=kind, aggregation="token")
    )
    expected = torch.zeros(3, dtype=torch.float64)
    for token in range(3):
        batch = BatchedDataDict(
            [1],
            {
                "loss_mask": torch.ones(1, dtype=torch.bool),
                "advantages": torch.zeros(1, dtype=torch.float64),
                "rollout_logprobs": logp[token : token + 1].detach(),
                "ref_logprobs": ref[token : token + 1],
            },
        )
        sums = loss(ModelOutputs(logprobs=logp[token : token + 1]), batch)
        (grad,) = torch.autograd.grad(sums.total, logits, retain_graph=True)
        expected += logp[token].exp().detach() * grad
    assert expected.tolist() == approx(exact.tolist(), abs=1e-12)


# -- mismatch with the engine ------------------------------------------------------------------------------

# Weights exp(trainer - engine) of four tokens in two sequences; each token's term is -1.
WEIGHTS = [0.25, 1.0, 1.5, 4.0]
MISMATCH = {"lengths": [2, 2], "rollout": [-1 - math.log(w) for w in WEIGHTS]}


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0]),
        ({"correction": "importance"}, WEIGHTS),
        ({"correction": "tis", "correction_max": 2.0}, [0.25, 1.0, 1.5, 2.0]),
        ({"correction": "tis", "correction_min": 0.5, "correction_max": 2.0}, [0.5, 1.0, 1.5, 2.0]),
        ({"correction": "icepop", "correction_min": 0.5, "correction_max": 2.0}, [0.0, 1.0, 1.5, 0.0]),
        # geometric means 0.5 and sqrt(6) = 2.45
        ({"correction": "seq_mask_tis", "correction_min": 0.4, "correction_max": 2.0}, [0.25, 1.0, 0.0, 0.0]),
        ({"correction": "seq_mask_tis", "correction_min": 0.6, "correction_max": 3.0}, [0.0, 0.0, 1.5, 4.0]),
    ],
)
def test_correction(options, weights):
    sums, grad = run(options, [-1.0] * 4, **MISMATCH)
    assert sums.total.item() == approx(-sum(weights))
    assert grad.tolist() == approx([-w for w in weights])
    assert value(sums.metrics["sampling_importance_ratio"]) == approx(sum(WEIGHTS) / 4)


def test_the_correction_does_not_touch_the_kl():
    options = {"correction": "icepop", "correction_min": 2.0, "correction_max": 3.0, "reference_kl_beta": 1.0}
    sums, _ = run({**options, "reference_kl_type": "k1"}, [-1.0], ref_logprobs=[-1.5])
    assert sums.total.item() == approx(0.5)


def test_the_correction_is_that_of_the_start_of_the_step():
    # start / engine = 2 and ratio = 1.1: -(1.1 * 2)
    options = {"correction": "tis", "correction_max": 9.0}
    sums, _ = run(options, [math.log(1.1) - 1], logprobs=[-1.0], rollout=[-1 - math.log(2)])
    assert sums.total.item() == approx(-2.2)


@pytest.mark.parametrize("engine", [math.nan, -math.inf, math.inf])
def test_a_weight_that_is_not_finite_drops_its_token(engine):
    sums, grad = run({"correction": "importance"}, [-1.0, -1.0], rollout=[engine, -1.0])
    assert sums.total.item() == approx(-1.0)
    assert grad.tolist() == approx([0.0, -1.0])


def test_mismatch_metrics():
    # trainer - engine: log 2 and -log 2
    sums, _ = run({}, [-1.0, -3.0], rollout=[-1 - math.log(2), -3 + math.log(2)])
    got = {name: value(metric) for name, metric in sums.metrics.items()}
    assert got["token_mult_prob_error"] == approx(2.0)
    assert got["sampling_importance_ratio"] == approx(1.25)
    assert got["gen_kl_error"] == approx(((2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2))) / 2)
    assert got["approx_entropy"] == approx((2 * 1 + 0.5 * 3) / 2)


def test_a_tiny_mismatch_keeps_its_digits():
    """k3 of 1e-4 is 5e-9; exp(x) - 1 in float32 has no digit of it."""
    kl = kl_estimate(torch.tensor([1e-4, -1e-4]), "k3")
    assert kl.tolist() == approx([5e-9, 5e-9], rel=1e-2)


# -- masks, batches, gradients -------------------------------------------------------------------------------

ALL = {
    "aggregation": "sequence",
    "ratio_clip_c": 3.0,
    "reference_kl_beta": 0.1,
    "correction": "tis",
    "correction_max": 2.0,
}
SEQ = {**ALL, "correction": "seq_mask_tis", "correction_min": 0.5, "reference_kl_gradient": "importance"}
TOKEN = {**ALL, "aggregation": "token"}


def fields(n, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def near(base, scale):
        return base + scale * torch.randn(n, generator=generator, dtype=dtype)

    base = -torch.rand(n, generator=generator, dtype=dtype) * 2 - 0.5
    return {
        "current": base,
        "logprobs": near(base, 0.3),
        "rollout": near(base, 0.3),
        "ref_logprobs": near(base, 0.5),
        "advantages": near(torch.zeros_like(base), 1.0),
    }


@pytest.mark.parametrize("options", [ALL, SEQ, TOKEN, {}])
@pytest.mark.parametrize("poison", [-math.inf, math.inf, math.nan, 1e30])
@pytest.mark.parametrize("name", ["current", "logprobs", "rollout", "ref_logprobs", "advantages"])
def test_masked_positions_move_nothing(options, poison, name):
    mask = torch.tensor([False, True, True, False, False, True])
    values = fields(6)
    spoilt = {**values, name: torch.where(mask, values[name], torch.tensor(poison))}
    (clean, clean_grad), (dirty, dirty_grad) = (
        run(options, v.pop("current"), lengths=[3, 3], mask=mask, **v) for v in (dict(values), spoilt)
    )
    assert dirty.total.item() == clean.total.item()
    assert torch.equal(dirty_grad, clean_grad)
    assert (dirty_grad[~mask] == 0).all()
    assert {k: value(m) for k, m in dirty.metrics.items()} == {k: value(m) for k, m in clean.metrics.items()}


@pytest.mark.parametrize("options", [ALL, SEQ, TOKEN])
def test_nothing_trained_is_zero_and_finite(options):
    values = dict(fields(4), advantages=torch.full((4,), math.nan))
    sums, grad = run(options, values.pop("current"), lengths=[2, 2], mask=[False] * 4, **values)
    assert sums.total.item() == 0.0
    assert (grad == 0).all()
    assert all(float(m.total) == 0 for m in sums.metrics.values() if m.reduction == "mean")


def normalized(options, batch, current, parts):
    """Loss, gradient and reduced metrics of a batch cut into micro-batches of the indices in `parts`."""
    current = current.clone().requires_grad_()
    loss = NormalizedLoss(ClippedPolicyGradientLoss(ClippedPGConfig(**options)), count_trained(batch))
    batch.set_tokens("position", torch.arange(batch.num_tokens))
    total, metrics = 0.0, {}
    for part in parts:
        micro = batch.select(part)
        sums = loss(ModelOutputs(logprobs=current[micro["position"]]), micro)
        sums.total.backward()
        total += sums.total.item()
        for name, metric in sums.metrics.items():
            metrics.setdefault(name, []).append(metric)
    reduce = {"min": min, "max": max}
    reduced = {
        name: sum(float(m.total) for m in found) / max(sum(float(m.count) for m in found), 1e-12)
        if found[0].reduction == "mean"
        else reduce.get(found[0].reduction, sum)(float(m.total) for m in found)
        for name, found in metrics.items()
    }
    return total, current.grad, reduced


@pytest.mark.parametrize("options", [ALL, SEQ, TOKEN, {"aggregation": "constant", "constant_length": 7}])
@pytest.mark.parametrize("parts", [[[0], [1], [2], [3]], [[3, 1], [0, 2]], [[2, 0, 3], [], [1]], [[3, 2, 1, 0]]])
def test_cutting_and_reordering_the_batch_change_nothing(options, parts):
    values = fields(12, seed=3, dtype=torch.float64)
    current = values.pop("current")
    batch = BatchedDataDict(
        [2, 5, 1, 4],
        {
            "loss_mask": torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool),
            "rollout_logprobs": values.pop("rollout"),
            **values,
        },
    )
    whole = normalized(options, batch, current, [[0, 1, 2, 3]])
    cut = normalized(options, batch, current, parts)
    assert cut[0] == approx(whole[0], rel=1e-6)
    assert torch.allclose(cut[1], whole[1], rtol=1e-6, atol=0)
    assert cut[2] == approx(whole[2], rel=1e-6)
    assert whole[1].abs().sum() > 0


@pytest.mark.parametrize("options", [ALL, SEQ, TOKEN, {"ratio_against": "rollout"}])
def test_the_gradient_is_that_of_finite_differences(options):
    """For the ratio and the direct KL (the other KL gradients differ from their value's on purpose)."""
    values = fields(6, seed=1, dtype=torch.float64)
    loss = ClippedPolicyGradientLoss(ClippedPGConfig(**{**options, "reference_kl_gradient": "direct"}))
    batch = BatchedDataDict(
        [2, 4],
        {
            "loss_mask": torch.tensor([0, 1, 0, 1, 1, 1], dtype=torch.bool),
            "rollout_logprobs": values["rollout"],
            **{k: values[k] for k in ("logprobs", "ref_logprobs", "advantages")},
        },
    )
    current = values["current"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(ModelOutputs(logprobs=x), batch).total, current)


def test_outputs_of_another_shape_are_refused():
    with pytest.raises(ShapeMismatch, match=r"\[2, 1\].*\[2\]"):
        run({}, [[-1.0], [-1.0]], mask=[True, True], rollout=[-1.0, -1.0])


# -- configuration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"correction": "tis"}, "correction_max"),
        ({"correction": "icepop", "correction_max": 2.0}, "correction_min"),
        ({"correction": "icepop", "correction_min": 3.0, "correction_max": 2.0}, "exchange"),
        ({"correction_max": 2.0}, "no effect"),
        ({"ratio_against": "rollout", "correction": "importance"}, "already"),
        ({"constant_length": 3}, "constant_length"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        ClippedPGConfig(**options)


@pytest.mark.parametrize(
    ("options", "required"),
    [
        ({}, {"logprobs"}),
        ({"reference_kl_beta": 0.01}, {"logprobs", "ref_logprobs"}),
        ({"force_on_policy_ratio": True}, set()),
        ({"ratio_against": "rollout"}, set()),
    ],
)
def test_fields_that_it_requires(options, required):
    assert ClippedPolicyGradientLoss(ClippedPGConfig(**options)).required_fields == required
