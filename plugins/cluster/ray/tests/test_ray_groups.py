"""Worker groups and engines in actors: places, dispatch, verification, resources."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from importlib.metadata import version

import attrs
import cloudpickle
import numpy as np
import pytest
import ray
import torch
from ray._private.utils import check_version_info, compute_version_info

from nemo_rl_core.errors import GenerationError, PluginIncompatible, ResourceError, WorkerDied
from nemo_rl_core.infra.engines.host import EngineHost, HostConfig
from nemo_rl_core.infra.engines.workers import EngineWorkers
from nemo_rl_core.protocols.generation_backend import GenerationRequest
from nemo_rl_core.protocols.launcher import WorkerSpec
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.registry import get_registry, worker_rows
from nemo_rl_core.registry.explaining._diagnosis import compare_nodes
from nemo_rl_core.schema import ClusterConfig, GenerationConfig
from nemo_rl_core.testing.site import PluginSite
from nemo_rl_plugins_ray.cluster import _check_address, _check_versions
from nemo_rl_plugins_ray.config import RayConfig
from nemo_rl_plugins_ray.host import _writable
from nemo_rl_plugins_ray.launcher import RayLauncher
from nemo_rl_plugins_ray.nodes import nemo_rl_node_manifests
from nemo_rl_plugins_ray.wire import decode, encode

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Worker:
    """Defined in a module that a worker cannot import: it must travel by value."""

    def setup(self, config, context):
        self.context = context

    def place(self):
        return ray.get_runtime_context().get_node_id(), self.context.local_rank

    def add_in_place(self, tensor):
        tensor += self.context.rank
        return tensor

    def difference(self, first, tensor, last):
        return first - last + float(tensor.sum())

    def variables(self, *names):
        return [os.environ.get(name) for name in names]

    def shutdown(self):
        pass


class Engine:
    """A generation backend that answers with its process id and the request's prompt."""

    capabilities = frozenset()
    dtype = None

    def setup(self, config, context):
        self.context = context
        self.paused = False
        self.cancelled = 0
        self.weights = {}

    async def generate(self, request):
        if request.prompt_ids == [0]:
            raise GenerationError("the prompt is empty")
        try:
            while self.paused or request.prompt_ids == [-1]:
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Completion(
            request_id=request.request_id,
            token_ids=[os.getpid(), *request.prompt_ids],
            logprobs=[],
            finish_reason="stop",
        )

    def pause(self):
        self.paused = True

    def resume(self):
        self.paused = False

    def update_weights(self, version, tensors, *, share=False):
        self.weights = {name: tensor.clone() for name, tensor in tensors}

    def fingerprint(self):
        return f"{sum(float(t.sum()) for t in self.weights.values()):g}"

    def metrics(self):
        return {"num_cancelled": self.cancelled}

    def shutdown(self):
        pass


def hold(engine):
    engine.paused = True


def node_of(engine):
    return ray.get_runtime_context().get_node_id()


@pytest.fixture
def make_launcher(connected):
    made = []

    def make(options=None, **cluster):
        launcher = RayLauncher(RayConfig(**{"failure_grace_s": 2.0, "start_timeout_s": 90.0, **(options or {})}))
        made.append(launcher)
        launcher.setup(ClusterConfig(**{"device": "cpu", "cpus_per_node": 2, **cluster}))
        return launcher

    yield make
    for launcher in made:
        launcher.shutdown()


def spec(role="policy", factory=Worker, **changes):
    return WorkerSpec(role=role, factory=factory, **{"config": None, "num_workers": 2, **changes})


# -- places and dispatch -----------------------------------------------------------------------------------


class Counted:
    """Counts how often it was pickled."""

    times = 0

    def __reduce__(self):
        Counted.times += 1
        return int, ()


