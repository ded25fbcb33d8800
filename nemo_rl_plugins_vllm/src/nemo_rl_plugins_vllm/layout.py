"""How many devices one engine takes, and which. An engine lives on one machine: so do the pieces of a refit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nemo_rl_core.errors import ConfigError

if TYPE_CHECKING:
    from nemo_rl_plugins_vllm.config import VLLMConfig

__all__ = ["check_one_machine", "executor", "num_devices", "visible_devices"]

_BEYOND = frozenset(
    {"nnodes", "node_rank", "data_parallel_backend", "data_parallel_address", "data_parallel_hybrid_lb"}
)
"""Engine arguments with which vLLM spreads an engine over machines."""


def num_devices(options: VLLMConfig) -> int:
    """Devices of one engine: a worker of vLLM stands on each."""
    return options.tensor_parallel_size * options.pipeline_parallel_size * options.data_parallel_size


def check_one_machine(options: VLLMConfig) -> None:
    """Refuse an engine whose workers stand on several machines.

    Raises:
        ConfigError: Says what to set instead.
    """
    beyond = sorted(_BEYOND & set(options.engine_args))
    if options.distributed_executor_backend == "ray":
        what = "distributed_executor_backend is ray"
    elif beyond:
        what = f"engine_args.{beyond[0]} is set"
    else:
        return
    raise ConfigError(
        f"generation.options.{what}: such an engine could never be refitted, because its workers take new weights from "
        "the memory of one machine. Remove it; vLLM then starts its workers as processes. For several machines start "
        "several engines, each on one of them: cluster.launcher: ray with generation.num_workers or "
        "cluster.roles.generation."
    )


def visible_devices(device: str, options: VLLMConfig) -> Mapping[str, str]:
    """Variables by which vLLM, which counts devices from 0, takes those from `device` on.

    Raises:
        ConfigError: There are fewer than the engine takes.
    """
    first, count = int(device.partition(":")[2] or 0), num_devices(options)
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name for name in given.split(",") if name] if given else [str(i) for i in range(_num_gpus())]
    mine = names[first : first + count]
    if len(mine) < count:
        raise ConfigError(
            f"generation.options: an engine of tensor_parallel_size {options.tensor_parallel_size}, "
            f"pipeline_parallel_size {options.pipeline_parallel_size} and data_parallel_size "
            f"{options.data_parallel_size} takes {count} GPUs; from {device} on there are {len(mine)} (visible here: "
            f"{', '.join(names) or 'none'}). Make the engine smaller, or give it more GPUs."
        )
    return {} if first == 0 else {"CUDA_VISIBLE_DEVICES": ",".join(mine)}


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def executor(options: VLLMConfig) -> str | None:
    """How vLLM is to start its workers. Left to itself it takes Ray wherever it finds itself in one of Ray's actors."""
    several = options.tensor_parallel_size * options.pipeline_parallel_size > 1
    return "mp" if several else options.distributed_executor_backend
