"""The estimators of the KL, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pytest import approx

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models.numerics.kl import kl_estimate


@pytest.mark.parametrize(("kind", "value"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 1 + 0.5)])
def test_by_hand(kind, value):
    assert kl_estimate(torch.tensor(-0.5), kind).item() == approx(value)


def test_their_means_are_the_divergence():
    """Of p = (0.5, 0.3, 0.2) to q = (0.2, 0.3, 0.5): k1 and k3 exactly, k2 (biased) within a tenth."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    divergence = float((p * (p / q).log()).sum())
    means = {kind: float((p * kl_estimate((q / p).log(), kind)).sum()) for kind in ("k1", "k2", "k3")}
    assert means["k1"] == approx(divergence) and means["k3"] == approx(divergence)
    assert means["k2"] == approx(divergence, rel=0.1)


def test_a_bound_holds_the_value_and_takes_the_gradient():
    x = torch.tensor([3.0, 30.0], requires_grad=True)
    found = kl_estimate(x, "k2", bound=20.0)
    found.sum().backward()
    assert found.tolist() == [4.5, 200.0]
    assert x.grad.tolist() == [3.0, 0.0]


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'k4' is not known; allowed: 'k1', 'k2', 'k3'"):
        kl_estimate(torch.zeros(1), "k4")
