"""Building what a run is made of, from its configuration: the only set-up code there is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from attrs import define, evolve, field

from nemo_rl_core.config.schema import PolicyConfig, RunConfig
from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.data.module import DataModule
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.infra.resources import check_role_names
from nemo_rl_core.models import load_tokenizer, located
from nemo_rl_core.protocols.algorithm import AlgorithmContext, ModelRole, feed_of
from nemo_rl_core.protocols.generation_backend import GenerationBackend, SamplingParams
from nemo_rl_core.protocols.launcher import Launcher, WorkerSpec
from nemo_rl_core.protocols.weight_sync import WeightSync
from nemo_rl_core.registry import ComponentRef, PluginCall, get_registry, worker_rows
from nemo_rl_core.rollouts.clock import Clock, SystemClock
from nemo_rl_core.rollouts.engine import EnvironmentFactory, RolloutEngine
from nemo_rl_core.rollouts.process_pool import ProcessPool
from nemo_rl_core.rollouts.reward_env import reward_environment
from nemo_rl_core.rollouts.runner import RolloutRunner
from nemo_rl_core.training.device_turns import DeviceTurns, make_turns
from nemo_rl_core.training.engine_assembly import (
    choose_weight_sync,
    engine_placement,
    may_share,
    start_engine,
    takes_updates_in_flight,
)
from nemo_rl_core.training.model_checks import check_models
from nemo_rl_core.training.policy import InitialModel, Policy
from nemo_rl_core.training.replay import RecordedRollouts, check_recorded
from nemo_rl_core.training.resolver import Resolver, options_of

if TYPE_CHECKING:
    from nemo_rl_core.data.tokenizer import Tokenizer
    from nemo_rl_core.protocols.reward import Reward

__all__ = ["RunInputs", "RunParts", "assemble", "sampling_params"]

SHUTDOWN_TIMEOUT_S = 10.0


@define(kw_only=True)
class RunInputs:
    """Python objects given to `fit` beside the configuration."""

    train_rows: Any = None
    validation_rows: Any = None
    reward: Reward | None = None
    environment: EnvironmentFactory | type | None = None
    recorded: RecordedRollouts | None = None
    """Rollouts to train on: then no generation backend and no environment is built, and no data is read."""


@define(kw_only=True)
class RunParts:
    """The objects of one run. Of an evaluation, only those that sample: there is no model and no algorithm."""

    config: RunConfig
    tokenizer: Tokenizer
    data: DataModule
    algorithm: Any = None
    models: dict[str, Any] = field(factory=dict)
    """The policy, and the algorithm's other models, by role: each a `Policy`, or the `InitialModel` of one."""
    generation: GenerationBackend | None = None
    weight_sync: WeightSync | None = None
    runner: RolloutRunner | None = None
    share_weights: bool = False
    in_flight_updates: bool = True
    """Whether new weights are loaded while the engine samples."""
    turns: DeviceTurns = field(factory=DeviceTurns)
    """Whether the models and the engine leave the devices that they share to each other in turn."""
    clock: Clock = field(factory=SystemClock)
    recorded: RecordedRollouts | None = None
    components: list[ComponentRef] = field(factory=list)
    _stack: ExitStack = field(factory=ExitStack, repr=False)

    @property
    def policy(self) -> Any:
        """The model that is trained; None in an evaluation."""
        return self.models.get("policy")

    @property
    def trained(self) -> dict[str, Policy]:
        """The models that take optimizer steps, which a checkpoint holds."""
        roles = {} if self.algorithm is None else self.algorithm.models
        return {name: model for name, model in self.models.items() if name not in roles or roles[name].trained}

    def check_alive(self) -> None:
        """Notice a worker of a model that has died while it had nothing to do.

        Raises:
            WorkerDied: Names it.
        """
        for model in self.models.values():
            if isinstance(model, Policy):  # the others are a policy's too
                model.check_alive()

    def close(self) -> None:
        """Stop threads and processes, newest first; may be called twice."""
        self._stack.close()


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
    run_dir = os.path.abspath(run_dir)  # workers may have another working directory
    with ExitStack() as stack:
        resolver = Resolver(config.plugins)
        algorithm_class = resolver.load("algorithms", config.algorithm)
        feed = feed_of(algorithm_class, config) if training else "rollouts"
        recorded = inputs.recorded if training else None
        if recorded is not None and feed != "rollouts":
            raise ConfigError(f"{config.algorithm} is trained on rows, not on rollouts; it cannot be replayed.")
        samples = feed == "rollouts" and recorded is None
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
                feed=feed,
                train_rows=inputs.train_rows,
                validation_rows=inputs.validation_rows,
                registry=resolver,
            ),
        )
        if recorded is not None:
            check_recorded(recorded, parts.tokenizer)
            parts.recorded = recorded
        launcher = _launcher(config, resolver)
        stack.callback(launcher.shutdown)
        if training and environment is not None:
            _check_engine(config, launcher, resolver)
        if training:
            _add_policy(parts, algorithm_class, launcher, resolver, stack, run_dir)
        if environment is not None:
            _add_engine(parts, environment, launcher, resolver, stack, run_dir)
        get_registry().check()
        parts.components = resolver.used
        parts._stack = stack.pop_all()
        return parts


