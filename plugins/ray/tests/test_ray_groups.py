"""Worker groups and engines in actors: places, dispatch, verification, resources."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from importlib.metadata import version

import cloudpickle
import numpy as np
import pytest
import ray
import torch

from nemo_rl_core.config.schema import ClusterConfig
from nemo_rl_core.errors import (
    DeadlineExceeded,
    GenerationError,
    InvariantViolation,
    PluginIncompatible,
    ResourceError,
    WorkerDied,
)
from nemo_rl_core.infra.fingerprint import fingerprint
from nemo_rl_core.protocols.generation_backend import Completion, GenerationRequest
from nemo_rl_core.protocols.launcher import WorkerSpec
from nemo_rl_core.registry import get_registry, worker_rows
from nemo_rl_core.registry._diagnosis import compare_nodes
from nemo_rl_core.testing import WeightSyncContract
from nemo_rl_core.testing.site import PluginSite
from nemo_rl_plugins_ray.cluster import _check_address
from nemo_rl_plugins_ray.config import ObjectStoreSyncConfig, RayConfig
from nemo_rl_plugins_ray.launcher import RayLauncher
from nemo_rl_plugins_ray.nodes import nemo_rl_node_manifests
from nemo_rl_plugins_ray.weight_sync import ObjectStoreSync
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

    def variables(self, *names):
        return [os.environ.get(name) for name in names]

    def shutdown(self):
        pass


class Engine:
    """A generation backend that answers with its process id and the request's prompt."""

    kind = "generation_backends"
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
        return {"num_cancelled": self.cancelled, "fill": 0.5}

    def shutdown(self):
        pass


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
    return WorkerSpec(role=role, factory=factory, config=None, num_workers=changes.pop("num_workers", 2), **changes)


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
    uneven = make_launcher({"num_engines": 2}, colocated=False, roles={"policy": 1, "generation": 1})
    with pytest.raises(ResourceError, match=r"2 engines .*cannot share evenly"):
        uneven.launch(spec("generation", Engine))


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
    started = time.monotonic()
    with pytest.raises(PluginIncompatible, match="2 worker processes have other plugins") as error:
        make_launcher(options).launch(spec(manifest=[*rows, absent]))
    assert time.monotonic() - started < 60
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


def test_engines_in_actors_stand_behind_one_backend(make_launcher):
    launcher = make_launcher({"num_engines": 2})
    group = launcher.launch(spec("generation", Engine, num_workers=1))
    engine = group.local
    assert group.size == 2

    async def some():
        engine.pause()
        asked = [asyncio.create_task(engine.generate(request(i, [10 + i]))) for i in range(6)]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in asked)
        await asyncio.to_thread(engine.resume)
        return await asyncio.gather(*asked)

    found = asyncio.run(some())
    assert [c.token_ids[1] for c in found] == [10, 11, 12, 13, 14, 15]
    assert [c.token_ids[0] for c in found] == group.pids * 3  # group by group in turn

    async def give_up():
        with pytest.raises(GenerationError, match=r"\[generation rank 1\] the prompt is empty"):
            await engine.generate(request(1, [0]))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.generate(request(0, [-1])), 0.2)

    asyncio.run(give_up())
    deadline = time.monotonic() + 20
    while (told := engine.metrics()) != {"num_cancelled": 1.0, "fill": 0.5}:
        assert time.monotonic() < deadline, told

    engine.update_weights(3, iter([("a", torch.ones(30_000)), ("b", torch.ones(2))]))
    assert engine.fingerprint() == "30002"

    def failing():
        yield "a", torch.ones(3)
        raise KeyError("the trainer has no more")

    with pytest.raises(KeyError, match="no more"):
        engine.update_weights(4, failing())
    engine.update_weights(5, iter([("a", torch.ones(4))]))
    assert engine.fingerprint() == "4"

    async def lose():
        asked = asyncio.create_task(engine.generate(request(1, [-1])))
        await asyncio.sleep(0.2)
        threading.Timer(0.1, os.kill, (group.pids[1], signal.SIGKILL)).start()
        with pytest.raises(WorkerDied, match=r"generation worker of rank 1 on .* was ended by signal 9"):
            await asyncio.wait_for(asked, 30)
        with pytest.raises(WorkerDied):
            await engine.generate(request(1, [7]))

    asyncio.run(lose())


# -- weight sync -----------------------------------------------------------------------------------------------


class Trainer:
    """Exports weights, of which every rank must take part; fails or hangs on demand."""

    def setup(self, config, context):
        self.context = context
        self.mode = "fine"

    def be(self, mode):
        self.mode = mode

    def export_weights(self):
        for i in range(4):
            if i == 2 and self.context.rank == 0 and self.mode == "fail":
                raise ArithmeticError("lost in the middle")
            if i == 2 and self.context.rank == 1 and self.mode == "die":
                os._exit(5)
            if i == 2 and self.mode == "hang":
                time.sleep(60)
            yield f"w{i}", torch.full((70_000,), float(i + 1), dtype=torch.float64)

    def shutdown(self):
        pass


class Keeper(Engine):
    """An engine that digests as the core does; "wrong" loses a bit."""

    dtype = torch.float32

    def fingerprint(self):
        if "w3" in self.weights and os.environ.get("KEEPER") == "wrong":
            self.weights["w3"][5] += 1
        return fingerprint(self.weights.items())


def test_weights_go_from_actor_to_actor(make_launcher):
    launcher = make_launcher({"num_engines": 2}, cpus_per_node=4)
    trainer = launcher.launch(spec(factory=Trainer))
    engine = launcher.launch(spec("generation", Keeper, num_workers=1)).local
    sync = ObjectStoreSync(ObjectStoreSyncConfig(chunk_mib=1))  # two tensors of float32 make a chunk... and a bit

    def go(**changes):
        return sync.sync(trainer, engine, **{"version": 7, "share": True, "timeout_s": 60.0, **changes})

    report = go()
    expected = fingerprint((f"w{i}", torch.full((70_000,), float(i + 1))) for i in range(4))
    assert report.fingerprint == expected == engine.fingerprint()
    assert (report.version, report.num_tensors, report.num_bytes) == (7, 4, 4 * 70_000 * 4)

    trainer.call("be", "fail")
    with pytest.raises(ArithmeticError, match=r"\[policy rank 0\] lost in the middle"):
        go()
    trainer.call("be", "fine")
    assert go(version=8).fingerprint == expected  # both sides go on

    wrong = launcher.launch(spec("generation", Keeper, num_workers=1, env={"KEEPER": "wrong"})).local
    with pytest.raises(InvariantViolation, match="weight version 7 the engines' weights differ"):
        sync.sync(trainer, wrong, version=7, share=False, timeout_s=60.0)

    trainer.call("be", "die")
    with pytest.raises(WorkerDied, match=r"policy worker of rank 1 on .* exited with status 5 during export_weights"):
        go()

    slow = launcher.launch(spec(factory=Trainer, num_workers=1))
    slow.call("be", "hang")
    with pytest.raises(
        DeadlineExceeded, match=r"export_weights on the policy workers passed its deadline.*rank\(s\) 0"
    ):
        sync.sync(slow, engine, version=9, share=False, timeout_s=1.5)


class TestObjectStoreSyncElsewhere(WeightSyncContract):
    """Between a trainer and an engine that are not in actors: the same configuration on another launcher."""

    @pytest.fixture
    def weight_sync(self):
        return ObjectStoreSync()


# -- the wire --------------------------------------------------------------------------------------------------


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
