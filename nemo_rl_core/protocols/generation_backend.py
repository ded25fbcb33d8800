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
    """How the next token is drawn."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this probability."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 is no limit."""
    stop: tuple[str, ...] = ()
    """Generation ends when the text of the completion contains one of these; the tokens up to and
    including the one that completes it are kept."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the completion, kept as its last token. The model's end-of-sequence ids are
    added by the engine unless `ignore_eos`."""
    ignore_eos: bool = False
    seed: int | None = None
    """Equal seed, prompt, weights and sampling give equal tokens, whatever else is in flight
    (up to floating-point differences between batch shapes)."""


@frozen(kw_only=True)
class GenerationRequest:
    """One completion to sample."""

    request_id: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams = field(factory=SamplingParams)
    order: tuple[int, ...] = ()
    """Waiting requests enter the batch in this order (then by arrival), so that a run is reproducible."""


@runtime_checkable
class GenerationBackend(Protocol):
    """Samples completions. A component of group `nemo_rl.generation_backends`.

    Made without arguments and then `setup`. `generate` is called concurrently from one event loop, many
    calls at a time; all of them share one continuous batch. Sub-classing this protocol gives the defaults.

    Attributes:
        config_class: attrs class of `generation.options` for this backend.
        capabilities: Of "share_weights" (may alias the trainer's tensors), "in_flight_updates",
            "prefix_sharing", "sleep".
        devices_per_worker: Function of the `GenerationConfig` (a static method): devices that one engine takes for its
            own tensor and pipeline parallelism. May be left out: then 1.
        start_timeout_s: Function of the `GenerationConfig` (a static method): seconds that `setup` may take, where the
            launcher's deadline is shorter. May be left out.
        check_installed: Function of the `GenerationConfig` (a static method): raises `MissingExtra` if what the engine
            needs is not installed here. Called before a model is loaded, where the engine will run in this
            installation. May be left out.
    """

    config_class: ClassVar[type]
    capabilities: ClassVar[frozenset[str]] = frozenset()

    def setup(self, config: GenerationConfig, context: WorkerContext) -> None:
        """Build the engine. Its weights are those of `config.model_name` until the first refit.

        Args:
            config: `config.options` is a `config_class`; `config.model_name` is filled by the core.
            context: Device and seed of this worker.
        """
        ...

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion; cancelling the call frees its place in the batch.

        Raises:
            GenerationError: The prompt is empty or leaves no room in the context.
            WorkerDied: A process of the engine has ended, and nothing can be sampled any more; any other method may
                raise it too. An engine in a process of its own is then started again.
        """
        ...

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]], *, share: bool = False) -> None:
        """Load new weights (Hugging Face names) and stamp later tokens with `version`.

        Caches that the old weights filled are never read again for a new request. Called when no request
        is in flight, unless the engine has the capability "in_flight_updates".

        Args:
            version: The trainer's step count; completions carry it.
            tensors: Name and full tensor; a tied weight comes once. Without `share` a tensor is valid until the
                next one is asked for: copy it before.
            share: The tensors are alive and stay valid: an engine may alias instead of copying.

        Raises:
            GenerationError: A name or shape does not belong to the model, or one is missing.
        """
        ...

    def pause(self) -> None:
        """Take requests but do not start on them until `resume`. Default: nothing.

        The core pauses the engine while it submits a step's first requests: with all of them waiting before
        the first is admitted, batches are formed in the same way in every run.
        """
        return None

    def resume(self) -> None:
        """Undo `pause`. Default: nothing."""
        return None

    def fingerprint(self) -> str:
        """Digest of the weights the engine now samples from, by `nemo_rl_core.infra.weights.fingerprint`."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Counters since the last call (tokens, steps, batch fill, cache use). Default: none."""
        return {}

    def sleep(self) -> None:
        """Give back memory between rollouts; again it does nothing. Default: nothing.

        A sleeping engine is not asked to generate, but takes new weights: `update_weights` and `fingerprint` get the
        memory of the weights back and no more. The core refits an engine that slept before it samples again.

        Raises:
            GenerationError: Requests are in flight.
        """
        return None

    def wake(self) -> None:
        """Undo `sleep`; of an engine that is awake nothing. Default: nothing."""
        return None

    def shutdown(self) -> None:
        """Stop every thread and process; may be called twice. Default: nothing."""
        return None
