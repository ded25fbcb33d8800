"""Placement of roles on a machine."""

from __future__ import annotations

import subprocess
import sys

import pytest
from attrs import evolve

from nemo_rl_core.errors import ConfigError, ResourceError
from nemo_rl_core.infra.workers import resources
from nemo_rl_core.infra.workers.resources import ResourceManager, check_role_names
from nemo_rl_core.schema import ClusterConfig


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(n)`: a machine on which `n` CUDA devices are found."""

    def pretend(count):
        monkeypatch.setattr(resources, "detect_devices", lambda: ("cuda", count) if count else ("cpu", 0))

    return pretend


def test_devices_are_found_without_torch_when_there_is_no_driver():
    code = (
        "import sys; from nemo_rl_core.schema.run import ClusterConfig; found = ClusterConfig.auto_detect();"
        "assert (found.device, found.gpus_per_node) == ('cpu', 0), found; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"CUDA_VISIBLE_DEVICES": ""}, timeout=60)


def test_cores_are_shared_among_the_workers(gpus):
    gpus(0)
    found = ResourceManager(ClusterConfig(cpus_per_node=8))
    assert found.place("policy", num_workers=1).num_threads is None
    placed = found.place("policy", num_workers=3)
    assert placed.devices == ("cpu",) * 3 and placed.num_threads == 2


def test_more_workers_than_cores_are_refused(gpus):
    gpus(0)
    with pytest.raises(ResourceError, match=r"'policy' asks for 3 workers.*2 CPU cores.*policy.num_workers"):
        ResourceManager(ClusterConfig(cpus_per_node=2)).place("policy", num_workers=3)


def test_colocated_roles_share_the_first_devices(gpus):
    gpus(4)
    found = ResourceManager(ClusterConfig())
    assert found.place("policy", num_workers=2).devices == ("cuda:0", "cuda:1")
    assert found.place("generation", num_workers=2, devices_per_worker=2).devices == ("cuda:0", "cuda:2")


def test_roles_apart_get_devices_of_their_own(gpus):
    gpus(4)
    found = ResourceManager(ClusterConfig(colocated=False, roles={"policy": 1, "generation": 3}))
    assert found.place("policy", num_workers=1).devices == ("cuda:0",)
    assert found.place("generation", num_workers=3).devices == ("cuda:1", "cuda:2", "cuda:3")
    with pytest.raises(ResourceError, match=r"asks for 2 devices; cluster.roles.policy is 1"):
        found.place("policy", num_workers=2)
    with pytest.raises(ResourceError, match=r"cluster.roles has no 'critic'.*Add `critic: 1`"):
        found.place("critic", num_workers=1)


@pytest.mark.parametrize(
    ("count", "cluster", "message"),
    [
        (0, ClusterConfig(device="cuda"), r"no CUDA device is visible.*cluster.device: cpu"),
        (2, ClusterConfig(gpus_per_node=4), r"gpus_per_node is 4; 2 CUDA"),
    ],
)
def test_what_the_machine_lacks_is_said(gpus, count, cluster, message):
    gpus(count)
    with pytest.raises(ResourceError, match=message):
        ResourceManager(cluster)


def test_roles_that_ask_for_more_than_there_is(gpus):
    gpus(2)
    cluster = ClusterConfig(colocated=False, roles={"policy": 2, "generation": 2})
    with pytest.raises(ResourceError, match=r"asks for 4 devices in all.*in GPUs the machine has 2"):
        ResourceManager(cluster)
    gpus(0)
    cluster = evolve(cluster, cpus_per_node=3)
    with pytest.raises(ResourceError, match=r"asks for 4 devices in all.*in CPU cores the machine has 3"):
        ResourceManager(cluster)
    found = ResourceManager(evolve(cluster, cpus_per_node=4))
    assert found.place("generation", num_workers=2, devices_per_worker=8).devices == ("cpu", "cpu")
    with pytest.raises(ResourceError, match=r"asks for 3 devices; cluster.roles.policy is 2"):
        found.place("policy", num_workers=3)


def test_devices_are_for_roles_that_there_are():
    cluster = ClusterConfig(colocated=False, roles={"policy": 2, "generatoin": 2})
    with pytest.raises(ConfigError, match=r"has generatoin, which is no role of this run.*Did you mean generation\?"):
        check_role_names(cluster, ["policy", "generation"])
    check_role_names(evolve(cluster, colocated=True), ["policy", "generation"])


def test_a_cpu_can_be_asked_for_where_gpus_are(gpus):
    gpus(2)
    for cluster in (ClusterConfig(device="cpu"), ClusterConfig(gpus_per_node=0)):
        assert ResourceManager(cluster).place("policy", num_workers=1).devices == ("cpu",)
