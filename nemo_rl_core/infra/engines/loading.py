"""Loading of weights from the driver into engine processes, a few tensors at a time."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from nemo_rl_core.errors import DeadlineExceeded
from nemo_rl_core.machine.threads import daemon

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Engines", "load_through_driver"]

_CHUNK_BYTES = 32 << 20
_numbers = itertools.count()
_loading: dict[int, _Loading] = {}


class Engines(Protocol):
    """What this needs of the engines."""

    timeout_s: float

    def apply(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function(engine, *args)` in every engine's process."""
        ...


def load_through_driver(engines: Engines, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Load `tensors` into every engine; returns when all have them.

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


def _chunks(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    chunk: list[tuple[str, Tensor]] = []
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
    """One update under way in the engine's process."""

    def __init__(self, engine: Any, version: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.chunks: queue.Queue[list[tuple[str, Tensor]] | BaseException | None] = queue.Queue(1)
        self.error: BaseException | None = None
        self.done = threading.Event()
        daemon(self._run, engine, version, name=f"nemo-rl-refit-{version}")

    def _run(self, engine: Any, version: int) -> None:
        try:
            engine.update_weights(version, self._tensors(), share=False)
        except BaseException as error:  # raised by the next call of the driver
            self.error = error
        self.done.set()
        with contextlib.suppress(queue.Empty):
            self.chunks.get_nowait()  # wakes a `put` that waits for room

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
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

    def put(self, chunk: Any) -> None:
        if not self.done.is_set():
            self.chunks.put(chunk)  # when `_run` ends it makes room
        elif self.error is not None:
            raise self.error


def _begin(engine: Any, number: int, version: int, timeout_s: float) -> None:
    _loading[number] = _Loading(engine, version, timeout_s)


def _push(engine: Any, number: int, chunk: Any) -> None:
    _loading[number].put(chunk)


def _abandon(engine: Any, number: int, why: str) -> None:
    loading = _loading.pop(number, None)
    if loading is not None and not loading.done.is_set():
        loading.put(InterruptedError(f"The weights stopped coming: {why}"))


def _finish(engine: Any, number: int) -> None:
    loading = _loading.pop(number)
    loading.put(None)
    if not loading.done.wait(loading.timeout_s):
        raise DeadlineExceeded(f"The engine did not finish its weight update within {loading.timeout_s:g} s.")
    if loading.error is not None:
        raise loading.error
