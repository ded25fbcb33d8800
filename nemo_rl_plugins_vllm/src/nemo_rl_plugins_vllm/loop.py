"""The thread in which vLLM's async engine lives: an event loop of its own, that any other thread or loop may ask.

vLLM decodes in processes of its own; this thread sends requests there and takes completions back. A request enters
here through a gate, which is shut during a pause, a weight update and sleep; what waits at it enters in the order of
the requests.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import itertools
import logging
import threading
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import define, field
from vllm import AsyncEngineArgs, SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from nemo_rl_core.errors import DeadlineExceeded, GenerationError, WorkerDied
from nemo_rl_core.machine.threads import settle_soon
from nemo_rl_plugins_vllm.stats import Counters, StepCounter

if TYPE_CHECKING:
    from nemo_rl_core.models.tokenizer import Tokenizer


__all__ = ["Call", "EngineThread"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_STOP_TIMEOUT_S = 20.0


@define(eq=False)
class Call:
    """A request on its way."""

    prompt_ids: list[int]
    params: Any
    order: tuple[int, ...]
    future: asyncio.Future[CompletionOutput]
    """Of the caller's loop."""
    loop: asyncio.AbstractEventLoop
    given_up: bool = False
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    def settle(self, result: CompletionOutput | BaseException) -> None:
        """Answer the caller, from any thread."""
        value, error = (None, result) if isinstance(result, BaseException) else (result, None)
        if not settle_soon(self.future, value, error):
            logger.debug("a completion came after its caller's event loop was closed")


