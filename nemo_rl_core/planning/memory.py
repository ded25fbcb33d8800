"""Device memory that the models of a run need, estimated from their shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from attrs import asdict, evolve, field, frozen

from nemo_rl_core.config.components import finished_options
from nemo_rl_core.config.layouts import training_backend
from nemo_rl_core.config.run_components import RunComponents
from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.planning.placement import PlannedEngines
from nemo_rl_core.planning.rates import Rates
from nemo_rl_core.protocols.algorithm import AlgorithmContext
from nemo_rl_core.protocols.training_backend import ModelMemory, TrainingBackend
from nemo_rl_core.registry import get_registry
from nemo_rl_core.schema import PolicyConfig, RunConfig
from nemo_rl_core.training.model.device_turns import share_devices

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["MemoryEstimate", "ModelEstimate", "estimate_memory"]

_BYTES = {"float32": 4, "bfloat16": 2}
_ACTIVATION_ELEMENTS = 17
"""Elements that a transformer layer keeps for the backward pass, per token and hidden unit, without the attention
matrix (arXiv:2205.05198 eq. 2: 34 bytes in 16 bits)."""


@frozen(kw_only=True)
class ModelEstimate:
    """Bytes of one model on the device of one of its workers."""

    num_parameters: int
    trained: bool
    memory: ModelMemory
    activations: float
    """Of one micro-batch."""

    @property
    def held(self) -> float:
        """Weights, gradients and optimizer."""
        return self.memory.held

    @property
    def computing(self) -> float:
        """Further memory in use while it computes."""
        return self.memory.computing + self.activations

    @property
    def total(self) -> float:
        """Peak of its memory."""
        return self.held + self.computing


@frozen(kw_only=True)
class MemoryEstimate:
    """Estimated bytes on one device of a trainer and of an engine."""

    models: dict[str, ModelEstimate]
    """Estimates by role, the policy first. A reference that is the policy without its adapters has no entry."""
    engine_weights: float
    engine_cache: float
    """Keys and values of a full batch, each sequence as long as on average while it is sampled."""
    engine_cache_longest: float
    """Keys and values of a full batch with every sequence at its longest; a paged cache stays below this bound."""
    sharing: Literal["apart", "in_turn", "together"] = "apart"
    """Whether trainer and engine have devices of their own, take turns on one, or hold it at the same time."""
    notes: list[str] = field(factory=list)
    """What could not be estimated, and why."""

    @property
    def trainer(self) -> float:
        """Bytes of one worker of the policy."""
        return self.models["policy"].total

    @property
    def engine(self) -> float:
        """Bytes on one engine's device."""
        return self.engine_weights + self.engine_cache

    @property
    def device(self) -> float:
        """The most that one device holds. In turn both sides have their weights there only during a refit."""
        models = list(self.models.values())
        computing = max(model.computing for model in models)
        if self.sharing == "apart":
            return max(*(model.total for model in models), self.engine)
        if self.sharing == "together":
            return sum(model.held for model in models) + computing + self.engine
        # A model that takes no steps leaves before those of the others.
        stepping = sum(model.held for model in models if model.trained) + computing
        scoring = max(model.total for model in models if not model.trained) if len(models) > 1 else 0.0
        return max(stepping, scoring, self.engine, self.models["policy"].held + self.engine_weights)

    def as_dict(self) -> dict[str, Any]:
        """The estimate in bytes by name, for programs."""
        policy = self.models["policy"]
        return {
            "num_parameters": policy.num_parameters,
            "trainer_weights": policy.held,
            "trainer_activations": policy.computing,
            "models": {
                name: {"num_parameters": m.num_parameters, **asdict(m.memory), "activations": m.activations}
                for name, m in self.models.items()
            },
            **{name: getattr(self, name) for name in ("engine_weights", "engine_cache", "engine_cache_longest")},
            **{name: getattr(self, name) for name in ("sharing", "trainer", "engine", "device", "notes")},
        }


