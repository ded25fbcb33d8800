"""Our configuration as vLLM's engine arguments, and the environment that its processes start in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import attrs

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.machine.starting import starting
from nemo_rl_plugins_vllm.config import VLLMConfig
from nemo_rl_plugins_vllm.cpu import KV_CACHE_GIB, environment
from nemo_rl_plugins_vllm.layout import check_one_machine, executor, visible_devices
from nemo_rl_plugins_vllm.plugin import HOST_VARIABLE, IMPORT_VARIABLE, TRANSFER_BACKEND

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs

    from nemo_rl_core.protocols.launcher import WorkerContext

__all__ = ["engine_arguments", "has_gpu", "starting_environment"]

_GIB = 1 << 30
_OURS = frozenset(
    {
        "model",
        "dtype",
        "max_model_len",
        "logprobs_mode",
        "skip_tokenizer_init",
        "enable_sleep_mode",
        "kv_cache_memory_bytes",
        "weight_transfer_config",
        "worker_extension_cls",
    }
)
"""Arguments that the backend depends on."""
_SHARE, _SHARE_BESIDE_TRAINER, _LEAST_SHARE = 0.9, 0.5, 0.01
"""Of a GPU's memory."""
_OF_PIECES = ("enable_chunked_prefill", "long_prefill_token_threshold")
"""Arguments that cut prompts into pieces."""


def has_gpu() -> bool:
    """Whether the installed vLLM drives a GPU."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def engine_arguments(
    options: VLLMConfig, *, folder: str, precision: str, max_length: int, seed: int, gpu: bool, shares_device: bool
) -> AsyncEngineArgs:
    """VLLM's arguments.

    Args:
        options: `generation.options`.
        folder: Of the checkpoint, or its hub name.
        precision: "float32" or "bfloat16".
        max_length: Tokens of prompt and completion together.
        seed: Of requests that have none.
        gpu: Whether vLLM drives a GPU.
        shares_device: Whether a trainer holds memory on the same devices.

    Raises:
        ConfigError: `engine_args` has a name that vLLM does not know, or one that is set elsewhere; the engine would
            stand on several machines; without a GPU, prompts would be cut into pieces.
    """
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig

    check_one_machine(options)
    _check_further(options.engine_args, {f.name for f in fields(AsyncEngineArgs)})
    if not gpu:
        _check_whole_prompts(options, max_length)
    kv_cache_gib = options.kv_cache_gib or (None if gpu else KV_CACHE_GIB)
    arguments: dict[str, Any] = {
        "model": folder,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": precision,
        "seed": seed & 0x7FFFFFFF,
        "max_model_len": max_length,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "data_parallel_size": options.data_parallel_size,
        "distributed_executor_backend": executor(options),
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "gpu_memory_utilization": _memory_share(options, shares_device=shares_device),
        "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * _GIB),
        "kv_cache_dtype": options.kv_cache_dtype,
        "quantization": options.quantization,
        "enable_prefix_caching": options.enable_prefix_caching,
        "enforce_eager": (not gpu) if options.enforce_eager is None else options.enforce_eager,
        "load_format": options.load_format,
        "use_tqdm_on_load": False,
        "enable_sleep_mode": gpu and options.sleep_level > 0,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "nemo_rl_plugins_vllm.worker.WorkerExtension",
        "weight_transfer_config": WeightTransferConfig(backend=TRANSFER_BACKEND),
        "disable_log_stats": True,
        "enable_log_requests": False,
    }
    if not gpu:
        arguments["enable_chunked_prefill"] = False
    given = {name: value for name, value in arguments.items() if value is not None}
    return AsyncEngineArgs(**{**given, **options.engine_args})


def _check_further(given: Mapping[str, Any], known: set[str]) -> None:
    own = {f.name for f in attrs.fields(VLLMConfig)}
    for name in given:
        if name in own:
            raise ConfigError(
                f"generation.options.engine_args.{name}: this is an option of the backend. Set "
                f"generation.options.{name} instead."
            )
        if name in _OURS:
            raise ConfigError(
                f"generation.options.engine_args.{name}: this backend sets it itself. Remove it; what can be chosen "
                "are the fields of generation and generation.options."
            )
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"generation.options.engine_args.{name}: vLLM has no such engine argument.{hint}")


def _memory_share(options: VLLMConfig, *, shares_device: bool) -> float:
    """Of each GPU's memory.

    VLLM refuses to start where less is free, also with a KV cache of a given size, which it takes whatever this is.
    """
    if options.kv_cache_gib is not None:
        return _LEAST_SHARE
    return options.gpu_memory_utilization or (_SHARE_BESIDE_TRAINER if shares_device else _SHARE)


def _check_whole_prompts(options: VLLMConfig, max_length: int) -> None:
    """Without a GPU a prompt must be computed in one step.

    One that is cut into pieces takes back a draw of its seeded generator, which generators of a CPU cannot do; vLLM's
    engine ends with it.
    """
    budget = options.max_num_batched_tokens
    if budget is not None and budget < max_length:
        least = max(max_length, options.max_num_seqs or 0)
        raise ConfigError(
            f"generation.options.max_num_batched_tokens is {budget}, and a sequence may have {max_length} tokens. "
            f"Without a GPU vLLM cannot cut a prompt into pieces. Set it to {least} or more, leave it out, or lower "
            "policy.max_sequence_length."
        )
    for name in _OF_PIECES:
        if options.engine_args.get(name):
            raise ConfigError(
                f"generation.options.engine_args.{name}: without a GPU vLLM cannot cut a prompt into pieces. Remove it."
            )


@contextlib.contextmanager
def starting_environment(options: VLLMConfig, context: WorkerContext, *, gpu: bool) -> Iterator[None]:
    """The environment in which vLLM's processes start; put back afterwards.

    They do not run the main module again: a script without `if __name__ == "__main__":` may start an engine.
    """
    values = {IMPORT_VARIABLE: ",".join(options.import_modules), HOST_VARIABLE: str(os.getpid())}
    if gpu:
        values |= visible_devices(context.device, options)
    else:
        threads = [n for n in (options.num_threads, context.num_threads) if n is not None]
        single = options.tensor_parallel_size * options.pipeline_parallel_size == 1
        values |= environment(
            min(threads, default=None), single=single and options.distributed_executor_backend is None
        )
    with starting(values):
        yield
