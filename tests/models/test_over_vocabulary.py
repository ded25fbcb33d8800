"""Functions of whole distributions in chunks, against autograd over the full matrix."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_rl_core.errors import InvariantViolation
from nemo_rl_core.models.numerics.logprobs import LogitTransform
from nemo_rl_core.models.numerics.over_vocabulary import OutputLayer, map_vocabulary
from nemo_rl_core.records.shared_value import SharedValue, hold

M, E, V = 23, 8, 37


def inputs(bias=False, dtype=torch.float32, tokens=M):
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, E, generator=rng, dtype=dtype).requires_grad_()
    weight = torch.randn(V, E, generator=rng, dtype=dtype).requires_grad_()
    extra = torch.randn(V, generator=rng, dtype=dtype).requires_grad_() if bias else None
    return hidden, weight, extra, torch.randn(tokens, V, generator=rng).log_softmax(-1)


def both_ways(logprobs, fields):
    """[C, 2] forward and reverse KL to the rows' own distributions."""
    other = fields["other"]
    return torch.stack(
        [(other.exp() * (other - logprobs)).sum(-1), (logprobs.exp() * (logprobs - other)).sum(-1)], dim=1
    )


TRANSFORMS = [LogitTransform(temperature=0.7), LogitTransform(scale=0.5, softcap=3.0, temperature=1.3)]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("chunk", [1, 28, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_equal_autograd_over_the_whole_matrix(transform, chunk, bias):
    found, expected = inputs(bias), inputs(bias)
    weights = torch.randn(M, 2, generator=torch.Generator().manual_seed(5))
    values = map_vocabulary(
        *found[:2], both_ways, {"other": found[3]}, bias=found[2], transform=transform, chunk_size=chunk
    )
    logits = torch.nn.functional.linear(*expected[:3]) * transform.scale
    if transform.softcap:
        logits = torch.tanh(logits / transform.softcap) * transform.softcap
    wanted = both_ways(torch.log_softmax(logits / transform.temperature, -1), {"other": expected[3]})
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)
    (values * weights).sum().backward()
    (wanted * weights).sum().backward()
    for one, other in zip(found[:3], expected[:3], strict=True):
        if one is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_no_tokens_give_the_columns_of_the_function_and_no_gradient():
    hidden, weight, _, other = inputs(tokens=0)
    values = map_vocabulary(hidden, weight, both_ways, {"other": other})
    values.sum().backward()
    assert values.shape == (0, 2)
    assert not weight.grad.any()


class _Largest(TorchDispatchMode):
    """Remembers the most rows of a tensor as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[1] == V:
                self.rows = max(self.rows, len(tensor))
        return out


def test_only_a_chunk_of_the_vocabulary_is_ever_held():
    """A teacher's distributions are made chunk by chunk as well, from its hidden states."""
    hidden, weight, _, _ = inputs(tokens=4000)
    layer = OutputLayer(weight=torch.randn(V, 3, generator=torch.Generator().manual_seed(2)))
    rows = {"hidden": torch.randn(4000, 3, generator=torch.Generator().manual_seed(3))}

    def compare(logprobs, fields):
        return both_ways(logprobs, {"other": layer.logprobs(fields["hidden"])})

    with _Largest() as seen:
        map_vocabulary(hidden, weight, compare, rows, chunk_size=256).sum().backward()
    assert seen.rows == 64


def test_an_output_layer_at_a_temperature():
    layer = OutputLayer(
        weight=torch.tensor([[1.0], [0.0]]), bias=torch.tensor([0.0, 0.5]), transform=LogitTransform(temperature=0.5)
    )
    expected = torch.tensor([[2.0, 1.0]]).log_softmax(-1)
    torch.testing.assert_close(layer.logprobs(torch.tensor([[1.0]])), expected)


def test_a_shared_value_travels_once():
    """Pickled, it is a key; where nothing was held under it, that is said."""
    shared = SharedValue(torch.zeros(1000))
    sent = pickle.dumps(shared)
    assert len(sent) < 300
    arrived = pickle.loads(sent)
    with pytest.raises(InvariantViolation, match=shared.key):
        arrived.on("cpu")
    hold(None, shared.key, torch.ones(2))
    assert arrived.on("cpu").tolist() == [1.0, 1.0]
    assert shared.on("cpu").shape == (1000,)
