"""Settings of the generation engine."""

from __future__ import annotations

from typing import Any, Literal

from attrs import field, frozen

from nemo_rl_core.schema.validators import ge, gt, le, optional

__all__ = ["GenerationConfig"]


@frozen(kw_only=True)
class GenerationConfig:
    """The engine that samples, and how it samples."""

    model_name: str | None = None
    """Filled from the policy; do not set it."""
    backend: Any = None
    """Generation backend: name, `dist:name`, `module:attr` or class; None is the installed default."""
    options: Any = field(factory=dict, metadata={"options_of": ("generation_backends", "backend")})
    """Settings of the generation backend, structured by its `config_class`."""
    num_workers: int | None = field(default=None, validator=optional(ge(1)))
    """Engines in processes of their own, each with the whole model. None is one in the driver's process where the
    launcher allows it, or, with `cluster.colocated: false`, as many as `cluster.roles.generation` has room for."""
    max_restarts: int = field(default=3, validator=ge(0))
    """Times in a run that an engine process that died is started again; its rollouts are sampled anew."""
    heartbeat_timeout_s: float = field(default=60.0, validator=gt(0))
    """An engine process that answers nothing for so long hangs, or its machine is gone: it counts as dead."""
    refit_timeout_s: float = field(default=600.0, validator=gt(0))
    """Deadline of one weight sync: of bringing all engines to new weights."""
    call_timeout_s: float = field(default=600.0, validator=gt(0))
    """Deadline of any other call to an engine in a process of its own, but for completions, and of its coming back."""
    precision: Literal["float32", "bfloat16"] | None = None
    """None is the policy's."""
    max_new_tokens: int | None = field(default=None, validator=optional(ge(1)))
    """Tokens of one completion at most; None is 512, or half of `policy.max_sequence_length` if that is less."""
    temperature: float = field(default=1.0, validator=ge(0))
    """Divides the logits; 0 takes the most likely token. Training logprobs are taken at it too."""
    top_p: float = field(default=1.0, validator=[gt(0), le(1)])
    """Sample from the smallest set of tokens with at least this probability."""
    top_k: int = field(default=0, validator=ge(0))
    """Sample from the k most likely tokens; 0 is no limit."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion and stay in it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion, beside the model's own."""
    max_sequence_length: int | None = field(default=None, validator=optional(ge(2)))
    """Tokens of prompt and completion together; None is the policy's."""
