"""Logprobs of several tokens in place of each, with gradient: against plain Hugging Face models and autograd."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import load_model
from nemo_rl_core.models.numerics.logprobs import LogitTransform, linear_logprobs
from nemo_rl_core.protocols.launcher import WorkerContext
from nemo_rl_core.protocols.loss import LossSums
from nemo_rl_core.protocols.training_backend import StepPlan
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_core.schema import OptimizerConfig, PolicyConfig
from nemo_rl_plugins_dtensor.backend import DTensorBackend

torch.set_num_threads(1)
MODEL = "scratch:qwen2-tiny"
LENGTHS = [5, 7, 3]


def backend(**options):
    made = DTensorBackend()
    made.setup(
        PolicyConfig(model_name=MODEL, optimizer=OptimizerConfig(lr=0.0), options=options), WorkerContext(num_threads=1)
    )
    return made


def batch(shape=(4,)):
    generator = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)
    made = BatchedDataDict(LENGTHS, {"input_ids": torch.randint(3, 90, (n,), generator=generator)})
    made.set_tokens("loss_mask", (made.position_ids > 1) | (made.position_ids == 1) & (made.sequence_index == 0))
    made.set_tokens("top_ids", torch.randint(0, 104, (n, *shape), generator=generator))
    made.set_tokens("weights", torch.randn(n, *shape, generator=generator))
    return made


class Weighted:
    """A loss whose gradient by the logprobs is `weights`; it keeps what it was given."""

    def __init__(self, *needs):
        self.needs = frozenset({"top_logprobs", *needs})
        self.seen = []

    def __call__(self, outputs, data):
        self.seen.append(outputs)
        inside = data["loss_mask"]
        total = (outputs.top_logprobs * data["weights"])[inside].sum()
        if "logprobs" in self.needs:
            total = total + 0.5 * outputs.logprobs[inside].sum() + 0.3 * outputs.entropy[inside].sum()
        return LossSums(total)


def plain(data, temperature, extra):
    """The same loss by autograd through the whole matrix."""
    model = load_model(MODEL, dtype=torch.float32)
    rows = [model(input_ids=ids[None]).logits[0, :-1] / temperature for ids in data.unpack("input_ids")]
    log_p = torch.cat([torch.cat([torch.zeros(1, row.shape[1]), torch.log_softmax(row, -1)]) for row in rows])
    inside = data["loss_mask"]
    top = log_p.gather(1, data["top_ids"].flatten(1)).view(data["top_ids"].shape)
    total = (top * data["weights"])[inside].sum()
    if extra:
        total = total + 0.5 * log_p.gather(1, data["input_ids"][:, None])[inside].sum()
        total = total - 0.3 * (log_p.exp() * log_p)[inside].sum()
    total.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    return float(norm), top.masked_fill(~inside.view(-1, *(1,) * (top.ndim - 1)), 0.0)


@pytest.mark.parametrize(
    ("shape", "needs", "options"),
    [
        ((4,), (), {}),
        ((2, 3), ("logprobs", "entropy"), {}),
        ((2, 3), ("logprobs", "entropy"), {"attention": "padded"}),
    ],
)
def test_logprobs_and_gradient_are_those_of_the_whole_matrix(shape, needs, options):
    data, loss = batch(shape), Weighted(*needs)
    result = backend(**options).train_step(data, loss, StepPlan(micro_batches=[[0, 1, 2]], temperature=0.7))
    norm, top = plain(data, 0.7, bool(needs))
    (seen,) = loss.seen
    torch.testing.assert_close(seen.top_logprobs, top, atol=1e-5, rtol=1e-5)
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)
    assert (seen.logprobs is not None) == ("logprobs" in needs)


def test_micro_batches_add_up():
    data = batch()
    norms = [
        backend().train_step(data, Weighted(), StepPlan(micro_batches=cut)).grad_norm
        for cut in ([[0, 1, 2]], [[1], [2, 0]])
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("chunk_size", [2, 64])
def test_chunks_and_repeated_ids(chunk_size):
    """A token that is asked for twice has the gradient of both, whatever the chunks."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 6, generator=generator, requires_grad=True)
    weight = torch.randn(9, 6, generator=generator, requires_grad=True)
    ids = torch.tensor([[0, 0, 3], [8, 1, 8], [2, 2, 2], [4, 5, 6], [7, 0, 1]])
    pull = torch.randn(5, 3, generator=generator)
    transform = LogitTransform(softcap=3.0, temperature=0.8)
    found, _ = linear_logprobs(hidden, weight, ids, transform=transform, chunk_size=chunk_size)
    grads = torch.autograd.grad((found * pull).sum(), (hidden, weight))
    logits = 3.0 * torch.tanh(hidden @ weight.T / 3.0) / 0.8
    expected = torch.log_softmax(logits, -1).gather(1, ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for mine, other in zip(grads, torch.autograd.grad((expected * pull).sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_an_id_beyond_the_vocabulary_is_refused():
    data = batch()
    data["top_ids"][3, 0] = 104  # of a trained token
    with pytest.raises(ConfigError, match=r"token id 104, but this model's vocabulary has 104"):
        backend().train_step(data, Weighted(), StepPlan(micro_batches=[[0, 1, 2]]))
