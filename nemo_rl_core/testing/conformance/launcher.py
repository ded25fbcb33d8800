"""The contract of a launcher.

Each clause is a way in which a run ended without a word, or did not end: a worker that died in silence, a call that
waited for ever, processes that stayed behind.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest

from nemo_rl_core.errors import DeadlineExceeded, ResourceError, WorkerDied
from nemo_rl_core.protocols.launcher import Launcher, WorkerGroup, WorkerSpec
from nemo_rl_core.schema import ClusterConfig
from nemo_rl_core.testing.conformance.frame.launched import LaunchedWorker
from nemo_rl_core.testing.conformance.frame.set_up import SetUpContract
from nemo_rl_core.testing.conformance.frame.subject import Configured, Expecting, configured

__all__ = ["LauncherContract"]

LauncherUnderTest = type[Launcher] | Configured[Launcher]
"""Type of the fixture `launcher`."""
_PAIR = pytest.StashKey[WorkerGroup]()
_HEALTHY = WorkerSpec(
    role="critic",
    factory=LaunchedWorker,
    config=None,
    num_workers=2,
    env={"KIT_VARIABLE": "here"},
    seed=17,
    timeout_s=77.0,
)


class LauncherContract(SetUpContract):
    """What every launcher must do. Define the fixture `launcher`: the component class.

    Attributes:
        config_options: Options of the component, if the defaults do not suit the kit.
        cluster: Fields of the `ClusterConfig` it is set up with; two workers must fit.
        same_machine: Whether its processes run on this machine, so that what is left of them can be seen.
        hang_s: How long a worker hangs; the deadline of the call is 1 s.
        wait_s: Deadline of calls that do not hang.
        notice_s: Within which the death of a worker that nobody calls is noticed.
    """

    kind: ClassVar[str] = "launchers"
    subject: ClassVar[str] = "launcher"
    timeout_s: ClassVar[float] = 90.0
    cluster: ClassVar[Mapping[str, Any]] = {"device": "cpu", "cpus_per_node": 4}
    same_machine: ClassVar[bool] = True
    hang_s: ClassVar[float] = 20.0
    wait_s: ClassVar[float] = 60.0
    notice_s: ClassVar[float] = 60.0

    @pytest.fixture
    def launcher(self) -> type:
        """The component class under test."""
        pytest.fail(f"{type(self).__name__} must define a fixture `launcher` that returns the class to test.")

    @pytest.fixture
    def ready(self, launcher: LauncherUnderTest) -> Iterator[Launcher]:
        """A launcher that was set up."""
        made = self.make(launcher)
        yield made
        made.shutdown()

    @pytest.fixture
    def pair(self, launcher: LauncherUnderTest, request: pytest.FixtureRequest) -> WorkerGroup:
        """Two healthy workers, shared by those clauses of the class that leave them healthy."""
        place: pytest.Class = request.node.getparent(pytest.Class)
        if _PAIR not in place.stash:
            made = self.make(launcher)
            place.addfinalizer(made.shutdown)
            place.stash[_PAIR] = made.launch(_HEALTHY)
        group: WorkerGroup = place.stash[_PAIR]
        return group

    def make(self, launcher: LauncherUnderTest) -> Launcher:
        """Make a launcher and set it up with the cluster of the kit."""
        case = configured(launcher, self.config_options)
        create: Callable[..., Launcher] = case.loaded
        made = create(case.options)
        made.setup(ClusterConfig(launcher=case.component, options=case.options, **self.cluster))
        return made

    # -- calls ---------------------------------------------------------------------------------

    def test_declares_its_config(self, launcher: LauncherUnderTest) -> None:
        """It names an attrs class of its options."""
        found = getattr(configured(launcher, self.config_options).loaded, "config_class", None)
        assert isinstance(found, type) and attrs.has(found), f"config_class is {found!r}, not an attrs class"

    def test_one_worker(self, ready: Launcher) -> None:
        """A group of one worker takes calls as a group of many does: lists of one answer, and items one at a time."""
        group = ready.launch(attrs.evolve(_HEALTHY, num_workers=1, env={}))
        assert group.size == 1, f"its size is {group.size}"
        found = group.call("combine", 4, plus=3, timeout_s=self.wait_s)
        assert found == [(0, 7)], f"call returned {found!r}, not [(0, 7)]"
        each = group.call_each("combine", [(5,)], timeout_s=self.wait_s)
        assert each == [(0, 5)], f"call_each returned {each!r}, not [(0, 5)]"
        shard = group.call_sharded("combine", [(6,)], axes={"dp": 1}, timeout_s=self.wait_s)
        assert shard == [(0, 6)], f"call_sharded returned {shard!r}, not [(0, 6)]"
        items = list(group.iterate("count", 3, timeout_s=self.wait_s))
        assert items == [(0, 0), (0, 1), (0, 2)], f"iterate gave {items!r}"
        worker = group.local
        assert worker is None or isinstance(worker, LaunchedWorker), f"`local` is {worker!r}, not the worker"

    def test_calls(self, pair: WorkerGroup) -> None:
        """`call` reaches every worker with the same arguments and answers in rank order."""
        assert pair.size == 2, f"the size of a group of two is {pair.size}"
        found = pair.call("combine", "a", plus="b", timeout_s=self.wait_s)
        assert found == [(0, "ab"), (1, "ab")], f"call returned {found!r}"

    def test_calls_with_their_own_arguments(self, pair: WorkerGroup) -> None:
        """`call_each` gives worker r the arguments r, and wants arguments for every worker."""
        found = pair.call_each("combine", [(1,), (2,)], timeout_s=self.wait_s)
        assert found == [(0, 1), (1, 2)], f"call_each returned {found!r}"
        with Expecting(ValueError, "call_each with arguments for one of two workers"):
            pair.call_each("combine", [(1,)], timeout_s=self.wait_s)

    def test_calls_over_axes(self, pair: WorkerGroup) -> None:
        """`call_sharded` shards over the axes it is told and replicates over the others; one result for each shard.

        What the peers return is not sent; what they raise is. Shards that do not fit the axes are a ValueError.
        """
        axes = {"dp": 1, "tp": 2}
        call = partial(pair.call_sharded, timeout_s=self.wait_s)
        found = call("combine", [(5,)], axes=axes)
        assert found == [(0, 5)], f"one shard over dp of {axes} returned {found!r}, not [(0, 5)]"
        found = call("combine", [(1,), (2,)], axes=axes, over="tp")
        assert found == [(0, 1), (1, 2)], f"two shards over tp of {axes} returned {found!r}"
        found = call("only_first", [("mine",)], axes=axes)
        assert found == ["mine"], f"what rank 0 returned came as {found!r}"
        error = self.error_of(lambda: call("fail", [(1,)], axes=axes), "what a rank raised whose result is not taken")
        self.names(error, 1)
        for what, wrong in (
            ("one shard for the two places of tp", partial(call, "combine", [(1,)], axes=axes, over="tp")),
            ("two shards for the one place of dp", partial(call, "combine", [(1,), (2,)], axes=axes)),
            ("an axis that is not there", partial(call, "combine", [(1,)], axes=axes, over="pp")),
            ("axes of four ranks", partial(call, "combine", [(1,), (2,)], axes={"dp": 2, "tp": 2})),
        ):
            with Expecting(ValueError, what):
                wrong()

    def test_iterate(self, pair: WorkerGroup) -> None:
        """`iterate` yields what rank 0 yields, in order; left early, the group takes the next call."""
        found = list(pair.iterate("count", 4, timeout_s=self.wait_s))
        assert found == [(0, i) for i in range(4)], f"iterate gave {found!r}"
        stream = pair.iterate("count", 100, timeout_s=self.wait_s)
        assert next(stream) == (0, 0), "the first item is another"
        stream.close()
        after = pair.call("combine", 1, timeout_s=self.wait_s)
        assert after == [(0, 1), (1, 1)], f"after an iteration that was left early, call returned {after!r}"

    def test_tensors(self, pair: WorkerGroup) -> None:
        """Tensors go there and back whole."""
        import torch

        sent = torch.arange(6.0).reshape(2, 3)
        for rank, found in pair.call("combine", sent, plus=1, timeout_s=self.wait_s):
            same = isinstance(found, torch.Tensor) and torch.equal(found, sent + 1)
            assert same, f"rank {rank} got {sent.tolist()} to add 1 and returned {found!r}"

    # -- what a worker knows -------------------------------------------------------------------

    def test_contexts(self, pair: WorkerGroup) -> None:
        """Each worker knows its role, rank, world size, seed and deadline, and all of them one rendezvous."""
        contexts = pair.call("get_context", timeout_s=self.wait_s)
        for rank, context in enumerate(contexts):
            wanted = {"role": "critic", "rank": rank, "world_size": 2, "seed": 17, "timeout_s": 77.0}
            found = {name: getattr(context, name) for name in wanted}
            assert found == wanted, f"rank {rank} knows {found}, not {wanted}"
        places = {(c.master_addr, c.master_port) for c in contexts}
        assert len(places) == 1, f"the workers have different rendezvous: {sorted(places)}"
        assert next(iter(places))[1] > 0, "there is no rendezvous port"

    def test_environment(self, pair: WorkerGroup) -> None:
        """Environment variables of the group are set in every worker."""
        found = pair.call("variable", "KIT_VARIABLE", timeout_s=self.wait_s)
        assert found == ["here", "here"], f"KIT_VARIABLE, set to 'here', is {found} in the workers"

    def test_by_value(self, ready: Launcher) -> None:
        """A worker class that was defined in a script reaches the workers."""

        def answer(self: LaunchedWorker) -> str:
            return f"rank {self.context.rank} of a script"

        members = {"answer": answer, "__module__": "__main__"}
        script_class = type("ScriptWorker", (LaunchedWorker,), members)
        found = ready.launch(attrs.evolve(_HEALTHY, factory=script_class)).call("answer", timeout_s=self.wait_s)
        assert found == ["rank 0 of a script", "rank 1 of a script"], f"it answered {found!r}"

    # -- what goes wrong -----------------------------------------------------------------------

    def test_worker_raises(self, pair: WorkerGroup) -> None:
        """What a worker raises reaches the caller with its words and its rank, and the group goes on."""
        for rank in (0, 1):
            fail = partial(pair.call, "fail", rank, timeout_s=self.wait_s)
            error = self.error_of(fail, "a call that raised")
            assert "cannot find the thing" in str(error), f"the worker's own words are lost: {error}"
            self.names(error, rank)
            assert isinstance(error, LookupError), f"the LookupError of the worker became a {type(error).__name__}"
        found = pair.call("combine", 1, timeout_s=self.wait_s)
        assert found == [(0, 1), (1, 1)], f"after an error the group returned {found!r}"

    def test_setup_raises(self, ready: Launcher) -> None:
        """What a worker's `setup` raises ends the launch, with its words and its rank."""
        error = self.error_of(lambda: ready.launch(attrs.evolve(_HEALTHY, config="refuse")), "a set-up that raised")
        assert "no such thing as this configuration" in str(error), f"the worker's own words are lost: {error}"
        self.names(error, 1)

    def test_worker_is_killed(self, ready: Launcher) -> None:
        """A worker that is killed is a WorkerDied that names rank and signal; later calls say so too."""
        group = ready.launch(_HEALTHY)
        error = self.error_of(lambda: group.call("leave", 1, -9, timeout_s=self.wait_s), "a worker that was killed")
        assert isinstance(error, WorkerDied), f"it raised {type(error).__name__}, not WorkerDied: {error}"
        self.names(error, 1)
        assert "9" in str(error) or "SIGKILL" in str(error), f"the signal is not in the message: {error}"
        later = self.error_of(lambda: group.call("pid", timeout_s=self.wait_s), "a call to a dead group")
        assert isinstance(later, WorkerDied), f"a later call raised {type(later).__name__}, not WorkerDied: {later}"

    def test_idle_worker_is_killed(self, ready: Launcher) -> None:
        """`check_alive` is silent while all live; of one that is killed between two calls it is a WorkerDied."""
        group = ready.launch(_HEALTHY)
        group.check_alive()
        group.call("leave_soon", 1, -9, timeout_s=self.wait_s)
        error = self.error_of(lambda: self.checked(group), "a worker that was killed between two calls")
        assert isinstance(error, WorkerDied), f"it raised {type(error).__name__}, not WorkerDied: {error}"
        self.names(error, 1)
        assert "9" in str(error) or "SIGKILL" in str(error), f"the signal is not in the message: {error}"

    def test_worker_exits(self, ready: Launcher) -> None:
        """A worker that ends is a WorkerDied with rank, exit status and the end of its standard error."""
        group = ready.launch(_HEALTHY)
        error = self.error_of(lambda: group.call("leave", 0, 3, timeout_s=self.wait_s), "a worker that ended")
        assert isinstance(error, WorkerDied), f"it raised {type(error).__name__}, not WorkerDied: {error}"
        self.names(error, 0)
        assert "3" in str(error), f"the exit status 3 is not in the message: {error}"
        assert "these are my last words" in str(error), f"the end of its standard error is not in the message: {error}"

    def test_deadline(self, ready: Launcher) -> None:
        """A call that hangs is a DeadlineExceeded at its deadline that names the ranks that did not answer."""
        group = ready.launch(_HEALTHY)
        error = self.error_of(lambda: group.call("hang", 1, self.hang_s, timeout_s=1.0), "a call that hangs")
        assert isinstance(error, DeadlineExceeded), f"it raised {type(error).__name__}, not DeadlineExceeded: {error}"
        self.names(error, 1)

    def test_too_many_devices(self, ready: Launcher) -> None:
        """More workers than the machines have room for are a ResourceError."""
        with Expecting(ResourceError, "a group of 100,000 workers"):
            ready.launch(attrs.evolve(_HEALTHY, num_workers=100_000))

    # -- its end -------------------------------------------------------------------------------

    def test_group_shutdown(self, ready: Launcher, tmp_path: Path) -> None:
        """Shut down twice, a group has called `shutdown` on every worker and left no process."""
        group = ready.launch(attrs.evolve(_HEALTHY, config=str(tmp_path)))
        pids = group.call("pid", timeout_s=self.wait_s)
        group.shutdown()
        group.shutdown()
        called = sorted(path.name for path in tmp_path.iterdir())
        assert called == ["rank0", "rank1"], f"`shutdown` was called on {called}, not on both workers"
        self.are_gone(pids)

    def test_launcher_shutdown(self, launcher: LauncherUnderTest) -> None:
        """Shut down twice, the launcher has ended the groups that still ran."""
        made = self.make(launcher)
        pids = made.launch(_HEALTHY).call("pid", timeout_s=self.wait_s)
        made.shutdown()
        made.shutdown()
        self.are_gone(pids)

    # -- looking -------------------------------------------------------------------------------

    def error_of(self, work: Callable[[], object], what: str) -> Exception:
        """Return the exception that `work` raises."""
        try:
            found = work()
        except Exception as error:  # looked at by the clause
            return error
        pytest.fail(f"{what} was not noticed: it returned {found!r}")

    def checked(self, group: WorkerGroup) -> None:
        """Call `check_alive` again and again, as a run does, until it raises or `notice_s` is over."""
        deadline = time.monotonic() + self.notice_s
        while time.monotonic() < deadline:
            group.check_alive()
            time.sleep(0.1)

    def names(self, error: Exception, rank: int) -> None:
        """Fail unless the error blames this rank."""
        named = re.search(r"\brank(?:s|\(s\))?\W*(\d+)", str(error), re.IGNORECASE)
        assert named, f"the message names no rank: {error}"
        assert int(named[1]) == rank, f"the message blames rank {named[1]}, not rank {rank}: {error}"

    def are_gone(self, pids: list[int]) -> None:
        """Fail unless all of the processes end within 10 seconds."""
        if not self.same_machine:
            return
        deadline = time.monotonic() + 10.0
        left = [pid for pid in pids if pid != os.getpid()]
        while left := [pid for pid in left if _runs(pid)]:
            assert time.monotonic() < deadline, f"process(es) {left} still run after shutdown"
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # a process that has ended and was not waited for is gone as well
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not Path("/proc").is_dir()