def test_two_nodes_colocated_roles_and_shards(make_launcher, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launcher = make_launcher({"role_runtime_env": {"policy": {"env_vars": {"OF_ROLE": "p"}}}}, num_nodes=2)
    before = dict(os.environ)
    policy = launcher.launch(spec(env={"OF_SPEC": "s"}))
    critic = launcher.launch(spec("critic", num_workers=1))
    assert dict(os.environ) == before

    nodes, local_ranks = zip(*policy.call("place", timeout_s=60), strict=True)
    assert len(set(nodes)) == 2 and local_ranks == (0, 0)
    assert critic.call("place", timeout_s=60) == [(nodes[0], 0)]  # colocated: the pool's first device
    assert policy.call("variables", "OF_ROLE", "OF_SPEC", "RANK", "WORLD_SIZE", "OMP_NUM_THREADS") == [
        ["p", "s", "0", "2", "2"],
        ["p", "s", "1", "2", "2"],
    ]
    assert critic.call("variables", "OF_ROLE", "OF_SPEC", "OMP_NUM_THREADS") == [[None, None, None]]

    big = torch.zeros(50_000)  # stands in the object store, which is read-only: a worker has a copy of its own
    found = policy.call("add_in_place", big, timeout_s=60)
    assert [t.unique().tolist() for t in found] == [[0.0], [1.0]] and not big.any()

    shard = (np.zeros(50_000), Counted())
    policy.call_each("variables", [("A",), ("B",)])
    with pytest.raises(TypeError, match="rank 0"):
        policy.call_each("add_in_place", [shard, shard], timeout_s=60)
    assert Counted.times == 1, "peers of one shard share one object"
    shards = [(np.zeros(50_000) + rank, shard[1]) for rank in range(2)]
    with pytest.raises(TypeError, match="rank 0"):
        policy.call_sharded("add_in_place", shards, axes={"dp": 2}, timeout_s=60)
    assert Counted.times == 2, "what all shards have in common is stored once"
    found = policy.call_sharded("difference", [(7, big, 4), (9, big, 4)], axes={"dp": 2}, timeout_s=60)
    assert found == [3.0, 5.0], "common arguments stand where they were"


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"cpus_per_node": 64}, r"cpus_per_node is 64; Ray has these nodes:(.|\n)*: 4 CPU, 0 GPU"),
        ({"num_nodes": 3}, r"num_nodes is 3; the Ray cluster has 2 node\(s\)(.|\n)*ray start --address"),
        ({"device": "cuda"}, r"no node of the Ray cluster has a GPU"),
    ],
)
def test_machines_that_are_not_there_are_refused_at_once(make_launcher, cluster, message):
    with pytest.raises(ResourceError, match=message):
        make_launcher(**cluster)


def test_workers_that_do_not_fit_are_refused_with_the_fix(make_launcher):
    with pytest.raises(
        ResourceError, match=r"'policy' asks for 3 workers.*a node has 2(.|\n)*Lower policy.num_workers"
    ):
        make_launcher().launch(spec(num_workers=3))
    apart = make_launcher(colocated=False, roles={"policy": 1, "generation": 1})
    with pytest.raises(ResourceError, match=r"asks for 2 devices; cluster.roles.policy is 1"):
        apart.launch(spec())
    with pytest.raises(ResourceError, match=r"has no 'critic'.*Add `critic: 2`"):
        apart.launch(spec("critic"))
    with pytest.raises(ResourceError, match=r"asks for 2 devices; cluster.roles.generation is 1"):
        apart.launch(spec("generation", num_workers=1, num_replicas=2))


def test_places_that_others_hold_are_waited_for_and_then_refused(make_launcher):
    holder = ray.util.placement_group([{"CPU": 4}] * 2, strategy="STRICT_SPREAD")
    try:
        assert holder.wait(30)
        with pytest.raises(ResourceError, match=r"No place for role 'policy' in 1 s(.|\n)*raise .*placement_timeout_s"):
            make_launcher({"placement_timeout_s": 1.0}).launch(spec())
    finally:
        ray.util.remove_placement_group(holder)


# -- plugins -------------------------------------------------------------------------------------------------


def cells(error):
    lines = str(error.value).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("node"))
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[start + 1 : -1]]


