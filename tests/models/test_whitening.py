"""Whitening by hand: both ways to keep the divisor from 0, masks, and values that do not vary."""

from __future__ import annotations

import math

import pytest
import torch
from pytest import approx

from nemo_rl_core.models.numerics.whitening import whiten

VALUES = torch.tensor([1.0, 2.0, 50.0, 6.0], dtype=torch.float64)
MASK = torch.tensor([True, True, False, True])
VARIANCE = (4 + 1 + 9) / 2  # of 1, 2, 6: mean 3, Bessel's factor


@pytest.mark.parametrize(
    ("options", "divisor"),
    [
        ({}, math.sqrt(VARIANCE)),
        ({"epsilon": 0.5}, math.sqrt(VARIANCE) + 0.5),
        ({"variance_floor": 2.0}, 3.0),
        ({"variance_floor": 2.0, "epsilon": 1.0}, 4.0),
    ],
)
def test_the_divisor(options, divisor):
    assert whiten(VALUES, MASK, **options).tolist() == approx([-2 / divisor, -1 / divisor, 0.0, 3 / divisor])
    kept = whiten(VALUES, MASK, shift_mean=False, **options)
    assert kept.tolist() == approx([1 / divisor, 2 / divisor, 0.0, 6 / divisor])
    assert torch.equal(whiten(VALUES[MASK], **options), whiten(VALUES, MASK, **options)[MASK])


@pytest.mark.parametrize("same", [0.0, 0.1, 1000.1])
@pytest.mark.parametrize("count", [1, 7])
def test_what_does_not_vary(same, count):
    mask = torch.ones(count, dtype=torch.bool)
    assert whiten(torch.full((count,), same), mask).tolist() == [0.0] * count
    assert whiten(torch.full((count,), same), mask, shift_mean=False).tolist() == approx([same] * count)


def test_nothing_counts():
    assert whiten(torch.ones(2), torch.zeros(2, dtype=torch.bool)).tolist() == [0.0, 0.0]
    assert whiten(torch.ones(0)).tolist() == []


def test_what_is_masked_may_be_anything_and_what_counts_is_not_hidden():
    spoilt = torch.tensor([1.0, 2.0, math.nan, 6.0], dtype=torch.float64)
    assert torch.equal(whiten(spoilt, MASK), whiten(VALUES, MASK))
    assert whiten(spoilt).isnan().all()
