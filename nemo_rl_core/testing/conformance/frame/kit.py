"""Conformance kits: the base class of their contracts, and functions that run them.

A contract is a class with one test method for each clause; the first line of the method's docstring is the
clause, in words. A plugin author sub-classes it and says with one fixture what is to be tested:

    class TestMyLoss(LossContract):
        @pytest.fixture
        def loss(self):
            return MyLoss(MyLossConfig())

`run_kit` runs the same clauses without a test file; `nemo-rl plugins check` prints what it returns.
"""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pytest
from attrs import frozen

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.machine.starting import environment
from nemo_rl_core.testing.conformance.frame.declared import example_of, overlaid, take_declarations
from nemo_rl_core.testing.conformance.frame.given_subject import maker_of
from nemo_rl_core.testing.conformance.frame.subject import structured

if TYPE_CHECKING:
    from nemo_rl_core.registry import ComponentRef

__all__ = [
    "ClauseResult",
    "Contract",
    "KitReport",
    "check_component",
    "clauses",
    "contract_for",
    "contracts",
    "run_kit",
]

CLAUSE_TIMEOUT_S = 60.0
"""Deadline of one clause, unless the contract says otherwise."""

_CONTRACTS = {
    "advantages": "advantage:AdvantageContract",
    "algorithms": "algorithm:AlgorithmContract",
    "callbacks": "callback:CallbackContract",
    "datasets": "dataset:DatasetContract",
    "environments": "environment:EnvironmentContract",
    "exporters": "exporter:ExporterContract",
    "generation_backends": "generation_backend:GenerationBackendContract",
    "launchers": "launcher:LauncherContract",
    "loggers": "logger:LoggerContract",
    "losses": "loss:LossContract",
    "rewards": "reward:RewardContract",
    "sandboxes": "sandbox:SandboxContract",
    "training_backends": "training_backend:TrainingBackendContract",
    "weight_syncs": "weight_sync:WeightSyncContract",
}
"""The contract of each kind: module in this package and class."""

_UNNEEDED = ("cacheprovider", "terminal", "unraisableexception", "threadexception")
"""Plugins of pytest that a kit does without; the last two collect garbage five times, which takes long with torch."""

Outcome = Literal["passed", "failed", "skipped"]


