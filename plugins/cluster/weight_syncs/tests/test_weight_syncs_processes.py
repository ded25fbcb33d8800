"""Refits of engines in processes of their own: what arrives, what is caught, who is named."""

from __future__ import annotations

import datetime
import gc
import os
import signal

import attrs
import pytest
import torch

from nemo_rl_core.errors import CheckpointError, ConfigError, DeadlineExceeded, InvariantViolation, WorkerDied
from nemo_rl_core.infra.engines.host import EngineHost, HostConfig
from nemo_rl_core.infra.engines.workers import EngineWorkers
from nemo_rl_core.infra.weights.fingerprint import fingerprint
from nemo_rl_core.infra.workers.local import LocalLauncher
from nemo_rl_core.machine.place import find_place
from nemo_rl_core.protocols.generation_backend import GenerationBackend
from nemo_rl_core.protocols.launcher import WorkerSpec
from nemo_rl_core.schema import ClusterConfig, GenerationConfig
from nemo_rl_core.testing.conformance.weight_sync import SyncedTrainer
from nemo_rl_plugins_weight_syncs.collective import CollectiveSync
from nemo_rl_plugins_weight_syncs.config import CollectiveConfig, DeltaConfig, DiskConfig, SharedMemoryConfig
from nemo_rl_plugins_weight_syncs.delta import DeltaSync
from nemo_rl_plugins_weight_syncs.disk import DiskSync
from nemo_rl_plugins_weight_syncs.shared_memory import SharedMemorySync

pytestmark = pytest.mark.xdist_group("weight_syncs")  # one worker makes the processes that they share

SYNCS = {
    "shared_memory": lambda: SharedMemorySync(SharedMemoryConfig(chunk_bytes=700)),
    "collective": lambda: CollectiveSync(CollectiveConfig(chunk_bytes=700)),
    "delta": lambda: DeltaSync(DeltaConfig(chunk_bytes=700)),
    "disk": lambda: DiskSync(DiskConfig(shard_bytes=700)),
}


class Trainer(SyncedTrainer):
    """Three tensors and what a test does to them."""

    capabilities = frozenset({"exports_on_every_rank"})

    def setup(self, config, context):
        pass

    def digest(self):
        return fingerprint(self.weights.items())

    def change_one(self):
        self.weights["embed"][3, 3] += 1.0


class Engine(GenerationBackend):
    config_class = dict
    dtype = torch.float32

    def setup(self, config, context):
        self.weights, self.version, self.fault = {"embed": torch.zeros(1)}, -1, None

    async def generate(self, request):
        raise NotImplementedError

    def update_weights(self, version, tensors, *, share=False):
        if self.fault == "hangs":
            import time

            time.sleep(3.0)
        if self.fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        self.weights = {name: tensor.clone() for name, tensor in tensors}
        self.version = version
        if self.fault == "flips a bit":
            self.weights["norm"].view(torch.int32)[2] ^= 1

    def fingerprint(self):
        return fingerprint(self.weights.items())


def set_fault(side, fault):
    """To the trainer a fault is a weight that it cannot export."""
    side.fault = fault
    if isinstance(side, SyncedTrainer):
        side.before_item = lambda name: 1 / (f"cannot export {name}" != fault)


def scale_embedding(trainer, factor):
    trainer.weights["embed"].mul_(factor)


def version(engine):
    return engine.version


@pytest.fixture(scope="module")
def launcher():
    made = LocalLauncher()
    made.setup(ClusterConfig(device="cpu", cpus_per_node=8))
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def start(launcher, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("logs"))

    def make(num_workers, max_restarts=0):
        host = HostConfig(engine=Engine, generation=GenerationConfig(model_name="none"))
        spec = WorkerSpec(
            role="generation",
            factory=EngineHost,
            config=host,
            own_process=True,
            num_replicas=num_workers,
            run_dir=folder,
        )
        return EngineWorkers.start(
            lambda index: launcher.launch(attrs.evolve(spec, replica=index)),
            num_workers=num_workers,
            timeout_s=60,
            max_restarts=max_restarts,
        )

    return make


@pytest.fixture(scope="module")
def engines(start):
    made = start(2)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def trainer(launcher, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("logs"))
    return launcher.launch(WorkerSpec(role="policy", factory=Trainer, config=None, num_workers=2, run_dir=folder))


@pytest.fixture(autouse=True)
def no_fault(request):
    yield
    if "engines" in request.fixturenames:
        request.getfixturevalue("engines").apply(set_fault, None)


def refit(sync, trainer, engines, number, timeout_s=30.0):
    return sync.sync(trainer, engines, version=number, share=False, timeout_s=timeout_s)


@pytest.mark.parametrize("name", SYNCS)
def test_weights_go_from_rank_zero_to_every_engine(name, trainer, engines):
    sync = SYNCS[name]()
    for number in (1, 2, 3):
        report = refit(sync, trainer, engines, number)
        assert report.fingerprint == engines.fingerprint() == trainer.call("digest")[0]
        assert engines.apply(version) == [number, number] and engines.version == number
        trainer.call("train")


