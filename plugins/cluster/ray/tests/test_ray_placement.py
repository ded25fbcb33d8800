"""Which devices of which machine each role gets; no worker is started."""

from __future__ import annotations

import time

import pytest
import ray

from nemo_rl_core.errors import ResourceError
from nemo_rl_core.schema import ClusterConfig
from nemo_rl_plugins_ray.layout import fill, plan
from nemo_rl_plugins_ray.placement import VirtualCluster

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


@pytest.mark.parametrize(
    ("num_blocks", "size", "free", "expected"),
    [
        (6, 1, [4, 4], {0: 4, 1: 2}),  # whole machines first
        (2, 1, [4, 2], {1: 2}),  # the one that it fills best
        (6, 1, [2, 4], {1: 4, 0: 2}),
        (3, 2, [4, 4], {0: 2, 1: 1}),
        (2, 3, [4, 4], {0: 1, 1: 1}),
        (1, 5, [4, 4], None),
        (9, 1, [4, 4], None),
    ],
)
def test_blocks_fill_machines(num_blocks, size, free, expected):
    found = fill(num_blocks, size, free)
    assert found == expected and list(found or ()) == list(expected or ())


def test_what_is_held_has_room_for_each_role():
    assert plan([6, 2], [4, 4]) == plan([2, 6], [4, 4]) == [4, 4]
    assert plan([3, 3], [4, 4, 4]) == [3, 3], "a role that fits on one machine is not split"
    assert plan([4], [4, 4]) == [4]
    assert plan([3, 3, 3], [4, 4]) is None


@pytest.fixture
def make_cluster(connected):
    made = []

    def make(timeout_s=20.0, **cluster):
        asked = ClusterConfig(**{"device": "cpu", "cpus_per_node": 4, "num_nodes": 2, **cluster})
        made.append(VirtualCluster(asked, placement_timeout_s=timeout_s))
        return made[-1]

    yield make
    for cluster in made:
        cluster.release()


def machines(seats):
    """Workers on each machine, in the order of ranks; a machine that comes twice was left in between."""
    found = []
    for seat in seats:
        if not found or found[-1][0] != seat.node_id:
            found.append((seat.node_id, []))
        found[-1][1].append(seat.local_rank)
    assert all(ranks == list(range(len(ranks))) for _, ranks in found)
    assert len({node for node, _ in found}) == len(found)
    return [len(ranks) for _, ranks in found]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ({"policy": 6, "generation": 2}, [[4, 2], [2]]),
        ({"policy": 2, "generation": 6}, [[2], [4, 2]]),
        ({"policy": 3, "critic": 3, "generation": 2}, [[3], [3], [1, 1]]),
    ],
)
def test_roles_that_fill_the_cluster_have_room(make_cluster, roles, expected):
    cluster = make_cluster(colocated=False, roles=roles)
    placed = {role: cluster.place(role, num_workers=count) for role, count in roles.items()}
    assert [machines(seats) for seats in placed.values()] == expected
    again = cluster.place("policy", num_workers=roles["policy"])
    assert machines(again) == expected[0] and again[0].node_id == placed["policy"][0].node_id
    count = roles["generation"]
    engines = [cluster.place("generation", num_workers=1, replica=i, num_replicas=count)[0] for i in range(count)]
    assert [seat.node_id for seat in engines] == [seat.node_id for seat in placed["generation"]]
    assert {seat.local_rank for seat in engines} == {0}


