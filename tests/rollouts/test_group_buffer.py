from __future__ import annotations

import copy
import json
import threading
import time

import pytest

from nemo_rl_core.errors import CheckpointError, ConfigError, DeadlineExceeded, InvariantViolation
from nemo_rl_core.records.rollout import Rollout, RolloutGroup, Turn
from nemo_rl_core.rollouts.buffer import GroupBuffer, group_age


def group(group_id, version=0, oldest=None):
    turn = Turn(
        message={"role": "assistant", "content": "a"},
        token_ids=[1],
        sampled=True,
        logprobs=[-0.1],
        weight_version=version if oldest is None else oldest,
    )
    rollout = Rollout(rollout_id=f"t{group_id}/0", task_id=f"t{group_id}", index=0, seed=1, segments=[[turn]])
    return RolloutGroup(group_id=group_id, task_id=f"t{group_id}", rollouts=[rollout], weight_version=version)


def filled(*ids, capacity=8, staleness=0, version=0):
    buffer = GroupBuffer(capacity, staleness)
    for group_id in ids:
        buffer.put(group(group_id, version))
    return buffer


def taken(buffer, num, version=0, waiting_for=None, timeout_s=0.05):
    groups = buffer.take(num, current_version=version, timeout_s=timeout_s, waiting_for=waiting_for)
    return [g.group_id for g in groups]


def test_groups_come_out_in_the_order_of_their_ids():
    assert taken(filled(3, 1, 2, 0), 3) == [0, 1, 2]


def test_the_lowest_ids_asked_for_are_waited_for():
    buffer = filled(1, 2, 3)
    threading.Timer(0.1, lambda: buffer.put(group(0))).start()
    assert taken(buffer, 2, waiting_for=[0, 1, 2, 3], timeout_s=20) == [0, 1]
    assert buffer.group_ids == [2, 3]


def test_a_wait_past_its_deadline_names_the_missing_groups():
    with pytest.raises(DeadlineExceeded, match=r"Waited 0\.05 s for rollouts: group 4, 6 did not finish; held: 5, 7"):
        taken(filled(5, 7), 3, waiting_for=[4, 5, 6, 7])
    with pytest.raises(DeadlineExceeded, match="for 2 groups of rollouts; 1 are there: 5"):
        taken(filled(5), 2)


def test_no_more_groups_than_its_capacity():
    buffer = filled(0, 1, capacity=2)
    with pytest.raises(DeadlineExceeded, match=r"full: 2 of 2 groups, and group 2 waited 0 s"):
        buffer.put(group(2))
    threading.Timer(0.1, lambda: taken(buffer, 1)).start()
    buffer.put(group(2), timeout_s=20)
    assert buffer.group_ids == [1, 2]


def test_a_group_is_handed_out_once():
    buffer = filled(0, 1)
    with pytest.raises(InvariantViolation, match=r"Group 1 was put into the rollout buffer twice \(it is held"):
        buffer.put(group(1))
    assert taken(buffer, 1) == [0]
    with pytest.raises(InvariantViolation, match="it is taken"):
        buffer.put(group(0))
    assert buffer.was_taken(0) and not buffer.was_taken(1)


@pytest.mark.parametrize(("staleness", "fits"), [(0, [5]), (1, [4, 5]), (2, [3, 4, 5])])
def test_groups_older_than_the_bound_are_evicted_and_counted(staleness, fits):
    buffer = GroupBuffer(8, staleness)
    for version in (3, 4, 5):
        buffer.put(group(version, version))
    assert taken(buffer, len(fits), version=5) == fits
    assert buffer.num_evicted == 3 - len(fits)
    assert [g.group_id for g in buffer.take_evicted()] == [i for i in (3, 4) if i not in fits]
    assert buffer.take_evicted() == []


def test_the_oldest_token_decides_the_age():
    assert group_age(group(0, version=4), 5) == 1
    assert group_age(group(0, version=4, oldest=3), 5) == 2
    assert group_age(group(0, version=4, oldest=5), 5) == 1  # asked for at 4, sampled at 5
    assert group_age(RolloutGroup(group_id=0, task_id="t", weight_version=3), 5) == 2


def test_an_evicted_group_may_be_sampled_again():
    buffer = filled(0, 1, version=0)
    buffer.put(group(2, version=1))
    with pytest.raises(InvariantViolation, match=r"Groups 0 \(sampled by 0\), 1 .* older than the staleness bound"):
        taken(buffer, 2, version=1, waiting_for=[0, 1, 2])
    assert [g.group_id for g in buffer.take_evicted()] == [0, 1]
    buffer.put(group(0, version=1))
    assert taken(buffer, 2, version=1, waiting_for=[0, 2]) == [0, 2]


def test_an_error_reaches_who_waits_and_who_comes_later():
    buffer = filled(0)
    threading.Timer(0.1, lambda: buffer.fail(ZeroDivisionError("the loop broke"))).start()
    with pytest.raises(ZeroDivisionError, match="the loop broke"):
        taken(buffer, 2, timeout_s=3600)  # unless it is woken, this test ends at its own deadline
    with pytest.raises(ZeroDivisionError):
        buffer.put(group(9))


def test_state_survives_a_checkpoint_and_nothing_is_lost_or_doubled():
    buffer = filled(0, 1, 2, 3, 5)
    assert taken(buffer, 2, waiting_for=[1, 3]) == [1, 3]
    state = json.loads(json.dumps(buffer.state_dict()))
    expected = copy.deepcopy([buffer._groups[i] for i in (0, 2, 5)])
    resumed = GroupBuffer(8, 0)
    resumed.load_state_dict(state)
    for handed_out in (1, 3):
        with pytest.raises(InvariantViolation):
            resumed.put(group(handed_out))
    assert resumed.take(3, current_version=0, timeout_s=0.05) == expected
    assert resumed.state_dict()["taken_below"] == 4
    assert taken(buffer, 3) == [0, 2, 5]
    assert buffer.state_dict() == resumed.state_dict()