def estimate_memory(config: RunConfig, rates: Rates, engines: PlannedEngines) -> MemoryEstimate:
    """Estimate the memory of the models' workers and of the engines, without loading weights.

    Args:
        config: Of the run, finalized.
        rates: How long sequences are, and how many one engine decodes together.
        engines: Of the run.

    Raises:
        ConfigError: There is no such model.
    """
    policy, notes = config.policy, []
    model = _empty(policy)
    models = {"policy": _estimate(policy, model, config)}
    try:
        for name, role in _other_roles(config).items():
            if role != evolve(policy, trained=False) or not models["policy"].memory.has_initial_weights:
                models[name] = _estimate(role, _empty(role), config)
    except NemoRLError as error:  # such as no tokenizer at hand
        notes.append(f"The memory of models beside the policy is not counted: {error}")
    shape = model.config.get_text_config()
    size = _BYTES[config.generation.precision or policy.precision] / engines.devices_per_engine
    batch = _batch(config, rates, engines.num_engines)
    each = _cache_elements(shape) * size
    return MemoryEstimate(
        models=models,
        engine_weights=models["policy"].num_parameters * size,
        engine_cache=batch * _mean_length(config, rates) * each,
        engine_cache_longest=batch * policy.max_sequence_length * each,
        sharing=_sharing(config),
        notes=notes,
    )


def _other_roles(config: RunConfig) -> dict[str, PolicyConfig]:
    """The algorithm's models beside the policy."""
    from nemo_rl_core.models import load_tokenizer

    policy = config.policy
    context = AlgorithmContext(
        tokenizer=load_tokenizer(policy.tokenizer_name or str(policy.model_name)),
        resolve=RunComponents(config.plugins).build,
        max_sequence_length=policy.max_sequence_length,
    )
    algorithm = get_registry().resolve("algorithms", config.algorithm, plugins=config.plugins).load()(config, context)
    return {
        name: evolve(
            role.config,
            model_name=role.config.model_name or policy.model_name,
            backend=role.config.backend or policy.backend,
            trained=role.trained,
        )
        for name, role in algorithm.models.items()
    }


def _empty(role: PolicyConfig) -> PreTrainedModel:
    """The model on the meta device."""
    import torch

    from nemo_rl_core.models import load_model

    model: PreTrainedModel = load_model(role.model_name or "", dtype=torch.float32, empty=True, head=role.head)
    return model


def _estimate(role: PolicyConfig, model: PreTrainedModel, config: RunConfig) -> ModelEstimate:
    backend = training_backend(role, config.plugins)
    if backend is None:
        backend = get_registry().resolve("training_backends", None, plugins=config.plugins).load()
    finished = evolve(role, options=finished_options(backend, role.options))
    memory = getattr(backend, "memory", TrainingBackend.memory)(finished, model)
    return ModelEstimate(
        num_parameters=sum(p.numel() for p in model.parameters()),
        trained=role.trained,
        memory=memory,
        activations=_activations(role, model.config.get_text_config(), memory.activation_share),
    )


def _activations(role: PolicyConfig, shape: PreTrainedConfig, share: float) -> float:
    size, layers, hidden = _BYTES[role.precision], shape.num_hidden_layers, shape.hidden_size
    tokens = max(role.token_budget("cuda"), role.max_sequence_length)
    layer = tokens * hidden * _ACTIVATION_ELEMENTS * size * share
    logits = 3 * min(role.logprob_chunk_size, tokens) * shape.vocab_size * 4 if role.head == "lm" else 0
    if not role.trained:
        return float(layer + logits)
    inputs = layers * tokens * hidden * size
    kept = layer + inputs if role.activation_checkpointing else layers * layer
    return float(kept + logits)


def _batch(config: RunConfig, rates: Rates, num_engines: int) -> int:
    """Largest number of sequences that one engine decodes together."""
    rollouts = config.num_items_per_step * config.group_size * (1 + config.rollouts.staleness)
    under_way = min(rollouts, config.rollouts.max_in_flight)
    return min(rates.engine_batch, -(-under_way // num_engines))


def _mean_length(config: RunConfig, rates: Rates) -> float:
    """Mean tokens of a sequence while it is sampled: halfway on average, and long ones count for more."""
    if rates.response_tokens is None:
        return float(config.policy.max_sequence_length)
    turns = max(rates.turns, 1.0)
    sampled = rates.response_tokens * turns * (1 + rates.response_spread**2 / turns) / 2
    return min(float(config.policy.max_sequence_length), rates.prompt_tokens + sampled)


def _sharing(config: RunConfig) -> Literal["apart", "in_turn", "together"]:
    """How trainer and engines share the accelerators of the planned cluster."""
    if not share_devices(config):
        return "apart"
    return "together" if config.rollouts.staleness or config.cluster.offload == "never" else "in_turn"


def _cache_elements(shape: PreTrainedConfig) -> int:
    """Number of elements in the keys and values of one token."""
    heads = shape.num_attention_heads
    kv_heads = getattr(shape, "num_key_value_heads", None) or heads
    size = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    return int(2 * shape.num_hidden_layers * kv_heads * size)
