"""A weight update from the trainer's side: pieces are filled while vLLM loads those before."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from attrs import frozen
from torch import Tensor

from nemo_rl_core.machine.deadline import Deadline
from nemo_rl_plugins_vllm.layout import num_devices
from nemo_rl_plugins_vllm.pieces import ExpectedWeights, Piece, pack

if TYPE_CHECKING:
    from nemo_rl_plugins_vllm.config import VLLMConfig
    from nemo_rl_plugins_vllm.loop import EngineThread

__all__ = ["RefitReport", "refit"]

_MIB = 1 << 20
_ABANDON_TIMEOUT_S = 30.0


@frozen
class RefitReport:
    """What an update moved."""

    num_bytes: int
    seconds: float


class _UpdateDeadline(Deadline):
    def __init__(self, thread: EngineThread, *, version: int, timeout_s: float) -> None:
        self._what = f"Weight update to version {version}"
        super().__init__(timeout_s, what=self._what, hint="Raise generation.options.refit_timeout_s.")
        self._thread = thread

    def wait(self, future: concurrent.futures.Future[Any]) -> Any:
        """The result, until the end of the whole update."""
        return self._thread.result(future, what=self._what, timeout_s=self.remaining())


def refit(
    thread: EngineThread,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    version: int,
    expected: ExpectedWeights | None,
    options: VLLMConfig,
    wake_weights: bool,
    gpu: bool,
) -> RefitReport:
    """Bring new weights into all of vLLM's workers.

    Args:
        thread: The engine.
        tensors: Name and full tensor.
        version: Stamp of later tokens.
        expected: What the model has, or None.
        options: Of the backend.
        wake_weights: The engine sleeps: give the weights their memory first.
        gpu: Whether vLLM drives a GPU.

    Raises:
        GenerationError, DeadlineExceeded, WorkerDied: As `VLLMEngine.update_weights`.
    """
    start = time.monotonic()
    deadline = _UpdateDeadline(thread, version=version, timeout_s=options.refit_timeout_s)
    if wake_weights:
        deadline.wait(thread.begin(thread.wake(gpu=gpu, only_weights=True)))
    pieces = pack(
        tensors,
        expected,
        chunk_bytes=options.refit_chunk_mib * _MIB,
        # A handle serves one process on the same device.
        cuda_ipc=options.weight_transport == "cuda_ipc"
        or (options.weight_transport == "auto" and num_devices(options) == 1),
    )
    try:
        deadline.wait(thread.begin(thread.begin_update()))
        num_bytes = _send(thread, pieces, deadline)
        recompute = options.kv_cache_on_update == "recompute"
        deadline.wait(thread.begin(thread.end_update(version, recompute=recompute)))
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            thread.call(thread.abandon_update(), what="Leaving the update", timeout_s=_ABANDON_TIMEOUT_S)
        raise
    finally:
        with contextlib.suppress(Exception):
            thread.call(thread.thaw(), what="Going on", timeout_s=_ABANDON_TIMEOUT_S)
    return RefitReport(num_bytes, time.monotonic() - start)


def _send(thread: EngineThread, pieces: Iterable[Piece], deadline: _UpdateDeadline) -> int:
    """Send all; one piece is loaded while the next one is filled."""
    under_way: tuple[concurrent.futures.Future[None], Piece] | None = None
    num_bytes = 0
    try:
        for piece in pieces:
            num_bytes += piece.num_bytes
            before, under_way = under_way, None
            try:
                _finish(before, deadline)
                deadline.check("the trainer's tensors")
            except BaseException:
                piece.close()
                raise
            under_way = thread.begin(thread.load(piece.update_info())), piece
        last, under_way = under_way, None
        _finish(last, deadline)
    finally:
        if under_way is not None:  # the trainer's side has failed
            with contextlib.suppress(Exception):
                _finish(under_way, deadline)
    return num_bytes


def _finish(under_way: tuple[concurrent.futures.Future[None], Piece] | None, deadline: _UpdateDeadline) -> None:
    if under_way is None:
        return
    future, piece = under_way
    try:
        deadline.wait(future)
    finally:
        piece.close()
