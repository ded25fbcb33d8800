"""Which rank gets which shard."""

from __future__ import annotations

import pytest

from nemo_rl_core.infra.workers.axes import dispatch

AXES = {"pp": 2, "dp": 2, "tp": 2}


@pytest.mark.parametrize(
    ("over", "shards", "heads"),
    [
        ("dp", (0, 0, 1, 1, 0, 0, 1, 1), (0, 2)),
        ("pp", (0, 0, 0, 0, 1, 1, 1, 1), (0, 4)),
        (["pp", "tp"], (0, 1, 0, 1, 2, 3, 2, 3), (0, 1, 4, 5)),
        (["tp", "pp"], (0, 2, 0, 2, 1, 3, 1, 3), (0, 4, 1, 5)),
        ([], (0,) * 8, (0,)),
        (list(AXES), tuple(range(8)), tuple(range(8))),
    ],
)
def test_ranks_row_by_row(over, shards, heads):
    found = dispatch(AXES, over, num_ranks=8, num_shards=len(heads))
    assert (found.shards, found.heads) == (shards, heads)


@pytest.mark.parametrize(
    ("over", "num_ranks", "num_shards", "message"),
    [
        ("dp", 8, 4, r"step: 4 shards for 2 places on dp of \{'pp': 2"),
        ("ep", 8, 2, "step: no axis ep among pp, dp, tp"),
        ("dp", 4, 2, r"are of 8 ranks; there are 4"),
    ],
)
def test_what_does_not_fit_is_refused(over, num_ranks, num_shards, message):
    with pytest.raises(ValueError, match=message):
        dispatch(AXES, over, num_ranks=num_ranks, num_shards=num_shards, what="step")
