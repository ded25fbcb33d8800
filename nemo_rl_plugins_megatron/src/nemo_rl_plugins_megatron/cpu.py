"""Everything that megatron-core needs on a machine without a GPU, and nothing else.

Megatron-core asks CUDA for its device, allocates small tensors on `"cuda"`, compares tensor types with
`"torch.cuda.FloatTensor"` and orders work on streams. Inside `without_gpu()` those questions get the CPU's answer. The
computation itself is the one that runs on a GPU: same modules, same schedules, same optimizers, over gloo.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["NO_FUSIONS", "attend_end_on_cpu", "seed_rng_tracker", "without_compiler", "without_gpu"]

_CPU = torch.device("cpu")

NO_FUSIONS = {
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
}
"""Megatron-core's fused kernels are compiled for GPUs, or written in CUDA."""


class _CpuForCuda(TorchFunctionMode):
    """Allocations on `"cuda"` land on the CPU, and a CPU tensor says that it has a CUDA type."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0]
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": _CPU}
        out = func(*args, **kwargs)
        if func is Tensor.type and isinstance(out, str):
            return out.replace("torch.", "torch.cuda.", 1)
        return out


class _Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None: ...


_STREAM = _Stream()


def _plain(tensor: object, as_numpy: bool = False, **kwargs: object) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


@contextmanager
def _replaced(module: object, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def without_gpu(device: torch.device) -> Iterator[None]:
    """Run megatron-core on the CPU; on any other device nothing is changed."""
    if device.type != "cpu":
        yield
        return
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    answers: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "synchronize": lambda *args: None,
        "Stream": _Stream,
        "stream": lambda stream: _STREAM,
        "current_stream": lambda *args: _STREAM,
        "default_stream": lambda *args: _STREAM,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(_replaced(torch.cuda, name, answer))
        # Recomputed activations restore the RNG of the device; the CPU's own is restored beside it.
        stack.enter_context(_replaced(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.empty(0)))
        stack.enter_context(_replaced(random, "_set_cuda_rng_state", lambda *args, **kwargs: None))
        # Numbers of tokens per expert become plain numbers on their way from the GPU; here they never make it.
        stack.enter_context(_replaced(token_dispatcher, "maybe_move_tensor_to_cpu", _plain))
        stack.enter_context(_CpuForCuda())
        yield


@contextmanager
def without_compiler() -> Iterator[None]:
    """Import megatron-core without the compiler of its fused kernels, which takes seconds to load; CPUs use none."""
    if torch.cuda.is_available():
        yield
        return
    with _replaced(torch, "compile", lambda function=None, **kwargs: function or (lambda decorated: decorated)):
        yield


def seed_rng_tracker(device: torch.device, seed: int) -> None:
    """Make the RNG tracker that layers ask for. Dropout is off, so on a CPU it need not draw anything."""
    from megatron.core.tensor_parallel import random

    if device.type == "cpu":
        random.initialize_rng_tracker(inference_rng_tracker=True)
    else:
        random.model_parallel_cuda_manual_seed(seed)


def attend_end_on_cpu(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with query [B, H, T, E] to key and value [B, G, S, E], the last T of S places; returns [B, H, T, E].

    It is `attention.attend_end` where the kernel takes a mask and shared heads, but does not know that form by name.
    """
    places, seen = query.shape[2], key.shape[2]
    mask = torch.ones(places, seen, dtype=torch.bool).tril(seen - places)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
