"""The process in which an episode is replayed and watched; see `environment_witness`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import cloudpickle

from nemo_rl_core.protocols.environment import Environment
from nemo_rl_core.rollouts.context import EpisodeContext
from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool
from nemo_rl_core.testing.conformance.cases.environment_case import EnvironmentCase
from nemo_rl_core.testing.conformance.cases.environment_play import PlayedEpisode, begin, take_turn, value_of
from nemo_rl_core.testing.conformance.cases.environment_witness import SEED, Testimony
from nemo_rl_core.testing.conformance.frame.process_traces import (
    SharedSettings,
    changes,
    child_processes,
    component_state,
    process_state,
    unseeded_random_numbers,
    variables_written,
    what_runs,
)

__all__ = ["testify"]

_Result = TypeVar("_Result")
_DAYS_AHEAD_S = 1_234_567.0
_GRACE_S = 2.0


class _InlineContext(EpisodeContext):
    """Runs functions of the pool in this process, as a mere replay needs no further process."""

    async def run_in_pool(
        self, function: Callable[..., _Result], *args: object, timeout_s: float | None = None, **kwargs: object
    ) -> _Result:
        """Call the function in this process."""
        return function(*args, **kwargs)


class _Row(dict[str, Any]):
    """A task that can be watched for being kept; it travels as a plain dict."""

    __slots__ = ("__weakref__",)

    def __reduce__(self) -> tuple[object, ...]:
        return dict, (dict(self),)


def testify(folder: Path, *, watched: bool) -> None:
    """Play the case in `folder` and write the testimony into the same folder."""
    try:
        testimony = _testimony(_case(folder), watched=watched)
    except BaseException as error:
        told = traceback.format_exception_only(error)[-1].strip()
        testimony = Testimony(episodes=(), failure=f"{told} ({_place(error)})")
    data = cloudpickle.dumps(testimony)
    (folder / "answer.new").write_bytes(data)
    (folder / "answer.new").replace(folder / "answer")
    for pid in child_processes():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    os._exit(0)  # what the episode left running must not keep this process


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return f"{Path(frames[0].filename).name}:{frames[0].lineno}" if frames else "no traceback"


def _case(folder: Path) -> EnvironmentCase:
    """Load the case by name if this process can import its module, else by value."""
    _shift_the_clock()
    by_name, by_value = pickle.loads((folder / "case").read_bytes())
    try:
        return pickle.loads(by_name)  # type: ignore[no-any-return]
    except Exception:
        if not by_value:
            raise
        return pickle.loads(by_value)  # type: ignore[no-any-return]


def _shift_the_clock() -> None:
    """Move the clock days ahead, before the environment's module imports a name from `time`."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + _DAYS_AHEAD_S
    time.time_ns = lambda: now_ns() + int(_DAYS_AHEAD_S * 1e9)


def _testimony(case: EnvironmentCase, *, watched: bool) -> Testimony:
    pool = ProcessPool(1, default_timeout_s=60.0)
    context = (EpisodeContext if watched else _InlineContext)(pool, reward_timeout_s=60.0)
    plans = (case.turns, case.wrong_turns)
    at_first = SharedSettings()
    episodes = [_played(case, context, plan)[0].plain() for plan in plans]
    if not watched:
        return Testimony(episodes=episodes)
    for plan in plans:  # what is loaded once is loaded now
        _played(case, context, plan)
    at_first.restore()  # what an episode sets each time alike is set again, what an import set is not
    with unseeded_random_numbers():
        testimony = _watch(case, context, plans)
    pool.shutdown()
    return attrs.evolve(testimony, episodes=episodes)


def _played(
    case: EnvironmentCase, context: EpisodeContext, turns: Sequence[str]
) -> tuple[PlayedEpisode, Environment, _Row]:
    """Play one episode to its end and close it; the environment and its row are not forgotten yet."""
    row = _Row(case.task)

    async def play() -> tuple[PlayedEpisode, Environment]:
        made = case.make(context)
        try:
            episode = await begin(made, row, SEED)
            for turn in range(len(turns)):
                await take_turn(made, turns, episode, turn)
        finally:
            await value_of(made.close())
        return episode, made

    return *asyncio.run(play()), row


def _watch(case: EnvironmentCase, context: EpisodeContext, plans: Sequence[Sequence[str]]) -> Testimony:
    """Play all plans once more and compare the process before and after."""
    logging.root.addHandler(logging.NullHandler())  # else Python itself prints warnings that are logged
    warnings.simplefilter("ignore")
    tempfile.gettempdir()  # sets it
    gc.collect()
    running = what_runs()
    states = [(component_state(case.environment), process_state())]
    played = []
    with _written() as printed, variables_written() as variables:
        for plan in plans:
            played.append(_played(case, context, plan))
            states.append((component_state(case.environment), process_state()))
    changed, changed_for_all = (_all_changes(list(kind)) for kind in zip(*states, strict=True))
    left = _left(running)
    watched = _references(played)
    del played
    gc.collect()
    return Testimony(
        episodes=(),
        changed=changed,
        changed_for_all=[
            *(f"the environment variable {v} was written" for v in dict.fromkeys(variables)),
            *changed_for_all,
        ],
        left=left,
        held=sorted({what for what, reference in watched if reference() is not None}),
        printed=printed[0],
    )


def _all_changes(states: Sequence[Mapping[str, str]]) -> list[str]:
    """Return what the episodes changed, each thing with its first change."""
    found = [what for before, after in itertools.pairwise(states) for what in changes(before, after)]
    return list({what.partition(" was ")[0]: what for what in reversed(found)}.values())


def _left(running: Mapping[Hashable, str]) -> list[str]:
    """Return what runs or is open now but was not before; threads and processes get a moment to end."""
    deadline = time.monotonic() + _GRACE_S
    while True:
        now = what_runs()
        new = [what for identity, what in now.items() if identity not in running]
        if not new or time.monotonic() > deadline:
            return sorted(new)
        time.sleep(0.02)


def _references(played: Sequence[tuple[PlayedEpisode, Environment, _Row]]) -> list[tuple[str, Callable[[], Any]]]:
    """Return weak references to the objects that nothing may hold after an episode."""
    found: list[tuple[str, Callable[[], Any]]] = []
    for _, made, row in played:
        found.append(("the task", weakref.ref(row)))
        with contextlib.suppress(TypeError):  # of a class with slots
            found.append(("the environment itself", weakref.ref(made)))
    return found


@contextlib.contextmanager
def _written() -> Iterator[list[str]]:
    """Capture what is written to standard output and error, also past Python's own streams; filled at the end."""
    found = [""]
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield found
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            found[0] = file.read().decode(errors="replace")
