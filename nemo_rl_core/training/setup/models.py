"""Models of a run, each in its workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from attrs import evolve

from nemo_rl_core.config.components import finished_options
from nemo_rl_core.config.run_components import RunComponents
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.infra.workers.resources import check_role_names
from nemo_rl_core.models import located
from nemo_rl_core.protocols.algorithm import Algorithm, AlgorithmContext, ModelRole, feed_of
from nemo_rl_core.protocols.launcher import Launcher, WorkerSpec
from nemo_rl_core.protocols.loss import Loss
from nemo_rl_core.protocols.training_backend import TrainingBackend
from nemo_rl_core.registry import ComponentRef, PluginCall, get_registry, worker_rows
from nemo_rl_core.schema import PolicyConfig, RunConfig
from nemo_rl_core.training.model.policy import InitialModel, Policy
from nemo_rl_core.training.setup.model_checks import check_models
from nemo_rl_core.training.setup.parts import RunParts

__all__ = ["add_models"]


def add_models(
    parts: RunParts,
    algorithm_class: type[Algorithm],
    launcher: Launcher,
    components: RunComponents,
    stack: ExitStack,
    run_dir: str,
) -> None:
    """Make the algorithm, and start the workers of every model that it asks for.

    Raises:
        ConfigError: A role, a backend or a staleness that does not fit the algorithm.
    """
    config = parts.config
    context = AlgorithmContext(
        tokenizer=parts.tokenizer,
        resolve=components.build,
        max_sequence_length=config.policy.max_sequence_length,
    )
    with PluginCall("algorithms", algorithm_class, "__init__", "made"):
        parts.algorithm = algorithm_class(config, context)
    _check_staleness(config, parts.algorithm)
    roles = {"policy": ModelRole(config=config.policy, trained=True), **_roles(parts.algorithm)}
    check_role_names(config.cluster, [*roles, "generation"])
    backends = {}
    for name, role in roles.items():
        backends[name] = components.resolve("training_backends", role.config.backend or config.policy.backend)
        backend = components.use(backends[name])
        _check_head(name, role, backend)
        _check_capabilities(name, role, backend, parts.algorithm.loss)
    configs = {name: _config_of(role, config, backends[name]) for name, role in roles.items()}
    check_models({name: (backends[name].load(), made) for name, made in configs.items()})
    rows = worker_rows(get_registry().manifest(components.used))
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


def _roles(algorithm: Algorithm) -> Mapping[str, ModelRole]:
    """The models beside the policy.

    Raises:
        ConfigError: One of them has the policy's name.
    """
    roles = algorithm.models
    if "policy" in roles:
        raise ConfigError(f"{type(algorithm).__name__}.models has a role 'policy', which every run has; rename it.")
    return roles


def _check_head(name: str, role: ModelRole, backend: type[TrainingBackend]) -> None:
    """A scalar head needs a backend that has one."""
    if role.config.head == "scalar" and "scalar_head" not in backend.capabilities:
        raise ConfigError(
            f"The role {name!r} needs a model with a scalar head, which the training backend {backend.__name__} does "
            f"not serve (its capabilities: {', '.join(sorted(backend.capabilities)) or 'none'}). Choose another "
            f"backend for this role, such as with {name}.backend."
        )


def _check_capabilities(name: str, role: ModelRole, backend: type[TrainingBackend], loss: Loss) -> None:
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


def _config_of(role: ModelRole, config: RunConfig, backend: ComponentRef) -> PolicyConfig:
    """What the workers of a role are set up with."""
    return evolve(
        role.config,
        model_name=located(role.config.model_name or str(config.policy.model_name)),
        options=finished_options(backend.load(), role.config.options),
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


def _check_staleness(config: RunConfig, algorithm: Algorithm) -> None:
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