def test_clear_drops_groups_that_may_come_again():
    buffer = filled(0, 1)
    assert [g.group_id for g in buffer.clear()] == [0, 1]
    buffer.put(group(0))
    assert buffer.group_ids == [0]


def test_bad_state_and_bad_sizes_are_clear_errors():
    with pytest.raises(CheckpointError, match="KeyError: 'taken_below'"):
        GroupBuffer(1, 0).load_state_dict({"groups": []})
    with pytest.raises(ConfigError):
        GroupBuffer(0, 0)
    with pytest.raises(InvariantViolation, match="3 groups are wanted and only 1"):
        taken(filled(0), 3, waiting_for=[0])


def test_many_threads_put_and_one_takes():
    buffer = GroupBuffer(4, 0)

    def put_every_third(start):
        for group_id in range(start, 60, 3):
            while group_id > len_taken[0] + 3:
                time.sleep(0.0005)
            buffer.put(group(group_id), timeout_s=30)

    len_taken = [0]
    threads = [threading.Thread(target=put_every_third, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    seen = []
    for group_id in range(60):
        seen += taken(buffer, 1, waiting_for=[group_id], timeout_s=30)
        len_taken[0] = len(seen)
    for thread in threads:
        thread.join(10)
    assert seen == list(range(60))


# -- whatever is there first -------------------------------------------------------------------------------


def ready(buffer, num, started, version, num_per_step=None):
    groups = buffer.take(num, current_version=version, timeout_s=0.02, started=started, num_per_step=num_per_step)
    return [g.group_id for g in groups]


def test_of_those_that_are_there_the_oldest_are_taken():
    buffer = GroupBuffer(8, staleness=2)
    for group_id, version in ((7, 3), (5, 4), (6, 3), (9, 4)):
        buffer.put(group(group_id, version))
    assert ready(buffer, 3, {4: 4, 5: 4, 6: 3, 7: 3, 9: 4}, version=4) == [5, 6, 7]


def test_a_group_at_its_last_step_is_waited_for():
    # bound 1, one group a step: group 0 was started at version 3, so that at 4 it is taken or too old
    started = {0: 3, 1: 4}
    buffer = GroupBuffer(8, staleness=1)
    buffer.put(group(1, 4))
    with pytest.raises(DeadlineExceeded, match=r"for 1 groups of rollouts: group 0 did not finish; held: 1"):
        ready(buffer, 1, started, version=4, num_per_step=1)
    assert ready(buffer, 1, started, version=4) == [1]  # without num_per_step it is left to become too old
    buffer = GroupBuffer(8, staleness=1)
    buffer.put(group(1, 4))
    buffer.put(group(0, 3))
    assert ready(buffer, 1, started, version=4, num_per_step=1) == [0]


def test_the_wait_looks_as_many_steps_ahead_as_the_bound():
    # bound 2, two groups a step, at version 5: four groups of version 4 have their last chance at 6, of which two may
    # be left after this step; so this step must take two of them, or wait
    started = {0: 4, 1: 4, 2: 4, 3: 4, 4: 5, 5: 5}
    buffer = GroupBuffer(8, staleness=2)
    for group_id in (3, 4, 5):
        buffer.put(group(group_id, started[group_id]))
    with pytest.raises(DeadlineExceeded):
        ready(buffer, 2, started, version=5, num_per_step=2)
    buffer.put(group(1, 4))
    assert ready(buffer, 2, started, version=5, num_per_step=2) == [1, 3]


def test_when_all_have_finished_there_is_nothing_to_wait_for():
    """As after a resume with a lower bound: more is held than later steps can take, and nothing will come."""
    buffer = filled(0, 1, 2, 3, 4, staleness=1)
    found = buffer.take(2, current_version=0, timeout_s=0.05, started=dict.fromkeys(range(5), 0), num_per_step=2)
    assert [group.group_id for group in found] == [0, 1]
    with pytest.raises(DeadlineExceeded):
        buffer.take(1, current_version=0, timeout_s=0.05, started=dict.fromkeys((2, 3, 4, 5, 6), 0), num_per_step=1)


def test_a_group_that_was_handed_out_may_be_given_back():
    buffer = filled(0, 1, 2, 3)
    taken(buffer, 4)
    buffer.give_back(1)
    assert [buffer.was_taken(i) for i in range(5)] == [True, False, True, True, False]
    buffer.put(group(1))
    assert taken(buffer, 1) == [1]
    assert all(map(buffer.was_taken, range(4)))


def test_what_is_evicted_while_someone_waits_for_it_is_told():
    buffer = GroupBuffer(8, staleness=1)
    buffer.put(group(0, 1))
    with pytest.raises(InvariantViolation, match=r"0 \(sampled by 1\) are older.*bound of 1 at weight version 4"):
        ready(buffer, 1, {0: 1}, version=4)
    assert [g.group_id for g in buffer.take_evicted()] == [0]


def test_a_group_that_is_skipped_counts_as_taken_and_one_removed_does_not():
    buffer = filled(0, 1, 2)
    buffer.skip(0)
    buffer.remove(1)
    with pytest.raises(InvariantViolation):
        buffer.put(group(0))
    buffer.put(group(1))
    assert buffer.group_ids == [1, 2]
    assert buffer.state_dict()["taken_below"] == 1
