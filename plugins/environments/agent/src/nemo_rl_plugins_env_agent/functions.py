"""An agent that is a Python function: in a thread of its own, so that it may block or have an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import asdict

from nemo_rl_core.errors import ConfigError, DataError
from nemo_rl_plugins_env_agent.calls import AgentCall, AgentFailed

__all__ = ["load_function", "name_of", "run_function"]

_GIVEN = ("task", "base_url", "api_key", "model", "seed")


def load_function(agent: object) -> Callable[..., Any]:
    """The function that `agent` is or names as `module:function`.

    Raises:
        ConfigError: There is none, or it cannot be imported.
    """
    if callable(agent):
        given: Callable[..., Any] = agent
        return given
    module, colon, attribute = str(agent).partition(":")
    if not isinstance(agent, str) or not colon or not attribute:
        raise ConfigError(f"The agent is {agent!r}; it must be a function, or written as module:function.")
    try:
        target: Any = importlib.import_module(module)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"The agent {agent} cannot be loaded: {error}. The module must be installed, or lie in the folder that the "
            "run is started in."
        ) from error
    if not callable(target):
        raise ConfigError(f"The agent {agent} is a {type(target).__name__}, not a function.")
    loaded: Callable[..., Any] = target
    return loaded


def name_of(function: Callable[..., Any]) -> str:
    """How messages call it."""
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{module}:{name}" if module else str(name)


async def run_function(function: Callable[..., Any], call: AgentCall, *, timeout_s: float | None) -> object:
    """Call it, sync or async, with the arguments that its signature names.

    At its deadline an async function is cancelled, and a sync one abandoned in its thread: the policy answers it no
    more.

    Raises:
        AgentFailed: It raised, or passed its deadline.
        DataError: It has an argument that nothing can fill.
    """
    name = name_of(function)
    thread = _AgentThread(function, _arguments(function, call), name)
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            return await thread.result
    except TimeoutError as error:
        if deadline.expired():
            raise AgentFailed(f"The agent {name} did not end within {timeout_s:g} s (timeout_s).") from error
        raise _failed(name, error) from error
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        raise _failed(name, error) from error
    finally:
        thread.cancel()


class _AgentThread(threading.Thread):
    """Runs the function as soon as it is made; `result` is a future of the loop that made it."""

    def __init__(self, function: Callable[..., Any], arguments: Mapping[str, Any], name: str) -> None:
        super().__init__(name=f"agent {name}", daemon=True)
        self._function, self._arguments = function, arguments
        self._home = asyncio.get_running_loop()
        self.result: asyncio.Future[Any] = self._home.create_future()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Future[Any] | None = None
        self._cancelled = False
        self.start()

    def run(self) -> None:
        value: object = None
        error: BaseException | None = None
        try:
            value = self._function(**self._arguments)
            if inspect.isawaitable(value):
                value = asyncio.run(self._awaited(value))
        except asyncio.CancelledError as found:
            error = AgentFailed(f"it was cancelled from inside ({found or 'CancelledError'})")
        except BaseException as found:
            error = found
        with contextlib.suppress(RuntimeError):  # the run is over, and its loop closed
            self._home.call_soon_threadsafe(self._tell, value, error)

    async def _awaited(self, awaitable: Any) -> object:
        with self._lock:
            self._loop, self._task = asyncio.get_running_loop(), asyncio.ensure_future(awaitable)
            if self._cancelled:
                self._task.cancel()
        return await self._task

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        with self._lock:
            self._cancelled = True
            if self._loop is not None and self._task is not None:
                with contextlib.suppress(RuntimeError):  # its loop has ended
                    self._loop.call_soon_threadsafe(self._task.cancel)

    def _tell(self, value: object, error: BaseException | None) -> None:
        if self.result.done():
            return
        if error is None:
            self.result.set_result(value)
        elif isinstance(error, Exception) and not isinstance(error, StopIteration):
            self.result.set_exception(error)
        else:  # a future takes no StopIteration, and hands SystemExit to the whole loop
            self.result.set_exception(AgentFailed(f"it raised {type(error).__name__}: {error}"))


def _arguments(function: Callable[..., Any], call: AgentCall) -> dict[str, Any]:
    known = {**asdict(call, recurse=False)}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return known
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return {**{str(k): v for k, v in call.task.items()}, **known}
    rows = {**call.task, **known}
    missing = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    missing = [name for name in missing if name not in rows]
    if missing:
        raise DataError(
            f"The agent {name_of(function)} has the argument {', '.join(map(repr, missing))}, which is neither known "
            f"({', '.join(_GIVEN)}) nor a column of the row ({', '.join(map(str, call.task)) or 'none'})."
        )
    return {p.name: rows[p.name] for p in parameters if p.name in rows}


def _failed(name: str, error: BaseException) -> AgentFailed:
    if isinstance(error, AgentFailed):
        return AgentFailed(f"The agent {name} failed: {error}")
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f
        for f in frames
        if "site-packages" not in f.filename and f.filename != __file__ and "asyncio" not in f.filename
    ]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name})" if own else ""
    return AgentFailed(f"The agent {name} raised {type(error).__name__}: {error}{where}")