class EngineThread:
    """Runs an `AsyncLLM`.

    Args:
        arguments: vLLM's.
        tokenizer: What stop strings are found with; None if there is none.
    """

    def __init__(self, arguments: AsyncEngineArgs, tokenizer: Tokenizer) -> None:
        self.counters = Counters()
        self._arguments = arguments
        self._tokenizer = tokenizer
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="vllm-engine", daemon=True)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._waiting: list[Call] = []
        self._wake_due = False
        self._stopped = False
        # Of the loop's thread only:
        self._active: set[Call] = set()
        self._shut: set[str] = set()
        self._standing = False
        self._frozen = False
        self._num_updates = 0
        self._pausing = asyncio.Lock()
        self._llm: Any = None
        self.salt = "0.0"
        """Of the prefix cache: the weights' version, and the number of the update that brought them."""

    # -- its life ------------------------------------------------------------------------------------------

    def start(self, timeout_s: float) -> None:
        """Start the thread and vLLM's processes.

        Raises:
            GenerationError: vLLM did not start.
            DeadlineExceeded: It was not ready in time.
        """
        self._thread.start()
        atexit.register(self.stop)
        self.call(self._build(), what="Starting vLLM", timeout_s=timeout_s)

    async def _build(self) -> None:
        try:
            await self._make()
            await self._first_token()
        except Exception as error:
            raise GenerationError(
                f"vLLM did not start: {type(error).__name__}: {error}. What its processes printed above has the cause."
            ) from error

    async def _make(self) -> None:
        llm: Any = AsyncLLM.from_engine_args(
            self._arguments,
            usage_context=UsageContext.ENGINE_CONTEXT,
            stat_loggers=[lambda config, index: StepCounter(self.counters)],
        )
        self._llm = llm
        # vLLM's own reading of the checkpoint's tokenizer may differ from the one that the run uses.
        llm.output_processor.tokenizer = self._tokenizer
        if self._arguments.pipeline_parallel_size > 1:
            await llm.collective_rpc("nemo_rl_prepare_pipeline")
        await llm.update_weight_version("0")
        await llm.get_supported_tasks()  # asked once, so that no request has to wait for the answer

    async def _first_token(self) -> None:
        """What vLLM cannot do with the model shows with the first step."""
        params = SamplingParams(max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        async for _ in self._llm.generate(tokens_input([0], cache_salt="start"), params, "start"):
            pass
        self.counters.take()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()

    def stop(self) -> None:
        """End vLLM's processes and the thread; who still waits gets an error. May be called twice."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            atexit.unregister(self.stop)
            waiting, self._waiting = self._waiting, []
        for call in waiting:
            call.settle(GenerationError("The vLLM engine was shut down."))
        if self._thread.is_alive():
            try:
                self._run(self._end()).result(_STOP_TIMEOUT_S)
            except (TimeoutError, RuntimeError) as error:
                logger.warning("vLLM did not end in %g s (%s)", _STOP_TIMEOUT_S, type(error).__name__)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_STOP_TIMEOUT_S)

    async def _end(self) -> None:
        for call in self._active:
            call.settle(GenerationError("The vLLM engine was shut down."))
        if self._llm is not None:
            llm, self._llm = self._llm, None
            if llm.output_handler is not None:  # it would report the end of the processes as a failure
                llm.output_handler.cancel()
            await asyncio.to_thread(llm.shutdown, timeout=_STOP_TIMEOUT_S / 2)

    # -- asked from other threads --------------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def begin(self, work: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        """Run a coroutine in the engine's loop."""
        if self._stopped:
            work.close()
            raise GenerationError("The vLLM engine was shut down.")
        return self._run(work)

    def call(self, work: Coroutine[Any, Any, _T], *, what: str, timeout_s: float) -> _T:
        """Run a coroutine in the engine's loop and wait for it.

        Raises:
            DeadlineExceeded: It took longer than `timeout_s`.
            WorkerDied: vLLM's processes have ended.
            GenerationError: vLLM raised.
        """
        return self.result(self.begin(work), what=what, timeout_s=timeout_s)

    def result(self, future: concurrent.futures.Future[_T], *, what: str, timeout_s: float) -> _T:
        """Wait for what `begin` returned; raises as `call` does."""
        try:
            return future.result(max(timeout_s, 0.0))
        except TimeoutError as error:
            if future.done():
                raise
            future.cancel()
            raise DeadlineExceeded(
                f"{what} passed its deadline of {timeout_s:.3g} s while waiting for vLLM's processes. "
                "Raise the timeout in generation.options, or look at what they printed."
            ) from error
        except (GenerationError, WorkerDied):
            raise
        except Exception as error:
            raise _in_our_terms(error, what) from error

    def submit(self, call: Call) -> None:
        """Send a request to the engine, or keep it at the gate.

        Raises:
            GenerationError: The engine was shut down.
        """
        with self._lock:
            if self._stopped:
                raise GenerationError("The vLLM engine was shut down.")
            self._waiting.append(call)
            if self._wake_due:
                return
            self._wake_due = True
        self._loop.call_soon_threadsafe(self._admit)

    def give_up(self, call: Call) -> None:
        """The caller was cancelled: take the request out, wherever it is."""

        def cancel() -> None:
            if call.task is not None:
                call.task.cancel()

        call.given_up = True
        self.counters.add(cancelled=1)
        if not self._stopped:
            self._loop.call_soon_threadsafe(cancel)

    def pause(self) -> None:
        """Keep new requests at the gate until `resume`."""
        self._loop.call_soon_threadsafe(self._shut.add, "pause")  # before any request that is submitted from now on
        self._in_background(self._pause())

    def resume(self) -> None:
        """Let those at the gate in together."""
        self._in_background(self._resume())

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        def report(done: concurrent.futures.Future[None]) -> None:
            if not done.cancelled() and done.exception() is not None:
                logger.warning("vLLM could not be paused or resumed: %s", done.exception())

        self.begin(work).add_done_callback(report)

    # -- in the loop's thread ------------------------------------------------------------------------------

    def _admit(self) -> None:
        with self._lock:
            self._wake_due = False
            if self._shut:
                return
            calls, self._waiting = self._waiting, []
        for call in sorted(calls, key=lambda c: c.order):
            if not call.given_up:
                self._active.add(call)
                call.task = self._loop.create_task(self._sample(call))

    async def _sample(self, call: Call) -> None:
        prompt = tokens_input(call.prompt_ids, cache_salt=self.salt)
        try:
            results = self._llm.generate(prompt, call.params, str(next(self._numbers)))
            (final,) = [result async for result in results]  # one, because of FINAL_ONLY
            output = final.outputs[0]
            self.counters.add(
                requests=1,
                tokens=len(output.token_ids),
                prompt_tokens=len(call.prompt_ids),
            )
            call.settle(output)
        except asyncio.CancelledError:
            call.settle(GenerationError("The vLLM engine was shut down."))
            raise
        except Exception as error:
            call.settle(_in_our_terms(error, "Sampling"))
        finally:
            self._active.discard(call)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight; exact in the loop's thread only."""
        return not self._active

    async def begin_update(self) -> None:
        """Shut the gate, stop those in flight where they are, and make vLLM ready for new weights.

        `thaw` undoes as much of it as was done.
        """
        self._shut.add("update")
        if self._active:
            self._frozen = True
            await self._llm.pause_generation(mode="keep", clear_cache=False)
        await self._llm.start_weight_update()

    async def load(self, update_info: dict[str, Any]) -> None:
        """One piece of the new weights."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def end_update(self, version: int, *, recompute: bool) -> None:
        """Put the new weights to work: later tokens have `version`, and new requests a cache of their own."""
        await self._llm.finish_weight_update(weight_version=str(version))
        self._num_updates += 1  # the same version may come with other weights
        self.salt = f"{version}.{self._num_updates}"
        if recompute and self._active:
            await self._llm.reset_prefix_cache(reset_running_requests=True)

    async def abandon_update(self) -> None:
        """Leave a broken update."""
        await self._llm.collective_rpc("nemo_rl_abandon_update")

    async def thaw(self) -> None:
        """Go on after an update."""
        if self._frozen:
            await self._llm.resume_generation()
            self._frozen = False
        self._shut.discard("update")
        self._admit()

    async def fingerprints(self) -> list[str | None]:
        """Of each worker of each engine; vLLM's own `collective_rpc` asks them all and returns those of the first."""
        ask = self._llm.engine_core.call_utility_all_async
        answers: list[list[str | None]] = await ask("collective_rpc", "nemo_rl_fingerprint", None, (), None)
        return [digest for of_engine in answers for digest in of_engine]

    async def sleep(self, level: int, *, gpu: bool) -> None:
        """Give memory back.

        Raises:
            GenerationError: Requests are in flight.
        """
        if self._active:
            raise GenerationError("vLLM cannot sleep while requests are in flight.")
        self._shut.add("sleep")
        if gpu:
            await self._llm.sleep(level=level)
        else:
            await self._llm.reset_prefix_cache()
            await self._llm.collective_rpc("nemo_rl_release_cache")

    async def wake(self, *, gpu: bool, only_weights: bool = False) -> None:
        """Undo `sleep`; with `only_weights` the KV cache sleeps on."""
        if gpu:
            await self._llm.wake_up(["weights"] if only_weights else None)
        elif not only_weights:
            await self._llm.collective_rpc("nemo_rl_restore_cache")
        if not only_weights:
            self._shut.discard("sleep")
            self._admit()

    async def _pause(self) -> None:
        """With nothing in flight the engine's scheduler stands too: a batch forms before its first step."""
        async with self._pausing:
            self._shut.add("pause")
            if not self._active and not self._standing and self._shut == {"pause"}:
                await self._llm.pause_generation(mode="keep", clear_cache=False)
                self._standing = True

    async def _resume(self) -> None:
        async with self._pausing:
            self._shut.discard("pause")
            self._admit()
            if self._standing:
                await asyncio.sleep(0)  # the tasks that were just made send their requests, in order
                self._standing = False
                await self._llm.resume_generation()


def _in_our_terms(error: BaseException, what: str) -> Exception:
    if isinstance(error, EngineDeadError):
        return WorkerDied(
            f"{what}: a process of vLLM has ended ({error}). What it printed above has the cause; often it is memory "
            "(generation.options.kv_cache_gib, gpu_memory_utilization)."
        )
    cause = error.__cause__ or error
    return GenerationError(f"{what} failed in vLLM: {type(cause).__name__}: {cause}")