@pytest.mark.parametrize("name", SYNCS)
def test_one_flipped_bit_is_caught_and_the_next_refit_is_right(name, trainer, engines):
    sync = SYNCS[name]()
    refit(sync, trainer, engines, 1)
    engines.links[1].wait(engines.links[1].submit(set_fault, "flips a bit"), what="set", timeout_s=30)
    with pytest.raises(InvariantViolation, match="engine generation-1's weights differ"):
        refit(sync, trainer, engines, 2)
    engines.apply(set_fault, None)
    assert refit(sync, trainer, engines, 3).fingerprint == engines.fingerprint()


@pytest.mark.parametrize("name", ["shared_memory", "collective", "delta"])
def test_an_engine_that_hangs_is_named_at_the_deadline(name, trainer, engines):
    sync = SYNCS[name]()
    engines.links[1].wait(engines.links[1].submit(set_fault, "hangs"), what="set", timeout_s=30)
    with pytest.raises(DeadlineExceeded, match="waiting for the engine generation-1"):
        refit(sync, trainer, engines, 1, timeout_s=1.0)
    engines.apply(set_fault, None)
    refit(sync, trainer, engines, 2)


def test_delta_sends_what_changed(trainer, engines):
    sync = DeltaSync()
    full = refit(sync, trainer, engines, 1)
    assert full.num_bytes_sent == full.num_bytes
    trainer.call("change_one")
    one = refit(sync, trainer, engines, 2)
    assert one.num_bytes == full.num_bytes and one.num_bytes_sent == 2 * (2 + 4)  # element 0 and the changed one
    assert refit(sync, trainer, engines, 3).num_bytes_sent == 0


def test_delta_is_full_when_it_is_asked_to_be(trainer, engines):
    sync = DeltaSync(DeltaConfig(full_every=2))
    sent = [refit(sync, trainer, engines, number) for number in (1, 2, 3)]
    assert [report.num_bytes_sent == report.num_bytes for report in sent] == [True, False, True]


def test_an_engine_that_dies_in_a_refit_is_named(trainer, start):
    engines = start(1)
    try:
        engines.apply(set_fault, "dies")
        with pytest.raises(WorkerDied, match="engine generation is gone.*signal 9"):
            refit(SharedMemorySync(), trainer, engines, 1)
    finally:
        engines.shutdown()


def test_an_engine_that_dies_in_a_refit_is_started_again_and_refitted(trainer, start):
    engines = start(1, max_restarts=1)
    try:
        sync = SYNCS["collective"]()
        refit(sync, trainer, engines, 1)
        engines.links[0].wait(engines.links[0].submit(set_fault, "dies"), what="set", timeout_s=30)
        report = refit(sync, trainer, engines, 2, timeout_s=60)
        assert report.fingerprint == engines.fingerprint() and engines.num_restarts == 1
        assert not engines.needs_refit
    finally:
        engines.shutdown()


