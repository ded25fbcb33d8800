"""The kit of launchers, tried on launchers that are broken in one thing each.

Clauses that leave two workers healthy run on one pair of processes, which the broken launchers pass on.
"""

from __future__ import annotations

import pickle

import pytest
from attrs import evolve

from nemo_rl_core.errors import DeadlineExceeded, WorkerDied
from nemo_rl_core.infra.workers.axes import dispatch
from nemo_rl_core.infra.workers.local import LocalConfig, LocalLauncher
from nemo_rl_core.schema import ClusterConfig
from nemo_rl_core.testing import LauncherContract, run_kit
from nemo_rl_core.testing.conformance.frame.kit import clauses


class Impatient(LauncherContract):
    hang_s = 3.0  # for launchers that wait for ever
    notice_s = 2.0  # and for those that notice nothing


class Group:
    """Passes every call on; its subclasses break one thing."""

    def __init__(self, group):
        self.group = group

    @property
    def size(self):
        return self.group.size

    @property
    def local(self):
        return self.group.local

    def call(self, method, /, *args, timeout_s=None, **kwargs):
        return self.group.call(method, *args, timeout_s=timeout_s, **kwargs)

    def call_each(self, method, arguments, /, *, timeout_s=None):
        return self.group.call_each(method, arguments, timeout_s=timeout_s)

    def call_sharded(self, method, shards, /, *, axes, over="dp", timeout_s=None):
        return self.group.call_sharded(method, shards, axes=axes, over=over, timeout_s=timeout_s)

    def iterate(self, method, /, *args, timeout_s=None):
        yield from self.group.iterate(method, *args, timeout_s=timeout_s)

    def check_alive(self):
        self.group.check_alive()

    def shutdown(self):
        self.group.shutdown()


class Kept(Group):
    """A group that goes on living."""

    def shutdown(self):
        pass


class Pool:
    """The pair of workers that clauses share."""

    launcher = None
    pair = None

    @classmethod
    def take(cls, spec):
        if cls.pair is None:
            cls.launcher = LocalLauncher(LocalConfig(failure_grace_s=1.0))
            cls.launcher.setup(ClusterConfig(device="cpu", cpus_per_node=4))
            cls.pair = cls.launcher.launch(spec)
        return Kept(cls.pair)

    @classmethod
    def close(cls):
        if cls.launcher is not None:
            cls.launcher.shutdown()
        cls.launcher = cls.pair = None


@pytest.fixture(scope="module", autouse=True)
def pool():
    yield
    Pool.close()
    for launcher in ForgetsGroups.made:
        LocalLauncher.shutdown(launcher)


def grouping(group_class):
    """A launcher of broken groups."""

    class Launcher(LocalLauncher):
        def launch(self, spec):
            return group_class(super().launch(spec))

    return Launcher


def sharing(group_class):
    """A launcher of broken groups, on the processes that clauses share."""

    class Launcher(LocalLauncher):
        def launch(self, spec):
            return group_class(Pool.take(spec))

    return Launcher


def specifying(change):
    """A launcher that takes each specification for another."""

    class Launcher(LocalLauncher):
        def launch(self, spec):
            return super().launch(change(spec))

    return Launcher


def telling(change):
    """Contexts that say something else, on the processes that clauses share: `change(contexts)`."""

    class Contexts(Group):
        def call(self, method, /, *args, **kwargs):
            found = super().call(method, *args, **kwargs)
            return change(found) if method == "get_context" else found

    return sharing(Contexts)


class WithoutConfigClass(LocalLauncher):
    config_class = None


class Bare(Group):
    """Answers of one worker are not in a list."""

    def call(self, method, /, *args, **kwargs):
        found = super().call(method, *args, **kwargs)
        return found[0] if self.size == 1 else found


class CountsWrong(Group):
    @property
    def size(self):
        return self.group.size + 1


class ListsItems(Group):
    """Yields all items at once."""

    def iterate(self, method, /, *args, timeout_s=None):
        yield list(super().iterate(method, *args, timeout_s=timeout_s))


class Backwards(Group):
    """Answers come in the order in which they were not asked for."""

    def call(self, method, /, *args, **kwargs):
        return super().call(method, *args, **kwargs)[::-1]


class OnlyTheFirst(Group):
    def call(self, method, /, *args, **kwargs):
        return super().call(method, *args, **kwargs)[:1]


class OneForAll(Group):
    def call_each(self, method, arguments, /, *, timeout_s=None):
        return super().call_each(method, [arguments[0]] * len(arguments), timeout_s=timeout_s)


