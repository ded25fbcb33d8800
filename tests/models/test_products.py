"""Products by oneDNN against float64, and where the usual ones must serve."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nemo_rl_core.models.numerics import products
from nemo_rl_core.models.numerics.products import fast_linear, product, use_fast_linear

N, I, O = 260, 576, 512  # noqa: E741
needs_onednn = pytest.mark.skipif(not products._works(), reason="this build of PyTorch has no such product")


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return make(N, I), make(O, I), make(O)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that oneDNN multiplied."""
    seen: list[tuple[int, ...]] = []
    multiply = products._multiply

    def recording(x, y, bias):
        seen.append((x.shape[0], *y.shape))
        return multiply(x, y, bias)

    products._works()
    monkeypatch.setattr(products, "_multiply", recording)
    return seen


@needs_onednn
@pytest.mark.parametrize("transposed", ["none", "x", "y", "both"])
def test_a_product_of_rows_and_of_columns(data, calls, transposed):
    x, y, _ = data
    if transposed in ("x", "both"):
        x = x.T.contiguous().T
    if transposed in ("y", "both"):
        y = y.T.contiguous().T
    assert torch.allclose(product(x, y).double(), x.double() @ y.double().T, rtol=0, atol=1e-3)
    assert calls == [(N, O, I)]


@needs_onednn
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_gradients_are_those_of_float64(data, calls, with_bias):
    x, weight, bias = (tensor.clone().requires_grad_() for tensor in data)
    arguments = (x, weight, bias) if with_bias else (x, weight)
    out = fast_linear(x.view(2, N // 2, I), *arguments[1:])
    exact = [tensor.detach().double().requires_grad_() for tensor in arguments]
    expected = F.linear(exact[0].view(2, N // 2, I), *exact[1:])
    assert torch.allclose(out.double(), expected, rtol=0, atol=1e-3)
    upstream = torch.linspace(-1, 1, out.numel()).view(out.shape).transpose(0, 1).contiguous().transpose(0, 1)
    out.backward(upstream)
    expected.backward(upstream.double())
    for mine, theirs in zip(arguments, exact, strict=True):
        assert torch.allclose(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-3)
    assert len(calls) == 3


@needs_onednn
def test_a_frozen_weight_costs_no_product(data, calls):
    x, weight, _ = data
    fast_linear(x.clone().requires_grad_(), weight).sum().backward()
    assert calls == [(N, O, I), (N, I, O)]


@pytest.mark.parametrize("case", ["small", "float64", "bfloat16", "expanded"])
def test_what_oneDNN_is_not_for_is_computed_as_usual(data, calls, case):
    x, weight, bias = data
    if case == "small":
        x = x[:4]
    elif case == "expanded":
        x = x[:1].expand(N, I)
    else:
        x, weight, bias = (tensor.to(getattr(torch, case)) for tensor in data)
    assert torch.equal(fast_linear(x, weight, bias), F.linear(x, weight, bias))
    assert not calls


def test_a_build_without_it_goes_on_as_usual(data, monkeypatch):
    def missing(*_):
        raise AttributeError("no such operator")

    products._works.cache_clear()
    monkeypatch.setattr(products, "_multiply", missing)
    try:
        x, weight, bias = data
        assert torch.equal(fast_linear(x, weight, bias), F.linear(x, weight, bias))
    finally:
        products._works.cache_clear()


@needs_onednn
def test_a_model_keeps_its_parameters_and_names(calls):
    class Derived(nn.Linear):
        def forward(self, x):
            return torch.zeros(1)

    model = nn.Sequential(nn.Linear(I, O), nn.SiLU(), nn.Linear(O, O, bias=False), Derived(O, 3))
    plain = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]
    assert use_fast_linear(model) == 2
    assert [name for name, _ in model.named_parameters()] == names
    assert all(isinstance(model[i], nn.Linear) for i in (0, 2))
    x = torch.linspace(-1, 1, N * I).view(N, I)
    assert torch.allclose(model[:3](x), plain[:3](x), rtol=0, atol=1e-4)
    assert len(calls) == 2
    assert model[3](x).shape == (1,)
