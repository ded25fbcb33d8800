"""The ranks of one model: this process alone, or a mesh of data-parallel by tensor-parallel processes.

Data-parallel ranks shard every parameter (FSDP2); tensor-parallel ranks split the linear layers of a block by
DTensor and hold embeddings, norms and the output layer in full.
"""

from __future__ import annotations

import datetime
import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from nemo_rl_core.errors import ConfigError

if TYPE_CHECKING:
    from nemo_rl_core.protocols.launcher import WorkerContext
    from nemo_rl_core.schema import PolicyConfig
    from nemo_rl_plugins_dtensor.network import PolicyNetwork

__all__ = ["Mesh", "OneProcess", "join", "local_part", "mesh_groups", "tensor_plan", "undivided_heads"]

_STYLES: dict[str, Any] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    # A norm over each head's own dimension: activations [B, T, heads, D] are split by heads.
    "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
}
_LEFT_WHOLE = frozenset({"embedding_rowwise"})
"""transformers before 5.20 names the embedding in every plan; its weight may be the head's too, and stays whole."""
_LLAMA_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part [...] of a distributed tensor, sharing its memory; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class OneProcess:
    """The whole model on one device."""

    dp_size = 1
    tp_size = 1
    is_first = True
    layout = "1x1"
    file_name = "trainer.pt"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def shard(self, network: PolicyNetwork, *, bfloat16: bool) -> None:
        """Split the network over the ranks."""

    def expect_reduction(self, network: PolicyNetwork, *, last: bool) -> None:
        """Say whether gradients are to be reduced in the next backward pass."""

    def reshard(self, network: PolicyNetwork) -> None:
        """Give back weights gathered by a forward pass that no backward pass follows."""

    def squared_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """[] float32 squared L2 norm over all ranks."""
        return _local_squares(gradients, self.device)

    def as_parameter(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient [...] summed over ranks that each hold a part of the sum."""
        return gradient

    def any_rank(self, flag: Tensor) -> Tensor:
        """[] float32: more than 0 if `flag` [] is True on any rank."""
        return flag.float()

    def full(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the whole of a parameter [...] in `dtype`; every rank calls it."""
        return tensor.detach().to(dtype)

    def close(self) -> None:
        """Leave the process group."""


def _local_squares(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the sum [] of the squares of this rank's parts of all gradients."""
    parts = [part for g in gradients if (part := local_part(g)).numel()]
    if not parts:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(parts, 2, dtype=torch.float32)
    return torch.stack(list(norms)).square().sum()


class Mesh(OneProcess):
    """`world_size / tensor_parallel_size` data-parallel by `tensor_parallel_size` tensor-parallel ranks.

    Args:
        device: Of this rank.
        context: Rank, world size and rendezvous.
        tensor_parallel_size: Neighbouring ranks that hold one replica together.

    Raises:
        ConfigError: The sizes do not divide.
    """

    def __init__(self, device: torch.device, context: WorkerContext, *, tensor_parallel_size: int) -> None:
        super().__init__(device)
        world, tp_size = context.world_size, tensor_parallel_size
        if world % tp_size:
            raise ConfigError(
                f"policy.num_workers is {world}, which policy.tensor_parallel_size {tp_size} does not divide. "
                f"Use {tp_size * max(1, world // tp_size)} workers or another tensor_parallel_size."
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{context.master_addr}:{context.master_port}",
            rank=context.rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=context.timeout_s),
        )
        mesh = init_device_mesh(device.type, (world // tp_size, tp_size), mesh_dim_names=("dp", "tp"))
        self.dp: DeviceMesh = mesh["dp"]
        self.tp: DeviceMesh = mesh["tp"]
        self.dp_size = self.dp.size()
        self.tp_size = tp_size
        self.is_first = context.rank == 0
        self.layout = f"{self.dp_size}x{tp_size}"
        self.file_name = f"trainer-rank{context.rank}.pt"

    def shard(self, network: PolicyNetwork, *, bfloat16: bool) -> None:
        """Split the network over the ranks.

        Args:
            network: Equal on every rank.
            bfloat16: Compute in bfloat16 while the sharded weights and reduced gradients are float32.

        Raises:
            ConfigError: The model cannot be split as asked.
        """
        if self.tp.size() > 1:
            plan = tensor_plan(network.model, self.tp.size())
            parallelize_module(network.model.base_model, self.tp, plan, src_data_rank=None)
        if self.dp_size == 1:
            return
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32 if bfloat16 else None
        )
        blocks = set(getattr(network.model, "_no_split_modules", None) or ())
        for module in network.modules():
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=self.dp, mp_policy=policy)
        fully_shard(network, mesh=self.dp, mp_policy=policy)
        for module in network.modules():
            if isinstance(module, FSDPModule):
                # Losses come divided by the global count: gradients are summed over ranks, not averaged.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def expect_reduction(self, network: PolicyNetwork, *, last: bool) -> None:
        """Reduce gradients only in the backward pass of the last micro-batch."""
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
            network.set_is_last_backward(last)

    def reshard(self, network: PolicyNetwork) -> None:
        """Give back weights gathered by a forward pass that no backward pass follows."""
        if isinstance(network, FSDPModule):
            network.reshard()

    def squared_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """[] float32 squared L2 norm over all ranks."""
        split = [g for g in gradients if self._is_split(g)]
        rest = [g for g in gradients if not self._is_split(g)]
        total = _local_squares(split, self.device)
        if self.tp.size() > 1:
            dist.all_reduce(total, group=self.tp.get_group())
        total = total + _local_squares(rest, self.device)
        if self.dp_size > 1:
            dist.all_reduce(total, group=self.dp.get_group())
        return total

    def as_parameter(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient [...] summed over ranks that each hold a part of the sum (norms of single heads)."""
        if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
            return gradient.redistribute(placements=parameter.placements)
        return gradient

    def _is_split(self, gradient: Tensor) -> bool:
        """Return whether tensor-parallel ranks hold different parts of a gradient [...]."""
        if not isinstance(gradient, DTensor):
            return False
        names = gradient.device_mesh.mesh_dim_names or ()
        return "tp" in names and gradient.placements[names.index("tp")].is_shard()

    def any_rank(self, flag: Tensor) -> Tensor:
        """[] float32: more than 0 if `flag` [] is True on any rank."""
        found = flag.float()
        dist.all_reduce(found)
        return found

    def full(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the whole of a parameter [...] in `dtype`, gathered from all ranks."""
        found = tensor.detach().to(dtype)
        return found.full_tensor() if isinstance(found, DTensor) else found

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def undivided_heads(config: object, size: int) -> dict[str, int]:
    """Numbers of heads of a Hugging Face text configuration that so many ranks cannot share out."""
    heads = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    return {name: count for name, count in heads.items() if count is not None and count % size}


def tensor_plan(model: Any, size: int) -> dict[str, ParallelStyle]:
    """How each module of the decoder is split, from the plan of its Hugging Face configuration.

    Raises:
        ConfigError: The heads do not divide, or no plan is known.
    """
    config = model.config.get_text_config()
    plan = getattr(config, "base_model_tp_plan", None) or _LLAMA_PLAN
    for name, heads in undivided_heads(config, size).items():
        raise ConfigError(
            f"policy.tensor_parallel_size is {size}, but {type(model).__name__} has {name}={heads}, which it does "
            "not divide."
        )
    modules = [name for name, _ in model.base_model.named_modules()]
    styles: dict[str, ParallelStyle] = {}
    for pattern, style in plan.items():
        if not fnmatch.filter(modules, pattern):
            continue
        if style in _LEFT_WHOLE:
            continue
        if style not in _STYLES:
            raise ConfigError(
                f"{type(model).__name__} splits {pattern} by {style!r}, which the dtensor backend does not know (it "
                f"knows {', '.join(_STYLES)}). Set policy.tensor_parallel_size: 1."
            )
        styles[pattern] = _STYLES[style]()
    if not any(isinstance(style, RowwiseParallel) for style in styles.values()):
        raise ConfigError(
            f"No tensor-parallel plan is known for {type(model).__name__}. Set policy.tensor_parallel_size: 1."
        )
    return styles


def mesh_groups(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return parameters [...] by device mesh: an optimizer's fused kernels take tensors of one mesh at a time."""
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        key = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(key, []).append(parameter)
    return list(groups.values())


def join(config: PolicyConfig, context: WorkerContext, device: torch.device) -> OneProcess:
    """This process's place among the ranks."""
    if context.world_size > 1:
        return Mesh(device, context, tensor_parallel_size=config.tensor_parallel_size)
    if config.tensor_parallel_size > 1:
        raise ConfigError(
            f"policy.tensor_parallel_size is {config.tensor_parallel_size}, but policy.num_workers is 1. Set "
            f"policy.num_workers: {config.tensor_parallel_size} (or a multiple)."
        )
    return OneProcess(device)
