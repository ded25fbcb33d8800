"""One-turn environment made from a plain reward function."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from nemo_rl_core.errors import ConfigError, RewardError
from nemo_rl_core.machine.threads import ThreadCalls
from nemo_rl_core.protocols.environment import EnvironmentContext, EnvironmentStep
from nemo_rl_core.records.message import Message, Task
from nemo_rl_core.records.rewards import finite_rewards
from nemo_rl_core.registry import PluginCall, contained

__all__ = ["RewardEnvironment", "RewardEnvironmentFactory", "reward_environment"]

_log = logging.getLogger(__name__)
_KNOWN = ("prompt", "response", "messages", "task", "completion_ids")
_NUM_THREADS = 8
_R = TypeVar("_R")

Isolation = Literal["process", "thread", "inline"]


def reward_environment(reward_fn: Callable[..., Any], *, isolation: Isolation = "process") -> RewardEnvironmentFactory:
    """Make environments that ask one response and score it with `reward_fn`.

    Args:
        reward_fn: Its arguments are matched by name among `prompt`, `response`, `messages`, `task`,
            `completion_ids` and the columns of the row; see `nemo_rl_core.protocols.reward.Reward`.
        isolation: Where a sync function runs: "process" (killed at the deadline; what cannot be pickled
            falls back to a thread), "thread" (abandoned at the deadline) or "inline" (in the rollout
            loop, for functions of microseconds). An async function runs on the loop, with a deadline.

    Raises:
        ConfigError: `reward_fn` is not a function, or has an argument that no name can fill.
    """
    return RewardEnvironmentFactory(reward_fn, isolation=isolation)


class RewardEnvironmentFactory:
    """Makes the `RewardEnvironment` of each episode from the context of the episode."""

    def __init__(self, reward_fn: Callable[..., Any], *, isolation: Isolation) -> None:
        if not callable(reward_fn):
            raise ConfigError(f"A reward must be a function, not {reward_fn!r} ({type(reward_fn).__name__}).")
        if isolation not in ("process", "thread", "inline"):
            raise ConfigError(f'isolation is {isolation!r}. Allowed: "process", "thread", "inline".')
        self.reward_fn = reward_fn
        self.name = _name_of(reward_fn)
        self.isolation = isolation
        self.is_async = _is_async(reward_fn)
        self.required, self.optional, self.takes_all = _parameters(reward_fn, self.name)
        self._threads: ThreadCalls | None = None
        self._shippable: bool | None = None

    def __call__(self, context: EnvironmentContext) -> RewardEnvironment:
        """Return the environment of one episode."""
        return RewardEnvironment(self, context)

    def check(self, row: Task) -> None:
        """Compare the function's arguments with the columns of a row.

        Raises:
            ConfigError: A required argument is neither known nor a column; lists what there is.
        """
        missing = [name for name in self.required if name not in row and name not in _KNOWN]
        if missing:
            raise ConfigError(self._missing(missing, row))

    def arguments(self, known: Mapping[str, Any], row: Task) -> dict[str, Any]:
        """Return the arguments for one call, by name.

        Raises:
            RewardError: A required argument is neither known nor a column of this row.
        """
        if self.takes_all:
            found = {**{k: v for k, v in row.items() if isinstance(k, str)}, **known}
        else:
            found = {}
            for name in (*self.required, *self.optional):
                if name in known:
                    found[name] = known[name]
                elif name in row:
                    found[name] = row[name]
        missing = [name for name in self.required if name not in found]
        if missing:
            raise RewardError(self._missing(missing, row))
        return found

    async def call(self, context: EnvironmentContext, arguments: dict[str, Any]) -> object:
        """Score one response, where `isolation` says."""
        timeout_s: float = getattr(context, "reward_timeout_s", 30.0)
        if self.is_async:
            return await self._await(self.reward_fn(**arguments), timeout_s)
        if self.isolation == "process" and self._can_ship(context):
            return await _run_in_pool(context, self.reward_fn, arguments)
        if self.isolation != "inline":
            if self._threads is None:
                self._threads = ThreadCalls(_NUM_THREADS)
            work = functools.partial(_contained, self.reward_fn, arguments)
            result = await self._threads.run(work, timeout_s=timeout_s, name=f"reward {self.name}")
        else:
            result = self.reward_fn(**arguments)
        return await self._await(result, timeout_s) if inspect.isawaitable(result) else result

    def _can_ship(self, context: EnvironmentContext) -> bool:
        """Return whether a worker process can take the function; if not, warn once."""
        if self._shippable is None:
            check = getattr(context, "can_run_in_pool", None)
            self._shippable = check is None or bool(check(self.reward_fn))
            if not self._shippable:
                _log.warning(
                    "reward %s cannot be pickled, so it runs in a thread: one that hangs is abandoned, not "
                    "killed. Make it a plain function of a module to have it run in a process.",
                    self.name,
                )
        return self._shippable

    async def _await(self, result: Awaitable[_R], timeout_s: float) -> _R:
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                return await result
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise RewardError(f"reward {self.name} did not answer in {timeout_s:g} s.") from error

    def _missing(self, missing: Sequence[str], row: Task) -> str:
        columns = sorted(k for k in row if isinstance(k, str))
        return (
            f"reward {self.name} needs the argument {', '.join(map(repr, missing))}, which is neither known nor a "
            f"column of the row. Known: {', '.join(_KNOWN)}. Columns: {', '.join(columns) or 'none'}. "
            "Rename the argument, map a column with data.train.columns, or give it a default."
        )


class RewardEnvironment:
    """One prompt, one response, scored by a reward function."""

    config_class: ClassVar[type] = dict

    def __init__(self, factory: RewardEnvironmentFactory, context: EnvironmentContext) -> None:
        self._factory = factory
        self._context = context
        self._task: Task = {}
        self._prompt: list[Message] = []

    def reset(self, task: Task, seed: int) -> Sequence[Message]:
        """Return the row's `prompt`, as one user message if it is a string."""
        if "prompt" not in task:
            raise RewardError(
                f"The row has no column 'prompt'. Columns: {', '.join(sorted(map(str, task))) or 'none'}. "
                "Map one with data.train.columns, such as {prompt: question}."
            )
        prompt = task["prompt"]
        self._task = task
        self._prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return list(self._prompt)

    async def step(self, message: Message) -> EnvironmentStep:
        """Score the response and end the episode.

        Raises:
            RewardError: The function raised, passed its deadline, or did not return finite numbers.
        """
        factory = self._factory
        known = {
            "prompt": _last_user_text(self._prompt),
            "response": message.get("content", ""),
            "messages": [*self._prompt, message],
            "task": self._task,
            "completion_ids": list(getattr(self._context, "completion_ids", ())),
        }
        with PluginCall("rewards", factory.reward_fn, "call"):
            arguments = factory.arguments(known, self._task)
            try:
                result = await factory.call(self._context, arguments)
            except RewardError:
                raise
            except Exception as error:
                raise RewardError(f"reward {factory.name} raised {type(error).__name__}: {error}") from error
            rewards = result if isinstance(result, Mapping) else {"reward": result}
            try:
                return EnvironmentStep(rewards=finite_rewards(rewards), terminated=True)
            except RewardError as error:
                raise RewardError(f"reward {factory.name} returned {_short(result)}: {error}") from error

    def close(self) -> None:
        """Release nothing: the environment holds nothing."""