def test_a_plugin_that_a_worker_lacks_or_has_in_another_version_is_named(make_launcher, tmp_path):
    """The workers of the role have another version first on their path, as a runtime environment may bring it."""
    PluginSite(tmp_path).install("nemo-rl-ray", "0.0.9", entry_points={"launchers": {"ray": "x:Y"}})
    registry = get_registry()
    rows = worker_rows(registry.manifest([registry.resolve("launchers", "ray")]))
    rows = [row for row in rows if row["distribution"] == "nemo-rl-ray"]
    absent = {**rows[0], "kind": "losses", "name": "x", "distribution": "acme-loss", "version": "2.0"}
    options = {"role_runtime_env": {"policy": {"env_vars": {"PYTHONPATH": str(tmp_path)}}}}
    with pytest.raises(PluginIncompatible, match="2 worker processes have other plugins") as error:
        make_launcher(options).launch(spec(manifest=[*rows, absent], timeout_s=3600.0))  # told before any deadline
    host = os.uname().nodename
    found = cells(error)
    assert [row[0] for row in found] == [f"{host} rank 0"] * 2 + [f"{host} rank 1"] * 2
    assert found[0][1].startswith("nemo-rl-ray") and found[0][2] == "0.0.9" and found[0][3] == rows[0]["version"]
    assert found[1][1:] == ["acme-loss (losses x)", "not installed", "2.0"]


