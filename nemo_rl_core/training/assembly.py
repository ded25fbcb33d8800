"""Building what a run is made of, from its configuration: the only set-up code there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from attrs import define, evolve, field

from nemo_rl_core._errors import ConfigError
from nemo_rl_core.config.schema import ComponentChoice, RunConfig
from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.data.module import DataModule
from nemo_rl_core.models import load_tokenizer
from nemo_rl_core.protocols.algorithm import AlgorithmContext
from nemo_rl_core.protocols.generation_backend import GenerationBackend, SamplingParams
from nemo_rl_core.protocols.launcher import Launcher, WorkerSpec
from nemo_rl_core.protocols.weight_sync import WeightSync
from nemo_rl_core.registry import ComponentRef, get_registry
from nemo_rl_core.rollouts.engine import EnvironmentFactory, RolloutEngine
from nemo_rl_core.rollouts.process_pool import ProcessPool
from nemo_rl_core.rollouts.reward_env import reward_environment
from nemo_rl_core.rollouts.runner import RolloutRunner
from nemo_rl_core.training.policy import Policy

if TYPE_CHECKING:
    from nemo_rl_core.data.tokenizer import Tokenizer
    from nemo_rl_core.protocols.environment import Reward

__all__ = ["RunInputs", "RunParts", "assemble", "sampling_params"]

SHUTDOWN_TIMEOUT_S = 10.0


@define(kw_only=True)
class RunInputs:
    """Python objects given to `fit` beside the configuration."""

    train_rows: Any = None
    validation_rows: Any = None
    reward: Reward | None = None
    environment: EnvironmentFactory | type | None = None


@define(kw_only=True)
class RunParts:
    """The objects of one run. Of an evaluation, only those that sample: `policy` and `algorithm` are None."""

    config: RunConfig
    tokenizer: Tokenizer
    data: DataModule
    algorithm: Any = None
    policy: Any = None
    reference: Policy | None = None
    generation: GenerationBackend | None = None
    weight_sync: WeightSync | None = None
    runner: RolloutRunner | None = None
    share_weights: bool = False
    components: list[ComponentRef] = field(factory=list)
    _stack: ExitStack = field(factory=ExitStack, repr=False)

    def close(self) -> None:
        """Stop threads and processes, newest first; may be called twice."""
        self._stack.close()


class _Resolver:
    """Looks names up, remembering every component that the run uses (for the manifest)."""

    def __init__(self, config: RunConfig) -> None:
        self.plugins: Mapping[str, str] = config.plugins
        self.used: list[ComponentRef] = []

    def load(self, kind: str, name: Any) -> Any:
        """The component itself; None takes the default of its kind."""
        ref = get_registry().resolve(kind, name, plugins=self.plugins)
        self.used.append(ref)
        return ref.load()

    def build(self, kind: str, choice: ComponentChoice) -> Any:
        """The component called with its options (the default of its config class if there are none)."""
        component = self.load(kind, choice.name)
        return component(_options(component, choice.options))


def _options(component: Any, options: Any) -> Any:
    config_class = getattr(component, "config_class", None)
    if isinstance(options, Mapping) and config_class not in (None, dict):
        return config_class(**options)
    return options


def sampling_params(config: RunConfig, **changes: Any) -> SamplingParams:
    """How the run samples, from `generation`."""
    generation = config.generation
    params = SamplingParams(
        max_new_tokens=generation.max_new_tokens or config.policy.max_sequence_length,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        stop=generation.stop,
        stop_token_ids=generation.stop_token_ids,
    )
    return evolve(params, **changes)


def assemble(config: RunConfig, inputs: RunInputs, *, run_dir: str, training: bool = True) -> RunParts:
    """Build every part of a run; what was started is stopped again if a later part fails.

    Args:
        config: Finalized configuration.
        inputs: Python objects that stand in for configured ones.
        run_dir: The run's folder.
        training: False builds only what an evaluation needs: data, environment and engine.

    Raises:
        ConfigError: Something that the algorithm needs is not configured.
        PluginError: A component cannot be loaded.
        DataError: The data cannot be read.
    """
    if config.policy.model_name is None:
        raise ConfigError(
            "No model is given. Set `model:` (or policy.model_name) to a hub name, a local folder, or a model made "
            "from scratch such as scratch:qwen2-1m."
        )
    with ExitStack() as stack:
        resolver = _Resolver(config)
        algorithm_class = resolver.load("algorithms", config.algorithm)
        samples = algorithm_class.feed == "rollouts" or not training
        environment = _environment(config, inputs, resolver) if samples else None
        parts = RunParts(
            config=config,
            tokenizer=load_tokenizer(
                config.policy.tokenizer_name or config.policy.model_name, chat_template=config.data.chat_template
            ),
            data=DataModule(
                config.data,
                seed=config.seed,
                max_epochs=config.max_epochs,
                feed=algorithm_class.feed if training else "rollouts",
                train_rows=inputs.train_rows,
                validation_rows=inputs.validation_rows,
            ),
        )
        launcher = _launcher(config, resolver)
        stack.callback(launcher.shutdown)
        if training:
            _add_policy(parts, algorithm_class, launcher, resolver, stack, run_dir)
        if environment is not None:
            _add_engine(parts, environment, launcher, resolver, stack, run_dir)
        parts.components = resolver.used
        parts._stack = stack.pop_all()
        return parts


def _add_policy(
    parts: RunParts, algorithm_class: Any, launcher: Launcher, resolver: _Resolver, stack: ExitStack, run_dir: str
) -> None:
    config = parts.config
    parts.algorithm = algorithm_class(
        config,
        AlgorithmContext(
            tokenizer=parts.tokenizer,
            resolve=resolver.build,
            max_sequence_length=config.policy.max_sequence_length,
        ),
    )
    resolver.load("training_backends", config.policy.backend)
    backend = resolver.used[-1]
    parts.policy = _policy(launcher, backend, config, role="policy", run_dir=run_dir)
    stack.callback(parts.policy.shutdown)
    if "reference" in parts.algorithm.roles:
        parts.reference = _policy(launcher, backend, config, role="reference", run_dir=run_dir)
        stack.callback(parts.reference.shutdown)


def _add_engine(
    parts: RunParts,
    environment: EnvironmentFactory,
    launcher: Launcher,
    resolver: _Resolver,
    stack: ExitStack,
    run_dir: str,
) -> None:
    config = parts.config
    engine_class = resolver.load("generation_backends", config.generation.backend)
    _check_staleness(config, engine_class)
    group = launcher.launch(
        WorkerSpec(
            role="generation",
            factory=resolver.used[-1],
            config=evolve(config.generation, options=_options(engine_class, config.generation.options)),
            seed=config.seed,
            run_dir=run_dir,
        )
    )
    stack.callback(group.shutdown)
    if group.local is None:
        raise ConfigError(
            f"The launcher {config.cluster.launcher!r} put the generation backend into another process, which this "
            "version cannot drive. Use cluster.launcher=local."
        )
    parts.generation = group.local
    if parts.policy is not None:
        parts.weight_sync = resolver.build("weight_syncs", config.weight_sync)
        parts.share_weights = _may_share(config, parts.policy, engine_class)
    parts.runner = _runner(config, group.local, environment, parts.tokenizer, stack)


def _launcher(config: RunConfig, resolver: _Resolver) -> Launcher:
    launcher_class = resolver.load("launchers", config.cluster.launcher)
    launcher: Launcher = launcher_class(_options(launcher_class, config.cluster.options))
    launcher.setup(config.cluster)
    return launcher


def _policy(launcher: Launcher, backend: ComponentRef, config: RunConfig, *, role: str, run_dir: str) -> Policy:
    policy = evolve(config.policy, options=_options(backend.load(), config.policy.options))
    group = launcher.launch(
        WorkerSpec(
            role=role,
            factory=backend,
            config=policy,
            num_workers=policy.num_workers,
            seed=config.seed,
            run_dir=run_dir,
        )
    )
    return Policy(group, token_budget=policy.max_tokens_per_microbatch, temperature=config.generation.temperature)


def _runner(
    config: RunConfig,
    generation: GenerationBackend,
    environment: EnvironmentFactory,
    tokenizer: Tokenizer,
    stack: ExitStack,
) -> RolloutRunner:
    pool = ProcessPool(config.rollouts.num_reward_workers, default_timeout_s=config.rollouts.reward_timeout_s)
    stack.callback(pool.shutdown)
    engine = RolloutEngine(
        generation=generation,
        environment=environment,
        chat=ChatFormatter(tokenizer, chat_template_kwargs=config.data.chat_template_kwargs),
        config=config.rollouts,
        sampling=sampling_params(config),
        pool=pool,
        seed=config.seed,
        max_sequence_length=config.policy.max_sequence_length,
    )
    runner = RolloutRunner(engine)
    stack.callback(runner.shutdown, SHUTDOWN_TIMEOUT_S)
    return runner


def _environment(config: RunConfig, inputs: RunInputs, resolver: _Resolver) -> EnvironmentFactory:
    """The episode factory: an environment, or a reward function wrapped as one."""
    given = [
        name
        for name, value in (
            ("reward_fn", inputs.reward),
            ("environment", inputs.environment),
            ("config.environment", config.environment.name),
            ("config.reward", config.reward.name),
        )
        if value is not None
    ]
    if not given:
        raise ConfigError(
            f"{config.algorithm} needs something that scores a response. Pass reward_fn=... to fit(), or set "
            "`reward: <name>` or `environment: <name>` in the configuration (nemo-rl plugins list --kind "
            "environments shows what is installed)."
        )
    if inputs.reward is not None:
        return reward_environment(inputs.reward)
    if inputs.environment is not None:
        return _factory(inputs.environment, config.environment.options)
    if config.environment.name is not None:
        component = resolver.load("environments", config.environment.name)
        return _factory(component, _options(component, config.environment.options))
    reward: Reward = resolver.load("rewards", config.reward.name)
    return reward_environment(reward)


def _factory(component: Any, options: Any) -> EnvironmentFactory:
    if not isinstance(component, type):
        factory: EnvironmentFactory = component
        return factory
    options = _options(component, options)
    make: Callable[..., Any] = component
    return lambda context: make(options, context)


def _may_share(config: RunConfig, policy: Policy, engine: Any) -> bool:
    """Whether the engine may sample from the trainer's own tensors."""
    backend = policy.group.local
    return (
        backend is not None
        and config.rollouts.staleness == 0
        and config.generation.precision in (None, config.policy.precision)
        and "share_weights" in backend.capabilities
        and "share_weights" in engine.capabilities
    )


def _check_staleness(config: RunConfig, engine: Any) -> None:
    if config.rollouts.staleness > 0 and "in_flight_updates" not in engine.capabilities:
        raise ConfigError(
            f"rollouts.staleness={config.rollouts.staleness} lets the engine sample while its weights change, but "
            f"the generation backend {engine.__name__} has not the capability 'in_flight_updates'. "
            "Set rollouts.staleness=0 or choose another backend."
        )
