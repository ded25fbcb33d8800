"""Sizes that fit a model and its workers, derived from the configuration alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from nemo_rl_core.config.layouts import replica_sizes
from nemo_rl_core.errors import ConfigError
from nemo_rl_core.schema import Mistake, mistake
from nemo_rl_plugins_megatron.families import heads_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from nemo_rl_core.schema import PolicyConfig

__all__ = ["check_sizes", "size_mistakes"]

_TENSOR, _PIPELINE, _CONTEXT = (
    "tensor_parallel_size",
    "options.pipeline_parallel_size",
    "options.context_parallel_size",
)
_EXPERT, _EXPERT_TENSOR = "options.expert_parallel_size", "options.expert_tensor_parallel_size"


def check_sizes(hf_config: object, policy: PolicyConfig, *, role: str) -> None:
    """Refuse the first size that does not fit.

    Raises:
        ConfigError: Names the setting, and sizes that would fit.
    """
    for found in size_mistakes(hf_config, policy):
        raise ConfigError(f"{role}.{found.path}: {found.problem}. {found.fix}")


def size_mistakes(hf_config: object, policy: PolicyConfig) -> Iterator[Mistake]:
    """Sizes that do not divide the model or the workers, by path within `policy`.

    Args:
        hf_config: The Hugging Face configuration of the model.
        policy: With structured options.
    """
    yield from _of_model(hf_config, policy)
    yield from _of_workers(policy)


def _of_model(hf_config: Any, policy: PolicyConfig) -> Iterator[Mistake]:
    options, tensor = policy.options, policy.tensor_parallel_size
    if not _tensor_fits(hf_config, tensor):
        names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        sizes = ", ".join(f"{name} {getattr(hf_config, name)}" for name in names)
        yield _unfit(_TENSOR, tensor, f"the model's {sizes}", lambda n: _tensor_fits(hf_config, n))
    experts = getattr(hf_config, "num_experts", None)
    if options.expert_parallel_size > 1 and not experts:
        problem = f"{options.expert_parallel_size}, but {hf_config.model_type} models have no experts"
        yield mistake(_EXPERT, problem, "Set it to 1.")
    path = _TENSOR if options.expert_tensor_parallel_size is None else _EXPERT_TENSOR
    wanted = [
        (_PIPELINE, options.pipeline_parallel_size, "num_hidden_layers"),
        (_EXPERT, options.expert_parallel_size, "num_experts"),
        (path, options.expert_tensor_parallel_size or tensor, "moe_intermediate_size"),
    ]
    for path, size, name in wanted:
        count = getattr(hf_config, name, None)
        if count and count % size:
            yield _unfit(path, size, f"the model's {name} {count}", partial(_divides, count))
    if experts and tensor > 1 and not options.sequence_parallel:
        problem = f"a mixture-of-experts model with tensor_parallel_size {tensor} needs it"
        yield mistake("options.sequence_parallel", problem, "Set it to true.", related=[_TENSOR])


def _tensor_fits(hf_config: PreTrainedConfig, size: int) -> bool:
    """Several ranks may share a key-value head: they gather what the projections give, and each attends for its own."""
    heads = heads_of(hf_config)
    shared = size % heads.num_groups == 0 and 2 * heads.num_groups * heads.head_size % size == 0
    return (
        hf_config.num_attention_heads % size == 0
        and (heads.num_groups % size == 0 or shared)
        and hf_config.intermediate_size % size == 0
    )


def _unfit(path: str, size: int, what: str, fits: Callable[[int], bool]) -> Mistake:
    fitting = ", ".join(str(n) for n in range(1, 2 * size + 1) if fits(n))
    return mistake(path, f"{size} does not divide {what}", f"Sizes that do: {fitting}.")


def _of_workers(policy: PolicyConfig) -> Iterator[Mistake]:
    options, workers = policy.options, policy.num_workers
    replica = math.prod(replica_sizes(policy).values())
    if workers % replica:
        product = " x ".join(f"{path.rpartition('.')[2]} {size}" for path, size in replica_sizes(policy).items())
        problem = f"{workers}, but one replica of the model takes {product} = {replica} workers"
        multiple = replica * max(1, round(workers / replica))
        fix = f"Set it to {multiple} or another multiple of {replica}, or use smaller sizes."
        yield mistake("num_workers", problem, fix, related=list(replica_sizes(policy)))
    expert_tensor = options.expert_tensor_parallel_size or policy.tensor_parallel_size
    experts = options.expert_parallel_size * expert_tensor * options.pipeline_parallel_size
    if workers % experts:
        problem = (
            f"{workers}, but the experts of one replica take expert_parallel_size {options.expert_parallel_size} x "
            f"expert_tensor_parallel_size {expert_tensor} x pipeline_parallel_size {options.pipeline_parallel_size} = "
            f"{experts} workers"
        )
        fix = f"Set it to a multiple of {experts}, or options.expert_parallel_size to a divisor of what there is."
        yield mistake("num_workers", problem, fix, related=[_EXPERT])


def _divides(count: int, size: int) -> bool:
    return count % size == 0
