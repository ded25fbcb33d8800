"""Loading of weights from the driver into engine processes, a few tensors at a time."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar, TypeVarTuple, Unpack

from nemo_rl_core.errors import DeadlineExceeded
from nemo_rl_core.machine.threads import daemon

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.protocols.generation_backend import GenerationBackend

__all__ = ["Engines", "load_through_driver"]

_R = TypeVar("_R")
_Ts = TypeVarTuple("_Ts")
_CHUNK_BYTES = 32 << 20
_numbers = itertools.count()
_loading: dict[int, _Loading] = {}
_Chunk = list[tuple[str, "Tensor"]]


class Engines(Protocol):
    """The engines, as far as `load_through_driver` uses them."""

    timeout_s: float

    def apply(self, function: Callable[[GenerationBackend, Unpack[_Ts]], _R], /, *args: *_Ts) -> list[_R]:
        """Run `function(engine, *args)` in every engine's process; return the results by engine."""
        ...


def load_through_driver(engines: Engines, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Load `tensors`, by name and of any shape [...], into every engine; returns when all have them.

    Raises:
        GenerationError: As an engine raises it.
        DeadlineExceeded: Names the engine that did not take them.
    """
    number, timeout_s = next(_numbers), engines.timeout_s
    engines.apply(_begin, number, version, timeout_s)
    try:
        for chunk in _chunks(tensors):
            engines.apply(_push, number, chunk)
    except BaseException as error:
        engines.apply(_abandon, number, f"{type(error).__name__}: {error}")
        raise
    engines.apply(_finish, number)


def _chunks(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[_Chunk]:
    """Yield copies of the tensors [...] on the CPU, with their names, a few at a time."""
    chunk: _Chunk = []
    size = 0
    for name, tensor in tensors:
        here = tensor.detach().to("cpu", copy=True)  # the next one may lie where this one did
        chunk.append((name, here))
        size += here.nbytes
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Loading:
    """A weight update in progress in the engine's process."""

    def __init__(self, engine: GenerationBackend, version: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.chunks: queue.Queue[_Chunk | BaseException | None] = queue.Queue(1)
        self.error: BaseException | None = None
        self.done = threading.Event()
        daemon(self._run, engine, version, name=f"nemo-rl-refit-{version}")

    def _run(self, engine: GenerationBackend, version: int) -> None:
        try:
            engine.update_weights(version, self._tensors(), share=False)
        except BaseException as error:  # raised by the next call of the driver
            self.error = error
        self.done.set()
        with contextlib.suppress(queue.Empty):
            self.chunks.get_nowait()  # wakes a `put` that waits for room

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors [...] with their names, as they arrive from the driver."""
        while True:
            try:
                chunk = self.chunks.get(timeout=self.timeout_s)
            except queue.Empty:
                raise DeadlineExceeded(f"No weights came from the driver for {self.timeout_s:g} s.") from None
            if isinstance(chunk, BaseException):
                raise chunk
            if chunk is None:
                return
            yield from chunk

    def put(self, chunk: _Chunk | BaseException | None) -> None:
        if not self.done.is_set():
            self.chunks.put(chunk)  # when `_run` ends it makes room
        elif self.error is not None:
            raise self.error


def _begin(engine: GenerationBackend, number: int, version: int, timeout_s: float) -> None:
    _loading[number] = _Loading(engine, version, timeout_s)


def _push(engine: GenerationBackend, number: int, chunk: _Chunk) -> None:
    _loading[number].put(chunk)


def _abandon(engine: GenerationBackend, number: int, why: str) -> None:
    loading = _loading.pop(number, None)
    if loading is not None and not loading.done.is_set():
        loading.put(InterruptedError(f"The weights stopped coming: {why}"))


def _finish(engine: GenerationBackend, number: int) -> None:
    loading = _loading.pop(number)
    loading.put(None)
    if not loading.done.wait(loading.timeout_s):
        raise DeadlineExceeded(f"The engine did not finish its weight update within {loading.timeout_s:g} s.")
    if loading.error is not None:
        raise loading.error
