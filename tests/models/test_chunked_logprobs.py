"""Chunked logprobs against autograd over the full matrix."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_rl_core.models.numerics.logprobs import LogitTransform, linear_logprobs

M, E, V = 23, 8, 37


def _inputs(bias=False, dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(M, E, generator=rng, dtype=dtype).requires_grad_()
    weight = torch.randn(V, E, generator=rng, dtype=dtype).requires_grad_()
    extra = torch.randn(V, generator=rng, dtype=dtype).requires_grad_() if bias else None
    return hidden, weight, extra, torch.randint(0, V, (M,), generator=rng)


def _reference(hidden, weight, bias, targets, transform):
    logits = torch.nn.functional.linear(hidden, weight, bias).float() * transform.scale
    if transform.softcap:
        logits = torch.tanh(logits / transform.softcap) * transform.softcap
    log_softmax = torch.log_softmax(logits / transform.temperature, dim=-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_softmax.gather(1, targets[:, None]).squeeze(1), entropy


TRANSFORMS = [
    LogitTransform(),
    LogitTransform(temperature=0.7),
    LogitTransform(scale=0.5, softcap=3.0, temperature=1.3),
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("chunk", [1, 7, M, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_equal_autograd_over_the_whole_matrix(transform, chunk, bias):
    found, expected = _inputs(bias), _inputs(bias)
    weights = torch.randn(2, M, generator=torch.Generator().manual_seed(5))
    logprobs, entropy = linear_logprobs(
        *found[:2], found[3], bias=found[2], transform=transform, chunk_size=chunk, with_entropy=True
    )
    want_logprobs, want_entropy = _reference(*expected, transform)
    torch.testing.assert_close(logprobs, want_logprobs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-6, atol=1e-6)
    (logprobs * weights[0] + entropy * weights[1]).sum().backward()
    (want_logprobs * weights[0] + want_entropy * weights[1]).sum().backward()
    for one, other in zip(found[:3], expected[:3], strict=True):
        if one is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=5e-6)


def test_no_tokens_give_no_logprobs_and_zero_gradients():
    hidden, weight, _, targets = _inputs()
    logprobs, entropy = linear_logprobs(hidden[:0], weight, targets[:0])
    assert logprobs.shape == (0,) and entropy is None
    logprobs.sum().backward()
    assert weight.grad.abs().sum() == 0


def test_an_impossible_token_has_logprob_minus_infinity_and_the_entropy_stays_finite():
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.zeros(3, 1)
    bias = torch.tensor([0.0, 0.0, -torch.inf])
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([2]), bias=bias, with_entropy=True)
    assert logprobs.item() == -torch.inf
    assert entropy.item() == pytest.approx(0.693147, abs=1e-6)


def test_softmax_is_taken_in_float32_when_weights_are_bfloat16():
    hidden, weight, _, targets = (x.detach() if x is not None else None for x in _inputs())
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logprobs, _ = linear_logprobs(hidden, weight, targets)
    exact = torch.log_softmax((hidden @ weight.T).float(), dim=-1).gather(1, targets[:, None]).squeeze(1)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, exact, rtol=1e-6, atol=1e-6)


class _Largest(TorchDispatchMode):
    """The most elements that any operation puts into one tensor."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize("chunk", [4, 1000])
def test_no_tensor_is_larger_than_a_chunk_of_logits(chunk):
    tokens, vocab = 64, 512
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    with _Largest() as seen:
        logprobs, _ = linear_logprobs(hidden, weight, torch.zeros(tokens, dtype=torch.int64), chunk_size=chunk)
        logprobs.sum().backward()
    if chunk < tokens:
        assert seen.largest <= chunk * vocab
    else:  # the same measure does see the whole matrix where one chunk holds it
        assert seen.largest == tokens * vocab