def _contained(reward_fn: Callable[..., _R], arguments: Mapping[str, Any]) -> _R:
    """Call it in a thread, which hands exceptions to a future: that takes no StopIteration, and nothing that exits."""
    with contained("rewards", reward_fn, "call"):
        return reward_fn(**arguments)


async def _run_in_pool(context: EnvironmentContext, function: Callable[..., _R], arguments: dict[str, Any]) -> _R:
    """Send one call; arguments whose names `run_in_pool` takes for itself travel in a partial."""
    own = {name: arguments.pop(name) for name in ("function", "timeout_s", "self") if name in arguments}
    return await context.run_in_pool(functools.partial(function, **own) if own else function, **arguments)


def _parameters(function: Callable[..., object], name: str) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Return the names of the required and of the optional arguments, and whether the function takes any other."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The arguments of reward {name} cannot be read ({error}). Wrap it in a function.") from error
    unnamed = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if unnamed:
        raise ConfigError(
            f"reward {name} has positional-only arguments {unnamed}; arguments are matched by name. "
            "Remove the `/` from its signature, or wrap it in a function."
        )
    preset = function.keywords if isinstance(function, functools.partial) else {}
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in preset]
    required = tuple(p.name for p in named if p.default is p.empty)
    optional = tuple(p.name for p in named if p.default is not p.empty)
    return required, optional, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _is_async(function: Callable[..., object]) -> bool:
    inner = function.func if isinstance(function, functools.partial) else function
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004


def _name_of(function: Callable[..., object]) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    return str(getattr(inner, "__qualname__", None) or type(inner).__name__)


def _last_user_text(messages: Sequence[Message]) -> str:
    for message in reversed(messages):
        if message.get("role") == "user":
            return str(message.get("content", ""))
    return str(messages[-1].get("content", "")) if messages else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
