"""One Ray cluster for all tests of the package: two nodes of four CPUs each, both on this machine."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil

import pytest

SETTINGS = {"num_cpus": 4, "num_gpus": 0, "object_store_memory": 200 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="session")
def ray_nodes():
    """The cluster; this process is not connected to it."""
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.ERROR)
    before = dict(os.environ)
    os.environ.update(RAY_USAGE_STATS_ENABLED="0")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cluster = Cluster(initialize_head=True, head_node_args=SETTINGS)
        cluster.add_node(**SETTINGS)
    os.environ.clear()
    os.environ.update(before)
    yield cluster
    folder = cluster.head_node.get_session_dir_path()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster(ray_nodes):
    """Its address."""
    return ray_nodes.address


@pytest.fixture(scope="session")
def connected(ray_cluster):
    """This process is connected, as a script that called `ray.init`; launchers use that connection."""
    from nemo_rl_core.schema import ClusterConfig
    from nemo_rl_plugins_ray.cluster import connect
    from nemo_rl_plugins_ray.config import RayConfig

    connection = connect(RayConfig(address=ray_cluster), ClusterConfig())
    yield ray_cluster
    connection.close()
