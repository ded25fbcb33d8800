"""The contract of a reward function.

A reward runs thousands of times on whatever a policy says, in other processes, several at a time, under a
deadline. The clauses are what then goes wrong.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pytest
from attrs import frozen

from nemo_rl_core.errors import ConfigError, NemoRLError, RewardError
from nemo_rl_core.records.message import Task
from nemo_rl_core.records.rewards import finite_rewards
from nemo_rl_core.registry import ComponentRef
from nemo_rl_core.rollouts.context import EpisodeContext
from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool
from nemo_rl_core.rollouts.scoring.reward_env import Isolation, reward_environment
from nemo_rl_core.testing.conformance.frame._blocking import longest_block
from nemo_rl_core.testing.conformance.frame._pool import shared_pool
from nemo_rl_core.testing.conformance.frame.declared import overlaid
from nemo_rl_core.testing.conformance.frame.kit import Contract
from nemo_rl_core.testing.conformance.frame.process_traces import changes_made_by

__all__ = ["RewardContract"]

ODD_RESPONSES = (
    "",
    " \n\t",
    "\N{GRINNING FACE} \u4e09 \u0663 \u202e",
    "\\boxed{",
    "\\frac{1}{0} = \\infty",
    "```python\nwhile True: pass",
    "<answer></answer><answer>",
    "{}%s%d{0}[](*\\",
    "9" * 500,
    "word " * 2000,
)
"""What a policy says that nobody thought of. None of it is worth an exception."""


@frozen(kw_only=True)
class _Scored:
    """The score of one response: rewards by name, or the error."""

    rewards: Mapping[str, float]
    error: str = ""


class RewardContract(Contract):
    """What every reward must be. Define the fixture `reward`, and `examples` if yours needs other columns.

    Attributes:
        examples: Rows and responses that can be scored.
        bad_rows: Rows that it must refuse, such as one without the expected answer.
        deterministic: False for a reward that is drawn (a judge that samples).
        deadline_s: Seconds in which it must score any of the responses, in the process pool as in a run. The
            first call, which imports, is not counted.
        max_block_s: Seconds for which an async reward may keep the event loop from everything else.
    """

    kind: ClassVar[str] = "rewards"
    subject: ClassVar[str] = "reward"
    examples: ClassVar[Sequence[tuple[Mapping[str, Any], str]]] = (
        ({"prompt": "What is 2 + 2?", "answer": "4"}, "The answer is 4."),
        ({"prompt": "What is 2 + 3?", "answer": "5"}, "The answer is 6."),
    )
    bad_rows: ClassVar[Sequence[Mapping[str, Any]]] = ()
    deterministic: ClassVar[bool] = True
    deadline_s: ClassVar[float] = 20.0
    max_block_s: ClassVar[float] = 0.05

    @classmethod
    def from_component(cls, ref: ComponentRef, options: Mapping[str, Any], example: Mapping[str, Any]) -> object:
        """Return the function with the options as preset arguments; a class is made with its options."""
        component = ref.load()
        if isinstance(component, type):
            return super().from_component(ref, options, example)
        preset = overlaid(example, options)
        return functools.partial(component, **preset) if preset else component

    @classmethod
    def declared_by(cls, subject: object) -> object:
        """Return the function without its preset arguments, as the attribute belongs to the function."""
        return subject.func if isinstance(subject, functools.partial) else subject

    @classmethod
    def mistake_in(cls, subject: object) -> str | None:
        """Refuse a class, and what cannot be called."""
        if isinstance(subject, type):
            return f"it returns the class {subject.__name__}: return an object, such as {subject.__name__}(...)"
        return None if callable(subject) else f"it returns {subject!r:.60}, not a function"

    @pytest.fixture
    def _pool(self) -> ProcessPool:
        return shared_pool()

    # -- clauses -------------------------------------------------------------------------------

    def test_arguments_by_name(self, reward: Callable[..., Any]) -> None:
        """Its arguments are matched by name: known ones and columns of the row fill all that it requires."""
        try:
            factory = reward_environment(reward)
            for row, _ in self.examples:
                factory.check(row)
        except ConfigError as error:
            raise AssertionError(f"{error} In this kit the rows are those of `examples`.") from error

    def test_returns_finite_numbers(self, reward: Callable[..., Any]) -> None:
        """It returns a finite number, or a mapping of text to finite numbers."""
        for row, response in self.examples:
            found = _raw(reward, row, response)
            rewards = found if isinstance(found, Mapping) else {"reward": found}
            names = [name for name in rewards if not isinstance(name, str)]
            assert not names, f"a reward is named {names[0]!r}, which is no text"
            assert rewards, "it returned an empty mapping: no reward at all"
            try:
                finite_rewards(rewards)
            except RewardError as error:
                raise AssertionError(f"it returned {found!r:.80}: {error}") from error

    def test_names_are_stable(self, reward: Callable[..., Any]) -> None:
        """It names the same rewards whatever the response, so that a metric means one thing."""
        row = self.examples[0][0]
        names = {response: sorted(_named(reward, row, response)) for response in (*self._responses(), "")}
        first = next(iter(names.values()))
        for response, found in names.items():
            assert found == first, f"for {response!r:.40} it names {found}, for another response {first}"

    def test_any_response(self, reward: Callable[..., Any]) -> None:
        """It scores whatever a policy may say: nothing, other scripts, half an answer, very much."""
        for row, _ in self.examples[:1]:
            for response in ODD_RESPONSES:
                try:
                    finite_rewards(_named(reward, row, response))
                except Exception as error:
                    raise AssertionError(
                        f"the response {response[:40]!r} ({len(response)} characters) raised "
                        f"{type(error).__name__}: {error}"
                    ) from error

    def test_deterministic(self, reward: Callable[..., Any]) -> None:
        """Scored again a response gets the same, unless it is declared to be drawn."""
        if not self.deterministic:
            pytest.skip("declared to be drawn (deterministic = False)")
        first = [_named(reward, row, response) for row, response in self.examples]
        again = [_named(reward, row, response) for row, response in reversed(self.examples)][::-1]
        assert again == first, f"it gave {first} and then {again}"

    def test_inputs_are_left_alone(self, reward: Callable[..., Any]) -> None:
        """It changes neither the row nor the messages, which others of the group read after it."""
        for row, response in self.examples:
            arguments = _arguments(reward, row, response)
            before = copy.deepcopy(arguments)
            _finish(reward(**arguments))
            changed = [name for name, value in before.items() if arguments[name] != value]
            assert not changed, f"it changed {', '.join(changed)}"

    def test_process_stays_as_it_is(self, reward: Callable[..., Any]) -> None:
        """It changes nothing of the process (variables, folder, global random numbers, logging) and prints nothing."""
        row, response = self.examples[0]
        found = changes_made_by(lambda: _raw(reward, row, response))
        assert not found, f"after a call {'; '.join(found[:3])}: everything else in the process sees that"

    def test_pickles(self, reward: Callable[..., Any]) -> None:
        """It can be sent to a worker process and scores the same there."""
        import cloudpickle

        try:
            again = pickle.loads(cloudpickle.dumps(reward))
        except Exception as error:
            raise AssertionError(f"it cannot be pickled ({type(error).__name__}: {error})") from error
        for row, response in self.examples:
            names = sorted(_named(reward, row, response))
            assert sorted(_named(again, row, response)) == names, "the copy names other rewards"

    def test_same_everywhere(self, reward: Callable[..., Any], _pool: ProcessPool) -> None:
        """It scores the same in the rollout loop, in a thread and in the process pool."""
        if not self.deterministic:
            pytest.skip("declared to be drawn (deterministic = False)")
        ways: tuple[Isolation, ...] = ("inline", "thread", "process")
        found = {way: self._played(reward, _pool, self.examples, isolation=way) for way in ways}
        for way in ways[1:]:
            assert found[way] == found["inline"], f"in a {way} it gave {found[way]}, inline {found['inline']}"

    def test_concurrent_calls(self, reward: Callable[..., Any], _pool: ProcessPool) -> None:
        """Calls at the same time do not disturb each other."""
        if not self.deterministic:
            pytest.skip("declared to be drawn (deterministic = False)")
        alone = [self._played(reward, _pool, [example], isolation="thread")[0] for example in self.examples]
        together = self._played(reward, _pool, [*self.examples] * 8, isolation="thread")
        assert together == alone * 8, f"at the same time they gave {together}, one by one {alone}"

    def test_deadline(self, reward: Callable[..., Any], _pool: ProcessPool) -> None:
        """It answers in `deadline_s`, for every response, where a run would kill it."""
        responses = [(self.examples[0][0], response) for response in (*self._responses(), *ODD_RESPONSES)]
        self._played(reward, _pool, responses[:1])  # imports
        for (_, response), scored in zip(responses, self._played(reward, _pool, responses), strict=True):
            assert "did not answer" not in scored.error, f"for {response[:40]!r}: {scored.error}"

    def test_event_loop_goes_on(self, reward: Callable[..., Any]) -> None:
        """An async reward waits, it does not block: other rollouts go on and its deadline can end it."""
        if not reward_environment(reward).is_async:
            pytest.skip("it is not async: it runs in a process or a thread")

        async def score() -> None:
            for row, response in self.examples:
                await reward(**_arguments(reward, row, response))

        asyncio.run(score())  # imports
        blocked = longest_block(score, limit_s=self.max_block_s)
        assert blocked <= self.max_block_s, (
            f"it blocked the event loop for {blocked * 1000:.0f} ms: await, or be a plain function"
        )

    def test_bad_rows_are_errors(self, reward: Callable[..., Any], _pool: ProcessPool) -> None:
        """A row that it cannot score is an error of that rollout, never a silent 0, and spoils no other."""
        if not self.bad_rows:
            pytest.skip("no `bad_rows` are given")
        response = self.examples[0][1]
        played = self._played(reward, _pool, [*((row, response) for row in self.bad_rows), self.examples[0]])
        for row, scored in zip(self.bad_rows, played, strict=False):
            assert scored.error, f"the row {row!r:.80} got {dict(scored.rewards)} in place of an error"
            assert "worker process" not in scored.error, f"the row {row!r:.80} ended its process: {scored.error}"
        assert not played[-1].error, f"after a bad row a good one failed: {played[-1].error}"

    # -- playing -------------------------------------------------------------------------------

    def _responses(self) -> list[str]:
        return [response for _, response in self.examples]

    def _played(
        self,
        reward: Callable[..., Any],
        pool: ProcessPool,
        examples: Sequence[tuple[Task, str]],
        *,
        isolation: Isolation = "process",
    ) -> list[_Scored]:
        """Score all examples at the same time, through the environment that a run makes of a reward."""
        factory = reward_environment(reward, isolation=isolation)

        async def one(row: Task, response: str) -> _Scored:
            environment = factory(EpisodeContext(pool, reward_timeout_s=self.deadline_s))
            try:
                environment.reset(row, 0)
                step = await environment.step({"role": "assistant", "content": response})
            except NemoRLError as error:
                return _Scored(rewards={}, error=str(error))
            return _Scored(rewards=dict(step.rewards))

        async def every() -> list[_Scored]:
            return list(await asyncio.gather(*(one(row, response) for row, response in examples)))

        return asyncio.run(every())


def _arguments(reward: Callable[..., Any], row: Mapping[str, Any], response: str) -> dict[str, Any]:
    prompt = row.get("prompt", "")
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    own = copy.deepcopy(dict(row))
    known = {
        "prompt": prompt if isinstance(prompt, str) else str(asked[-1].get("content", "")),
        "response": response,
        "messages": [*asked, {"role": "assistant", "content": response}],
        "task": own,
        "completion_ids": [5, 6, 7],
    }
    return reward_environment(reward).arguments(known, own)


def _raw(reward: Callable[..., Any], row: Mapping[str, Any], response: str) -> object:
    return _finish(reward(**_arguments(reward, row, response)))


def _named(reward: Callable[..., Any], row: Mapping[str, Any], response: str) -> dict[str, Any]:
    found = _raw(reward, row, response)
    return dict(found) if isinstance(found, Mapping) else {"reward": found}


def _finish(result: object) -> object:
    """Return the result, awaited if necessary."""
    if not inspect.isawaitable(result):
        return result

    async def wait() -> object:
        return await result

    return asyncio.run(wait())