class Contract:
    """Base of every contract.

    What a subclass declares by its attributes and methods, the component may declare itself in an attribute
    `conformance`, a mapping of their names: `{"differentiable": False, "add_fields": add_labels}`. `nemo-rl plugins
    check` knows only this. If both declare something, the subclass takes precedence.

    Attributes:
        kind: Kind of component that the contract is for, such as "losses".
        subject: Name of the fixture that a sub-class defines.
        timeout_s: Deadline of one clause in seconds; one that hangs fails with its own name.
    """

    kind: ClassVar[str]
    subject: ClassVar[str]
    timeout_s: ClassVar[float] = CLAUSE_TIMEOUT_S

    @classmethod
    def from_component(cls, ref: ComponentRef, options: Mapping[str, Any], example: Mapping[str, Any]) -> object:
        """Return what the fixture would return for an installed component with these options.

        The component is called with its structured options. Contracts whose subject is something else
        (a factory, a component that is made without arguments) override this.

        Args:
            ref: The component.
            options: As given on the command line.
            example: What the component says it can be checked with; here options, over which those given go.
        """
        return ref.load()(structured(cls.kind, ref, overlaid(example, options)))

    @classmethod
    def mistake_in(cls, subject: object) -> str | None:
        """Say in words what is wrong with the value of the fixture; None if it can be tested.

        A class is a mistake where the subject is the component made with its options (see `from_component`).
        """
        if subject is None:
            return "it returns None: is a `return` missing?"
        if isinstance(subject, type) and cls._makes_the_component():
            return f"it returns the class {subject.__name__}: return an object, such as {subject.__name__}(...)"
        return None

    @classmethod
    def declared_by(cls, subject: object) -> object:
        """Return the object whose attribute `conformance` applies: the subject, or the component in its case."""
        return subject

    @classmethod
    def _makes_the_component(cls) -> bool:
        return getattr(cls.from_component, "__func__", None) is vars(Contract)["from_component"].__func__

    @pytest.fixture(autouse=True)
    def _clause_deadline(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Fail a clause that hangs, with its name in the message."""
        with _deadline(self.timeout_s, f"clause {request.node.name}"):
            yield

    @pytest.fixture(autouse=True)
    def _sound_subject(self, request: pytest.FixtureRequest, _clause_deadline: None) -> None:
        """Report common mistakes in the fixture in words, before they break a clause."""
        name, kind = type(self).__name__, type(self).__mro__[1].__name__
        try:
            subject = request.getfixturevalue(self.subject)
        except pytest.FixtureLookupError as error:
            if error.argname != self.subject:
                raise
            pytest.fail(
                f"{name} is a {kind}, which tests what the fixture `{self.subject}` returns, and there is none. Write "
                f"in the class: @pytest.fixture def {self.subject}(self): return ...",
                pytrace=False,
            )
        mistake = self.mistake_in(subject)
        if mistake is not None:
            pytest.fail(f"The fixture `{self.subject}` of {name} cannot be tested: {mistake}.", pytrace=False)
        mistake = take_declarations(self, self.declared_by(subject))
        if mistake is not None:
            pytest.fail(f"{mistake}.", pytrace=False)


@frozen(kw_only=True)
class ClauseResult:
    """The outcome of one clause."""

    clause: str
    """Name of the test without `test_`."""
    sentence: str
    """The clause in words."""
    outcome: Outcome
    message: str = ""
    """What was wrong, or why it was skipped; empty if it passed."""
    seconds: float = 0.0


@frozen(kw_only=True)
class KitReport:
    """The outcome of every clause, in the order of the contract."""

    contract: str
    results: tuple[ClauseResult, ...]

    @property
    def passed(self) -> bool:
        """Whether no clause failed and at least one was tested."""
        outcomes = {result.outcome for result in self.results}
        return "passed" in outcomes and "failed" not in outcomes

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the clauses that failed."""
        return tuple(result.clause for result in self.results if result.outcome == "failed")


def contracts() -> tuple[str, ...]:
    """Return the kinds of component that have a contract."""
    return tuple(_CONTRACTS)


def contract_for(kind: str) -> type[Contract]:
    """Return the contract of a kind, such as "losses".

    Raises:
        NemoRLError: The kind has none.
    """
    if kind not in _CONTRACTS:
        raise NemoRLError(f"There is no conformance kit for {kind!r}. There is one for: {', '.join(_CONTRACTS)}.")
    module, _, name = _CONTRACTS[kind].partition(":")
    found: type[Contract] = getattr(importlib.import_module(f"nemo_rl_core.testing.conformance.{module}"), name)
    return found


def clauses(contract: type[Contract]) -> dict[str, str]:
    """Return the sentence of each clause by name, in the order in which the contract defines them."""
    found: dict[str, str] = {}
    for base in reversed(contract.__mro__):
        for name, value in vars(base).items():
            if name.startswith("test_") and inspect.isfunction(value):
                found[name.removeprefix("test_")] = (inspect.getdoc(value) or name).partition("\n")[0]
    return found


def run_kit(
    contract: type[Contract],
    subject: object,
    *,
    only: Sequence[str] = (),
    timeout_s: float | None = None,
) -> KitReport:
    """Run the clauses of a contract in this process.

    Args:
        contract: Or a sub-class of one, with its class attributes set.
        subject: A callable without arguments that makes what is tested, anew for each clause. Or what is tested: a
            class, made by its `example` or its defaults, an object, or a case such as an `EnvironmentCase`.
        only: Names of clauses; empty runs all.
        timeout_s: Deadline of each clause.

    Returns:
        The report. Settings and plugins of a surrounding pytest run have no influence on it.

    Raises:
        NemoRLError: A name in `only` is no clause, or there is nothing of the contract's kind in what is given.
    """
    if not (isinstance(contract, type) and issubclass(contract, Contract)):
        raise NemoRLError(f"run_kit wants a contract first, such as LossContract. It got {contract!r:.80}.")
    known = clauses(contract)
    unknown = [name for name in only if name not in known]
    if unknown:
        raise NemoRLError(f"{contract.__name__} has no clause {', '.join(unknown)}. It has: {', '.join(known)}.")
    with tempfile.TemporaryDirectory() as folder:
        return _run(contract, maker_of(contract, subject, Path(folder)), known, only, timeout_s)


def _run(
    contract: type[Contract],
    make: Callable[[], object],
    known: Mapping[str, str],
    only: Sequence[str],
    timeout_s: float | None,
) -> KitReport:
    """Run the known clauses, or only some of them, in a separate pytest session."""
    collector = _Collector(_tested_class(contract, make, timeout_s), only)
    with tempfile.TemporaryDirectory() as folder, _no_other_plugins():
        name = f"test_kit_{uuid.uuid4().hex}"  # pytest keeps modules by name: a second kit must not find the first
        module = Path(folder) / f"{name}.py"
        module.write_text("")
        (Path(folder) / "pytest.ini").write_text("[pytest]\n")
        arguments = ["-c", f"{folder}/pytest.ini", "--rootdir", folder]
        for unneeded in _UNNEEDED:
            arguments += ["-p", f"no:{unneeded}"]
        status = pytest.main([*arguments, "--import-mode=importlib", "--capture=sys", str(module)], plugins=[collector])
        sys.modules.pop(name, None)
    if collector.interrupted:
        raise KeyboardInterrupt
    if status == pytest.ExitCode.USAGE_ERROR:
        raise NemoRLError(f"pytest {pytest.__version__} cannot run the kit {contract.__name__}; see its message above.")
    asked = [name for name in known if not only or name in only]
    return KitReport(contract=contract.__name__, results=tuple(collector.result(name, status) for name in asked))


def check_component(
    ref: ComponentRef,
    options: Mapping[str, Any] | None = None,
    *,
    only: Sequence[str] = (),
    timeout_s: float | None = None,
) -> KitReport:
    """Run the kit of an installed component's kind, as `nemo-rl plugins check` does.

    Args:
        ref: The component; it is imported.
        options: Its settings, nested; they go over those of its attribute `example`.
        only: See `run_kit`.
        timeout_s: See `run_kit`.

    Raises:
        NemoRLError: The kind has no kit, the component cannot be made, or a name in `only` is no clause.
    """
    contract = contract_for(ref.kind)
    with tempfile.TemporaryDirectory() as folder:
        example = example_of(ref.load(), Path(folder))
        contract.from_component(ref, options or {}, example)  # wrong options are one error, not one for each clause
        return run_kit(
            contract, lambda: contract.from_component(ref, options or {}, example), only=only, timeout_s=timeout_s
        )


def _tested_class(contract: type[Contract], make: Callable[[], object], timeout_s: float | None) -> type[Contract]:
    def subject(self: object) -> object:
        return make()

    members: dict[str, object] = {contract.subject: pytest.fixture(name=contract.subject)(subject)}
    if timeout_s is not None:
        members["timeout_s"] = timeout_s
    return type(f"Test{contract.__name__}", (contract,), members)


class _Collector:
    """A pytest plugin that puts one class into the test module and collects the results of its tests."""

    def __init__(self, tested: type[Contract], only: Sequence[str]) -> None:
        self._tested = tested
        self._only = set(only)
        self._sentences = clauses(tested)
        self._trouble = ""
        self._running = ""
        self.interrupted = False
        self.results: dict[str, ClauseResult] = {}

    def result(self, name: str, status: int) -> ClauseResult:
        """Return the outcome of a clause; one that never ran has failed."""
        missing = ClauseResult(
            clause=name,
            sentence=self._sentences[name],
            outcome="failed",
            message=f"it did not run to its end: pytest ended with status {status} ({self._trouble or 'no message'})",
        )
        return self.results.get(name, missing)

    @pytest.hookimpl
    def pytest_configure(self, config: pytest.Config) -> None:
        config.option.tbstyle = "native"  # the message is all that is kept; pytest's own style parses every source

    @pytest.hookimpl
    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        self.interrupted = not isinstance(excinfo.value, pytest.Session.Interrupted)  # pytest's own way to stop

    @pytest.hookimpl
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running = _clause(nodeid.rpartition("::")[2])

    @pytest.hookimpl
    def pytest_internalerror(self, excrepr: object) -> bool:
        """Let an error inside pytest fail the running clause, and all clauses that have not run yet."""
        self._trouble = str(excrepr).strip().rpartition("\n")[2]
        self.results.pop(self._running, None)
        return True

    @pytest.hookimpl
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._trouble = str(report.longrepr)

    @pytest.hookimpl
    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        if isinstance(collector, pytest.Module):
            setattr(collector.obj, self._tested.__name__, self._tested)

    @pytest.hookimpl
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self._only:
            items[:] = [item for item in items if _clause(item.name) in self._only]

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        name = _clause(report.nodeid.rpartition("::")[2])
        before = self.results.get(name)
        if before is not None and (before.outcome == "failed" or report.skipped):
            return  # of several parameters the first failure is told, and one that ran counts
        self.results[name] = ClauseResult(
            clause=name,
            sentence=self._sentences.get(name, name),
            outcome=report.outcome,
            message="" if report.passed else _message(report),
            seconds=report.duration + (before.seconds if before else 0.0),
        )


def _clause(name: str) -> str:
    return name.partition("[")[0].removeprefix("test_")


def _message(report: pytest.TestReport) -> str:
    """Return the reason of a skip, or the message of the failed assertion without its traceback."""
    if report.skipped:
        found = report.longrepr
        return str(found[2]).removeprefix("Skipped: ") if isinstance(found, tuple) else str(found)
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash is not None else report.longrepr)
    for prefix in ("AssertionError: ", "Failed: "):
        text = text.removeprefix(prefix)
    return text.partition("\nassert ")[0]  # what assertion rewriting adds


@contextmanager
def _no_other_plugins() -> Iterator[None]:
    """Keep installed pytest plugins and options of a surrounding run out of the inner one."""
    current = os.environ.get("PYTEST_CURRENT_TEST")  # the inner run changes it
    wanted = {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
        "PYTEST_PLUGINS": None,
        "PYTEST_CURRENT_TEST": current,
    }
    with environment(wanted):
        yield


@contextmanager
def _deadline(seconds: float, what: str) -> Iterator[None]:
    """Raise in the main thread when the time is over; elsewhere, and where there is no alarm, do nothing."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expired(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"{what} was not done after {seconds:g} s: something waits without a deadline")

    previous = signal.signal(signal.SIGALRM, expired)
    remaining = signal.setitimer(signal.ITIMER_REAL, seconds)[0]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining)
        signal.signal(signal.SIGALRM, previous)
