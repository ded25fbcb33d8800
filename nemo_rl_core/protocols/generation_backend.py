"""Contract of a generation backend: tokens in, tokens and their logprobs out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from attrs import field, frozen

from nemo_rl_core.records.completion import Completion

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.protocols.launcher import WorkerContext
    from nemo_rl_core.schema import GenerationConfig

__all__ = ["GenerationBackend", "GenerationRequest", "SamplingParams"]


@frozen(kw_only=True)
class SamplingParams:
    """Settings for drawing the next token."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    """Divisor of the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities add up to at least this."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 means no limit."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion as soon as it contains one; the completion keeps the tokens up to and
    including the one that completes the text."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the completion, which keeps them as its last token. The engine adds the model's
    end-of-sequence ids unless `ignore_eos`."""
    ignore_eos: bool = False
    seed: int | None = None
    """Seed of this completion. Equal seed, prompt, weights and sampling give equal tokens, whatever else is in
    flight (up to floating-point differences between batch shapes)."""


@frozen(kw_only=True)
class GenerationRequest:
    """One completion to sample."""

    request_id: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams = field(factory=SamplingParams)
    order: tuple[int, ...] = ()
    """Sort key by which waiting requests enter the batch (then by arrival), so that a run is reproducible."""


@runtime_checkable
class GenerationBackend(Protocol):
    """Samples completions. A component of group `nemo_rl.generation_backends`.

    The core creates the object without arguments and then calls `setup`. It calls `generate` concurrently from one
    event loop, many calls at a time; all of them share one continuous batch. Subclass this protocol to inherit the
    defaults.

    Attributes:
        config_class: attrs class of `generation.options` for this backend.
        capabilities: Any of "share_weights" (the engine may alias the trainer's tensors), "in_flight_updates",
            "prefix_sharing", "sleep".
        devices_per_worker: Optional static method that takes the `GenerationConfig` and returns the number of devices
            of one engine, for its own tensor and pipeline parallelism. Without it, 1.
        start_timeout_s: Optional static method that takes the `GenerationConfig` and returns the seconds that `setup`
            may take, if that is more than the launcher's deadline.
        check_installed: Optional static method that takes the `GenerationConfig` and raises `MissingExtra` if a
            requirement of the engine is not installed. Called before a model is loaded, if the engine will run in this
            installation.
    """

    config_class: ClassVar[type]
    capabilities: ClassVar[frozenset[str]] = frozenset()

    def setup(self, config: GenerationConfig, context: WorkerContext) -> None:
        """Build the engine. Its weights are those of `config.model_name` until the first refit.

        Args:
            config: Settings of the engine. `config.options` is a `config_class`; the core fills `config.model_name`.
            context: Device and seed of this worker.
        """
        ...

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion; cancelling the call frees its place in the batch.

        Raises:
            GenerationError: The prompt is empty or leaves no room in the context.
            WorkerDied: A process of the engine has ended, so it can no longer sample; any other method may raise it
                too. The core then restarts an engine that runs in its own process.
        """
        ...

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]], *, share: bool = False) -> None:
        """Load new weights (Hugging Face names) and stamp later tokens with `version`.

        A new request must never read caches that the old weights filled. Called when no request is in flight,
        unless the engine has the capability "in_flight_updates".

        Args:
            version: The trainer's step count; completions carry it.
            tensors: Name and full tensor [...]; a tied weight comes once. Without `share` a tensor is valid only until
                the next one is taken: copy it before.
            share: Whether the tensors stay valid, so that the engine may alias them instead of copying.

        Raises:
            GenerationError: A name or shape does not belong to the model, or one is missing.
        """
        ...

    def pause(self) -> None:
        """Accept requests but do not start them until `resume`. Default: no-op.

        The core pauses the engine while it submits the first requests of a step. All of them then wait before
        the first is admitted, so that every run forms the same batches.
        """
        return None

    def resume(self) -> None:
        """Undo `pause`. Default: no-op."""
        return None

    def fingerprint(self) -> str:
        """Return the digest of the current weights, computed by `nemo_rl_core.infra.weights.fingerprint`."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Return counters since the last call (tokens, steps, batch fill, cache use). Default: none."""
        return {}

    def sleep(self) -> None:
        """Release memory between rollouts; a second call is a no-op. Default: no-op.

        The core does not call `generate` on a sleeping engine, but it may refit it: `update_weights` and `fingerprint`
        bring back the memory of the weights only. The core refits an engine that slept before it samples again.

        Raises:
            GenerationError: Requests are in flight.
        """
        return None

    def wake(self) -> None:
        """Undo `sleep`; no-op if the engine is awake. Default: no-op."""
        return None

    def shutdown(self) -> None:
        """Stop every thread and process; may be called twice. Default: no-op."""
        return None