class TakesFewer(Group):
    def call_each(self, method, arguments, /, *, timeout_s=None):
        padded = [*arguments, *[arguments[-1]] * (self.size - len(arguments))]
        return super().call_each(method, padded, timeout_s=timeout_s)


class FetchesAll(Group):
    """Has every rank's result sent, and drops those of the peers here."""

    def call_sharded(self, method, shards, /, *, axes, over="dp", timeout_s=None):
        found = dispatch(axes, over, num_ranks=self.size, num_shards=len(shards))
        results = self.call_each(method, [shards[i] for i in found.shards], timeout_s=timeout_s)
        return [results[rank] for rank in found.heads]


class AnswersOfPeers(Group):
    def call_sharded(self, method, shards, /, *, axes, over="dp", timeout_s=None):
        found = super().call_sharded(method, shards, axes=axes, over=over, timeout_s=timeout_s)
        return found * (self.size // len(found))


class OverTheLastAxis(Group):
    def call_sharded(self, method, shards, /, *, axes, over="dp", timeout_s=None):
        return super().call_sharded(method, shards, axes=axes, over=list(axes)[-1], timeout_s=timeout_s)


class FirstShardForAll(Group):
    def call_sharded(self, method, shards, /, *, axes, over="dp", timeout_s=None):
        return super().call_sharded(method, [shards[0]] * len(shards), axes=axes, over=over, timeout_s=timeout_s)


class ForgetsPeers(Group):
    """Takes no notice of what ranks raise whose results it does not take."""

    def call_sharded(self, method, shards, /, *, axes, over="dp", timeout_s=None):
        try:
            return super().call_sharded(method, shards, axes=axes, over=over, timeout_s=timeout_s)
        except LookupError:
            return ["fine"]


class TakesAnyNumberOfShards(Group):
    def call_sharded(self, method, shards, /, *, axes, over="dp", timeout_s=None):
        if over in axes:
            shards = (list(shards) * axes[over])[: axes[over]]
        return super().call_sharded(method, shards, axes=axes, over=over, timeout_s=timeout_s)


class BackwardsItems(Group):
    def iterate(self, method, /, *args, timeout_s=None):
        yield from reversed(list(super().iterate(method, *args, timeout_s=timeout_s)))


class LeftItems(Group):
    """An iteration that is left early gets in the way of the next call."""

    left = False

    def iterate(self, method, /, *args, timeout_s=None):
        try:
            yield from super().iterate(method, *args, timeout_s=timeout_s)
        except GeneratorExit:
            self.left = True
            raise

    def call(self, method, /, *args, **kwargs):
        found = super().call(method, *args, **kwargs)
        return [(0, 1), *found] if self.left else found


class AsLists(Group):
    def call(self, method, /, *args, **kwargs):
        return [(rank, value.tolist()) for rank, value in super().call(method, *args, **kwargs)]


class WithoutEnvironment(Group):
    def call(self, method, /, *args, **kwargs):
        found = super().call(method, *args, **kwargs)
        return [None] * len(found) if method == "variable" else found


class ByImportPath(LocalLauncher):
    """Sends classes by their import path alone."""

    def launch(self, spec):
        pickle.dumps(spec.factory)
        return super().launch(spec)


def failing(change):
    """A group whose errors are others: `change(error)`, raised in its place."""

    class Errors(Group):
        def call(self, method, /, *args, **kwargs):
            try:
                return super().call(method, *args, **kwargs)
            except Exception as error:
                raise change(error) from None

    return Errors


class NoneOnError(Group):
    """Answers None where a worker raised."""

    def call(self, method, /, *args, **kwargs):
        try:
            return super().call(method, *args, **kwargs)
        except Exception:
            return [None] * self.size


class BreaksAfterAnError(Group):
    broken = False

    def call(self, method, /, *args, **kwargs):
        if self.broken and method != "fail":
            raise WorkerDied("the group was ended after an error")
        try:
            return super().call(method, *args, **kwargs)
        except LookupError:
            self.broken = True
            raise


class HidesSetup(LocalLauncher):
    def launch(self, spec):
        try:
            return super().launch(spec)
        except LookupError:
            raise RuntimeError("rank 1 did not start") from None


class StartsTheRest(LocalLauncher):
    """Launches without the worker that refused."""

    def launch(self, spec):
        try:
            return super().launch(spec)
        except LookupError:
            return super().launch(evolve(spec, num_workers=1, config=None))


class HangsAfterDeath(Group):
    """Does not say to later calls that it is gone."""

    def call(self, method, /, *args, **kwargs):
        try:
            return super().call(method, *args, **kwargs)
        except WorkerDied as error:
            if "gone" in str(error):
                return []
            raise


class NoticesNothing(Group):
    """A dead worker is found when it is called."""

    def check_alive(self):
        pass


class IgnoresDeadlines(Group):
    def call(self, method, /, *args, timeout_s=None, **kwargs):
        return super().call(method, *args, timeout_s=None, **kwargs)


class TakesLess(LocalLauncher):
    """Starts as many as fit."""

    def launch(self, spec):
        return super().launch(evolve(spec, num_workers=min(spec.num_workers, 1)))


class LeavesProcesses(Group):
    def shutdown(self):
        pass


class KillsAtOnce(Group):
    """Ends the processes without asking the workers to shut down."""

    def shutdown(self):
        self.group.end("it was shut down")


class ShutsDownOnce(Group):
    gone = False

    def shutdown(self):
        if self.gone:
            raise RuntimeError("was shut down already")
        self.gone = True
        super().shutdown()


class ForgetsGroups(LocalLauncher):
    made = []  # noqa: RUF012

    def __init__(self, config=None):
        super().__init__(config)
        self.made.append(self)

    def shutdown(self):
        pass


class LauncherShutsDownOnce(LocalLauncher):
    gone = 0

    def shutdown(self):
        super().shutdown()
        self.gone += 1
        if self.gone == 2:
            raise RuntimeError("was shut down already")


BROKEN = {
    "declares_its_config": (WithoutConfigClass,),
    "one_worker": (grouping(Bare), grouping(CountsWrong), grouping(ListsItems)),
    "calls": (sharing(Backwards), sharing(OnlyTheFirst), sharing(CountsWrong)),
    "calls_with_their_own_arguments": (sharing(OneForAll), sharing(TakesFewer)),
    "calls_over_axes": (
        sharing(FetchesAll),
        sharing(AnswersOfPeers),
        sharing(OverTheLastAxis),
        sharing(FirstShardForAll),
        sharing(ForgetsPeers),
        sharing(TakesAnyNumberOfShards),
    ),
    "iterate": (sharing(BackwardsItems), sharing(LeftItems)),
    "tensors": (sharing(AsLists),),
    "contexts": (
        telling(lambda contexts: [evolve(c, rank=0) for c in contexts]),
        telling(lambda contexts: [evolve(c, world_size=1) for c in contexts]),
        telling(lambda contexts: [evolve(c, seed=c.seed + c.rank) for c in contexts]),
        telling(lambda contexts: [evolve(c, role="worker") for c in contexts]),
        telling(lambda contexts: [evolve(c, timeout_s=600.0) for c in contexts]),
        telling(lambda contexts: [evolve(c, master_port=c.master_port + c.rank) for c in contexts]),
        telling(lambda contexts: [evolve(c, master_port=0) for c in contexts]),
    ),
    "environment": (sharing(WithoutEnvironment), specifying(lambda spec: evolve(spec, env={}))),
    "by_value": (ByImportPath,),
    "worker_raises": (
        sharing(failing(lambda error: LookupError("rank 0 raised"))),
        sharing(failing(lambda error: LookupError("cannot find the thing"))),
        sharing(failing(lambda error: RuntimeError(str(error)))),
        sharing(failing(lambda error: LookupError(str(error).replace("rank 1", "rank 0")))),
        sharing(NoneOnError),
        sharing(BreaksAfterAnError),
    ),
    "setup_raises": (HidesSetup, StartsTheRest),
    "worker_is_killed": (grouping(HangsAfterDeath), grouping(failing(lambda error: RuntimeError(str(error))))),
    "idle_worker_is_killed": (grouping(NoticesNothing),),
    "worker_exits": (grouping(failing(lambda error: WorkerDied(str(error).partition("\n")[0].partition("last")[0]))),),
    "deadline": (
        grouping(IgnoresDeadlines),
        grouping(failing(lambda error: DeadlineExceeded("a worker did not answer in 1 s"))),
    ),
    "too_many_devices": (TakesLess,),
    "group_shutdown": (grouping(LeavesProcesses), grouping(KillsAtOnce), grouping(ShutsDownOnce)),
    "launcher_shutdown": (ForgetsGroups, LauncherShutsDownOnce),
}


def test_a_broken_launcher_is_there_for_each_clause():
    assert set(BROKEN) == set(clauses(LauncherContract))


@pytest.mark.parametrize(("clause", "broken"), [(c, b) for c, launchers in BROKEN.items() for b in launchers])
def test_a_broken_launcher_is_caught(clause, broken):
    (result,) = run_kit(Impatient, lambda: broken, only=[clause]).results
    assert result.outcome == "failed", f"{broken.__name__} passes {clause}"
    assert result.message
