"""The generation backend `vllm`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nemo_rl_core.config.components import finished_options
from nemo_rl_core.errors import ConfigError, GenerationError
from nemo_rl_core.infra.weights.fingerprint import fingerprint
from nemo_rl_core.protocols.generation_backend import GenerationBackend, GenerationRequest
from nemo_rl_core.records.completion import Completion
from nemo_rl_plugins_vllm.checkpoint import (
    checkpoint_folder,
    expected_weights,
    initial_weights,
    limits_of,
    tokenizer_of,
)
from nemo_rl_plugins_vllm.config import VLLMConfig
from nemo_rl_plugins_vllm.installed import check_version, installed_version, require_vllm
from nemo_rl_plugins_vllm.layout import check_one_machine, num_devices
from nemo_rl_plugins_vllm.requests import completion, refusal, sampling_params

if TYPE_CHECKING:
    from nemo_rl_core.protocols.launcher import WorkerContext
    from nemo_rl_core.schema import GenerationConfig
    from nemo_rl_plugins_vllm.loop import EngineThread

__all__ = ["VLLMEngine"]

_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
"""Set before vLLM is imported, where the user has not."""


def _options_of(config: GenerationConfig) -> VLLMConfig:
    options: VLLMConfig = finished_options(VLLMEngine, config.options)
    return options


class VLLMEngine(GenerationBackend):
    """Samples with vLLM's async engine, which decodes in processes of its own."""

    config_class: ClassVar[type] = VLLMConfig
    capabilities: ClassVar[frozenset[str]] = frozenset({"in_flight_updates", "prefix_sharing", "sleep"})

    @staticmethod
    def devices_per_worker(config: GenerationConfig) -> int:
        """Devices that one engine takes: one for each of vLLM's workers.

        Raises:
            ConfigError: The engine would stand on several machines.
        """
        options = _options_of(config)
        check_one_machine(options)
        return num_devices(options)

    @staticmethod
    def start_timeout_s(config: GenerationConfig) -> float:
        """Seconds that `setup` may take."""
        return _options_of(config).start_timeout_s

    @staticmethod
    def check_installed(config: GenerationConfig) -> None:
        """Refuse a vLLM that is missing or untested, without importing it.

        Raises:
            MissingExtra: Says what to install.
        """
        check_version(installed_version(), allow_untested=_options_of(config).allow_untested_version)

    def __init__(self) -> None:
        self._thread: EngineThread | None = None
        self._stack = ExitStack()
        self._broken: str | None = None
        self._asleep = False
        self._version = 0

    # -- its life ------------------------------------------------------------------------------------------

    def setup(self, config: GenerationConfig, context: WorkerContext) -> None:
        """Start vLLM's processes.

        Raises:
            MissingExtra: vLLM is not installed, or in a version that was not tested.
            ConfigError: The model or an option does not fit.
            GenerationError: vLLM did not start.
            DeadlineExceeded: It was not ready within `start_timeout_s`.
        """
        self._options = _options_of(config)
        if config.model_name is None:
            raise ConfigError("generation.model_name is not set; it is filled from policy.model_name.")
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        require_vllm(allow_untested=self._options.allow_untested_version)
        self._model_name, self._seed = config.model_name, context.seed
        self._dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        self._tokenizer = tokenizer_of(config.model_name)
        self._limits = limits_of(config.model_name, self._tokenizer, config.max_sequence_length)
        self._expected = expected_weights(config.model_name, dtype=self._dtype)
        try:
            self._start(config.precision or "float32", context)
        except BaseException:
            self.shutdown()
            raise

    def _start(self, precision: str, context: WorkerContext) -> None:
        from nemo_rl_plugins_vllm.arguments import engine_arguments, has_gpu, starting_environment
        from nemo_rl_plugins_vllm.loop import EngineThread

        options = self._options
        self._gpu = has_gpu()
        folder = self._stack.enter_context(
            checkpoint_folder(self._model_name, dtype=self._dtype, seed=context.seed),
        )
        with starting_environment(options, context, gpu=self._gpu):
            arguments = engine_arguments(
                options,
                folder=folder,
                precision=precision,
                max_length=self._limits.max_length,
                seed=context.seed,
                gpu=self._gpu,
                shares_device=context.shares_device,
            )
            self._thread = EngineThread(arguments, self._tokenizer)
            self._thread.start(options.start_timeout_s)

    def shutdown(self) -> None:
        """Stop vLLM's processes; requests in flight fail. May be called twice."""
        if self._thread is not None:
            self._thread.stop()
        self._stack.close()

    def _running(self) -> EngineThread:
        if self._thread is None:
            raise GenerationError("The vLLM engine is not set up; call setup(config, context) first.")
        return self._thread

    @property
    def dtype(self) -> torch.dtype:
        """Of the engine's weights; a weight sync casts the trainer's to it.

        Raises:
            GenerationError: The engine is not set up.
        """
        self._running()
        return self._dtype

    # -- sampling ------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion; cancelling the call frees its place in the batch.

        Raises:
            GenerationError: The request cannot be served, or the engine sleeps, is not running, or holds weights of an
                update that failed.
            WorkerDied: A process of vLLM has ended.
        """
        from nemo_rl_plugins_vllm.loop import Call

        thread = self._running()
        self._limits.check(request)
        if self._broken is not None:
            raise refusal(request, self._broken, "Update the weights again.")
        if self._asleep:
            raise refusal(request, "the engine sleeps", "Call wake() first.")
        loop = asyncio.get_running_loop()
        call = Call(
            prompt_ids=list(request.prompt_ids),
            params=sampling_params(request, self._limits),
            order=request.order,
            future=loop.create_future(),
            loop=loop,
        )
        thread.submit(call)
        try:
            output = await call.future
        except asyncio.CancelledError:
            thread.give_up(call)
            raise
        return completion(request, output, weight_version=self._version)

    def pause(self) -> None:
        """Take requests but start on none until `resume`; those in flight go on."""
        self._running().pause()

    def resume(self) -> None:
        """Start on what waits, in the order of the requests."""
        self._running().resume()

    def metrics(self) -> Mapping[str, float]:
        """Counters since the last call.

        requests, tokens and prompt_tokens of finished completions, cancelled requests; of vLLM's scheduler: steps, mean
        running and waiting requests a step, highest kv_cache_usage (share), prefix_queried_tokens and of these
        prefix_cached_tokens, preempted requests; refits, refit_bytes and refit_seconds.
        """
        return self._running().counters.take()

    # -- weights -------------------------------------------------------------------------------------------

    def update_weights(self, version: int, tensors: Iterable[tuple[str, Tensor]], *, share: bool = False) -> None:
        """Load new weights in all of vLLM's processes; requests in flight stand still meanwhile and then go on.

        Raises:
            GenerationError: A name or shape does not belong to the model, or one is missing, or vLLM could not load
                them; the engine then refuses to generate until an update succeeds.
            DeadlineExceeded: It was not finished within `refit_timeout_s`.
            WorkerDied: A process of vLLM has ended.
        """
        from nemo_rl_plugins_vllm.refit import refit

        self._broken = f"the weight update to version {version} was not finished"
        try:
            report = refit(
                self._running(),
                tensors,
                version=version,
                expected=self._expected,
                options=self._options,
                wake_weights=self._asleep and self._gpu,
                gpu=self._gpu,
            )
        except BaseException as error:
            self._broken = f"the weight update to version {version} failed ({error})"
            raise
        self._broken, self._version = None, version
        self._running().counters.add(refits=1, refit_bytes=report.num_bytes, refit_seconds=report.seconds)

    def fingerprint(self) -> str:
        """Digest of the weights the engine now samples from, taken in vLLM's processes.

        It is over what the last update brought there; that the model still holds what it made of it is checked. Before
        the first update it is that of the checkpoint, read once more.

        Raises:
            GenerationError: The workers disagree, or their weights changed since the last update.
        """
        thread = self._running()
        digests = set(
            thread.call(thread.fingerprints(), what="The fingerprint", timeout_s=self._options.refit_timeout_s)
        )
        if len(digests) > 1:
            raise GenerationError(
                f"The workers of vLLM hold different weights: fingerprints {sorted(map(str, digests))}."
            )
        (digest,) = digests
        if digest is not None:
            return digest
        if self._broken is not None:
            raise GenerationError(f"There is no fingerprint: {self._broken}.")
        if self._options.load_format == "dummy":
            raise GenerationError(
                "The first weights are made up (load_format: dummy): there is nothing to compare with."
            )
        return fingerprint(initial_weights(self._model_name, dtype=self._dtype, seed=self._seed))

    # -- memory --------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Give back what `sleep_level` says; only while nothing is in flight.

        Raises:
            GenerationError: Requests are in flight.
        """
        level = self._options.sleep_level
        if level == 0 or self._asleep:
            return
        thread = self._running()
        thread.call(thread.sleep(level, gpu=self._gpu), what="Sleep", timeout_s=self._options.refit_timeout_s)
        self._asleep = True
        if level == 2 and self._gpu:
            self._broken = "the weights were given back by sleep (sleep_level: 2)"

    def wake(self) -> None:
        """Undo `sleep`, with an empty KV cache."""
        if not self._asleep:
            return
        thread = self._running()
        thread.call(thread.wake(gpu=self._gpu), what="Wake", timeout_s=self._options.refit_timeout_s)
        self._asleep = False
