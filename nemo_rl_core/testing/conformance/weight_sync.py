"""The contract of a weight sync.

Each clause is a way in which an engine sampled from other weights than those that were trained, or in which a refit
that did not happen was not noticed. Trainer and engine are small objects of this file; a sync that needs others
(another process, a device) overrides `make_trainer` and `make_engine`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast

import attrs
import pytest
import torch
from torch import Tensor

from nemo_rl_core.errors import DeadlineExceeded, GenerationError, InvariantViolation
from nemo_rl_core.infra.weights.fingerprint import fingerprint
from nemo_rl_core.infra.workers.local import InProcessGroup
from nemo_rl_core.protocols.generation_backend import GenerationBackend
from nemo_rl_core.protocols.launcher import WorkerGroup
from nemo_rl_core.protocols.weight_sync import SyncReport, WeightSync
from nemo_rl_core.testing.conformance.frame.kit import Contract
from nemo_rl_core.testing.conformance.frame.subject import Expecting

__all__ = ["SyncedEngine", "SyncedTrainer", "WeightSyncContract"]

_Result = TypeVar("_Result")


class SyncedTrainer:
    """The worker that a sync reads from; it exports three tensors.

    Attributes:
        weights: The live tensors by name.
        before_item: Called before each tensor is exported; where a test lets it hang or fail.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        shapes = {"embed": (31, 8), "norm": (8,), "layer.weight": (16, 8)}
        self.weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        self.before_item: Callable[[str], None] = lambda name: None

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each live tensor and the tensor, [...] of its own shape."""
        for name, tensor in self.weights.items():
            self.before_item(name)
            yield name, tensor

    def apply(self, function: Callable[..., _Result], /, *args: object) -> _Result:
        """Return `function(self, *args)`, as a training backend does."""
        return function(self, *args)

    def train(self) -> None:
        """Change every weight in place, as an optimizer step does."""
        for tensor in self.weights.values():
            tensor.mul_(0.9).add_(0.1)

    def shutdown(self) -> None:
        """Do nothing: nothing is held."""


class SyncedEngine:
    """The engine that a sync writes to; it keeps weights and answers with a number computed from them.

    Attributes:
        dtype: Of its weights, as an engine of another precision has it.
        fault: How it loads: "none", "loses" the last tensor, is "stale" (loads nothing) or "refuses".
        before_load: Called before it takes the first tensor.
    """

    dtype: torch.dtype = torch.float32

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.fault = "none"
        self.before_load: Callable[[], None] = lambda: None
        self.weights: dict[str, Tensor] = {"embed": torch.zeros(31, 8, dtype=dtype)}
        self.version = -1
        self.num_bytes_copied = 0

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]], *, share: bool = False) -> None:
        """Alias the tensors, each [...] of its own shape, with `share`; else copy them."""
        self.before_load()
        if self.fault == "refuses":
            raise GenerationError("no weight of that name")
        loaded = {}
        for name, tensor in tensors:
            kept = tensor if share and tensor.dtype == self.dtype else tensor.to(self.dtype, copy=True)
            if kept is not tensor:
                self.num_bytes_copied += kept.numel() * kept.element_size()
            loaded[name] = kept
        if self.fault == "loses":
            loaded[name] = torch.zeros_like(loaded[name])
        if self.fault != "stale":
            self.weights = loaded
        self.version = version

    def fingerprint(self) -> str:
        """Return the fingerprint of the weights that it would sample from."""
        return fingerprint(self.weights.items())

    def answer(self) -> float:
        """Return a number that depends on every weight."""
        return float(sum(tensor.double().sum() for tensor in self.weights.values()))

    def shutdown(self) -> None:
        """Do nothing: nothing is held."""


class _Elsewhere:
    """A worker group in other processes, as far as a sync can see: nothing of it can be aliased."""

    size = 1
    local = None

    def __init__(self, trainer: SyncedTrainer) -> None:
        self._trainer = trainer

    def call(self, method: str, /, *args: object, timeout_s: float | None = None, **kwargs: object) -> list[Any]:
        """Return `[worker.method(*args, **kwargs)]`."""
        return [getattr(self._trainer, method)(*args, **kwargs)]

    def call_each(
        self, method: str, arguments: Sequence[tuple[Any, ...]], /, *, timeout_s: float | None = None
    ) -> list[Any]:
        """Return `[worker.method(*arguments[0])]`."""
        (only,) = arguments
        return [getattr(self._trainer, method)(*only)]

    def iterate(self, method: str, /, *args: object, timeout_s: float | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield what the worker's generator yields: names, and copies of its tensors [...]."""
        for name, tensor in getattr(self._trainer, method)(*args):
            yield name, tensor.clone()

    def shutdown(self) -> None:
        """Do nothing: nothing is held."""


