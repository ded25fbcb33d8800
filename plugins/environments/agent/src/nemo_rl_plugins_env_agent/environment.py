"""The environment `agent`: runs a user's agent against the policy, and gives what it asked as the rollout."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from attrs import field, frozen, validators

from nemo_rl_core.config.run_components import RunComponents
from nemo_rl_core.errors import ConfigError, RewardError
from nemo_rl_core.protocols.environment import DrivingEnvironment, EnvironmentContext, EnvironmentStep
from nemo_rl_core.protocols.policy import PolicySession
from nemo_rl_core.records.message import Message, Task
from nemo_rl_core.registry import register_environment
from nemo_rl_core.rollouts.scoring.reward_env import RewardEnvironmentFactory, reward_environment
from nemo_rl_core.schema import ComponentChoice, component
from nemo_rl_plugins_env_agent.calls import AgentCall, AgentFailed
from nemo_rl_plugins_env_agent.commands import read_output, run_command
from nemo_rl_plugins_env_agent.functions import load_function, name_of, run_function
from nemo_rl_plugins_env_agent.outcome import Outcome, outcome_of
from nemo_rl_plugins_env_agent.server import shared_endpoint

__all__ = ["AgentConfig", "AgentEnvironment", "agent_environment", "register_agent"]

_F = TypeVar("_F", bound=Callable[..., Any])


@frozen(kw_only=True)
class AgentConfig:
    """Options of the environment `agent`: either `agent` or `command`."""

    agent: Any = None
    """A function, in a file `module:function`; sync or async. Of `task`, `base_url`, `api_key`, `model`, `seed` and the
    columns of the row it gets those that its signature names. It returns the reward as a number, rewards by name, or
    the answer as text."""
    command: tuple[str, ...] = ()
    """A program and its arguments. It finds the policy in OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL and the row
    as JSON on standard input. The last line of its output is a number (the reward) or a JSON object with `reward` or
    `answer`; else all of the output is the answer."""
    env: Mapping[str, str] = field(factory=dict)
    """Environment variables of the program beside those it inherits."""
    folder: str | None = None
    """Where the program runs; None is where the run was started."""
    reward: ComponentChoice = component("rewards")
    """Scores an answer, as the run's own `reward` scores a response. Without one the agent returns rewards."""
    timeout_s: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """Seconds for one run of the agent; then a program is killed with all it started. None is the limit of the rollout:
    rollouts.max_turns x (generation_timeout_s + environment_timeout_s)."""
    failure_reward: float | None = None
    """Reward of a run in which the agent failed (raised, ended with an error, passed `timeout_s`). None: the rollout
    failed, it is counted and not trained on. An engine that fails is never the agent's failure."""
    host: str = "127.0.0.1"
    """Address at which the policy is served; the default is for agents on this machine."""
    port: int = field(default=0, validator=[validators.ge(0), validators.lt(1 << 16)])
    """0 takes a free one."""

    def __attrs_post_init__(self) -> None:
        if self.agent is not None and self.command:
            raise ConfigError("Both agent and command are given; an agent is a function or a program.")


