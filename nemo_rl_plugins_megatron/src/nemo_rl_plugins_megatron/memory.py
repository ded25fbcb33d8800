"""Memory that a worker of the backend will hold, estimated from the model's shapes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from attrs import define

from nemo_rl_core.protocols.training_backend import ModelMemory
from nemo_rl_plugins_megatron.config import MegatronConfig

if TYPE_CHECKING:
    from nemo_rl_core.schema import PolicyConfig

__all__ = ["model_memory"]

_WHOLE, _SPLIT = 5 / 17, 12 / 17
"""Of a layer's activations, what tensor-parallel ranks each hold and what they share (arXiv:2205.05198 eq. 1)."""


@define
class _Stage:
    """Elements of one pipeline stage on one worker."""

    dense: float = 0.0
    experts: float = 0.0


def model_memory(policy: PolicyConfig, model: object) -> ModelMemory:
    """See `TrainingBackend.memory`."""
    options: MegatronConfig = policy.options
    tp, pp, cp = policy.tensor_parallel_size, options.pipeline_parallel_size, options.context_parallel_size
    expert_tp = options.expert_tensor_parallel_size or tp
    # Context-parallel workers hold the same weights, and share the optimizer as data-parallel ones do.
    copies = max(1, policy.num_workers // (tp * pp))
    expert_copies = max(1, policy.num_workers // (options.expert_parallel_size * expert_tp * pp))
    bfloat16 = policy.precision == "bfloat16"
    state = 4 * _num_states(policy) + (4 if bfloat16 else 0)
    share = _activation_share(tp, cp, sequence_parallel=options.sequence_parallel)

    def of(stage: _Stage) -> ModelMemory:
        count = stage.dense + stage.experts
        weights = count * (2 if bfloat16 else 4)
        if not policy.trained:
            return ModelMemory(weights=weights, activation_share=share)
        divided = stage.dense / copies + stage.experts / expert_copies if options.distributed_optimizer else count
        return ModelMemory(weights=weights, gradients=4 * count, optimizer=state * divided, activation_share=share)

    stages = _stages(model, pp, tp=tp, expert_parts=options.expert_parallel_size * expert_tp)
    return max((of(stage) for stage in stages), key=lambda memory: memory.held)


def _activation_share(tp: int, cp: int, *, sequence_parallel: bool) -> float:
    """Of a micro-batch's activations, on one worker; a pipeline's first stage holds as many as one without stages."""
    return (1 / tp if sequence_parallel else _WHOLE + _SPLIT / tp) / cp


def _num_states(policy: PolicyConfig) -> int:
    """float32 tensors of the optimizer for each one that it steps."""
    if policy.optimizer.name.rpartition(".")[2] == "SGD":
        return int(bool(policy.optimizer.options.get("momentum")))
    return 2


def _stages(model: Any, pp: int, *, tp: int, expert_parts: int) -> list[_Stage]:
    stages = [_Stage() for _ in range(pp)]
    per_stage = model.config.num_hidden_layers // pp
    embedding = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        last = stages[int(layer[1]) // per_stage] if layer else stages[-1]
        stage = stages[0] if parameter is embedding else last
        if ".experts." in name:
            stage.experts += parameter.numel() / expert_parts
        else:
            stage.dense += _elements(name, parameter, tp)
    tied = getattr(model.get_output_embeddings(), "weight", None) is embedding
    if tied and pp > 1:  # the last stage has a copy
        stages[-1].dense += _elements("embed", embedding, tp)
    return stages


def _elements(name: str, parameter: Any, tp: int) -> float:
    """On one tensor-parallel worker: norms, routers and scalar heads are whole, the vocabulary is filled up."""
    if "norm" in name or name.endswith(("mlp.gate.weight", "score.weight")):
        return float(parameter.numel())
    if "embed" in name or name.startswith("lm_head"):
        return float(-(-parameter.shape[0] // tp) * parameter.shape[1])
    return float(parameter.numel() / tp)