def _add_policy(
    parts: RunParts, algorithm_class: Any, launcher: Launcher, resolver: Resolver, stack: ExitStack, run_dir: str
) -> None:
    config = parts.config
    context = AlgorithmContext(
        tokenizer=parts.tokenizer,
        resolve=resolver.build,
        max_sequence_length=config.policy.max_sequence_length,
    )
    with PluginCall("algorithms", algorithm_class, "__init__", "made"):
        parts.algorithm = algorithm_class(config, context)
    _check_staleness(config, parts.algorithm)
    roles = {"policy": ModelRole(config=config.policy, trained=True), **_roles(parts.algorithm)}
    check_role_names(config.cluster, [*roles, "generation"])
    backends = {}
    for name, role in roles.items():
        backend = resolver.load("training_backends", role.config.backend or config.policy.backend)
        _check_head(name, role, backend)
        _check_capabilities(name, role, backend, parts.algorithm.loss)
        backends[name] = resolver.used[-1]
    configs = {name: _config_of(role, config, backends[name]) for name, role in roles.items()}
    check_models({name: (backends[name].load(), made) for name, made in configs.items()})
    rows = worker_rows(get_registry().manifest(resolver.used))
    for name in roles:
        if name != "policy" and _is_initial_policy(parts, name):
            parts.models[name] = InitialModel(parts.policy)
            continue
        made = _model(launcher, backends[name], config, configs[name], name=name, run_dir=run_dir, manifest=rows)
        stack.callback(made.shutdown)
        parts.models[name] = made


def _is_initial_policy(parts: RunParts, name: str) -> bool:
    """Whether a role is the policy as it was before the run, and the policy's workers can be that too."""
    role = parts.algorithm.models[name]
    return not role.trained and role.config == parts.config.policy and parts.policy.has_initial_weights


def _check_engine(config: RunConfig, launcher: Launcher, resolver: Resolver) -> None:
    """Find out before a model is loaded whether the run's engine can start and be refitted."""
    engine_class = resolver.resolve("generation_backends", config.generation.backend).load()
    check = getattr(engine_class, "check_installed", None)
    if check is not None and getattr(launcher, "in_process", True):  # else it may have an installation of its own
        check(config.generation)
    choose_weight_sync(config, engine_placement(config, engine_class, launcher))


def _add_engine(
    parts: RunParts,
    environment: EnvironmentFactory,
    launcher: Launcher,
    resolver: Resolver,
    stack: ExitStack,
    run_dir: str,
) -> None:
    config = parts.config
    engine_class = resolver.load("generation_backends", config.generation.backend)
    parts.in_flight_updates = takes_updates_in_flight(config, engine_class)
    engine = resolver.used[-1]
    placement = engine_placement(config, engine_class, launcher)
    if parts.policy is not None:
        parts.weight_sync = resolver.build("weight_syncs", choose_weight_sync(config, placement))
        parts.share_weights = placement.in_driver and may_share(config, parts.policy, engine_class)
        parts.turns = make_turns(config, parts.models, parts.trained, engine_class, share_weights=parts.share_weights)
        parts.turns.sampling()  # an engine takes what memory there is when it starts
    parts.generation = start_engine(
        launcher,
        engine,
        config=evolve(
            config.generation,
            model_name=config.generation.model_name and located(config.generation.model_name),
            options=options_of(engine_class, config.generation.options),
        ),
        placement=placement,
        seed=config.seed,
        run_dir=run_dir,
        manifest=worker_rows(get_registry().manifest(resolver.used)),
        shares_device=parts.policy is not None and (config.cluster.colocated or not config.cluster.roles),
    )
    stack.callback(parts.generation.shutdown)
    parts.runner = _runner(config, parts.generation, environment, parts.tokenizer, stack)
    parts.runner.watch_over(parts.check_alive)
    parts.turns.attach(parts.generation, parts.runner)


