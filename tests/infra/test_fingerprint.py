"""Properties of the digest of weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl_core.infra.weights.fingerprint import CachedSums, _row_and_column_sums, fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


def _model(dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 300), "b": (300, 7), "c": (5,), "d": (40, 40, 3), "e": ()}
    return {n: (torch.randn(s, generator=rng) * 50).to(dtype) for n, s in shapes.items()}


def test_equal_weights_in_any_order_and_layout_have_one_fingerprint():
    one, other = _model(), _model()
    assert fingerprint(one.items()) == fingerprint(reversed(other.items()))
    strided = {n: t.T.contiguous().T if t.dim() == 2 else t for n, t in other.items()}
    assert not strided["a"].is_contiguous()
    assert fingerprint(one.items()) == fingerprint(strided.items())


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_single_changed_element_shows(dtype, data):
    model = _model(dtype)
    before = fingerprint(model.items())
    name = data.draw(st.sampled_from(sorted(model)))
    flat = model[name].view(-1)
    i = data.draw(st.integers(0, flat.numel() - 1))
    flat[i] = 3 if flat[i] != 3 else 4
    assert fingerprint(model.items()) != before


@settings(max_examples=60, deadline=None)
@given(i=st.integers(0, 4799), j=st.integers(0, 4799))
def test_two_exchanged_elements_show(i, j):
    values = torch.arange(4800, dtype=torch.float32)
    before = fingerprint([("w", values)])
    values[i], values[j] = values[j].clone(), values[i].clone()
    assert (fingerprint([("w", values)]) == before) is (i == j)


def test_names_shapes_types_and_transposition_show():
    weight = torch.randn(64, 64)
    other = torch.randn(64, 64)
    seen = [
        fingerprint(tensors)
        for tensors in (
            [("x", weight), ("y", other)],
            [("x", other), ("y", weight)],  # exchanged tensors
            [("x", weight.T), ("y", other)],
            [("x", weight.view(32, 128)), ("y", other)],
            [("x", weight.view(torch.int32)), ("y", other)],
            [("z", weight), ("y", other)],
            [("x", weight)],
            [("x", weight), ("y", other), ("empty", torch.zeros(0))],
            [],
        )
    ]
    assert len(set(seen)) == len(seen)


def test_it_sees_bits_not_values():
    assert fingerprint([("w", torch.tensor([0.0]))]) != fingerprint([("w", torch.tensor([-0.0]))])
    nan = torch.tensor([torch.nan])
    assert fingerprint([("w", nan)]) == fingerprint([("w", nan.clone())])


def test_a_view_that_starts_inside_a_word_reads_its_own_bits():
    base = torch.arange(5000, dtype=torch.float32)
    assert fingerprint([("w", base[1:4001])]) == fingerprint([("w", base[1:4001].clone())])


def test_a_tensor_of_many_blocks_is_summed_as_by_hand():
    words = torch.randint(-(2**62), 2**62, (300, 1024))  # 300 rows are more than are summed at a time
    before = fingerprint([("w", words)])
    for row, column in ((0, 0), (127, 5), (128, 1023), (299, 7)):
        words[row, column] += 1
        assert fingerprint([("w", words)]) != before
        words[row, column] -= 1
    assert fingerprint([("w", words)]) == before
    columns, rows = _row_and_column_sums(words)
    assert torch.equal(columns, words.sum(0)) and torch.equal(rows, words.sum(1))


def test_kept_sums_are_those_of_the_weights_as_they_are():
    model, kept = _model(), CachedSums()
    for name, tensor in model.items():
        if name != "c":  # one that was never taken in
            kept.add(name, tensor)
    assert kept.fingerprint(model.items()) == fingerprint(model.items())
    changes = (
        lambda: model["a"].add_(1),
        lambda: model["a"].detach().view(-1)[:5].zero_(),  # through a view
        lambda: model["b"].view(torch.int32)[3].bitwise_xor_(1),
        lambda: model.update(d=model["d"] + 1),
        lambda: model.update(a=model["b"].view(7, 300), b=model["a"].view(300, 7)),  # exchanged
        lambda: model.pop("e"),
    )
    for change in changes:
        before = kept.fingerprint(model.items())
        change()
        assert kept.fingerprint(model.items()) == fingerprint(model.items()) != before
    with torch.inference_mode():  # torch counts no changes of such a tensor
        weight = torch.zeros(4)
        kept.add("i", weight)
        weight.add_(1)
        assert kept.fingerprint([("i", weight)]) == fingerprint([("i", weight)])
