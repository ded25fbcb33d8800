"""A prefix that stands in the row once gives what each sequence with its own copy gives."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_core.protocols.training_backend import StepPlan
from nemo_rl_core.records.batch import BatchedDataDict
from nemo_rl_plugins_dtensor.config import DTensorConfig
from nemo_rl_plugins_dtensor.network import Row
from nemo_rl_plugins_dtensor.prefix import share_prefixes

VOCAB = 96
FAMILIES = ["llama", "qwen2", "qwen3", "gpt2"]
ON, OFF = DTensorConfig(attention="packed"), DTensorConfig(attention="packed", share_prefixes=False)


def _batch(sequences, seed=0):
    """From (tokens, mask) of each sequence."""
    rng = torch.Generator().manual_seed(seed)
    batch = BatchedDataDict([len(ids) for ids, _ in sequences])
    batch.set_tokens("input_ids", torch.cat([torch.as_tensor(ids) for ids, _ in sequences]))
    batch.set_tokens("loss_mask", torch.cat([torch.as_tensor(mask, dtype=torch.bool) for _, mask in sequences]))
    batch.set_tokens("advantages", torch.randn(batch.num_tokens, generator=rng))
    return batch


def _group(prompt, sizes, rng):
    ids = [torch.cat([prompt, torch.randint(0, VOCAB, (size,), generator=rng)]) for size in sizes]
    return [(x, [0] * len(prompt) + [1] * (len(x) - len(prompt))) for x in ids]


def _rng(seed):
    return torch.Generator().manual_seed(seed)


def _tokens(size, rng):
    return torch.randint(0, VOCAB, (size,), generator=rng)


def _ragged(rng):
    return [s for size in (12, 9, 11) for s in _group(_tokens(size, rng), (3, 20, 7, 1, 30), rng)]


def _uniform(rng):
    return [s for _ in range(3) for s in _group(_tokens(12, rng), (3,) * 6, rng)]


def _group_of_one(rng):
    return _group(_tokens(12, rng), (3, 4, 5), rng) + _group(_tokens(4, rng), (9,), rng)


def _common_beginning(rng):
    prompt = _tokens(12, rng)
    other = torch.cat([prompt[:8], (prompt[8:] + 1) % VOCAB])
    return _group(prompt, (4, 2, 6), rng) + _group(other, (5, 3), rng) + _group(prompt[:8], (7, 7), rng)


def _trained_from_the_second_token(rng):
    return _group(_tokens(1, rng), (6, 3, 8), rng) + _group(_tokens(14, rng), (2, 5, 2), rng)


def _turns(rng):
    """Untrained gaps after the first trained token, and untrained tokens at the end."""
    found = []
    for ids, mask in _ragged(rng):
        gap = [m and i % 5 not in (1, 2) and i < len(mask) - 2 for i, m in enumerate(mask)]
        found.append((ids, gap))
    return found


def _one_trained_token_each(rng):
    return _group(_tokens(10, rng), (1,) * 5, rng)


def _interleaved(rng):
    sequences = _ragged(rng)
    return [sequences[i] for i in torch.randperm(len(sequences), generator=rng).tolist()]


CASES = [
    _ragged,
    _uniform,
    _group_of_one,
    _common_beginning,
    _trained_from_the_second_token,
    _turns,
    _one_trained_token_each,
    _interleaved,
]


def _rows(backend):
    """Appends the shape of the ids that enter the model."""
    seen = []
    backend.model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[:-1])))
    return seen


def _step(backend, batch, loss, parts=None):
    """The result of one step and its gradients, taken in place of the update."""
    gradients = {}
    backend.optimizer.step = lambda: gradients.update({n: p.grad.clone() for n, p in backend.weights.items()})
    backend.scheduler.step = lambda: None
    plan = StepPlan(micro_batches=parts or [list(range(len(batch)))], temperature=0.7)
    return backend.train_step(batch, loss, plan), gradients


def _assert_equal_steps(found, expected):
    (a, gradients), (b, reference) = found, expected
    assert a.metrics["loss"].total == pytest.approx(b.metrics["loss"].total, rel=1e-5, abs=1e-6)
    assert a.num_tokens == b.num_tokens
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    for name, gradient in gradients.items():
        error = float((gradient - reference[name]).norm() / (reference[name].norm() + 1e-6))
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_prefixes_changes_no_logprob_and_no_gradient(make_backend, make_loss, family, case):
    batch = _batch(case(_rng(1)))
    shared, plain = (make_backend(family, options=options, max_grad_norm=None) for options in (ON, OFF))
    seen = _rows(shared)
    found, expected = (b.get_logprobs(batch, temperature=0.7) for b in (shared, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found == 0, expected == 0)
    loss = make_loss(batch, needs=("logprobs", "entropy"))
    _assert_equal_steps(_step(shared, batch, loss), _step(plain, batch, loss))
    assert len(seen) == 2
    assert all(rows < 0.95 * batch.num_tokens for _, rows in seen), "the prefixes were not shared"


def test_float64_agrees_to_the_last_digits(make_backend):
    batch = _batch(_ragged(_rng(2)))
    runs = []
    for options in (ON, OFF):
        backend = make_backend("gpt2", options=options)  # the other families cast to float32 in their norms
        backend.model.double()
        row = backend.network.row(batch, device="cpu", only_trained=True)
        hidden = backend.network.hidden_states(row).index_select(0, row.predictors)
        weight = torch.linspace(-1, 1, hidden.numel(), dtype=torch.float64).view_as(hidden)
        (hidden * weight).sum().backward()
        runs.append((hidden.detach(), {n: p.grad for n, p in backend.weights.items() if p.grad is not None}))
    (hidden, gradients), (reference, expected) = runs
    torch.testing.assert_close(hidden, reference, rtol=1e-11, atol=1e-11)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_any_split_into_micro_batches_takes_the_same_step(make_backend, make_loss, checkpointing):
    batch = _batch(_ragged(_rng(3)))
    loss = make_loss(batch)
    options = {"max_grad_norm": None, "activation_checkpointing": checkpointing}
    parts = [list(range(0, 15, 2)), [], list(range(1, 15, 2))]
    found = _step(make_backend(options=ON, **options), batch, loss, parts)
    _assert_equal_steps(found, _step(make_backend(options=OFF, **options), batch, loss))


def test_nothing_that_is_trained_is_zero_loss_and_zero_gradient(make_backend, make_loss):
    rng = _rng(4)
    batch = _batch([(ids, [0] * len(ids)) for ids, _ in _uniform(rng)])
    result, gradients = _step(make_backend(options=ON), batch, make_loss(batch))
    assert result.grad_norm == 0
    assert all(not g.any() for g in gradients.values())
    assert not make_backend(options=ON).get_logprobs(batch).any()


def test_a_sequence_without_trained_tokens_is_left_out(make_backend):
    rng = _rng(5)
    sequences = _uniform(rng)
    sequences[4] = (sequences[4][0], [0] * 15)
    batch = _batch(sequences)
    found, expected = (make_backend(options=options).get_logprobs(batch) for options in (ON, OFF))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not found[4 * 15 : 5 * 15].any()


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_no_sequence_sees_what_another_continues_with(make_backend, family):
    backend = make_backend(family, options=ON)
    batch = _batch(_ragged(_rng(6)))
    before = backend.get_logprobs(batch)
    changed = torch.zeros(batch.num_tokens, dtype=torch.bool)
    for sequence in (1, 3, 7):
        changed |= batch.sequence_index == sequence
    target = changed & batch["loss_mask"]
    batch["input_ids"][target] = (batch["input_ids"][target] + 1) % VOCAB
    after = backend.get_logprobs(batch)
    torch.testing.assert_close(after[~changed], before[~changed], rtol=0, atol=1e-6)
    assert not torch.isclose(after[target], before[target], atol=1e-6).any()


def test_every_sequence_sees_all_of_its_prefix(make_backend):
    backend = make_backend(options=ON)
    rng = _rng(7)
    first, second = _tokens(12, rng), _tokens(9, rng)
    rests = [_tokens(size, rng) for size in (5, 20, 2)]
    make = lambda a: _batch(  # noqa: E731
        [(torch.cat([p, r]), [0] * len(p) + [1] * len(r)) for p in (a, second) for r in rests]
    )
    before = backend.get_logprobs(make(first))
    first[0] = (first[0] + 1) % VOCAB
    after = backend.get_logprobs(batch := make(first))
    moved = (after - before).abs() > 1e-6
    assert torch.equal(moved, batch["loss_mask"] & (batch.sequence_index < 3))


def test_a_window_shorter_than_a_sequence_is_not_shared(make_backend):
    batch = _batch(_uniform(_rng(8)))
    seen = _rows(backend := make_backend("mistral", options=ON))  # a window of 6
    found = backend.get_logprobs(batch)
    assert seen == [(1, batch.num_tokens)]
    assert torch.equal(found, make_backend("mistral", options=OFF).get_logprobs(batch))


def test_a_window_that_all_fit_into_is_shared(make_backend):
    rng = _rng(9)
    batch = _batch([s for _ in range(2) for s in _group(_tokens(4, rng), (2,) * 4, rng)])
    seen = _rows(backend := make_backend("gemma3", options=ON))
    found = backend.get_logprobs(batch)
    assert seen == [(1, 2 * (4 + 4))]  # the last token of a sequence predicts nothing
    torch.testing.assert_close(found, make_backend("gemma3", options=OFF).get_logprobs(batch), rtol=1e-5, atol=1e-5)


def test_the_option_off_is_the_row_of_whole_sequences(make_backend):
    batch = _batch(_uniform(_rng(10)))
    row = make_backend(options=OFF).network.row(batch, device="cpu", only_trained=True)
    reference = Row.of(batch, device="cpu", only_trained=True)
    assert torch.equal(row.input_ids, batch["input_ids"])
    assert torch.equal(row.predictors, reference.wanted - 1)
    assert row.packing.key_pad is None and not row.packing.branches
    assert make_backend(options=DTensorConfig(attention="padded")).network._pair_cost is None


def test_too_small_a_gain_leaves_the_row_as_it_is(make_backend):
    rng = _rng(11)
    batch = _batch(_group(_tokens(2, rng), (30, 40, 35), rng))
    backend = make_backend(options=ON)
    row = backend.network.row(batch, device="cpu", only_trained=True)
    assert torch.equal(row.input_ids, batch["input_ids"])
    everything = backend.network.row(_batch(_uniform(rng)), device="cpu", only_trained=False)
    assert len(everything.input_ids) == 18 * 15  # every token is wanted, the first one is no prefix worth sharing


def test_the_row_of_a_group_worked_by_hand():
    prompt = [7, 8, 9]
    batch = _batch(
        [
            ([*prompt, 1, 2], [0, 0, 0, 1, 1]),
            ([5, 6, 4], [0, 1, 1]),
            ([*prompt, 3], [0, 0, 0, 1]),
            ([*prompt, 4, 5, 6], [0, 0, 0, 1, 0, 1]),
        ]
    )
    wanted = batch["loss_mask"].nonzero().squeeze(1)
    row = share_prefixes(batch, wanted, pair_cost=0.0)
    assert batch["input_ids"][row.source].tolist() == [7, 8, 9, 1, 4, 5, 5, 6]
    assert row.packing.position_ids.tolist() == [0, 1, 2, 3, 3, 4, 0, 1]
    assert row.predictors.tolist() == [2, 3, 6, 7, 2, 2, 5]
    (branches,) = row.packing.branches  # the rests [1] and [4, 5] side by side
    assert (branches.count, branches.width, branches.depth) == (1, 3, 3)
    assert branches.mask[0, 0].int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0], [1, 1, 1, 0, 1, 1]]
