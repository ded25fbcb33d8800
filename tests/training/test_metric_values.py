"""What a reduction over nothing leaves behind: nothing."""

from __future__ import annotations

import math

from nemo_rl_core.protocols.loss import Metric
from nemo_rl_core.training.model.metrics import merge_metrics, metric_values


def parts(*totals, reduction):
    return [{"x": Metric(total, count, reduction)} for total, count in totals]


def test_the_neutral_elements_move_no_extremum():
    assert metric_values(merge_metrics(parts((math.inf, 1), (0.5, 1), reduction="min"))) == {"x": 0.5}
    assert metric_values(merge_metrics(parts((0.5, 1), (-math.inf, 1), reduction="max"))) == {"x": 0.5}


def test_over_nothing_there_is_no_value():
    assert metric_values(merge_metrics(parts((math.inf, 1), (math.inf, 1), reduction="min"))) == {}
    assert metric_values(merge_metrics(parts((-math.inf, 1), reduction="max"))) == {}
    assert metric_values(merge_metrics(parts((0.0, 0), reduction="mean"))) == {}


def test_an_infinity_that_was_measured_is_kept():
    assert metric_values(merge_metrics(parts((math.inf, 1), reduction="max"))) == {"x": math.inf}
    assert metric_values(merge_metrics(parts((math.inf, 2), reduction="mean"))) == {"x": math.inf}
