"""Packed, padded and one-by-one forward passes are the same policy."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import load_model
from nemo_rl_core.models.numerics.packed_attention import Packing
from nemo_rl_core.protocols.training_backend import StepPlan
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_plugins_dtensor.config import DTensorConfig

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "gpt2"]


def _plain_logprobs(model_name, batch, temperature=1.0):
    """Each sequence alone through the model as transformers ships it."""
    model = load_model(model_name, dtype=torch.float32).eval()
    out = []
    for ids in batch.unpack("input_ids"):
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0] / temperature
        table = torch.log_softmax(logits[:-1], dim=-1)
        out += [torch.zeros(1), table.gather(1, ids[1:, None]).squeeze(1)]
    return torch.cat(out)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_the_plain_model_on_each_sequence_alone(make_backend, model_name, batch, family, temperature):
    del batch.tokens["loss_mask"]
    backend = make_backend(family)
    assert backend.network.packed is (family != "gemma2")  # gemma2 caps its attention scores
    found = backend.get_logprobs(batch, temperature=temperature)
    torch.testing.assert_close(found, _plain_logprobs(model_name(family), batch, temperature), rtol=1e-5, atol=1e-5)


def _gradients(backend, batch, loss, micro_batches):
    """Gradients of one step, taken by a learning rate of 0 with hooks in place of the update."""
    seen = {}
    backend.optimizer.step = lambda: seen.update({n: p.grad.clone() for n, p in backend.weights.items()})
    backend.scheduler.step = lambda: None
    result = backend.train_step(batch, loss, StepPlan(micro_batches=micro_batches))
    return result, seen


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_padded_and_one_by_one_give_equal_gradients(make_backend, make_loss, batch, family):
    loss = make_loss(batch, needs=("logprobs", "entropy"))
    whole, alone = [list(range(len(batch)))], [[i] for i in range(len(batch))]
    runs = {}
    for name, attention, plan in (("packed", "packed", whole), ("padded", "padded", whole), ("alone", "packed", alone)):
        backend = make_backend(family, options=DTensorConfig(attention=attention), max_grad_norm=None)
        runs[name] = _gradients(backend, batch, loss, plan)
    for other in ("padded", "alone"):
        result, gradients = runs[other]
        assert result.grad_norm == pytest.approx(runs["packed"][0].grad_norm, rel=1e-6)
        for parameter, gradient in runs["packed"][1].items():
            torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2"])
def test_no_token_sees_another_sequence(make_backend, batch, family):
    backend = make_backend(family, options=DTensorConfig(attention="packed"))
    del batch.tokens["loss_mask"]
    before = backend.get_logprobs(batch)
    start, end = batch.offsets[3:5].tolist()
    batch.tokens["input_ids"][start:end] = (batch.tokens["input_ids"][start:end] + 1) % 96
    after = backend.get_logprobs(batch)
    changed = torch.zeros(batch.num_tokens, dtype=torch.bool)
    changed[start:end] = True
    assert torch.equal(before[~changed], after[~changed])
    assert not torch.equal(before[changed], after[changed])


def test_a_loss_mask_restricts_logprobs_to_what_is_trained(make_backend, batch):
    backend = make_backend()
    found = backend.get_logprobs(batch)
    mask = batch.tokens.pop("loss_mask")
    everything = backend.get_logprobs(batch)
    assert torch.equal(found[~mask], torch.zeros_like(found[~mask]))
    torch.testing.assert_close(found[mask], everything[mask], rtol=1e-6, atol=1e-6)
    assert torch.equal(everything[batch.position_ids == 0], torch.zeros(len(batch)))
    assert (everything[batch.position_ids > 0] < 0).all()


def test_micro_batches_of_logprobs_are_put_back_in_the_order_of_the_batch(make_backend, batch):
    backend = make_backend()
    together = backend.get_logprobs(batch)
    apart = backend.get_logprobs(batch, micro_batches=[[7, 0], [], [3, 1, 2], [6, 5, 4]])
    torch.testing.assert_close(apart, together, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_the_chunk_size_changes_nothing(make_backend, make_loss, batch, chunk):
    plan = StepPlan(micro_batches=[range(len(batch))])
    expected = make_backend(logprob_chunk_size=64).train_step(batch, make_loss(batch), plan)
    found = make_backend(logprob_chunk_size=chunk).train_step(batch, make_loss(batch), plan)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
    assert found.metrics["loss"].total == pytest.approx(expected.metrics["loss"].total, rel=1e-5)


def test_logits_and_entropy_are_those_that_predict_each_token(make_backend, model_name, batch):
    backend = make_backend("llama")
    seen = {}

    class Look:
        needs = frozenset({"logits", "entropy", "logprobs"})

        def __call__(self, outputs, batch):
            from nemo_rl_core.protocols.loss import LossSums

            seen.update(logits=outputs.logits, entropy=outputs.entropy, logprobs=outputs.logprobs)
            return LossSums(outputs.logits.sum() * 0)

    backend.train_step(batch, Look(), StepPlan(micro_batches=[range(len(batch))], update=False, temperature=0.5))
    mask = batch["loss_mask"]
    table = torch.log_softmax(seen["logits"], dim=-1)
    picked = table.gather(1, batch["input_ids"][:, None]).squeeze(1)
    torch.testing.assert_close(picked[mask], seen["logprobs"][mask], rtol=1e-5, atol=1e-5)
    entropy = -(table.exp() * table).sum(-1)
    torch.testing.assert_close(entropy[mask], seen["entropy"][mask], rtol=1e-5, atol=1e-5)
    expected = _plain_logprobs(model_name("llama"), batch, temperature=0.5)
    torch.testing.assert_close(picked[mask], expected[mask], rtol=1e-5, atol=1e-5)


def test_a_model_that_cannot_be_packed_says_why_when_told_to(make_backend):
    with pytest.raises(ConfigError, match=r"Gemma2ForCausalLM cannot be run packed.*capped scores.*auto or padded"):
        make_backend("gemma2", options=DTensorConfig(attention="packed"))


@pytest.mark.parametrize("lengths", [[4, 4, 4], [1], [1, 50, 2, 49, 3], list(range(1, 30))])
def test_a_packing_is_a_permutation_with_little_padding(lengths):
    packing = Packing.of(lengths)
    places = sum(count * width for count, width in packing.groups)
    assert sum(lengths) <= places <= sum(lengths) / 0.75 + 1
    assert sum(count for count, _ in packing.groups) == len(lengths)
    if packing.pad is not None:
        row = torch.arange(sum(lengths))
        assert torch.equal(row[packing.pad][packing.unpad], row)
        assert len(packing.pad) == places
    batch = BatchedDataDict(lengths)
    assert torch.equal(packing.position_ids, batch.position_ids)
