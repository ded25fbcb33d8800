"""Metrics reduce over micro-batches and ranks as if there had been one batch."""

from __future__ import annotations

import pytest

from nemo_rl_core.protocols.loss import Metric
from nemo_rl_core.training.model.metrics import merge_metrics, metric_values


def test_a_mean_is_weighted_by_its_counts():
    merged = merge_metrics([{"x": Metric(6.0, 2.0)}, {"x": Metric(1.0, 1.0)}])
    assert metric_values(merged) == {"x": pytest.approx(7 / 3)}


def test_sum_min_and_max():
    parts = [
        {"s": Metric(1.0, reduction="sum"), "lo": Metric(3.0, reduction="min"), "hi": Metric(3.0, reduction="max")},
        {"s": Metric(2.0, reduction="sum"), "lo": Metric(-1.0, reduction="min"), "hi": Metric(7.0, reduction="max")},
    ]
    assert metric_values(merge_metrics(parts), prefix="t/") == {"t/s": 3.0, "t/lo": -1.0, "t/hi": 7.0}


def test_a_mean_over_nothing_is_left_out():
    assert metric_values({"x": Metric(0.0, 0.0)}) == {}


def test_a_metric_that_is_missing_in_one_part_counts_only_where_it_is():
    merged = merge_metrics([{"x": Metric(2.0, 1.0)}, {}])
    assert metric_values(merged) == {"x": 2.0}


def test_two_reductions_of_one_name_are_refused():
    with pytest.raises(ValueError, match="reduced both by"):
        merge_metrics([{"x": Metric(1.0)}, {"x": Metric(1.0, reduction="max")}])
