"""Options of the engine: `generation.options` in a configuration."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen
from attrs.validators import ge, gt, optional

__all__ = ["TorchEngineConfig"]


@frozen(kw_only=True)
class TorchEngineConfig:
    """Options of the `torch_engine` generation backend."""

    max_batch_size: int | None = field(default=None, validator=optional(ge(1)))
    """Sequences decoded together. None is 64 on the CPU and 256 on CUDA."""
    max_prefill_tokens: int = field(default=4096, validator=ge(1))
    """Prompt tokens of one prefill pass; a longer prompt goes alone."""
    decoder: Literal["auto", "lean", "attention", "recompute"] = "auto"
    """How the model is run. lean: our own forward for Llama, Mistral, Qwen2 and Qwen3 shapes; attention: the
    Hugging Face module with our attention and cache; recompute: the Hugging Face module without any cache,
    for models whose attention cannot be replaced (slow). auto takes the first that fits the model."""
    cache_dtype: Literal["float32", "bfloat16"] | None = None
    """Of the K/V cache; None is the precision of the model."""
    cuda_graphs: bool = True
    """Replay decoding steps as CUDA graphs (CUDA and the lean decoder only)."""
    packed_weights: bool = True
    """Decode with a second copy of the linear layers' weights, laid out for small batches and made anew after every
    weight update (CPU, float32 and the lean decoder only). False saves its memory."""
    num_threads: int | None = field(default=None, validator=optional(ge(1)))
    """Threads of one operator while generating, on the CPU. None is 1 for models below 0.2 billion parameters, whose
    steps are too short to share, else PyTorch's own number. Never more than the launcher gives the worker."""
    cache_after_refit: Literal["keep", "recompute"] = "keep"
    """What becomes of the cached keys and values of sequences that a weight update finds in flight. keep: later tokens
    attend to what the weights of before computed; recompute: they are computed anew, so that each token is drawn as if
    its whole prefix had been read by the weights that draw it."""
    refit_timeout_s: float = field(default=600.0, validator=gt(0))
    """Deadline for a weight update to get between two steps and finish."""
