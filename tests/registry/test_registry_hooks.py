"""Hooks: isolation, order, arguments, and misspelled ones."""

from __future__ import annotations

import functools
import logging

import pytest

from nemo_rl_core.errors import PluginBroken, PluginError, RunInterrupted
from nemo_rl_core.hookspecs import hookimpl
from nemo_rl_core.registry import KINDS, RunHooks, register_callback
from nemo_rl_core.registry._hooks import SPECS
from nemo_rl_core.training.callbacks import Callback


def test_every_kind_has_a_provision_hook():
    assert {f"nemo_rl_{kind}" for kind in KINDS} <= set(SPECS)


class Listener(Callback):
    def __init__(self, log, name="listener"):
        self.log, self.name = log, name

    @property
    def explosive(self):
        raise AssertionError("a property was evaluated at registration")

    def on_step_end(self, metrics):
        self.log.append((self.name, metrics))

    def on_run_end(self, status, run):
        self.log.append((self.name, run, status))

    def helper(self):
        raise AssertionError("not a hook")


@pytest.fixture
def hooks(registry):
    """Hooks of a run with these callbacks and no installed plugins."""
    return functools.partial(RunHooks, registry=registry, installed=False)


def test_undecorated_methods_get_the_arguments_they_ask_for(hooks):
    log = []
    run = hooks([Listener(log)])
    assert run.call("on_step_end", run="RUN", metrics={"a": 1.0}) == []
    run.call("on_run_end", run="RUN", status="completed")
    run.call("on_step_start", run="RUN")  # nobody listens
    assert log == [("listener", {"a": 1.0}), ("listener", "RUN", "completed")]


def test_other_shapes_of_listener(hooks):
    log = []

    class Odd:
        def on_step_end(self, *, run, extra=4, **rest):
            log.append((run, extra, rest))

        @staticmethod
        def on_step_start(run):
            log.append(("static", run))

        @hookimpl(specname="on_run_start")
        def begin(self, run):
            log.append(("begin", run))

        @hookimpl(optionalhook=True)
        def on_a_hook_of_tomorrow(self):
            raise AssertionError

    run = hooks([Odd()])
    run.call("on_run_start", run=1)
    run.call("on_step_start", run=2)
    run.call("on_step_end", run=3, metrics={})
    assert log == [("begin", 1), ("static", 2), (3, 4, {"metrics": {}})]


def test_callbacks_are_called_in_their_order(hooks):
    log = []

    class First:
        @hookimpl(tryfirst=True)
        def on_step_end(self):
            log.append("first")

    run = hooks([Listener(log, "a"), Listener(log, "b"), First()])
    run.call("on_step_end", run=None, metrics=0)
    assert log == ["first", ("a", 0), ("b", 0)]


class Raises(Callback):
    def on_step_end(self):
        raise ValueError("disk is full")


def test_a_listener_that_raises_is_named_once_and_the_run_goes_on(hooks, caplog):
    log = []
    run = hooks([Raises(), Listener(log)])
    for _ in range(3):
        run.call("on_step_end", run=None, metrics=1)
    assert len(log) == 3
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "Raises, hook on_step_end: ValueError: disk is full" in warnings[0]
    assert [f.hook for f in run.failures] == ["on_step_end"] * 3


def test_a_critical_listener_stops_the_run(hooks):
    class Critical(Raises):
        critical = True

    with pytest.raises(ValueError, match="disk is full") as error:
        hooks([Critical()]).call("on_step_end", run=None, metrics=1)
    assert "Critical, hook on_step_end, which is critical" in error.value.__notes__[0]


def test_an_interrupt_is_not_swallowed(hooks):
    class Interrupted(Callback):
        def on_step_end(self):
            raise RunInterrupted("SIGTERM")

    with pytest.raises(RunInterrupted):
        hooks([Interrupted()]).call("on_step_end", run=None, metrics=1)


def method(name, function=lambda self: None):
    return type("Misfit", (Callback,), {name: function})()


