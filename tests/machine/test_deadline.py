"""One deadline for several waits, on a clock that the test moves."""

from __future__ import annotations

import pytest

from nemo_rl_core.errors import DeadlineExceeded
from nemo_rl_core.machine import deadline as module
from nemo_rl_core.machine.deadline import Deadline


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_what_one_wait_used_is_missing_to_the_next(clock):
    deadline = Deadline(5.0)
    clock.now += 3.0
    assert (deadline.remaining(), deadline.expired, deadline.seconds) == (2.0, False, 5.0)
    clock.now += 3.0
    assert (deadline.remaining(), deadline.expired) == (0.0, True)


@pytest.mark.parametrize(("grace_s", "left_s"), [(1.0, 1.0), (60.0, 5.0)])
def test_a_grace_time_never_lengthens(clock, grace_s, left_s):
    deadline = Deadline(5.0)
    deadline.shorten(grace_s)
    assert deadline.remaining() == left_s


def test_the_error_names_the_work_who_was_waited_for_and_what_to_do(clock):
    deadline = Deadline(5.0, what="Refit to weight version 3", hint="Raise generation.refit_timeout_s.")
    deadline.check("the engines")
    clock.now += 5.0
    with pytest.raises(DeadlineExceeded) as caught:
        deadline.check("the engines")
    assert str(caught.value) == (
        "Refit to weight version 3 passed its deadline of 5 s while waiting for the engines. "
        "Raise generation.refit_timeout_s."
    )
