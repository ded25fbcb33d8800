"""What a plugin raises never reads as success and never ends another's work; what comes from outside passes."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import pytest

from nemo_rl_core.cli import main
from nemo_rl_core.errors import PluginFailed, RunInterrupted
from nemo_rl_core.planning.simulation.clock import SimulatedKill
from nemo_rl_core.registry import PluginCall, contained, is_escape, origin_of
from nemo_rl_core.registry._escapes import comes_from_outside, text_of


class Odd(BaseException):
    pass


class Untold(Exception):
    def __str__(self):
        raise TypeError("no text")


def raising(error):
    def call(self=None):
        raise error

    return call


class Component:
    pass


ESCAPES = [
    (StopIteration(), "raised StopIteration, which would have been taken for the end of the data"),
    (StopAsyncIteration(), "raised StopAsyncIteration"),
    (GeneratorExit(), "raised GeneratorExit, which only the interpreter may do"),
    (KeyboardInterrupt(), "raised KeyboardInterrupt, which only the interpreter may do"),
    (SystemExit(0), "called sys.exit(0), which would have ended the whole process"),
    (SystemExit(), "called sys.exit(None)"),
    (Odd("x"), "raised Odd: x. It is no Exception"),
    (asyncio.CancelledError(), "raised CancelledError though nobody cancelled it"),
    (Untold(), "raised Untold (its text cannot be shown: __str__ raised TypeError)"),
]


@pytest.mark.parametrize("boundary", [PluginCall, contained])
@pytest.mark.parametrize(("error", "told"), ESCAPES, ids=lambda value: type(value).__name__)
def test_an_escape_becomes_an_error_of_the_plugin(error, told, boundary):
    with pytest.raises(PluginFailed) as raised, boundary("algorithms", Component(), "build_batch"):
        raising(error)()
    where = origin_of(raised.value)
    assert where.endswith("Component, algorithm build_batch")
    assert str(raised.value).startswith(f"{where}: {told}")
    assert raised.value.__cause__ is error and raised.value.exit_code != 0


def test_ordinary_errors_stay_what_they_are():
    with (
        pytest.raises(ValueError, match="Component, algorithm build_batch: odd"),
        PluginCall("algorithms", Component(), "build_batch"),
    ):
        raise ValueError("odd")
    with pytest.raises(ValueError, match=r"\Aodd\Z"), contained("algorithms", Component(), "fill_batch"):
        raise ValueError("odd")


def test_ctrl_c_stays_ctrl_c():
    """The interpreter's own handler runs between two instructions of whoever runs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    begun = threading.Event()

    def press():
        begun.wait()
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=press).start()
    try:
        with pytest.raises(KeyboardInterrupt), PluginCall("losses", Component(), "__call__"):
            begun.set()
            while True:
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_a_signal_handler_raises_is_not_the_plugin_s():
    def handler(number, frame):
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(SystemExit), PluginCall("losses", Component(), "__call__"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interrupted_run_stays_interrupted():
    assert comes_from_outside(RunInterrupted("asked to stop")) and not is_escape(RunInterrupted("asked to stop"))


def test_the_kill_of_a_simulated_process_passes():
    with pytest.raises(SimulatedKill), PluginCall("weight_syncs", Component(), "sync"):
        raise SimulatedKill


def test_a_cancelled_task_stays_cancelled():
    async def call():
        with PluginCall("environments", Component(), "step"):
            await asyncio.sleep(60)

    async def main():
        task = asyncio.create_task(call())
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())


def test_a_generator_that_is_closed_ends_quietly():
    ended = []

    def inner():
        try:
            yield 1
        finally:
            ended.append(True)

    def outer():
        with PluginCall("training_backends", Component(), "export_weights"):
            yield from inner()

    generator = outer()
    assert next(generator) == 1
    generator.close()
    assert ended == [True]


def test_text_of_any_exception():
    assert text_of(ValueError("plain")) == "plain"
    assert text_of(Untold()) == "(its text cannot be shown: __str__ raised TypeError)"


# -- the command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(5)", 5, ""),
        ("sys.exit('no luck')", 1, "no luck"),
        ("raise Odd('x')", 70, "command call: Odd: x"),
        ("raise Untold", 70, "command call: Untold: (its text cannot be shown: __str__ raised TypeError)"),
    ],
)
def test_a_command_of_a_plugin_ends_as_it_says(site, registry, capsys, body, status, told):
    name = f"cmd{abs(hash(body))}"
    head = (
        "import sys\nclass Odd(BaseException): ...\nclass Untold(Exception):\n    def __str__(self): raise TypeError\n"
    )
    site.install(
        f"{name}-dist",
        entry_points={"commands": {name: f"{name}_pkg:run"}},
        modules={f"{name}_pkg": f"{head}def run() -> None:\n    {body}\n"},
    )
    assert main([name]) == status
    assert told in capsys.readouterr().err


def test_an_exit_of_anything_else_is_no_success(site, registry, capsys):
    """A reward's module that exits where no call is guarded."""
    source = (
        "class Meta(type):\n    @property\n    def config_class(cls): raise SystemExit(0)\nclass R(metaclass=Meta):\n"
    )
    site.install(
        "meta-dist",
        entry_points={"rewards": {"meta": "meta_pkg:R"}},
        modules={"meta_pkg": f"{source}    def __call__(self, response): return 1.0\n"},
    )
    assert main(["plugins", "show", "meta"]) != 0
    assert "plugin meta 1.0 (dist meta-dist), function Meta.config_class: SystemExit: 0" in capsys.readouterr().err
