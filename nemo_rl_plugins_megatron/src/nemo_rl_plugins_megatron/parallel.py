"""The ranks of one model, and this process's place among them.

Megatron-core keeps its process groups in globals of the process, so all models of one process share a layout. That is
no limit in a run: several workers of a role have a process each, and models that share a process are alone in it.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_rl_core.errors import ConfigError
from nemo_rl_plugins_megatron._megatron import parallel_state

if TYPE_CHECKING:
    from nemo_rl_core.protocols.launcher import WorkerContext
    from nemo_rl_core.schema import PolicyConfig
    from nemo_rl_plugins_megatron.config import MegatronConfig

__all__ = ["Ranks"]

_users: list[Ranks] = []
"""Models of this process that use megatron-core's process groups."""
_made: list[str] = []
"""What of "world" and "groups" the first of them made, so that the last one takes it down."""


class Ranks:
    """Joins the process group and lays the ranks out.

    Args:
        config: Of the model.
        options: Of the backend.
        context: Rank, world size and rendezvous.
        device: Of this rank.

    Raises:
        ConfigError: This process is in another group already.
    """

    def __init__(
        self, config: PolicyConfig, options: MegatronConfig, context: WorkerContext, device: torch.device
    ) -> None:
        self.device = device
        self._join_world(context, device)
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=config.tensor_parallel_size,
                pipeline_model_parallel_size=options.pipeline_parallel_size,
                context_parallel_size=options.context_parallel_size,
                expert_model_parallel_size=options.expert_parallel_size,
                expert_tensor_parallel_size=options.expert_tensor_parallel_size,
                distributed_timeout_minutes=max(1, round(context.timeout_s / 60)),
                create_gloo_process_groups=False,
            )
            _made.append("groups")
        _users.append(self)
        state = parallel_state
        self.is_first = dist.get_rank() == 0
        self.dp_size = state.get_data_parallel_world_size()
        self.tp_group: Any
        self.tp_size: int
        self.tp_group, self.tp_size = (
            state.get_tensor_model_parallel_group(),
            state.get_tensor_model_parallel_world_size(),
        )
        self.tp_index: int = state.get_tensor_model_parallel_rank()
        self.pp_group, self.pp_size = (
            state.get_pipeline_model_parallel_group(),
            state.get_pipeline_model_parallel_world_size(),
        )
        self.pp_index = state.get_pipeline_model_parallel_rank()
        self.cp_group, self.cp_size = state.get_context_parallel_group(), state.get_context_parallel_world_size()
        self.cp_index = state.get_context_parallel_rank()
        self.ep_group, self.ep_size = (
            state.get_expert_model_parallel_group(),
            state.get_expert_model_parallel_world_size(),
        )
        self.ep_index = state.get_expert_model_parallel_rank()
        self.etp_group = state.get_expert_tensor_parallel_group()
        self.etp_size = state.get_expert_tensor_parallel_world_size()
        self.etp_index = state.get_expert_tensor_parallel_rank()

    @staticmethod
    def _join_world(context: WorkerContext, device: torch.device) -> None:
        """Join the process group, if it is not there already."""
        if dist.is_initialized():
            if dist.get_world_size() != context.world_size:
                raise ConfigError(
                    f"This process is one of {dist.get_world_size()} in a torch.distributed group already, but the "
                    f"model of role {context.role!r} has {context.world_size} workers. Megatron-core allows one layout "
                    "in a process; give the roles processes of their own."
                )
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        alone = context.world_size == 1
        rendezvous: dict[str, Any] = (
            {"store": dist.HashStore()}
            if alone
            else {"init_method": f"tcp://{context.master_addr}:{context.master_port}"}
        )
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=context.rank,
            world_size=context.world_size,
            timeout=datetime.timedelta(seconds=context.timeout_s),
            **rendezvous,
        )
        _made.append("world")

    @property
    def is_last_stage(self) -> bool:
        """Whether the output layer stands here."""
        return bool(self.pp_index == self.pp_size - 1)

    def any_rank(self, flag: Tensor) -> bool:
        """Whether `flag` [] is True on any rank."""
        found = flag.float().to(self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found.item())

    def from_last_stage(self, value: object) -> Any:
        """What the last pipeline stage passes; the other stages pass anything."""
        if self.pp_size == 1:
            return value
        box = [value]
        source = dist.get_process_group_ranks(self.pp_group)[-1]
        dist.broadcast_object_list(box, src=source, group=self.pp_group, device=self.device)
        return box[0]

    def from_stage(self, stage: int, tensors: Sequence[Tensor]) -> None:
        """Fill tensors [...] with those of a pipeline stage, in place."""
        if self.pp_size == 1:
            return
        source = dist.get_process_group_ranks(self.pp_group)[stage]
        for tensor in tensors:
            dist.broadcast(tensor, src=source, group=self.pp_group)

    @staticmethod
    def gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
        """Return the tensors [...] of all ranks of a group, all of one shape."""
        if dist.get_world_size(group) == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return parts

    def close(self) -> None:
        """Leave the process group when the last model of this process does."""
        if self in _users:
            _users.remove(self)
        if _users:
            return
        if "groups" in _made:
            parallel_state.destroy_model_parallel()
        if "world" in _made and dist.is_initialized():
            dist.destroy_process_group()
        _made.clear()