def test_a_node_without_this_package_is_named(make_launcher, tmp_path):
    """Its Python has Ray, and neither the launcher's package nor the core."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'nemo_rl_plugins_ray':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    options = {"role_runtime_env": {"policy": {"env_vars": {"PYTHONPATH": str(tmp_path)}}}}
    with pytest.raises(PluginIncompatible, match="2 worker processes have other plugins") as error:
        make_launcher(options).launch(spec())
    assert [row[1:] for row in cells(error)] == [["nemo-rl-ray", "not installed", version("nemo-rl-ray")]] * 2


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:1", "Cannot reach the Ray cluster at '127.0.0.1:1'"), ("http://head:8265", "ray job submit")],
)
def test_addresses_where_no_ray_answers_are_refused_at_once(address, message):
    with pytest.raises(ResourceError, match=message):
        _check_address(address)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"ray_version": "2.50.1"}, r"runs Ray 2.50.1 on Python .*process has Ray 2.*pip install 'ray==2.50.1'` here"),
        ({"ray_version": "2.9.0"}, r"runs Ray 2.9.0 .*needs Ray 2.49 or newer: `pip install 'ray=="),
        ({"python_version": "3.10.1"}, r"on Python 3.10.1, .*Run with Python 3.10.1 here"),
    ],
)
def test_another_version_of_the_cluster_is_named_with_the_fix(theirs, message):
    cluster = dict(zip(("ray_version", "python_version"), compute_version_info(), strict=True))
    with pytest.raises(RuntimeError) as words:
        check_version_info({**cluster, **theirs}, "127.0.0.1:1")
    with pytest.raises(ResourceError, match=message):
        _check_versions(str(words.value))
    _check_versions("Version mismatch of something else")


def test_the_doctor_sees_the_plugins_of_other_nodes(connected, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert nemo_rl_node_manifests() is None
    monkeypatch.setenv("RAY_ADDRESS", connected)
    ((node, rows),) = nemo_rl_node_manifests().items()
    assert compare_nodes(get_registry(), {node: rows}) == []
    older = [{**row, "version": "0.0.9"} if row["distribution"] == "nemo-rl-ray" else row for row in rows]
    (difference,) = compare_nodes(get_registry(), {node: older})
    assert (difference.node, difference.plugin, difference.found) == (node, "nemo-rl-ray", "0.0.9")


# -- engines -------------------------------------------------------------------------------------------------


def request(number, prompt):
    return GenerationRequest(request_id=str(number), prompt_ids=prompt, order=(number, 0, 0))


def start_engines(launcher, num_workers, **options):
    hosted = spec(
        "generation",
        EngineHost,
        num_workers=1,
        own_process=True,
        num_replicas=num_workers,
        config=HostConfig(engine=Engine, generation=GenerationConfig(model_name="none")),
    )
    return EngineWorkers.start(
        lambda index: launcher.launch(attrs.evolve(hosted, replica=index)),
        num_workers=num_workers,
        timeout_s=90.0,
        **options,
    )


def test_engines_of_the_core_run_in_actors(make_launcher):
    """Two engines on two nodes; one is killed, comes back where it was, and no request is lost."""
    engines = start_engines(make_launcher(num_nodes=2), 2, max_restarts=1)
    try:
        pids = [link.served.pid for link in engines.links]
        nodes = engines.apply(node_of)
        assert len({os.getpid(), *pids}) == 3 and len(set(nodes)) == 2
        engines.update_weights(3, iter([("a", torch.ones(30_000)), ("b", torch.ones(2))]))
        assert engines.fingerprint() == "30002"

        async def some():
            engines.pause()
            asked = [asyncio.create_task(engines.generate(request(i, [10 + i]))) for i in range(6)]
            await asyncio.sleep(0.3)
            assert not any(task.done() for task in asked)
            await asyncio.to_thread(engines.resume)
            return await asyncio.gather(*asked)

        found = asyncio.run(some())
        assert [c.token_ids[1] for c in found] == [10, 11, 12, 13, 14, 15]
        assert sorted(c.token_ids[0] for c in found) == sorted(pids * 3)

        async def give_up():
            with pytest.raises(GenerationError, match=r"\[generation-[01] rank 0\] the prompt is empty"):
                await engines.generate(request(1, [0]))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(engines.generate(request(0, [-1])), 0.2)

        asyncio.run(give_up())
        deadline = time.monotonic() + 20
        while (told := engines.metrics())["num_cancelled"] != 1.0:
            assert time.monotonic() < deadline, told

        async def lose():
            engines.apply(hold)
            asked = [asyncio.create_task(engines.generate(request(i, [i]))) for i in (20, 21, 22, 23)]
            await asyncio.sleep(0.2)
            os.kill(pids[1], signal.SIGKILL)
            while engines.num_restarts == 0:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(engines.wait_alive, 60)
            await asyncio.to_thread(engines.resume)
            return await asyncio.gather(*asked)

        found = asyncio.run(lose())
        assert [c.token_ids[1] for c in found] == [20, 21, 22, 23]
        assert {c.token_ids[0] for c in found} == {pids[0]}, "the new one takes none before it has the weights"
        assert engines.num_restarts == 1 and engines.needs_refit
        assert engines.links[1].served.pid not in pids and engines.apply(node_of) == nodes

        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(WorkerDied, match=r"engine generation-0 is gone.*worker of rank 0 on .* ended by signal 9"):
            engines.fingerprint()
    finally:
        engines.shutdown()


# -- the wire --------------------------------------------------------------------------------------------------


def test_logs_stand_in_the_run_folder_where_that_is_seen(tmp_path):
    seen, unseen = tmp_path / "a.log", tmp_path / "other-machine" / "b.log"
    seen.touch()
    assert _writable(str(seen)) == seen
    found = _writable(str(unseen))
    assert found.name == "b.log" and found.parent.is_dir() and tmp_path not in found.parents
    assert not unseen.parent.exists(), "a folder that is not shared is not made a second time"


def test_values_travel_whole():
    sent = {
        "bf16": torch.arange(4000, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "view": torch.arange(2000).reshape(40, 50).t(),
        "grad": torch.ones(3, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.ones(700)),
        "array": np.arange(900.0),
    }
    packet = encode(sent)
    assert len(packet.header) < 6000  # what is large stands beside the pickle
    found = decode(packet)
    for name, value in sent.items():
        assert type(found[name]) is type(value) and found[name].dtype == value.dtype
        assert found[name].shape == value.shape and bool((found[name] == value).all())
    assert found["grad"].requires_grad and found["parameter"].requires_grad and not found["scalar"].requires_grad
    found["view"] += 1
    found["array"] += 1
    assert sent["array"][0] == 0 and sent["view"][0, 0] == 0