def test_roles_that_others_leave_no_room_for_are_refused_and_nothing_stays_pending(make_cluster):
    before = set(ray.util.placement_group_table())
    holder = ray.util.placement_group([{"CPU": 2}] * 2, strategy="STRICT_SPREAD")
    try:
        assert holder.wait(30)
        with pytest.raises(ResourceError, match=r"No place for the roles \{'policy': 6\} in 1 s"):
            make_cluster(timeout_s=1.0, colocated=False, roles={"policy": 6})
        with pytest.raises(ResourceError, match="No place for role 'policy' in 1 s"):
            make_cluster(timeout_s=1.0).place("policy", num_workers=6)
        smaller = make_cluster(timeout_s=20.0, colocated=False, roles={"policy": 3, "generation": 1})
        assert machines(smaller.place("policy", num_workers=3)) == [2, 1], "what is free, before what is whole"
    finally:
        ray.util.remove_placement_group(holder)
    states = {key: row["state"] for key, row in ray.util.placement_group_table().items() if key not in before}
    assert "PENDING" not in states.values() and list(states.values()).count("REMOVED") >= 3


@pytest.mark.parametrize("apart", [{}, {"colocated": False, "roles": {"policy": 6, "generation": 2}}])
def test_blocks_share_a_machine(make_cluster, apart):
    def place(**shape):
        cluster = make_cluster(**apart)
        try:
            return machines(cluster.place("policy", **shape))
        finally:
            cluster.release()

    assert place(num_workers=6, block=2) == [4, 2]
    assert place(num_workers=6, block=3) == [3, 3]
    assert place(num_workers=2, block=2) == [2]
    with pytest.raises(ResourceError, match=r"5 worker\(s\) of 1 .* must share a machine; a node has 4"):
        place(num_workers=5, block=5)


def test_blocks_that_do_not_fit_are_refused_with_the_fix(make_cluster):
    cluster = make_cluster(colocated=False, roles={"critic": 2, "policy": 6})
    assert machines(cluster.place("critic", num_workers=2)) == [2]
    with pytest.raises(ResourceError, match=r"have \[2, 4\] left. Change tensor_parallel_size of policy"):
        cluster.place("policy", num_workers=6, block=3)
    with pytest.raises(ResourceError, match=r"'policy' asks for 6 workers .*a node has 4"):
        make_cluster(num_nodes=1).place("policy", num_workers=6, block=3)


@pytest.fixture
def two_more_nodes(connected, ray_nodes):
    """One after the other: the others are full. The first is lost when the second is there."""
    settings = {"num_cpus": 4, "num_gpus": 0, "object_store_memory": 80 * 2**20}
    added = []

    def lose():
        added.append(ray_nodes.add_node(**settings))
        ray_nodes.remove_node(added.pop(0))
        return added[0].node_id

    holder = ray.util.placement_group([{"CPU": 4}] * 2, strategy="STRICT_SPREAD")
    try:
        assert holder.wait(30)
        added.append(ray_nodes.add_node(**settings))
        yield lose
    finally:
        ray.util.remove_placement_group(holder)
        for node in added:
            if node in ray_nodes.worker_nodes:
                ray_nodes.remove_node(node)
    deadline = time.monotonic() + 30
    while sum(node["Alive"] for node in ray.nodes()) != 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_place_of_a_lost_node_is_where_ray_has_moved_it(make_cluster, two_more_nodes, ray_nodes):
    """Two workers share what one held before and what was added for the other: both move, to one node."""

    def node_of(seat):
        where = ray.remote(num_cpus=0)(lambda: ray.get_runtime_context().get_node_id())
        return ray.get(where.options(scheduling_strategy=seat.strategy).remote(), timeout=60)

    cluster = make_cluster(num_nodes=1)
    first = cluster.place("critic", num_workers=1) + cluster.place("policy", num_workers=2)
    assert len({seat.node_id for seat in first}) == 1
    spare = two_more_nodes()
    assert spare != first[0].node_id
    seats = cluster.place("policy", num_workers=2)
    assert [seat.node_id for seat in seats] == [node_of(seat) for seat in seats] == [spare] * 2

    cluster.placement_timeout_s = 1.0
    ray_nodes.remove_node(next(node for node in ray_nodes.worker_nodes if node.node_id == spare))
    with pytest.raises(ResourceError, match=r"The node .* of role 'policy' was lost, and no other had room for its 2"):
        cluster.place("policy", num_workers=2)
