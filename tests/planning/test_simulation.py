"""Thousands of schedules on a virtual clock: nothing is lost, doubled, too old or waited for in vain."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest
from attrs import evolve

from nemo_rl_core.planning.simulation import (
    EngineSpec,
    Faults,
    ResponseLengths,
    SimulatedCluster,
    SimulatedKill,
    VirtualClock,
    VirtualLoop,
    simulate,
)
from nemo_rl_core.rollouts import buffer as buffer_module
from nemo_rl_core.rollouts.buffer import GroupBuffer
from nemo_rl_core.rollouts.feed import RolloutFeed
from nemo_rl_core.rollouts.pump import RolloutPump
from nemo_rl_core.rollouts.traffic import GenerationTraffic
from nemo_rl_core.schema import RolloutConfig
from nemo_rl_core.testing.schedules import draw_cluster, run_schedule
from nemo_rl_core.training.steps.refit import Refit

CHUNK = 250


@pytest.mark.parametrize("first", range(0, 1000, CHUNK))
def test_everything_holds_in_a_thousand_schedules(first):
    reports = [run_schedule(seed) for seed in range(first, first + CHUNK)]
    assert [(r.seed, r.violations) for r in reports if r.violations] == []
    # the schedules are worth something: most train, many die and are resumed
    assert sum(r.num_groups for r in reports) > 5 * CHUNK
    assert sum(r.num_lives > 1 for r in reports) > CHUNK // 8


def test_a_schedule_is_the_same_in_every_run():
    dying = next(seed for seed in range(100) if run_schedule(seed).num_lives > 1)
    assert run_schedule(dying) == run_schedule(dying)
    assert len({run_schedule(seed).seconds for seed in range(20)}) > 10


# -- broken on purpose -----------------------------------------------------------------------------------


def never_tells(patch):
    """A group arrives and nobody is woken."""
    put = GroupBuffer.put

    def silent(self, group, **kwargs):
        told = self._changed.notify_all
        self._changed.notify_all = lambda: None
        try:
            put(self, group, **kwargs)
        finally:
            self._changed.notify_all = told

    patch.setattr(GroupBuffer, "put", silent)


def one_step_too_old(patch):
    """The bound is off by one."""
    make = GroupBuffer.__init__

    def wider(self, capacity, staleness, clock=None):
        make(self, capacity, staleness + 1, clock)

    patch.setattr(GroupBuffer, "__init__", wider)
    patch.setattr(RolloutFeed, "_overdue", lambda self, version: [])


def age_by_the_newest_token(patch):
    """A rollout that spans weights counts as fresh."""

    def newest(group):
        turns = [t for r in group.valid for s in r.segments for t in s if t.weight_version is not None]
        return max((t.last_weight_version for t in turns), default=group.weight_version)

    patch.setattr(buffer_module, "_oldest_version", newest)
    patch.setattr(RolloutFeed, "_overdue", lambda self, version: [])


def takes_the_ready_and_forgets_the_old(patch):
    """`wait` does not wait."""
    ready = GroupBuffer._ready_first
    patch.setattr(
        GroupBuffer, "_ready_first", lambda self, num, started, now, per_step: ready(self, num, started, now, None)
    )


def one_batch_too_many(patch):
    """More groups are started than can be trained on within the bound."""
    wanted = RolloutFeed._wanted
    patch.setattr(RolloutFeed, "_wanted", lambda self, missing, version: wanted(self, missing, version) + 1)


def checkpoint_without_the_unfinished(patch):
    """Prompts that were under way are not in the checkpoint."""
    mark = RolloutPump.mark

    def without(self):
        state = mark(self)
        return lambda: {**state(), "unfinished": []}

    patch.setattr(RolloutPump, "mark", without)


def checkpoint_without_the_buffer(patch):
    """Finished groups are not in the checkpoint."""
    mark = RolloutPump.mark

    def empty(state):
        return {**state, "finished": [], "buffer": {**state["buffer"], "groups": [], "group_ids": []}}

    def without(self):
        state = mark(self)
        return lambda: empty(state())

    patch.setattr(RolloutPump, "mark", without)


def data_of_the_step_before(patch):
    """The checkpoint continues the data too early."""
    mark = RolloutPump.mark

    def earlier(self):
        state = mark(self)
        before = getattr(self, "data_before", None)
        self.data_before = self.data.state_dict()
        return lambda: {**state(), "data": before or self.data_before}

    patch.setattr(RolloutPump, "mark", earlier)


def an_abandoned_attempt_arrives(patch):
    """What was given up is put into the buffer all the same."""

    def arrived(self, attempt, future):
        with contextlib.suppress(BaseException):
            self.buffer.put(future.result())

    def abandon(self, group_id):
        attempt = self._attempts.pop(group_id)
        self.buffer.remove(group_id)
        return attempt.item

    patch.setattr(RolloutPump, "_arrived", arrived)
    patch.setattr(RolloutPump, "_abandon", abandon)


def weights_that_stay(patch):
    """A refit is forgotten."""
    bring_to = Refit.bring_to

    def every_other(self, version):
        if version % 2:
            self.version = version
        else:
            bring_to(self, version)

    patch.setattr(Refit, "bring_to", every_other)


def requests_under_the_update(patch):
    """Nothing holds requests back while an engine that needs it takes weights."""
    patch.setattr(Refit, "_between_requests", lambda self: contextlib.nullcontext())


def requests_held_for_ever(patch):
    """After the update nobody lets the requests go on."""

    def forget(self):
        self._held = False
        self._queue = []

    patch.setattr(GenerationTraffic, "_release", forget)


def a_group_is_dropped_uncounted(patch):
    """A group that is too old disappears."""

    def vanish(self, group_ids, version):
        for group_id in group_ids:
            self._pump.drop(group_id)

    patch.setattr(RolloutFeed, "_give_up", vanish)


BUGS = [
    never_tells,
    one_step_too_old,
    age_by_the_newest_token,
    takes_the_ready_and_forgets_the_old,
    one_batch_too_many,
    checkpoint_without_the_unfinished,
    checkpoint_without_the_buffer,
    data_of_the_step_before,
    an_abandoned_attempt_arrives,
    weights_that_stay,
    requests_under_the_update,
    requests_held_for_ever,
    a_group_is_dropped_uncounted,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_put_in_on_purpose_is_found(bug: Callable, monkeypatch):
    bug(monkeypatch)
    for seed in range(400):
        if run_schedule(seed).violations:
            return
    pytest.fail(f"400 schedules did not show: {bug.__doc__}")


# -- the clock -------------------------------------------------------------------------------------------


def test_time_jumps_and_the_order_is_that_of_the_timers():
    loop = VirtualLoop()
    clock, seen = VirtualClock(loop), []

    async def wait(seconds):
        await asyncio.sleep(seconds)
        seen.append((seconds, loop.time()))

    for seconds in (30.0, 10.0, 20.0):
        asyncio.run_coroutine_threadsafe(wait(seconds), loop)
    clock.sleep(25.0)
    assert seen == [(10.0, 10.0), (20.0, 20.0)] and clock.now() == 25.0
    clock.sleep(1e6)
    assert seen[-1] == (30.0, 30.0) and clock.now() == 25.0 + 1e6
    loop.drop()


def test_a_condition_wakes_its_waiter_or_times_out():
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    condition = clock.condition()
    loop.call_later(3.0, condition.notify_all)
    assert condition.wait(10.0) and clock.now() == 3.0
    assert not condition.wait(10.0) and clock.now() == 13.0
    loop.drop()


def test_a_process_dies_at_its_time_and_a_bug_in_a_callback_is_not_swallowed():
    clock = VirtualClock(VirtualLoop(), dies_at=5.0)
    with pytest.raises(SimulatedKill):
        clock.sleep(10.0)
    assert clock.now() == 5.0
    broken = VirtualClock(VirtualLoop())
    broken.loop.call_later(1.0, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.sleep(2.0)
    for each in (clock, broken):
        each.loop.drop()


# -- speeds that can be worked out by hand ---------------------------------------------------------------


def cluster(**changes):
    """Four groups of two responses of 100 tokens: 800 tokens a step, on one engine of 100 tokens/s: 8 s."""
    base = SimulatedCluster(
        num_steps=8,
        num_prompts=4,
        group_size=2,
        engine=EngineSpec(max_batch=8, tokens_per_s=100.0),
        lengths=ResponseLengths(mean=100),
    )
    return evolve(base, **changes)


def test_synchronous_steps_add_up():
    result = simulate(cluster(step_s=4.0, refit_s=1.0))
    assert result.step_s == pytest.approx(8 + 4 + 1)
    assert result.trainer_idle == pytest.approx(8 / 13)
    assert result.engine_busy == pytest.approx(8 / 13)
    assert (result.age_mean, result.age_max) == (0, 0)
    assert [m["async/trainer_idle_s"] for m in result.history] == pytest.approx([8.0] * 8), "each wait counts once"


def test_asynchronous_steps_overlap():
    result = simulate(cluster(step_s=8.0, rollouts=RolloutConfig(staleness=1)))
    assert result.step_s == pytest.approx(8.0)
    assert result.engine_busy == pytest.approx(1.0)
    assert result.age_max == 1
    slow_trainer = simulate(cluster(step_s=20.0, rollouts=RolloutConfig(staleness=1)))
    assert slow_trainer.step_s == pytest.approx(20.0)
    assert slow_trainer.trainer_idle == pytest.approx(0.0)


def test_the_wait_before_an_update_counts_as_idle():
    between = RolloutConfig(staleness=2, weight_updates="between")
    steps = simulate(cluster(step_s=2.0, rollouts=between)).history
    waits = [m["async/update_wait_s"] for m in steps]
    assert max(waits) > 1 and all(m["async/trainer_idle_s"] >= m["async/update_wait_s"] for m in steps)
    in_flight = simulate(cluster(step_s=2.0, rollouts=RolloutConfig(staleness=2)))
    assert all(m["async/update_wait_s"] == 0 for m in in_flight.history)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_step_finds_its_groups_though_half_of_them_are_refused(staleness):
    """One sampled batch takes 8 s; with replacements asked for one after another it would be ten times that."""
    refusing = cluster(
        num_steps=40,
        num_prompts=64,
        group_size=1,
        max_batches=10,
        engine=EngineSpec(max_batch=64, tokens_per_s=6400.0, sequence_tokens_per_s=12.5),
        faults=Faults(refused=0.5),
        rollouts=RolloutConfig(staleness=staleness),
    )
    result = simulate(refusing)
    assert len(result.history) == 40
    assert result.step_s < 8 * (5 if staleness == 0 else 2.5)
    refused = [m["rollouts/discarded_groups"] for m in result.history]
    assert 50 < sum(refused) / len(refused) < 80


def test_a_batch_that_is_full_makes_the_others_wait():
    narrow = EngineSpec(max_batch=2, tokens_per_s=100.0, sequence_tokens_per_s=10.0)
    assert simulate(cluster(engine=narrow)).step_s == pytest.approx(8 / 2 * 100 / 10)
    wide = EngineSpec(max_batch=8, tokens_per_s=100.0, sequence_tokens_per_s=10.0)
    assert simulate(cluster(engine=wide)).step_s == pytest.approx(100 / 10)
    assert simulate(cluster(engine=evolve(wide, num_engines=2))).step_s == pytest.approx(100 / 10)
    assert simulate(cluster(engine=EngineSpec(num_engines=4, max_batch=8, tokens_per_s=100.0))).step_s == pytest.approx(
        2
    )


def test_the_trainer_takes_the_time_of_its_tokens():
    result = simulate(cluster(train_tokens_per_s=100.0, prompt_tokens=25))
    assert result.step_s == pytest.approx(8 + (800 + 8 * 25) / 100)


def test_ready_first_is_not_held_up_by_long_responses():
    long_tail = cluster(
        num_steps=30,
        num_prompts=16,
        step_s=10.0,
        engine=EngineSpec(num_engines=4, max_batch=8, tokens_per_s=400.0, sequence_tokens_per_s=50.0),
        lengths=ResponseLengths(mean=300, spread=1.5, longest=6000),
    )
    steps = {
        order: simulate(evolve(long_tail, rollouts=RolloutConfig(staleness=4, order=order))).step_s
        for order in ("data", "ready_first")
    }
    synchronous = simulate(evolve(long_tail, rollouts=RolloutConfig())).step_s
    assert steps["ready_first"] <= steps["data"] < 0.5 * synchronous


def test_a_thousand_clusters_are_drawn_that_differ():
    drawn = [draw_cluster(seed) for seed in range(200)]
    assert {c.rollouts.staleness for c in drawn} == {0, 1, 2, 4}
    assert {c.rollouts.too_old for c in drawn} == {"wait", "resample", "drop"}
    assert len({repr(c) for c in drawn}) == 200
