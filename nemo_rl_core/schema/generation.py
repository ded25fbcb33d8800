"""Settings of the generation engine."""

from __future__ import annotations

from typing import Any, Literal

from attrs import field, frozen

from nemo_rl_core.schema.validators import ge, gt, le, optional

__all__ = ["GenerationConfig"]


@frozen(kw_only=True)
class GenerationConfig:
    """Engine that samples completions, and its sampling settings."""

    model_name: str | None = None
    """Model of the engine, filled from the policy. Do not set it."""
    backend: Any = None
    """Generation backend: name, `dist:name`, `module:attr` or class. None takes the installed default."""
    options: Any = field(factory=dict, metadata={"options_of": ("generation_backends", "backend")})
    """Settings of the generation backend, structured by its `config_class`."""
    num_workers: int | None = field(default=None, validator=optional(ge(1)))
    """Number of engines in separate processes, each with the whole model. None starts one engine in the driver's
    process if the launcher allows it; with `cluster.colocated: false`, as many as fit `cluster.roles.generation`."""
    max_restarts: int = field(default=3, validator=ge(0))
    """Number of times in a run that a dead engine process is restarted. Its rollouts are sampled again."""
    heartbeat_timeout_s: float = field(default=60.0, validator=gt(0))
    """Seconds of silence after which an engine process counts as dead, because it hangs or its machine is gone."""
    refit_timeout_s: float = field(default=600.0, validator=gt(0))
    """Seconds that loading new weights into all engines may take."""
    call_timeout_s: float = field(default=600.0, validator=gt(0))
    """Seconds that any other call to an engine process may take, except for completions, and that a restart may
    take."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Type of the engine's weights. None takes the policy's."""
    max_new_tokens: int | None = field(default=None, validator=optional(ge(1)))
    """Maximum tokens of one completion. None means 512, or half of `policy.max_sequence_length` if that is less."""
    temperature: float = field(default=1.0, validator=ge(0))
    """Divisor of the logits; 0 takes the most likely token. Training computes logprobs at it too."""
    top_p: float = field(default=1.0, validator=[gt(0), le(1)])
    """Sample from the smallest set of tokens whose probabilities add up to at least this."""
    top_k: int = field(default=0, validator=ge(0))
    """Sample from this many most likely tokens; 0 means no limit."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion. The completion keeps them."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion, in addition to the model's own."""
    max_sequence_length: int | None = field(default=None, validator=optional(ge(2)))
    """Maximum tokens of prompt and completion together. None takes the policy's."""
