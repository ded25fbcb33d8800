from __future__ import annotations

import asyncio
import threading

import pytest

from nemo_rl_core.errors import DeadlineExceeded
from nemo_rl_core.planning.simulation import VirtualClock, VirtualLoop
from nemo_rl_core.rollouts.traffic import GenerationTraffic


@pytest.fixture
def clock():
    clock = VirtualClock(VirtualLoop())
    yield clock
    clock.loop.drop()


def requests(clock, traffic, *spans):
    """Requests that come at and take these (start, seconds); gives when each began at the engine."""
    began = {}

    async def one(index, start, seconds):
        await asyncio.sleep(start)
        await traffic.enter()
        began[index] = clock.now()
        await asyncio.sleep(seconds)
        traffic.leave()

    for index, (start, seconds) in enumerate(spans):
        asyncio.run_coroutine_threadsafe(one(index, start, seconds), clock.loop)
    return began


def test_idle_is_the_time_without_any_request(clock):
    traffic = GenerationTraffic(clock)
    requests(clock, traffic, (2.0, 3.0), (4.0, 3.0), (10.0, 5.0))
    clock.sleep(12.0)
    assert traffic.take_idle_s() == pytest.approx(2 + 3)  # 0 to 2, 7 to 10
    clock.sleep(8.0)
    assert traffic.take_idle_s() == pytest.approx(5)  # 15 to 20


def test_an_update_waits_for_the_requests_it_finds_and_holds_those_that_come(clock):
    traffic = GenerationTraffic(clock)
    began = requests(clock, traffic, (0.0, 4.0), (1.0, 5.0), (3.0, 1.0), (8.0, 1.0))
    clock.sleep(2.0)
    with traffic.stopped(timeout_s=10.0):
        assert clock.now() == 6.0 and traffic.count == 1  # the third waits at the gate
        clock.sleep(3.0)
        assert began == {0: 0.0, 1: 1.0} and traffic.count == 2
    clock.sleep(1.0)
    assert began == {0: 0.0, 1: 1.0, 2: 9.0, 3: 9.0}


def test_a_request_that_does_not_end_is_named_and_the_others_go_on(clock):
    traffic = GenerationTraffic(clock)
    began = requests(clock, traffic, (0.0, 1e6), (5.0, 1.0))
    clock.sleep(1.0)
    with (
        pytest.raises(DeadlineExceeded, match=r"1 were not answered in 10 s.*generation_timeout_s.*in_flight"),
        traffic.stopped(timeout_s=10.0),
    ):
        pytest.fail("the update took place")
    clock.sleep(1.0)
    assert began == {0: 0.0, 1: 11.0}


def test_requests_that_nobody_works_on_are_not_waited_for(clock):
    traffic = GenerationTraffic(clock)
    requests(clock, traffic, (0.0, 1e6))
    clock.sleep(1.0)
    with traffic.stopped(timeout_s=1e5, unless=lambda: clock.now() > 4.5):  # when the engine is found dead
        assert 4.5 < clock.now() < 6 and traffic.count == 1
    assert traffic.take_stopping_s() == pytest.approx(clock.now() - 1)
    assert traffic.take_stopping_s() == 0


def test_a_request_that_gives_up_at_the_gate_leaves_nothing_behind(clock):
    traffic = GenerationTraffic(clock)
    with traffic.stopped(timeout_s=1.0):
        waiting = asyncio.run_coroutine_threadsafe(traffic.enter(), clock.loop)
        clock.sleep(1.0)
        waiting.cancel()
        clock.sleep(1.0)
        assert traffic.count == 0
    clock.sleep(1.0)
    assert traffic.take_idle_s() == pytest.approx(3.0)


def test_it_works_between_threads():
    traffic, loop = GenerationTraffic(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(traffic.enter(), loop).result(20)
        threading.Timer(0.05, traffic.leave).start()
        with traffic.stopped(timeout_s=20.0):
            held = asyncio.run_coroutine_threadsafe(traffic.enter(), loop)
            with pytest.raises(TimeoutError):
                held.result(0.05)
        held.result(20)
        assert traffic.count == 1
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