def _roles(algorithm: Any) -> Mapping[str, ModelRole]:
    """The models beside the policy.

    Raises:
        ConfigError: One of them has the policy's name.
    """
    roles: Mapping[str, ModelRole] = algorithm.models
    if "policy" in roles:
        raise ConfigError(f"{type(algorithm).__name__}.models has a role 'policy', which every run has; rename it.")
    return roles


def _check_head(name: str, role: ModelRole, backend: Any) -> None:
    """A scalar head needs a backend that has one."""
    if role.config.head == "scalar" and "scalar_head" not in backend.capabilities:
        raise ConfigError(
            f"The role {name!r} needs a model with a scalar head, which the training backend {backend.__name__} does "
            f"not serve (its capabilities: {', '.join(sorted(backend.capabilities)) or 'none'}). Choose another "
            f"backend for this role, such as with {name}.backend."
        )


def _check_capabilities(name: str, role: ModelRole, backend: Any, loss: Any) -> None:
    """What an algorithm or its loss asks of a backend, asked before a model is loaded.

    Raises:
        ConfigError: The backend does not have it.
    """
    of_loss = {"over_vocabulary"} & set(loss.needs) if name == "policy" else set()
    if missing := {*role.capabilities, *of_loss} - set(backend.capabilities):
        raise ConfigError(
            f"The role {name!r} needs a training backend with {', '.join(sorted(missing))}, which {backend.__name__} "
            f"does not have (its capabilities: {', '.join(sorted(backend.capabilities)) or 'none'}). Choose another "
            f"backend for it, such as with {name}.backend, or settings that do not need it."
        )


def _launcher(config: RunConfig, resolver: Resolver) -> Launcher:
    launcher_class = resolver.load("launchers", config.cluster.launcher)
    with PluginCall("launchers", resolver.used[-1], "__init__", "made"):
        launcher: Launcher = launcher_class(options_of(launcher_class, config.cluster.options))
    with PluginCall("launchers", launcher, "setup"):
        launcher.setup(config.cluster)
    return launcher


def _config_of(role: ModelRole, config: RunConfig, backend: ComponentRef) -> PolicyConfig:
    """What the workers of a role are set up with."""
    return evolve(
        role.config,
        model_name=located(role.config.model_name or str(config.policy.model_name)),
        options=options_of(backend.load(), role.config.options),
        trained=role.trained,
    )


def _model(
    launcher: Launcher,
    backend: ComponentRef,
    config: RunConfig,
    made: PolicyConfig,
    *,
    name: str,
    run_dir: str,
    manifest: Sequence[Mapping[str, Any]],
) -> Policy:
    group = launcher.launch(
        WorkerSpec(
            role=name,
            factory=backend,
            config=made,
            num_workers=made.num_workers,
            block=min(made.tensor_parallel_size, made.num_workers),
            seed=config.seed,
            run_dir=run_dir,
            timeout_s=made.collective_timeout_s,
            manifest=manifest,
        )
    )
    budget = made.token_budget(config.cluster.device_type())
    can_offload = "offload" in backend.load().capabilities
    return Policy(group, token_budget=budget, temperature=config.generation.temperature, can_offload=can_offload)


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


def _environment(config: RunConfig, inputs: RunInputs, resolver: Resolver) -> EnvironmentFactory:
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
        resolver.used.append(resolver.resolve("rewards", inputs.reward))
        return reward_environment(inputs.reward)
    if inputs.environment is not None:
        resolver.used.append(resolver.resolve("environments", inputs.environment))
        return _factory(inputs.environment, config.environment.options)
    if config.environment.name is not None:
        component = resolver.load("environments", config.environment.name)
        return _factory(component, options_of(component, config.environment.options))
    return reward_environment(resolver.reward(config.reward))


def _factory(component: Any, options: Any) -> EnvironmentFactory:
    if not isinstance(component, type):
        factory: EnvironmentFactory = component
        return factory
    return partial(component, options_of(component, options))


def _check_staleness(config: RunConfig, algorithm: Any) -> None:
    """Rollouts from older weights need an algorithm that says it corrects for them.

    Raises:
        ConfigError: It does not say so.
    """
    if config.rollouts.staleness == 0 or feed_of(algorithm, config) != "rollouts":
        return
    if not getattr(algorithm, "takes_stale_rollouts", False):
        raise ConfigError(
            f"rollouts.staleness={config.rollouts.staleness} trains on rollouts that older weights sampled, and "
            f"{type(algorithm).__name__} as configured does not correct their importance (its `takes_stale_rollouts` "
            "is not True). Choose a loss with a correction, such as one with truncated (tis) or masked (icepop, "
            "seq_mask_tis) importance weights, or set rollouts.staleness=0."
        )
