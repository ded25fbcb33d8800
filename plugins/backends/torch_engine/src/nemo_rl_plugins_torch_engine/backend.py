"""The generation backend `torch_engine`: continuous batching in this process."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.backends.host_memory import HostMemory
from nemo_rl_core.config.components import finished_options
from nemo_rl_core.errors import ConfigError, GenerationError
from nemo_rl_core.infra.weights.fingerprint import CachedSums
from nemo_rl_core.protocols.generation_backend import GenerationBackend, GenerationRequest
from nemo_rl_core.records.completion import Completion
from nemo_rl_plugins_torch_engine.config import TorchEngineConfig
from nemo_rl_plugins_torch_engine.decoders import build_decoder
from nemo_rl_plugins_torch_engine.loop import EngineLoop
from nemo_rl_plugins_torch_engine.scheduler import Scheduler
from nemo_rl_plugins_torch_engine.sequence import Sequence
from nemo_rl_plugins_torch_engine.stopping import StopStrings
from nemo_rl_plugins_torch_engine.weights import load_weights, named_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nemo_rl_core.models.tokenizer import Tokenizer
    from nemo_rl_core.protocols.launcher import WorkerContext
    from nemo_rl_core.schema import GenerationConfig

__all__ = ["TorchEngine"]

logger = logging.getLogger(__name__)

_DEFAULT_CONTEXT = 2048
_ONE_THREAD_BELOW = 200_000_000
"""Parameters; see `TorchEngineConfig.num_threads`. A fixed number rather than a trial run, because the number of
threads changes the rounding, and a resumed run must repeat the uninterrupted one bit for bit."""


class TorchEngine(GenerationBackend):
    """Samples from a Hugging Face model with a K/V cache, shared prompts and continuous batching."""

    config_class: ClassVar[type] = TorchEngineConfig
    capabilities: ClassVar[frozenset[str]] = frozenset(
        {"share_weights", "in_flight_updates", "prefix_sharing", "sleep"}
    )

    def __init__(self) -> None:
        self._loop: EngineLoop | None = None
        self._pending: dict[asyncio.AbstractEventLoop, list[Sequence]] = {}
        self._broken_weights: str | None = None
        self._sums = CachedSums()
        self._host = HostMemory()
        self._shares = self._asleep = False

    def setup(self, config: GenerationConfig, context: WorkerContext) -> None:
        """Load the model and start the engine's thread.

        Raises:
            ConfigError: The model cannot be loaded or run with these options.
        """
        from nemo_rl_core.models import load_model

        options: TorchEngineConfig = finished_options(type(self), config.options)
        if config.model_name is None:
            raise ConfigError("generation.model_name is not set; it is filled from policy.model_name.")
        self._options = options
        device = torch.device(context.device)
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        self._dtype = dtype
        model = load_model(config.model_name, dtype=dtype, seed=context.seed).to(device).eval()
        self._model = model.requires_grad_(False)
        self._tokenizer = _tokenizer(config.model_name)
        self._eos = _eos(config.model_name, self._tokenizer, model)
        self._max_length = _context_length(config.max_sequence_length, model)
        self._seeds = random.Random(context.seed)
        num_rows = options.max_batch_size or (256 if device.type == "cuda" else 64)
        cache_dtype = {None: dtype, "float32": torch.float32, "bfloat16": torch.bfloat16}[options.cache_dtype]
        decoder = build_decoder(
            self._model,
            choice=options.decoder,
            num_rows=num_rows,
            max_length=self._max_length,
            cache_dtype=cache_dtype,
            cuda_graphs=options.cuda_graphs,
            packed_weights=options.packed_weights,
        )
        self._vocab_size = decoder.vocab_size
        self._scheduler = Scheduler(
            decoder, num_rows=num_rows, max_prefill_tokens=options.max_prefill_tokens, device=device
        )
        self._loop = EngineLoop(self._scheduler, num_threads=_num_threads(options, context, self._model))

    @property
    def dtype(self) -> torch.dtype:
        """Of the engine's weights; a weight sync casts the trainer's to it.

        Raises:
            GenerationError: The engine is not set up.
        """
        self._running()
        return self._dtype

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion; cancelling the call frees its place in the batch.

        Raises:
            GenerationError: The prompt is empty, leaves no room in the context or holds an unknown token;
                the sampling parameters make no sense; the engine is not running.
        """
        sequence = self._sequence(request)
        self._queue(sequence)
        try:
            return await sequence.future
        except asyncio.CancelledError:
            self._running().cancel(sequence)
            raise

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]], *, share: bool = False) -> None:
        """Load new weights, tensors [...] by name, between two steps; requests in flight go on with them.

        What is kept of their prompts is as `cache_after_refit` says.

        Raises:
            GenerationError: A name or shape does not belong to the model, or one is missing; the engine then
                refuses to generate until an update succeeds (unless nothing was changed).
            DeadlineExceeded: The engine did not finish it within `refit_timeout_s`.
        """

        def load() -> None:
            self._host.reload()
            self._sums = sums = CachedSums()
            try:
                with torch.inference_mode(mode=False):
                    copied = load_weights(self._model, tensors, share=share, sums=sums)
            except BaseException as error:
                if not share:
                    self._broken_weights = (
                        f"failed: {error}" if isinstance(error, GenerationError) else "was not finished"
                    )
                    self._running().refuse_waiting(self._refuse_broken)  # they came while it still could succeed
                raise
            self._broken_weights, self._shares = None, share
            self._scheduler.counters["packed_bytes"] += self._scheduler.decoder.refresh()
            recompute = self._options.cache_after_refit == "recompute"
            with torch.inference_mode():
                self._scheduler.weights_changed(version, recompute=recompute)
            self._scheduler.counters["refit_bytes"] += copied

        self._running().call(load, what=f"Weight update to version {version}", timeout_s=self._options.refit_timeout_s)

    def pause(self) -> None:
        """Take requests but start on none until `resume`."""
        self._running().pause()

    def resume(self) -> None:
        """Start on what waits, in the order of the requests."""
        self._running().resume()

    def fingerprint(self) -> str:
        """Digest of the weights the engine now samples from."""
        if self._host.is_away:
            self._running().call(self._restore_weights, what="Fingerprint", timeout_s=self._options.refit_timeout_s)
        return self._sums.fingerprint(named_weights(self._model))

    def metrics(self) -> Mapping[str, float]:
        """Counters since the last call.

        tokens sampled; decoding steps; batch_fill, the mean share of rows in use; recomputed_tokens whose keys and
        values a weight update made anew; prefill_tokens computed and shared_prefill_tokens that another request of the
        same prompt had computed; refit_bytes copied to parameters, packed_bytes to the copies that `packed_weights`
        decodes with.
        """
        counters, self._scheduler.counters = self._scheduler.counters, Counter()
        taken = {name: float(value) for name, value in counters.items()}
        filled = taken.pop("filled_rows", 0.0)
        steps = taken.get("steps", 0.0)
        taken["batch_fill"] = filled / (steps * self._scheduler.num_rows) if steps else 0.0
        return taken

    def sleep(self) -> None:
        """Give the cache's memory back, and that of weights which are not the trainer's; they wait on the host.

        Raises:
            GenerationError: Requests are in flight.
        """

        def release() -> None:
            if not self._scheduler.idle:
                raise GenerationError("The torch engine cannot sleep while requests are in flight.")
            self._scheduler.decoder.cache.release()
            self._sums = CachedSums()  # what others do with the memory meanwhile is not counted
            self._asleep = True
            if not self._shares:
                self._host.offload(tensor for _, tensor in named_weights(self._model))
            if self._scheduler.decoder.cache.device.type == "cuda":  # another process may share the device
                torch.cuda.empty_cache()

        self._running().call(release, what="Sleep", timeout_s=self._options.refit_timeout_s)

    def wake(self) -> None:
        """Bring the weights back; the cache grows again with the next request."""
        if self._asleep:
            self._running().call(self._restore_weights, what="Wake", timeout_s=self._options.refit_timeout_s)
            self._asleep = False

    def _restore_weights(self) -> None:
        if self._host.is_away:
            self._host.reload()
            self._scheduler.decoder.refresh()

    def shutdown(self) -> None:
        """Stop the thread; requests in flight fail. May be called twice."""
        if self._loop is not None:
            self._loop.stop()

    # -- requests ------------------------------------------------------------------------------------------

    def _running(self) -> EngineLoop:
        if self._loop is None:
            raise GenerationError("The torch engine is not set up; call setup(config, context) first.")
        return self._loop

    def _queue(self, sequence: Sequence) -> None:
        """Submit what this turn of the event loop asks for in one piece, so that groups come together."""
        self._running()
        pending = self._pending.setdefault(sequence.loop, [])
        pending.append(sequence)
        if len(pending) == 1:
            sequence.loop.call_soon(self._flush, sequence.loop)

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        sequences = [s for s in self._pending.pop(loop, []) if not s.cancelled]
        try:
            self._running().submit(sequences)
        except GenerationError as error:
            for sequence in sequences:
                if not sequence.future.done():
                    sequence.future.set_exception(error)

    def _sequence(self, request: GenerationRequest) -> Sequence:
        self._running()
        self._check(request)
        sampling = request.sampling
        loop = asyncio.get_running_loop()
        prompt = tuple(request.prompt_ids)
        return Sequence(
            request=request,
            prompt_ids=prompt,
            seed=sampling.seed if sampling.seed is not None else self._seeds.getrandbits(64),
            stop_ids=frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._eos),
            limit=min(sampling.max_new_tokens, self._max_length - len(prompt)),
            stop_strings=self._stop_strings(request),
            future=loop.create_future(),
            loop=loop,
        )

    def _stop_strings(self, request: GenerationRequest) -> StopStrings | None:
        if not any(request.sampling.stop):
            return None
        if self._tokenizer is None:
            raise self._refuse(request, "stop strings need the model's tokenizer, which could not be loaded", "")
        return StopStrings(self._tokenizer, request.sampling.stop)

    def _check(self, request: GenerationRequest) -> None:
        prompt, sampling = request.prompt_ids, request.sampling
        if self._asleep:
            raise self._refuse(request, "the engine sleeps", "Call wake() first.")
        if self._broken_weights is not None:
            raise self._refuse_broken(request)
        if len(prompt) == 0:
            raise self._refuse(request, "the prompt is empty", "Give at least one token (such as the BOS token).")
        if len(prompt) >= self._max_length:
            raise self._refuse(
                request,
                f"its prompt of {len(prompt)} tokens leaves no room in the context of {self._max_length}",
                "Shorten the prompt or raise policy.max_sequence_length.",
            )
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise self._refuse(
                request,
                f"its prompt holds token ids outside of 0..{self._vocab_size - 1}",
                "Use the tokenizer of this model.",
            )
        if sampling.max_new_tokens < 1 or not sampling.temperature >= 0 or sampling.top_k < 0:
            raise self._refuse(
                request, f"{sampling} makes no sense", "max_new_tokens >= 1, temperature and top_k >= 0."
            )
        if not 0 < sampling.top_p <= 1:
            raise self._refuse(request, f"top_p is {sampling.top_p}", "It must be above 0 and at most 1.")

    def _refuse_broken(self, request: GenerationRequest) -> GenerationError:
        return self._refuse(request, f"the last weight update {self._broken_weights}", "Update the weights again.")

    def _refuse(self, request: GenerationRequest, what: str, fix: str) -> GenerationError:
        return GenerationError(f"Request {request.request_id!r}: {what}. {fix}".rstrip())


def _tokenizer(model_name: str) -> Tokenizer | None:
    from nemo_rl_core.models import load_tokenizer

    try:
        return load_tokenizer(model_name)
    except ConfigError as error:
        logger.info("No tokenizer for the torch engine, so no stop strings: %s", error)
        return None


def _eos(model_name: str, tokenizer: Tokenizer | None, model: PreTrainedModel) -> frozenset[int]:
    from nemo_rl_core.models import eos_token_ids

    if tokenizer is not None:
        return frozenset(eos_token_ids(model_name, tokenizer))
    eos = model.config.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or ())


def _context_length(asked: int | None, model: PreTrainedModel) -> int:
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(asked or own or _DEFAULT_CONTEXT, own or asked or _DEFAULT_CONTEXT)


def _num_threads(options: TorchEngineConfig, context: WorkerContext, model: PreTrainedModel) -> int | None:
    """Threads of one operator in the engine's thread; None leaves PyTorch's."""
    chosen = options.num_threads
    if chosen is None and torch.device(context.device).type == "cpu":
        size = sum(parameter.numel() for parameter in model.parameters())
        chosen = 1 if size < _ONE_THREAD_BELOW else None
    limits = [number for number in (chosen, context.num_threads) if number is not None]
    return min(limits, default=None)
