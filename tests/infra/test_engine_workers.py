"""Engines in processes of their own: requests, routing, refits, and what happens when one dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time

import attrs
import pytest
import torch

from nemo_rl_core.errors import ConfigError, DeadlineExceeded, GenerationError, InvariantViolation, WorkerDied
from nemo_rl_core.infra.engines.host import EngineHost, HostConfig
from nemo_rl_core.infra.engines.metrics import merge_engine_metrics
from nemo_rl_core.infra.engines.workers import EngineWorkers
from nemo_rl_core.infra.workers.local import LocalLauncher
from nemo_rl_core.machine.arrivals import arrive
from nemo_rl_core.protocols.generation_backend import GenerationBackend, GenerationRequest, SamplingParams
from nemo_rl_core.protocols.launcher import WorkerSpec
from nemo_rl_core.records.completion import Completion
from nemo_rl_core.schema import ClusterConfig, GenerationConfig

pytestmark = pytest.mark.xdist_group("engine_workers")  # they share the two processes


class CountingEngine(GenerationBackend):
    """Answers with (seed, prompt, its weight) after a number of milliseconds; notes what it was asked."""

    config_class = dict
    capabilities = frozenset({"share_weights", "in_flight_updates"})
    dtype = torch.float32

    def setup(self, config, context):
        self.weights = {"w": torch.zeros(3)}
        self.version = 0
        self.going = asyncio.Event()
        self.going.set()
        self.seen = []
        self.cancelled = 0

    broken = False

    async def generate(self, request):
        self._check_alive()
        self.seen.append(request.request_id)
        if request.prompt_ids[0] == 13:
            raise GenerationError("thirteen is refused")
        if request.prompt_ids[0] == 14:  # a step that takes long and holds the engine's loop
            time.sleep(request.sampling.max_new_tokens / 1000)
        await self.going.wait()
        try:
            await asyncio.sleep(request.sampling.max_new_tokens / 1000)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        tokens = [request.sampling.seed % 1000, *request.prompt_ids, int(self.weights["w"][0])]
        return Completion(
            request_id=request.request_id,
            token_ids=tokens,
            logprobs=[0.0] * len(tokens),
            finish_reason="stop",
            weight_version=self.version,
        )

    def update_weights(self, version, tensors, *, share=False):
        self.weights = {name: tensor.clone() for name, tensor in tensors}
        if "bad" in self.weights:
            raise GenerationError("no weight of the name bad")
        self.version = version

    def pause(self):
        self.going.clear()

    def resume(self):
        self.going.set()

    def fingerprint(self):
        return f"{float(self.weights['w'].sum()):g}"

    def _check_alive(self):
        if self.broken:
            raise WorkerDied("the process that decodes has ended")

    def metrics(self):
        self._check_alive()
        return {"requests": float(len(self.seen)), "batch_fill": 0.5}


def seen(engine):
    """Request ids in their order, and forget them."""
    found, engine.seen = engine.seen, []
    return found


def process_id(engine):
    return os.getpid()


def change_weight(engine, number):
    engine.weights["w"] += number


def break_down(engine):
    engine.broken = True


def sleep_for(engine, seconds):
    time.sleep(seconds)


def start(tmp_path, *, num_workers=2, around=lambda index, launch: launch(), **limits):
    """`around(index, launch)` launches engine `index`."""
    launcher = LocalLauncher()
    launcher.setup(ClusterConfig(device="cpu", cpus_per_node=4))
    spec = WorkerSpec(
        role="generation",
        factory=EngineHost,
        config=HostConfig(engine=CountingEngine, generation=GenerationConfig(model_name="none")),
        own_process=True,
        num_replicas=num_workers,
        run_dir=str(tmp_path),
    )
    return EngineWorkers.start(
        lambda index: around(index, lambda: launcher.launch(attrs.evolve(spec, replica=index))),
        num_workers=num_workers,
        seed=5,
        timeout_s=60,
        **limits,
    )


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    made = start(tmp_path_factory.mktemp("engines"))
    yield made
    made.shutdown()


@pytest.fixture(autouse=True)
def fresh(request):
    if "engines" in request.fixturenames:
        request.getfixturevalue("engines").apply(seen)


def ask(name, *, group=0, prompt=(7,), milliseconds=1, seed=3):
    sampling = SamplingParams(max_new_tokens=milliseconds, seed=seed)
    return GenerationRequest(request_id=name, prompt_ids=prompt, sampling=sampling, order=(group, 0, 0))


def complete(engines, requests):
    async def all_of_them():
        return await asyncio.gather(*(engines.generate(request) for request in requests))

    return asyncio.run(all_of_them())


def test_they_live_elsewhere_and_answer_by_request(engines):
    assert len({os.getpid(), *engines.apply(process_id)}) == 3
    requests = [ask(f"{group}/{i}", group=group, seed=10 * group + i) for group in range(6) for i in range(3)]
    completions = complete(engines, requests)
    assert [c.request_id for c in completions] == [r.request_id for r in requests]
    assert [c.token_ids[0] for c in completions] == [r.sampling.seed for r in requests]


def test_a_group_goes_to_one_engine_and_groups_are_spread(engines):
    complete(engines, [ask(f"{group}/{i}", group=group) for group in range(100, 104) for i in range(3)])
    first, second = ({name.split("/")[0] for name in names} for names in engines.apply(seen))
    assert first | second == {"100", "101", "102", "103"} and not first & second
    assert len(first) == len(second) == 2
    complete(engines, [ask("101/later", group=101)])  # its next turn finds the prompt where it is
    where = [i for i, names in enumerate(engines.apply(seen)) if names]
    assert where == [0 if "101" in first else 1]


def test_requests_without_a_seed_get_one_here(engines):
    unseeded = [attrs.evolve(ask(str(i)), sampling=SamplingParams(max_new_tokens=1)) for i in range(8)]
    assert len({c.token_ids[0] for c in complete(engines, unseeded)}) > 4


def test_paused_engines_start_when_all_requests_are_there(engines):
    engines.pause()

    async def work():
        tasks = [asyncio.create_task(engines.generate(ask(str(i), group=i))) for i in range(4)]
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in tasks)
        engines.resume()
        return await asyncio.gather(*tasks)

    assert len(asyncio.run(work())) == 4


def test_a_cancelled_request_is_cancelled_there(engines):
    async def work():
        task = asyncio.create_task(engines.generate(ask("long", milliseconds=60_000)))
        while sum(link.load for link in engines.links) == 0:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    cancelled = lambda engine: engine.cancelled  # noqa: E731
    end = time.monotonic() + 10
    while sum(engines.apply(cancelled)) == 0 and time.monotonic() < end:
        time.sleep(0.02)
    assert sum(engines.apply(cancelled)) == 1
    assert all(link.load == 0 for link in engines.links)


def test_an_error_of_the_engine_is_of_its_type_and_names_it(engines):
    with pytest.raises(GenerationError, match=r"\[generation-[01] rank 0\].*thirteen is refused"):
        complete(engines, [ask("bad", prompt=(13,))])
    assert complete(engines, [ask("fine")])[0].token_ids[1] == 7


def test_a_call_that_takes_too_long_names_the_engine(engines):
    with pytest.raises(DeadlineExceeded, match=r"sleep_for on the engine generation-0 \(pid \d+(.|\n)*call_timeout_s"):
        engines.apply(sleep_for, 1.0, timeout_s=0.1)


def test_weights_through_the_driver(engines):
    engines.update_weights(4, iter([("w", torch.full((3,), 2.0))]))
    assert engines.fingerprint() == "6"
    (completion,) = complete(engines, [ask("after")])
    assert completion.token_ids[-1] == 2 and completion.weight_version == 4
    with pytest.raises(GenerationError, match="no weight of the name bad"):
        engines.update_weights(5, iter([("bad", torch.zeros(1))]))
    engines.update_weights(6, iter([("w", torch.full((3,), 1.0))]))

    def broken():
        yield "w", torch.zeros(3)
        raise ZeroDivisionError("the trainer failed")

    with pytest.raises(ZeroDivisionError):
        engines.update_weights(7, broken())
    assert engines.fingerprint() == "3"


def test_engines_with_different_weights_are_found_out(engines):
    engines.update_weights(8, iter([("w", torch.zeros(3))]))
    engines.links[1].wait(engines.links[1].submit(change_weight, 1.0), what="change", timeout_s=30)
    with pytest.raises(InvariantViolation, match="generation-0 0, generation-1 3"):
        engines.fingerprint()
    engines.update_weights(9, iter([("w", torch.zeros(3))]))


def test_metrics_are_summed_and_shares_averaged(engines):
    complete(engines, [ask(str(i), group=200 + i) for i in range(4)])
    found = engines.metrics()
    assert found["requests"] == 4.0 and found["batch_fill"] == 0.5 and found["engines"] == 2.0
    assert merge_engine_metrics([{"a": 1.0, "hit_rate": 0.2}, {"a": 2.0, "hit_rate": 0.4, "b": 1.0}]) == {
        "a": 3.0,
        "hit_rate": pytest.approx(0.3),
        "b": 1.0,
    }


def test_nothing_is_shared_between_processes(engines):
    assert engines.capabilities == {"in_flight_updates"}
    assert engines.dtype is torch.float32


def kill(link, number=signal.SIGKILL):
    os.kill(link.served.pid, number)


def test_a_dead_engine_is_named_and_ends_what_waits_for_it(tmp_path):
    made = start(tmp_path, num_workers=1)
    try:

        async def work():
            task = asyncio.create_task(made.generate(ask("long", milliseconds=3_600_000)))
            await asyncio.sleep(0.2)
            kill(made.links[0])
            await task

        with pytest.raises(WorkerDied, match=r"engine generation is gone.*ended by signal 9"):
            asyncio.run(work())
        for again in (lambda: complete(made, [ask("next")]), made.metrics, made.fingerprint):
            with pytest.raises(WorkerDied, match="generation"):
                again()
    finally:
        made.shutdown()


def test_an_engine_that_died_is_started_again_and_loses_no_request(tmp_path):
    made = start(tmp_path, num_workers=2, max_restarts=1)
    try:
        made.update_weights(1, iter([("w", torch.full((3,), 5.0))]))
        requests = [ask(str(i), group=i, milliseconds=400, seed=i) for i in range(10)]

        async def work():
            gathered = asyncio.gather(*(made.generate(request) for request in requests))
            await asyncio.sleep(0.1)
            kill(made.links[1])
            return await gathered

        completions = asyncio.run(work())
        assert [c.token_ids for c in completions] == [[i, 7, 5] for i in range(10)]
        assert made.metrics()["engine_restarts"] == 1.0  # of those that are there: it does not wait for the other
        made.wait_alive(60)
        assert made.num_restarts == 1 and made.needs_refit  # it has the weights of its start
        complete(made, [ask(str(i), group=50 + i) for i in range(4)])
        assert made.links[1].load == 0 and made.apply(seen)[1] == []  # nothing goes there before the refit

        def refit(engine):
            engine.update_weights(1, iter([("w", torch.full((3,), 5.0))]))

        with made.refits(refit):
            end = time.monotonic() + 30
            while made.needs_refit and time.monotonic() < end:
                time.sleep(0.01)
        assert not made.needs_refit and made.fingerprint() == "15"
        kill(made.links[0])  # the second death is one too many
        threading.Event().wait(0.2)
        with pytest.raises(WorkerDied, match="generation-0"):
            made.metrics()
    finally:
        made.shutdown()


def test_an_engine_that_dies_while_others_start_is_started_again_also_where_a_start_fails(tmp_path):
    groups = {0: [], 1: []}
    others = set(threading.enumerate())

    def readers():
        return [t for t in threading.enumerate() if t.name == "nemo-rl-generation-0" and t not in others]

    def around(index, launch):
        if index == 1:  # starts when the other has been up and has died
            while not readers():  # it is connected
                time.sleep(0.01)
            os.kill(groups[0][0].pids[0], signal.SIGKILL)
            while readers():
                time.sleep(0.01)
        elif len(groups[0]) == 1:
            groups[0].append(None)
            raise ConfigError("no device is free yet")
        groups[index].append(launch())
        return groups[index][-1]

    made = start(tmp_path, num_workers=2, around=around, max_restarts=2)
    try:
        assert len(made.apply(process_id)) == 2
        assert made.num_restarts == 2 and [len(found) for found in groups.values()] == [3, 1]
    finally:
        made.shutdown()


def test_an_engine_that_lost_a_process_of_its_own_is_started_again(tmp_path):
    made = start(tmp_path, num_workers=1, max_restarts=2)
    try:
        for num_restarts, use in enumerate((lambda: complete(made, [ask("one")])[0].token_ids, made.metrics), 1):
            (link,) = made.links
            made.apply(break_down)
            assert use()  # without an error: it is asked of the new one
            assert made.num_restarts == num_restarts
            assert "generation is gone" in str(link.lost) and "exited with status 1" in str(link.lost)
            assert str(link.lost).endswith("the process that decodes has ended")  # its last words
    finally:
        made.shutdown()


def test_an_engine_that_hangs_gets_nothing_more_and_is_started_again(tmp_path):
    made = start(tmp_path, num_workers=2, max_restarts=1, heartbeat_timeout_s=3.0)
    try:
        hangs, other = made.links

        async def work():
            tasks = [asyncio.create_task(made.generate(ask(str(i), group=i, seed=i))) for i in range(2)]
            kill(hangs, signal.SIGSTOP)
            while not hangs.is_late:
                await asyncio.sleep(0.01)
            tasks += [asyncio.create_task(made.generate(ask(str(i), group=i, seed=i))) for i in range(2, 12)]
            await asyncio.gather(*tasks[2:])  # none of them waits for the one that hangs
            assert hangs.lost is None and made.links == [hangs, other]
            tasks += [asyncio.create_task(made.generate(ask("12", group=12, seed=12, prompt=(14,), milliseconds=4000)))]
            return await asyncio.gather(*tasks)

        assert [c.token_ids[0] for c in asyncio.run(work())] == list(range(13))
        made.wait_alive(60)
        assert made.links[0] is not hangs and made.links[1] is other and not made.needs_refit
        assert "generation-0" in str(hangs.lost) and "answered nothing for 3 s" in str(hangs.lost)
        assert len(complete(made, [ask(str(i), group=20 + i) for i in range(4)])) == 4
        with pytest.raises(ProcessLookupError):
            kill(hangs)
    finally:
        made.shutdown()


def killed_meanwhile(made):
    """A completion in the middle of which its engine is killed."""

    async def work():
        task = asyncio.create_task(made.generate(ask("long", milliseconds=300)))
        await asyncio.sleep(0.1)
        kill(made.links[0])
        return await task

    return asyncio.run(work())


def test_a_lone_engine_that_died_is_refitted_before_it_samples(tmp_path):
    made = start(tmp_path, num_workers=1, max_restarts=1)
    try:
        made.update_weights(3, iter([("w", torch.full((3,), 4.0))]))

        def refit(engine):
            engine.update_weights(3, iter([("w", torch.full((3,), 4.0))]))

        with made.refits(refit):
            assert killed_meanwhile(made).token_ids == [3, 7, 4]
    finally:
        made.shutdown()


def test_an_engine_that_dies_again_in_its_refit_is_started_once_more(tmp_path):
    made = start(tmp_path, num_workers=1, max_restarts=2)
    refitted = []
    try:
        made.update_weights(3, iter([("w", torch.full((3,), 4.0))]))

        def refit(engine):
            refitted.append(engine.links[0].served.pid)
            if len(refitted) == 1:
                kill(engine.links[0])
                engine.apply(sleep_for, 30.0)
            engine.update_weights(3, iter([("w", torch.full((3,), 4.0))]))

        with made.refits(refit):
            assert killed_meanwhile(made).token_ids == [3, 7, 4]
        assert made.num_restarts == 2 and len(set(refitted)) == 2
    finally:
        made.shutdown()


def test_an_engine_that_does_not_answer_at_its_socket_is_named_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes the connection and says nothing
        with pytest.raises(DeadlineExceeded, match=r"The engine generation-1 did not answer at .* in 0.2 s"):
            arrive(silent.getsockname(), b"key", who="The engine generation-1", timeout_s=0.2)
        silent.close()
    with pytest.raises(OSError, match="refused"):
        arrive(("127.0.0.1", 1), b"key", who="nobody", timeout_s=30)


def test_a_start_that_fails_ends_the_others(tmp_path):
    with pytest.raises(ConfigError, match="refuses to start"):
        launcher = LocalLauncher()
        launcher.setup(ClusterConfig(device="cpu", cpus_per_node=4))
        spec = WorkerSpec(
            role="generation",
            factory=EngineHost,
            config=HostConfig(engine=RefusingEngine, generation=GenerationConfig(model_name="none")),
            own_process=True,
            run_dir=str(tmp_path),
        )
        EngineWorkers.start(lambda index: launcher.launch(spec), num_workers=1)


class RefusingEngine(CountingEngine):
    def setup(self, config, context):
        raise ConfigError("this engine refuses to start")
