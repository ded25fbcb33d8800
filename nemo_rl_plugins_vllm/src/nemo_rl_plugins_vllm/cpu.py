"""What only vLLM without a GPU needs: threads that share the machine, packed weights, pipelines, and its sleep.

vLLM's own sleep mode rests on the allocator of CUDA. On the CPU we take the pages of the KV cache back and give new
ones, behind the tensors that the attention layers hold.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


__all__ = [
    "KV_CACHE_GIB",
    "environment",
    "forget_expert_kernels",
    "keep_expert_kernels",
    "prepare_pipeline",
    "release_cache",
    "repack_tied_heads",
    "restore_cache",
]

KV_CACHE_GIB = 1.0
"""Of `kv_cache_gib`, where vLLM itself would take most of the machine."""
_SPIN_COUNT = "2000"
_SIZES = "_nemo_rl_cache_sizes"


def environment(num_threads: int | None, *, single: bool) -> dict[str, str]:
    """Variables for vLLM's processes, as far as the user has not set them.

    vLLM binds each worker to the cores of one memory node, and refuses a second worker on a machine with one; the
    trainer in the same machine would have to wait for those cores. So nothing is bound. With nothing to bind, a lone
    worker needs no process of its own beside the engine's, which it has only to have its threads bound: without it the
    engine starts faster and saves a hop in each step.

    Threads that wait for each other spin for milliseconds by default, on cores that trainer, episodes and rewards need;
    they spin shortly instead. Not to spin at all is slower again.

    Args:
        num_threads: Of each worker; None leaves the number to PyTorch.
        single: Whether an engine has one worker.
    """
    wanted = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    unbound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind") == "nobind"
    if unbound and single:
        wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if unbound and "OMP_WAIT_POLICY" not in os.environ:
        wanted["GOMP_SPINCOUNT"] = _SPIN_COUNT
    wanted = {name: value for name, value in wanted.items() if name not in os.environ}
    if num_threads is not None:
        wanted["OMP_NUM_THREADS"] = str(num_threads)
    return wanted


def repack_tied_heads(model: nn.Module) -> None:
    """Give a head that shares its weight with the embedding the new weights too.

    The CPU's matrix product reads a packed copy, which is made when a layer is loaded; a tied head is not loaded.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    embeddings = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    for head in embeddings:
        tied = any(other is not head and other.weight is head.weight for other in embeddings)
        if isinstance(head, ParallelLMHead) and tied:
            head.quant_method.process_weights_after_loading(head)


def forget_expert_kernels(model: nn.Module) -> list[tuple[Any, Any]]:
    """Let the next load of each layer of experts make its kernel anew; returns what `keep_expert_kernels` takes.

    The CPU's grouped matrix product reads the experts padded and packed. vLLM does both only where it makes the kernel,
    and at a reload it takes the kernel that is there: the plain weights would be read as if they were packed.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    kernels = []
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod) and method.moe_kernel is not None:
            kernels.append((method, method.moe_kernel))
            method.moe_kernel = None
    return kernels


def keep_expert_kernels(kernels: list[tuple[Any, Any]]) -> None:
    """Give the layers that were not loaded, since the update was broken off, their kernels back."""
    for method, kernel in kernels:
        if method.moe_kernel is None:
            method.moe_kernel = kernel


def prepare_pipeline(model_runner: Any) -> None:
    """Make the buffers in which a later stage of a pipeline receives hidden states.

    vLLM makes them in its trial run, which it leaves out on a CPU when nothing is compiled; the first step would fail.
    """
    from vllm.distributed.parallel_state import get_pp_group

    if get_pp_group().is_first_rank or model_runner.intermediate_tensors is not None:
        return
    model_runner.intermediate_tensors = model_runner.model.make_empty_intermediate_tensors(
        batch_size=model_runner.max_num_tokens, dtype=model_runner.model_config.dtype, device=model_runner.device
    )


def _storages(model_runner: Any) -> list[Any]:
    storages = {}
    for cache in model_runner.kv_caches:
        for tensor in cache if isinstance(cache, list | tuple) else [cache]:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
    return list(storages.values())


def release_cache(model_runner: object) -> int:
    """Free the memory of the KV cache; returns the number of bytes."""
    sizes = []
    for storage in _storages(model_runner):
        sizes.append(storage.nbytes())
        storage.resize_(0)
    setattr(model_runner, _SIZES, sizes)
    return sum(sizes)


def restore_cache(model_runner: object) -> None:
    """Give the KV cache its memory again, with zeros in it."""
    import torch

    for storage, size in zip(_storages(model_runner), getattr(model_runner, _SIZES, ()), strict=True):
        storage.resize_(size)
        torch.empty(0, dtype=torch.uint8).set_(storage).zero_()
    setattr(model_runner, _SIZES, ())
