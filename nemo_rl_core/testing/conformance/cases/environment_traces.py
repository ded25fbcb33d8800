"""Clauses of the contract of an environment: what an episode depends on, and what it leaves behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import ClassVar

import pytest

from nemo_rl_core.rollouts.context import EpisodeContext
from nemo_rl_core.testing.conformance.cases.environment_bench import EnvironmentBench
from nemo_rl_core.testing.conformance.cases.environment_case import EnvironmentCase
from nemo_rl_core.testing.conformance.cases.environment_play import play
from nemo_rl_core.testing.conformance.cases.environment_witness import SEED, Testimony, WitnessFailed, testimonies
from nemo_rl_core.testing.conformance.frame._blocking import longest_block

__all__ = ["EnvironmentTraces"]


class EnvironmentTraces(EnvironmentBench):
    """An episode comes from its task and seed alone, and when it is closed nothing is left of it.

    Attributes:
        max_block_s: Seconds for which a step may keep the event loop from the other episodes.
        shared_state: Names, as a report has them, that may change with each episode, such as `GameEnv.num_played`.
    """

    max_block_s: ClassVar[float] = 0.05
    shared_state: ClassVar[Sequence[str]] = ()

    def test_seedable(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """Equal task and seed give an equal episode, whatever was drawn from global random numbers before."""
        if not environment.deterministic:
            pytest.skip("declared to be drawn (deterministic = False)")
        first = self._play(environment, _context, environment.turns, seed=5).plain()
        random.seed(99)
        for _ in range(2):
            again = self._play(environment, _context, environment.turns, seed=5).plain()
            assert again == first, f"with seed 5 it gave {again!r:.200} after {first!r:.200}"

    def test_seeds_differ(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """Other seeds give other episodes, if it is declared to draw them from the seed."""
        if not environment.seeded:
            pytest.skip("not declared to draw episodes from the seed (seeded = False)")
        found = [repr(self._play(environment, _context, environment.turns, seed=s).plain()) for s in range(20)]
        assert len(set(found)) > 1, f"with 20 seeds it gave {found[0]:.200} each time: it does not use the seed"

    def test_same_in_another_process(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """In other processes, with another hash seed, clock and time zone, the episode is the same."""
        told = self._testimonies(environment)
        if not environment.deterministic:
            pytest.skip("declared to be drawn (deterministic = False)")
        plans = (environment.turns, environment.wrong_turns)
        here = [self._play(environment, _context, plan, seed=SEED).plain() for plan in plans]
        for testimony in told:
            for found, expected in zip(testimony.episodes, here, strict=True):
                assert found == expected, (
                    f"in another process it gave {found!r:.200}, here {expected!r:.200}: it depends on the order of a "
                    "set, hash(), the clock, the time zone, or random numbers without a seed"
                )

    def test_instances_are_independent(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """Episodes at the same time do not disturb each other, also if one of them ends or is given up early."""
        plans = [(turns, seed) for seed in (3, 4, 5) for turns in (environment.turns, environment.wrong_turns)]
        alone = [self._play(environment, _context, turns, seed=seed).plain() for turns, seed in plans]
        together = self._play_together(environment, _context, plans)
        for number, (found, expected) in enumerate(zip(together, alone, strict=True)):
            assert found == expected, f"among others episode {number} gave {found!r:.200}, alone {expected!r:.200}"

    def test_classes_stay_as_they_are(self, environment: EnvironmentCase) -> None:
        """An episode changes nothing in its classes, modules and default arguments, which all episodes share."""
        changed = self._testimonies(environment)[0].changed
        told = [what for what in changed if not what.startswith(tuple(f"{name} was " for name in self.shared_state))]
        assert not told, f"after one more episode {'; '.join(told[:3])}: keep state in the instance"

    def test_process_stays_as_it_is(self, environment: EnvironmentCase) -> None:
        """An episode changes nothing of the process: variables, folder, global random numbers, logging, signals."""
        changed = self._testimonies(environment)[0].changed_for_all
        assert not changed, f"after an episode {'; '.join(changed[:3])}: every other episode and the trainer see that"

    def test_leaves_nothing_running(self, environment: EnvironmentCase) -> None:
        """When it is closed no thread, process or file of the episode is left."""
        left = self._testimonies(environment)[0].left
        assert not left, f"after close there is still {', '.join(left[:3])}"

    def test_is_forgotten(self, environment: EnvironmentCase) -> None:
        """When it is closed nobody holds the environment or its task any more: a run has millions of them."""
        held = self._testimonies(environment)[0].held
        assert not held, f"after close {' and '.join(held)} is still held by a class, a module or a cache"

    def test_prints_nothing(self, environment: EnvironmentCase) -> None:
        """It writes nothing to standard output or error; what it has to say it logs."""
        printed = self._testimonies(environment)[0].printed
        assert not printed, f"it printed {printed!r:.120}: use logging"

    def test_task_is_left_alone(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """It does not change the task, which the other rollouts of the group share."""
        task = copy.deepcopy(dict(environment.task))
        before = copy.deepcopy(task)
        self._play(environment, _context, environment.turns, task=task)
        assert task == before, f"the task was {before!r:.120} and is {task!r:.120}"

    def test_options_are_left_alone(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """It does not change its options, which all episodes share."""
        options = environment.options()
        before = repr(options)

        class WithTheseOptions(EnvironmentCase):
            def options(self) -> object:
                return options

        case = WithTheseOptions(environment=environment.environment, task=environment.task)
        for plan in (environment.turns, environment.wrong_turns):
            self._play(case, _context, plan)
        assert repr(options) == before, f"the options were {before:.120} and are {options!r:.120}"

    def test_event_loop_goes_on(self, environment: EnvironmentCase, _context: EpisodeContext) -> None:
        """It does not block the event loop on which all other episodes run."""
        self._play(environment, _context, environment.turns)  # imports
        blocked = longest_block(lambda: play(environment, _context, environment.turns), limit_s=self.max_block_s)
        assert blocked <= self.max_block_s, (
            f"it blocked the event loop for {blocked * 1000:.0f} ms: make it async, or use context.run_in_pool"
        )

    def _testimonies(self, case: EnvironmentCase) -> tuple[Testimony, ...]:
        try:
            return testimonies(case, self.timeout_s * 0.8)
        except WitnessFailed as error:
            raise AssertionError(str(error)) from error