def test_disk_keeps_whole_versions_only(trainer, engines, tmp_path):
    sync = DiskSync(DiskConfig(folder=str(tmp_path), shard_bytes=700, keep=2))
    for number in (1, 2, 3):
        refit(sync, trainer, engines, number)
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name.split("-")[1] for path in folder.iterdir()) == ["v2", "v3"]
    assert len(list(next(folder.glob("weights-v3-*")).glob("*.safetensors"))) > 1
    trainer.call_each("apply", [(set_fault, "cannot export norm"), (set_fault, None)])
    with pytest.raises(ZeroDivisionError):
        refit(sync, trainer, engines, 4)
    (folder / ".weights-v4-killed.unfinished").mkdir()
    trainer.call("apply", set_fault, None)
    refit(sync, trainer, engines, 5)
    assert sorted(path.name.split("-")[1] for path in folder.iterdir()) == ["v3", "v5"]
    del sync
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_disk_that_cannot_be_written_is_told(trainer, engines, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write the weights of version 1"):
        refit(DiskSync(DiskConfig(folder=str(tmp_path / "file"))), trainer, engines, 1)


def test_a_byte_that_changes_on_its_way_is_caught(monkeypatch, tmp_path):
    """Trainer and engine in this process, and a packer that damages what it packs."""
    from nemo_rl_core.infra.workers.local import InProcessGroup
    from nemo_rl_core.testing.conformance.weight_sync import SyncedEngine
    from nemo_rl_plugins_weight_syncs import collective, shared_memory

    whole = shared_memory.pack

    def damaged(chunk, buffer):
        whole(chunk, buffer)
        buffer[5] ^= 8

    for module, sync in ((shared_memory, SharedMemorySync()), (collective, CollectiveSync())):
        monkeypatch.setattr(module, "pack", damaged)
        with pytest.raises(InvariantViolation, match="the engine's weights differ"):
            refit(sync, InProcessGroup(SyncedTrainer()), SyncedEngine(), 1)


def test_shared_memory_refuses_another_machine():
    here = find_place()
    there = attrs.evolve(here, machine="another", host="node-7")
    with pytest.raises(ConfigError, match="engines on node-7. Set weight_sync: collective"):
        SharedMemorySync().routes({0: here}, [here, there])


def test_an_engine_is_served_by_the_rank_on_its_device_or_its_machine():
    here, sync = find_place(), SharedMemorySync()

    def on(device_id, machine="a"):
        return attrs.evolve(here, machine=machine, device="cuda:0" if device_id else "cpu", device_id=device_id)

    def kinds(trainers, engines):
        """Engines by rank, and whether they are served from device memory."""
        routes = sync.routes(dict(enumerate(trainers)), engines)
        return {
            rank: (numbers, sync.carriers(trainers[rank], [engines[n] for n in numbers], None)[0][1])
            for rank, numbers in routes.items()
        }

    two = [on("A"), on("B")]
    assert kinds(two, two) == {0: ((0,), True), 1: ((1,), True)}
    assert kinds(two, [on("B"), on("A"), on("B")]) == {1: ((0, 2), True), 0: ((1,), True)}
    assert kinds(two, [on("B")]) == {1: ((0,), True)}
    assert kinds(two[:1], two) == {0: ((0, 1), False)}  # the backend exports on rank 0 only
    assert kinds(two, [on("C")]) == {0: ((0,), False)}  # devices of its own
    assert kinds([on(""), on("")], [on(""), on("")]) == {0: ((0, 1), False)}
    nodes = [on("A", "a"), on("B", "b")]
    assert kinds(nodes, [on("B", "b"), on("A", "a"), on("", "b")]) == {1: ((0, 2), False), 0: ((1,), True)}


def test_ranks_serve_engines_side_by_side(trainer, engines, monkeypatch):
    """As where each is on the device of an engine; here through the machine's memory."""
    sync = SYNCS["shared_memory"]()
    monkeypatch.setattr(sync, "routes", lambda trainers, places: {0: (1,), 1: (0,)})
    for number in (1, 2):
        report = refit(sync, trainer, engines, number)
        assert report.fingerprint == engines.fingerprint() and report.num_tensors == 3
        trainer.call("train")
    engines.links[0].wait(engines.links[0].submit(set_fault, "flips a bit"), what="set", timeout_s=30)
    with pytest.raises(InvariantViolation, match="engine generation-0's weights differ"):
        refit(sync, trainer, engines, 3)
    engines.links[0].wait(engines.links[0].submit(set_fault, "hangs"), what="set", timeout_s=30)
    with pytest.raises(DeadlineExceeded, match="waiting for the engine generation-0"):
        refit(sync, trainer, engines, 4, timeout_s=1.0)
    engines.apply(set_fault, None)
    assert refit(sync, trainer, engines, 5).fingerprint == engines.fingerprint()


def test_ranks_that_export_other_weights_are_told(trainer, engines, monkeypatch):
    sync = SYNCS["shared_memory"]()
    monkeypatch.setattr(sync, "routes", lambda trainers, places: {0: (0,), 1: (1,)})
    trainer.call_each("apply", [(set_fault, None), (scale_embedding, 2.0)])
    with pytest.raises(InvariantViolation, match="engine generation-1's weights differ"):
        refit(sync, trainer, engines, 1)
    trainer.call_each("apply", [(set_fault, None), (scale_embedding, 0.5)])
    refit(sync, trainer, engines, 2)


def test_nccl_needs_a_device_for_each():
    here = find_place()
    with pytest.raises(ConfigError, match=r"found \['cpu', 'cpu'\]. Set backend: gloo"):
        CollectiveSync(CollectiveConfig(backend="nccl")).carriers(here, [here], None)


def test_collective_reaches_another_machine(trainer, engines, monkeypatch):
    """As between machines: a port instead of a path, a store behind a port, the address of an interface."""
    sync = CollectiveSync()
    carriers = sync.carriers

    def apart(place, places, transfer):
        return carriers(place, [attrs.evolve(one, machine="another") for one in places], transfer)

    monkeypatch.setattr(sync, "carriers", apart)
    report = refit(sync, trainer, engines, 1)
    assert report.fingerprint == engines.fingerprint()


def gloo_for_nccl(worker, *_):
    """In a process of the test: a group of gloo where NCCL's would be made, which needs a GPU for each."""
    from nemo_rl_plugins_weight_syncs import collective

    def make(store, rank, size):
        return collective._gloo(store, rank, size, datetime.timedelta(seconds=30), local=True)

    collective._nccl = make


def test_nccl_goes_from_device_to_device(trainer, engines, monkeypatch):
    """All but the group itself is real: neither side is asked for a device but by its place."""
    trainer.call("apply", gloo_for_nccl)
    engines.apply(gloo_for_nccl)
    sync = CollectiveSync(CollectiveConfig(chunk_bytes=700))
    carriers = sync.carriers

    def on_gpus(place, places, transfer):
        apart = [attrs.evolve(one, device_id=f"GPU-{number}") for number, one in enumerate([place, *places])]
        out, into = carriers(apart[0], apart[1:], transfer)
        assert out[1] == into[1] == "nccl"
        return out, into

    monkeypatch.setattr(sync, "carriers", on_gpus)
    for number in (1, 2):
        assert refit(sync, trainer, engines, number).fingerprint == engines.fingerprint()
        trainer.call("train")