async def coroutine(self, run):
    pass


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (method("on_stepend"), r"'on_stepend' is no hook. Did you mean 'on_step_end'\?"),
        (method("nemo_rl_lossses"), "Did you mean 'nemo_rl_losses'"),
        (method("other", hookimpl(lambda self: None)), "'other' is no hook"),
        (method("on_step_end", lambda self, metric: None), r"asks for 'metric'.*It has: run, metrics. Did you mean"),
        (method("on_step_end", coroutine), "is async"),
        (method("on_step_end", 5), "has a hook's name but is 5"),
        (method("on_step_end", hookimpl(wrapper=True)(lambda self: None)), "is a wrapper"),
    ],
)
def test_what_would_never_be_called_rightly_is_refused(hooks, callback, message):
    with pytest.raises(PluginError, match=message):
        hooks([callback])


def test_wrong_calls_by_the_core_are_errors(hooks):
    run = hooks([])
    with pytest.raises(PluginError, match=r"There is no hook 'on_step_ends'\. Did you mean 'on_step_end'"):
        run.call("on_step_ends", run=None)
    with pytest.raises(TypeError, match="takes run, metrics; got run"):
        run.call("on_step_end", run=None)


def test_the_same_callback_twice_is_refused(hooks):
    callback = Listener([])
    with pytest.raises(PluginError, match="given twice"):
        hooks([callback, callback])


CALLBACK = """
from nemo_rl_core.training.callbacks import Callback
seen = []

class Count(Callback):
    def on_step_start(self, run):
        seen.append(run)
"""


def test_classes_and_installed_names(site, hooks):
    site.install("cb", entry_points={"callbacks": {"count": "cb_pkg:Count"}}, modules={"cb_pkg": CALLBACK})

    @register_callback("needs")
    class Needs(Callback):
        def __init__(self, path):
            raise AssertionError

    run = hooks(["count"])
    run.call("on_step_start", run=5)
    import cb_pkg  # from the site

    hooks([cb_pkg.Count]).call("on_step_start", run=6)
    assert cb_pkg.seen == [5, 6]
    with pytest.raises(PluginError, match="Needs without arguments raised TypeError"):
        hooks(["needs"])


HOOKS = """
seen = []
def on_step_start(run):
    seen.append(run)
"""


def install_hooks(site):
    for name, source in {"good": HOOKS, "bad": "import no_such_dep", "misfit": "def on_stepstart(run): 0",
                         "loud": "def on_step_start(run): raise KeyError('k')"}.items():  # fmt: skip
        site.install(name, "1.2", entry_points={"hooks": {name: f"{name}_hooks"}}, modules={f"{name}_hooks": source})
    site.install("newer", entry_points={"hooks": {"newer": "newer_hooks"}}, requires=["nemo-rl-core>=99"])


def test_installed_hook_plugins_are_isolated(site, registry, caplog):
    install_hooks(site)
    run = RunHooks(registry=registry)
    text = caplog.text
    assert "plugin bad 1.2 (dist bad): importing bad_hooks raised ModuleNotFoundError" in text
    assert "NEMO_RL_DISABLE_PLUGINS=bad" in text
    assert "plugin misfit 1.2 (dist misfit): 'on_stepstart' is no hook" in text
    assert "requires nemo-rl-core>=99" in text
    run.call("on_step_start", run=1)
    run.call("on_step_start", run=2)
    import good_hooks  # from the site

    assert good_hooks.seen == [1, 2]
    assert caplog.text.count("plugin loud 1.2 (dist loud), hook on_step_start: KeyError: 'k'") == 1
    before = len(caplog.records)
    RunHooks(registry=registry)
    assert len(caplog.records) == before  # loaded once, warned once


def test_strict_stops_at_a_broken_hook_plugin(site, registry):
    install_hooks(site)
    registry.strict = True
    with pytest.raises(PluginBroken, match="plugin bad"):
        RunHooks(registry=registry)


def test_disabled_hook_plugins_are_not_imported(site, monkeypatch):
    import sys

    from nemo_rl_core.registry import Registry

    install_hooks(site)
    RunHooks(registry=Registry(allow=[]))
    assert "good_hooks" not in sys.modules