class WeightSyncContract(Contract):
    """What every weight sync must do. Define the fixture `weight_sync`: the component, made with its config.

    Attributes:
        wait_s: What a sync with a short deadline may take at most.
    """

    kind: ClassVar[str] = "weight_syncs"
    subject: ClassVar[str] = "weight_sync"
    wait_s: ClassVar[float] = 10.0

    @pytest.fixture
    def weight_sync(self) -> WeightSync:
        """The weight sync under test."""
        pytest.fail(f"{type(self).__name__} must define a fixture `weight_sync` that returns the sync to test.")

    def make_trainer(self) -> tuple[SyncedTrainer, WorkerGroup]:
        """Make the trainer and the worker group that it belongs to."""
        trainer = SyncedTrainer()
        return trainer, InProcessGroup(trainer)

    def make_engine(self, dtype: torch.dtype = torch.float32) -> SyncedEngine:
        """Make the engine, with weights of this precision."""
        return SyncedEngine(dtype)

    # -- clauses -------------------------------------------------------------------------------

    def test_declares_its_config(self, weight_sync: WeightSync) -> None:
        """It names an attrs class of its options."""
        found = getattr(weight_sync, "config_class", None)
        assert isinstance(found, type) and attrs.has(found), f"config_class is {found!r}, not an attrs class"

    def test_weights_arrive(self, weight_sync: WeightSync) -> None:
        """After a sync the engine has the trainer's weights, all of them, bit for bit, and answers accordingly."""
        (trainer, group), engine = self.make_trainer(), self.make_engine()
        for version in (1, 2):
            before = engine.answer()
            self.sync(weight_sync, group, engine, version=version)
            _same_weights(engine.weights, trainer.weights)
            assert engine.answer() != before, "the engine's answers did not change"
            trainer.train()

    def test_report(self, weight_sync: WeightSync) -> None:
        """It reports version, number of tensors, seconds, and the fingerprint that both sides have."""
        (trainer, group), engine = self.make_trainer(), self.make_engine()
        report = self.sync(weight_sync, group, engine, version=5)
        assert isinstance(report, SyncReport), f"it returned {type(report).__name__}, not a SyncReport"
        assert report.version == 5, f"the reported version is {report.version}, not 5"
        count = len(trainer.weights)
        assert report.num_tensors == count, f"it reports {report.num_tensors} tensors; the trainer has {count}"
        assert 0 <= report.seconds < 60, f"it reports {report.seconds} seconds"
        assert report.fingerprint == fingerprint(trainer.weights.items()), "the fingerprint is not the trainer's"
        assert report.fingerprint == engine.fingerprint(), "the fingerprint is not the engine's"

    def test_version(self, weight_sync: WeightSync) -> None:
        """The engine is told the version it is given."""
        (_, group), engine = self.make_trainer(), self.make_engine()
        for version in (3, 7):
            self.sync(weight_sync, group, engine, version=version)
            assert engine.version == version, f"the engine stamps version {engine.version}, not {version}"

    @pytest.mark.parametrize("fault", ["loses", "stale"])
    def test_stale_engine(self, weight_sync: WeightSync, fault: str) -> None:
        """An engine that did not take all of the weights is an InvariantViolation."""
        (_, group), engine = self.make_trainer(), self.make_engine()
        engine.fault = fault
        words = {"loses": "lost a tensor", "stale": "kept its old weights"}[fault]
        with Expecting(InvariantViolation, f"an engine that {words}"):
            self.sync(weight_sync, group, engine, version=1)

    def test_share(self, weight_sync: WeightSync) -> None:
        """With `share` an engine of this process aliases the trainer's tensors; without, it has copies."""
        (trainer, group), sharing, copying = self.make_trainer(), self.make_engine(), self.make_engine()
        self.sync(weight_sync, group, sharing, share=True)
        self.sync(weight_sync, group, copying, share=False)
        before = {name: tensor.clone() for name, tensor in trainer.weights.items()}
        trainer.train()
        _same_weights(copying.weights, before, "a copy followed the trainer: ")
        if sharing.num_bytes_copied == 0:
            _same_weights(sharing.weights, trainer.weights, "an alias did not follow the trainer: ")

    def test_nothing_to_share(self, weight_sync: WeightSync) -> None:
        """A trainer in another process is never aliased, also if `share` is asked for."""
        trainer, engine = SyncedTrainer(), self.make_engine()
        asked: list[bool] = []
        update = engine.update_weights

        def watch(version: int, tensors: Iterable[tuple[str, Tensor]], *, share: bool = False) -> None:
            """Note `share` and pass on the tensors, each [...] of its own shape."""
            asked.append(share)
            update(version, tensors, share=share)

        engine.update_weights = watch  # type: ignore[method-assign]
        report = self.sync(weight_sync, _Elsewhere(trainer), engine, share=True)
        assert asked == [False], "the engine was told that it may alias tensors of another process"
        _same_weights(engine.weights, trainer.weights)
        assert report.num_bytes > 0, "it reports that nothing was copied from another process"

    @pytest.mark.parametrize("share", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_num_bytes(self, weight_sync: WeightSync, share: bool, dtype: torch.dtype) -> None:
        """`num_bytes` is what was copied: all of it, or 0 where the engine aliases; cast to the engine's type."""
        (trainer, group), engine = self.make_trainer(), self.make_engine(dtype)
        report = self.sync(weight_sync, group, engine, share=share)
        size = sum(tensor.numel() for tensor in trainer.weights.values()) * dtype.itemsize
        aliased = share and dtype == torch.float32 and engine.num_bytes_copied == 0
        wanted = 0 if aliased else size
        assert report.num_bytes == wanted, f"it reports {report.num_bytes} bytes; {wanted} were copied"
        _same_weights(engine.weights, {name: tensor.to(dtype) for name, tensor in trainer.weights.items()})

    def test_trainer_is_left_alone(self, weight_sync: WeightSync) -> None:
        """A sync changes none of the trainer's weights."""
        trainer, group = self.make_trainer()
        before = fingerprint(trainer.weights.items())
        for dtype in (torch.float32, torch.bfloat16):
            self.sync(weight_sync, group, self.make_engine(dtype))
        assert fingerprint(trainer.weights.items()) == before, "the trainer's weights changed"

    @pytest.mark.parametrize("side", ["trainer", "engine"])
    def test_deadline(self, weight_sync: WeightSync, side: str) -> None:
        """A side that hangs is a DeadlineExceeded at the deadline, and the message names that side."""
        (trainer, group), engine = self.make_trainer(), self.make_engine()
        released = threading.Event()

        def hang(*_: object) -> None:
            released.wait(60.0)

        if side == "trainer":
            trainer.before_item = hang
        else:
            engine.before_load = hang
        try:
            error = self.error_within(lambda: self.sync(weight_sync, group, engine, timeout_s=0.2))
        finally:
            released.set()
        assert error is not None, f"a {side} that hangs was not noticed {self.wait_s:g} s after a deadline of 0.2 s"
        assert isinstance(error, DeadlineExceeded), f"it raised {type(error).__name__}, not DeadlineExceeded: {error}"
        other = {"trainer": "engine", "engine": "trainer"}[side]
        words = str(error).lower()
        named = side in words and (other not in words or words.index(side) < words.index(other))
        assert named, f"the message does not say that the {side} was waited for: {error}"

    @pytest.mark.parametrize("side", ["trainer", "engine"])
    def test_errors(self, weight_sync: WeightSync, side: str) -> None:
        """What the trainer or the engine raises reaches the caller, as it is."""
        (trainer, group), engine = self.make_trainer(), self.make_engine()

        def fail(name: str) -> None:
            if name == "norm":
                raise ZeroDivisionError("cannot export norm")

        if side == "trainer":
            trainer.before_item = fail
        else:
            engine.fault = "refuses"
        expected: type[Exception] = ZeroDivisionError if side == "trainer" else GenerationError
        with Expecting(expected, f"an error of the {side}"):
            self.sync(weight_sync, group, engine)

    # -- running -------------------------------------------------------------------------------

    def sync(
        self,
        weight_sync: WeightSync,
        group: WorkerGroup | _Elsewhere,
        engine: SyncedEngine,
        *,
        version: int = 1,
        share: bool = False,
        timeout_s: float = 30.0,
    ) -> SyncReport:
        """Run one refit and return its report."""
        workers, backend = cast("WorkerGroup", group), cast("GenerationBackend", engine)  # as far as a sync uses them
        return weight_sync.sync(workers, backend, version=version, share=share, timeout_s=timeout_s)

    def error_within(self, work: Callable[[], object]) -> BaseException | None:
        """Run `work` in a thread and return what it raises; None if it has not ended after `wait_s`."""
        raised: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as error:  # handed to the clause
                raised.append(error)
            else:
                raised.append(AssertionError("it ended without an error"))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self.wait_s)
        return raised[0] if raised else None


def _same_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str = "") -> None:
    """Fail unless two sets of weights, tensors [...] by name, are the same bit for bit."""
    assert found.keys() == expected.keys(), f"{what}other tensors: {sorted(found.keys() ^ expected.keys())}"
    for name, tensor in expected.items():
        same = found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert same, f"{what}{name} is not the trainer's, bit for bit"
