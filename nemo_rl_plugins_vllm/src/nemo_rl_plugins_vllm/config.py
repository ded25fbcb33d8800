"""Options of the engine: `generation.options` in a configuration."""

from __future__ import annotations

from typing import Any, Literal

from attrs import Factory, field, frozen
from attrs.validators import ge, gt, in_, le, optional

__all__ = ["VLLMConfig"]


@frozen(kw_only=True)
class VLLMConfig:
    """Options of the `vllm` generation backend. None leaves vLLM's own default."""

    tensor_parallel_size: int = field(default=1, validator=ge(1))
    """Devices that share each layer of the model."""
    pipeline_parallel_size: int = field(default=1, validator=ge(1))
    """Devices that share the model by layers."""
    data_parallel_size: int = field(default=1, validator=ge(1))
    """Copies of the engine; requests go to the one with the least to do."""
    distributed_executor_backend: Literal["mp", "ray"] | None = None
    """How vLLM starts its workers. None is processes if there are several; `ray` is refused, since workers on other
    machines could not be refitted."""
    max_num_seqs: int | None = field(default=None, validator=optional(ge(1)))
    """Sequences decoded together by one engine."""
    max_num_batched_tokens: int | None = field(default=None, validator=optional(ge(1)))
    """Tokens of one step, prompts and decoded ones together. Without a GPU at least those of a whole sequence."""
    kv_cache_gib: float | None = field(default=None, validator=optional(gt(0)))
    """GiB of KV cache for each device. None is 1 without a GPU, and with one what `gpu_memory_utilization` leaves."""
    gpu_memory_utilization: float | None = field(default=None, validator=optional([gt(0), le(1)]))
    """Share of a GPU's memory for weights and KV cache, if `kv_cache_gib` is not set; it must be free at the start.
    None is 0.5 where a trainer shares the GPU, and 0.9 elsewhere."""
    kv_cache_dtype: str | None = None
    """Precision of the KV cache, such as `fp8`; None is that of the model."""
    quantization: str | None = None
    """Quantise the weights as they are loaded, such as `fp8`. The policy that samples is then not exactly the one that
    is trained: correct the importance."""
    enable_prefix_caching: bool = True
    """Compute a shared prompt, or the earlier turns of a conversation, once."""
    enforce_eager: bool | None = None
    """Run without compiling and without CUDA graphs; slower, and starts faster. None is true without a GPU."""
    load_format: str = "auto"
    """How the first weights are read; `dummy` makes random ones, for a run that refits before it samples."""
    sleep_level: int = field(default=1, validator=in_((0, 1, 2)))
    """What `sleep` gives back: 1 the KV cache, with the weights moved to the host; 2 the weights too, which the next
    refit must bring again; 0 nothing. Without a GPU the KV cache is given back at 1 and 2."""
    kv_cache_on_update: Literal["keep", "recompute"] = "keep"
    """At a weight update with requests in flight: go on with their KV cache as old weights filled it, or compute it
    again with the new ones."""
    weight_transport: Literal["auto", "shared_memory", "cuda_ipc"] = "auto"
    """How new weights reach vLLM's processes. auto is CUDA IPC from a GPU to a lone worker, else shared memory."""
    refit_chunk_mib: int = field(default=256, validator=ge(1))
    """MiB of weights handed over at a time; two such pieces are held at once."""
    num_threads: int | None = field(default=None, validator=optional(ge(1)))
    """CPU threads of each of vLLM's workers (without a GPU). None is what the launcher gives, or else PyTorch's."""
    import_modules: tuple[str, ...] = ()
    """Modules that each of vLLM's processes imports at its start, such as one that registers a model with vLLM."""
    engine_args: dict[str, Any] = Factory(dict)
    """Further arguments of vLLM's `AsyncEngineArgs`, by name; none that is an option here."""
    allow_untested_version: bool = False
    """Run with a version of vLLM that this package was not tested with."""
    start_timeout_s: float = field(default=900.0, validator=gt(0))
    """Deadline of starting the engine, also where the launcher's own is shorter."""
    refit_timeout_s: float = field(default=600.0, validator=gt(0))
    """Deadline of a weight update, of `sleep` and of `wake`."""
