"""Weight sync within this process: the engine aliases the trainer's tensors, or copies them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import frozen

from nemo_rl_core.errors import DeadlineExceeded, InvariantViolation
from nemo_rl_core.infra.fingerprint import Fingerprint
from nemo_rl_core.protocols.weight_sync import SyncReport

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_rl_core.protocols.generation_backend import GenerationBackend
    from nemo_rl_core.protocols.launcher import WorkerGroup

__all__ = ["InProcessSync", "InProcessSyncConfig"]


@frozen(kw_only=True)
class InProcessSyncConfig:
    """Options of the in-process weight sync."""

    check_fingerprint: bool = True
    """Compare the weights of both sides after each refit."""


class _Tap:
    """Passes the trainer's tensors on in the engine's dtype, counting them and keeping what to digest."""

    def __init__(self, source: Iterator[tuple[str, Tensor]], dtype: Any) -> None:
        self.source = source
        self.dtype = dtype
        self.num_tensors = 0
        self.num_bytes = 0
        self.num_cast_bytes = 0
        self.digest = Fingerprint()
        self.waiting_for = "the engine (update_weights)"

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.waiting_for = "the trainer (export_weights)"
        for name, tensor in self.source:
            out = tensor.detach()
            if self.dtype is not None and out.is_floating_point() and out.dtype != self.dtype:
                out = out.to(self.dtype)
                self.num_cast_bytes += out.numel() * out.element_size()
            self.num_tensors += 1
            self.num_bytes += out.numel() * out.element_size()
            self.digest.add(name, out)
            self.waiting_for = "the engine (update_weights)"
            yield name, out
            self.waiting_for = "the trainer (export_weights)"
        self.waiting_for = "the engine (update_weights)"


class InProcessSync:
    """Moves weights to an engine in this process.

    From a trainer in this process the engine gets the live tensors, and with `share` it may alias them: then
    nothing is copied. From trainers in other processes rank 0 streams the full tensors, one at a time, through
    shared memory.

    Tensors are cast to the engine's `dtype` if it has that attribute, so that the fingerprints of both sides
    are comparable.

    Args:
        config: Options; None takes the defaults.
    """

    config_class: ClassVar[type] = InProcessSyncConfig

    def __init__(self, config: InProcessSyncConfig | None = None) -> None:
        self.config = config or InProcessSyncConfig()

    def sync(
        self, trainer: WorkerGroup, engine: GenerationBackend, *, version: int, share: bool, timeout_s: float
    ) -> SyncReport:
        """Bring the engine to the trainer's weights.

        Args:
            trainer: The policy's workers.
            engine: The generation backend, in this process.
            version: Stamp for what is sampled from now on.
            share: The engine may alias the trainer's tensors; honoured if the trainer is in this process.
            timeout_s: Deadline of the whole refit.

        Raises:
            DeadlineExceeded: Names the side that was waited for.
            InvariantViolation: The fingerprints differ after the sync.
        """
        start = time.perf_counter()
        share = share and trainer.local is not None
        source = iter(trainer.iterate("export_weights", timeout_s=timeout_s))
        tap = _Tap(source, getattr(engine, "dtype", None))
        _run_until(
            lambda: engine.update_weights(version, iter(tap), share=share),
            tap,
            version=version,
            timeout_s=timeout_s,
        )
        digest = tap.digest.hexdigest()
        if self.config.check_fingerprint:
            _compare(digest, engine.fingerprint(), version=version, num_tensors=tap.num_tensors)
        return SyncReport(
            version=version,
            num_tensors=tap.num_tensors,
            num_bytes=tap.num_cast_bytes if share else tap.num_bytes,
            seconds=time.perf_counter() - start,
            fingerprint=digest,
        )


def _run_until(work: Any, tap: _Tap, *, version: int, timeout_s: float) -> None:
    """Run `work` in a thread until the deadline; what it raises is raised here."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # handed to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=run, name=f"refit-{version}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise DeadlineExceeded(
            f"Refit to weight version {version} passed its deadline of {timeout_s:g} s while waiting for "
            f"{tap.waiting_for}, after {tap.num_tensors} tensors. Raise the refit timeout, or look at that side's log."
        )
    if failure:
        raise failure[0]


def _compare(trainer: str, engine: str, *, version: int, num_tensors: int) -> None:
    if trainer != engine:
        raise InvariantViolation(
            f"After the refit to weight version {version} the engine's weights differ from the trainer's "
            f"({num_tensors} tensors; trainer {trainer}, engine {engine}). The engine lost, mixed up or "
            "changed a tensor: what it would sample is not the policy. Set invariants.check_fingerprint: false "
            "only to look for the cause."
        )
