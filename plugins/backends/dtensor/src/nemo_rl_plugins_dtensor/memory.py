"""Memory that a worker of the backend will hold, estimated from the model's shapes."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_core.protocols.training_backend import ModelMemory
from nemo_rl_plugins_dtensor.config import DTensorConfig, LoRAConfig
from nemo_rl_plugins_dtensor.lora import DEFAULT_RANK
from nemo_rl_plugins_dtensor.parallel import tensor_plan

if TYPE_CHECKING:
    from nemo_rl_core.schema import PolicyConfig

__all__ = ["model_memory"]

_WHOLE, _SPLIT = 5 / 17, 12 / 17
"""Of a layer's activations, what tensor-parallel ranks each hold and what they share (arXiv:2205.05198 eq. 1)."""


def model_memory(policy: PolicyConfig, model: object) -> ModelMemory:
    """See `TrainingBackend.memory`."""
    options: DTensorConfig = policy.options
    tp = policy.tensor_parallel_size
    dp = max(1, policy.num_workers // tp)
    sizes = _sizes(model, tp)
    total = sum(sizes.values())
    bfloat16 = policy.precision == "bfloat16"
    computes = 2 if bfloat16 else 4
    masters = bfloat16 and options.master_weights and policy.trained
    lora = options.lora if policy.trained else None
    trained = _adapter_size(model, lora) if lora else total if policy.trained else 0.0
    frozen = total if lora else total - trained
    exact = 4 if masters else computes  # of what the optimizer steps, of its gradient and of its state
    sharded = dp > 1
    shards = exact if sharded else computes  # FSDP keeps the float32 weights alone, and rounds what it gathers
    computing = 0.0
    if sharded:
        # Blocks are gathered with the one that follows; what stands outside of them stays through the pass.
        blocks = _blocks(sizes)
        computing = computes * (total - sum(blocks.values()) + 2 * max(blocks.values(), default=0.0))
        computing += exact * trained  # gradients of all but the last micro-batch are not reduced
    elif masters:
        computing = computes * trained  # of one micro-batch, before it is added to the float32 ones
    return ModelMemory(
        weights=(frozen * computes + trained * shards) / dp,
        gradients=trained * exact / dp,
        optimizer=(trained * exact * _num_states(policy) + (trained * 4 if masters and not sharded else 0)) / dp,
        computing=computing,
        activation_share=_WHOLE + _SPLIT / tp,
        has_initial_weights=lora is not None,
    )


def _num_states(policy: PolicyConfig) -> int:
    """Tensors of the optimizer for each one that it steps."""
    if policy.optimizer.name.rpartition(".")[2] == "SGD":
        return int(bool(policy.optimizer.options.get("momentum")))
    return 2


def _sizes(model: Any, tp: int) -> dict[str, float]:
    """Elements of each parameter on one tensor-parallel rank, tied ones once."""
    parts = dict.fromkeys((name for name, _ in model.named_parameters()), 1)
    if tp > 1:
        styles = tensor_plan(model, tp)
        prefix = f"{model.base_model_prefix}."
        for name in parts:
            module, _, kind = name.removeprefix(prefix).rpartition(".")
            style = next((s for pattern, s in styles.items() if fnmatch.fnmatch(module, pattern)), None)
            by_columns = type(style).__name__ == "ColwiseParallel"
            if by_columns or (type(style).__name__ == "RowwiseParallel" and kind == "weight"):
                parts[name] = tp
    return {name: p.numel() / parts[name] for name, p in model.named_parameters()}


def _blocks(sizes: dict[str, float]) -> dict[str, float]:
    """Elements of each block of the decoder."""
    found: dict[str, float] = {}
    for name, size in sizes.items():
        if match := re.match(r"(.*\.\d+)\.", name):
            block = re.sub(r"(\.\d+)\..*", r"\1", match[1])
            found[block] = found.get(block, 0.0) + size
    return found


def _adapter_size(model: Any, lora: LoRAConfig) -> float:
    """Elements of all adapters, and of the scalar head that is trained with them."""
    rank, targets = lora.rank or DEFAULT_RANK, lora.target_modules
    if lora.path is not None and (file := Path(lora.path).expanduser() / "adapter_config.json").is_file():
        saved = json.loads(file.read_text(encoding="utf-8"))
        rank, targets = int(saved["r"]), tuple(saved["target_modules"])
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    score = getattr(model, "score", None)
    count = 0.0 if score is None else float(sum(p.numel() for p in score.parameters()))
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or id(module) in ends or module is score:
            continue
        if not targets or name.rpartition(".")[2] in targets or any(name.endswith(f".{t}") for t in targets):
            count += rank * sum(weight.shape)
    return count