class AgentEnvironment(DrivingEnvironment):
    """Lends the policy to an agent over HTTP, in a session with a base URL of its own.

    Everything that the agent samples in it is trained with the agent's reward. One endpoint serves all rollouts of a
    run. An agent that fails fails its rollout.
    """

    config_class: ClassVar[type] = AgentConfig

    def __init__(self, config: AgentConfig, context: EnvironmentContext) -> None:
        super().__init__(config, context)
        if config.agent is None and not config.command:
            raise ConfigError(
                "The environment `agent` has no agent: set its option `agent` (module:function) or `command`."
            )
        self._function = None if config.agent is None else load_function(config.agent)
        self._name = " ".join(config.command) if self._function is None else name_of(self._function)

    async def drive(self, task: Task, seed: int, policy: PolicySession) -> EnvironmentStep:
        """Run the agent and score what it returns.

        Raises:
            AgentFailed: The agent failed, and `failure_reward` is None.
            RewardError: What it returned is no reward, and no answer that can be scored.
        """
        endpoint = await shared_endpoint(self.config.host, self.config.port)
        key = secrets.token_hex(16)
        with endpoint.serving(key, policy) as url:
            call = AgentCall(task=task, base_url=url, api_key=key, model=endpoint.model_name, seed=seed)
            try:
                returned = await self._run(call)
            except AgentFailed as error:
                return self._after_failure(error, policy)
        outcome = outcome_of(returned, self._name)
        info = dict(outcome.info) if self.config.failure_reward is None else {**outcome.info, "agent_failed": 0.0}
        rewards = await self._rewards(outcome, task, seed)
        return EnvironmentStep(
            rewards=rewards, terminated=not outcome.truncated, truncated=outcome.truncated, info=info
        )

    async def _run(self, call: AgentCall) -> object:
        config = self.config
        if self._function is not None:
            return await run_function(self._function, call, timeout_s=config.timeout_s)
        output = await run_command(
            config.command, call, timeout_s=config.timeout_s, variables=config.env, folder=config.folder
        )
        return read_output(output)

    def _after_failure(self, error: AgentFailed, policy: PolicySession) -> EnvironmentStep:
        refused = "" if policy.refused is None else f" A call of it was refused: {policy.refused}"
        if self.config.failure_reward is None or not policy.segments:
            raise AgentFailed(f"{error}{refused}") from error
        return EnvironmentStep(
            rewards={"reward": self.config.failure_reward},
            truncated=True,
            info={"agent_failed": 1.0, "agent_error": f"{error}{refused}"},
        )

    async def _rewards(self, outcome: Outcome, task: Task, seed: int) -> dict[str, Any]:
        rewards = dict(outcome.rewards)
        if outcome.answer is not None:
            scorer = self._scorer(outcome.answer)(self.context)
            scorer.reset({"prompt": "", **task}, seed)
            answer: Message = {"role": "assistant", "content": outcome.answer}
            rewards |= (await scorer.step(answer)).rewards
        if not rewards:
            raise RewardError(f"The agent {self._name} returned neither a reward nor an answer.")
        return rewards

    def _scorer(self, answer: str) -> RewardEnvironmentFactory:
        choice = self.config.reward
        if choice.name is None:
            raise RewardError(
                f"The agent {self._name} returned the answer {answer!r:.80}, and there is nothing to score it: set the "
                "environment's option `reward`, or have the agent return its reward."
            )
        return _scorer(_Chosen(choice))


class _Chosen:
    """A choice that can be a key: equal to itself, and to nothing else."""

    def __init__(self, choice: ComponentChoice) -> None:
        self.choice = choice

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Chosen) and other.choice is self.choice

    def __hash__(self) -> int:
        return id(self.choice)


@functools.lru_cache(maxsize=8)
def _scorer(chosen: _Chosen) -> RewardEnvironmentFactory:
    """A reward is made once per run."""
    return reward_environment(RunComponents().reward(chosen.choice))


def agent_environment(
    agent: Callable[..., Any] | str, *, reward: Any = None, **options: Any
) -> Callable[[EnvironmentContext], AgentEnvironment]:
    """An environment for `fit(environment=...)` from an agent.

    Args:
        agent: A function or `module:function`; see `AgentConfig`.
        reward: Scores an answer: a name, or a function.
        **options: Others of `AgentConfig`.
    """
    choice = reward if isinstance(reward, ComponentChoice) else ComponentChoice(name=reward)
    made = functools.partial(AgentEnvironment, AgentConfig(agent=agent, reward=choice, **options))
    made.__name__ = agent if isinstance(agent, str) else name_of(agent)  # type: ignore[attr-defined]  # for manifests
    return made


def register_agent(name: str, **options: object) -> Callable[[_F], _F]:
    """Make a function an environment of this name, for `environment: <name>` where the code that defines it has run.

    Args:
        name: Of the environment.
        **options: As `agent_environment` takes them.
    """

    def register(function: _F) -> _F:
        register_environment(name)(agent_environment(function, **options))
        return function

    return register
