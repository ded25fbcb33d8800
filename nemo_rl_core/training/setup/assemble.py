"""Assembly of a run's parts from its configuration: the only set-up code there is."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from attrs import evolve

from nemo_rl_core.config.components import finished_options
from nemo_rl_core.config.run_components import RunComponents
from nemo_rl_core.data.message_log import ChatFormatter
from nemo_rl_core.data.module import DataModule
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.models import load_tokenizer, located
from nemo_rl_core.protocols.algorithm import feed_of
from nemo_rl_core.protocols.generation_backend import GenerationBackend
from nemo_rl_core.protocols.launcher import Launcher
from nemo_rl_core.registry import PluginCall, get_registry, worker_rows
from nemo_rl_core.rollouts.engine import EnvironmentFactory, RolloutEngine
from nemo_rl_core.rollouts.recorded import check_recorded
from nemo_rl_core.rollouts.runner import RolloutRunner
from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool
from nemo_rl_core.schema import RunConfig
from nemo_rl_core.training.model.device_turns import make_turns
from nemo_rl_core.training.setup.engine import (
    choose_weight_sync,
    engine_placement,
    may_share,
    start_engine,
    takes_updates_in_flight,
)
from nemo_rl_core.training.setup.models import add_models
from nemo_rl_core.training.setup.parts import SHUTDOWN_TIMEOUT_S, RunInputs, RunParts, sampling_params
from nemo_rl_core.training.setup.scoring import make_environment

if TYPE_CHECKING:
    from nemo_rl_core.models.tokenizer import Tokenizer

__all__ = ["assemble"]


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
        components = RunComponents(config.plugins)
        algorithm_class = components.use(components.resolve("algorithms", config.algorithm))
        feed = feed_of(algorithm_class, config) if training else "rollouts"
        recorded = inputs.recorded if training else None
        if recorded is not None and feed != "rollouts":
            raise ConfigError(f"{config.algorithm} is trained on rows, not on rollouts; it cannot be replayed.")
        samples = feed == "rollouts" and recorded is None
        environment = make_environment(config, inputs, components) if samples else None
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
                registry=components,
            ),
        )
        if recorded is not None:
            check_recorded(recorded, parts.tokenizer)
            parts.recorded = recorded
        launcher = _launcher(config, components)
        stack.callback(launcher.shutdown)
        if training and environment is not None:
            _check_engine(config, launcher, components)
        if training:
            add_models(parts, algorithm_class, launcher, components, stack, run_dir)
        if environment is not None:
            _add_engine(parts, environment, launcher, components, stack, run_dir)
        get_registry().check()
        parts.components = components.used
        parts._stack = stack.pop_all()
        return parts


def _check_engine(config: RunConfig, launcher: Launcher, components: RunComponents) -> None:
    """Find out before a model is loaded whether the run's engine can start and be refitted."""
    engine_class = components.resolve("generation_backends", config.generation.backend).load()
    check = getattr(engine_class, "check_installed", None)
    if check is not None and getattr(launcher, "in_process", True):  # else it may have an installation of its own
        check(config.generation)
    choose_weight_sync(config, engine_placement(config, engine_class, launcher))


def _add_engine(
    parts: RunParts,
    environment: EnvironmentFactory,
    launcher: Launcher,
    components: RunComponents,
    stack: ExitStack,
    run_dir: str,
) -> None:
    config = parts.config
    engine = components.resolve("generation_backends", config.generation.backend)
    engine_class = components.use(engine)
    parts.in_flight_updates = takes_updates_in_flight(config, engine_class)
    placement = engine_placement(config, engine_class, launcher)
    if parts.models:
        choice = choose_weight_sync(config, placement)
        parts.weight_sync = components.make(components.resolve("weight_syncs", choice.name), choice.options)
        parts.share_weights = placement.in_driver and may_share(config, parts.policy, engine_class)
        parts.turns = make_turns(config, parts.models, parts.trained, engine_class, share_weights=parts.share_weights)
        parts.turns.sampling()  # an engine takes what memory there is when it starts
    parts.generation = start_engine(
        launcher,
        engine,
        config=evolve(
            config.generation,
            model_name=config.generation.model_name and located(config.generation.model_name),
            options=finished_options(engine_class, config.generation.options),
        ),
        placement=placement,
        seed=config.seed,
        run_dir=run_dir,
        manifest=worker_rows(get_registry().manifest(components.used)),
        shares_device=bool(parts.models) and (config.cluster.colocated or not config.cluster.roles),
    )
    stack.callback(parts.generation.shutdown)
    parts.runner = _runner(config, parts.generation, environment, parts.tokenizer, stack)
    parts.runner.watch_over(parts.check_alive)
    parts.turns.attach(parts.generation, parts.runner)


def _launcher(config: RunConfig, components: RunComponents) -> Launcher:
    launcher = components.make(components.resolve("launchers", config.cluster.launcher), config.cluster.options)
    with PluginCall("launchers", launcher, "setup"):
        launcher.setup(config.cluster)
    return launcher


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
