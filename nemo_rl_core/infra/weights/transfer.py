"""Parts that all weight syncs share: outgoing tensors, a deadline, the comparison afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from typing import TYPE_CHECKING

from nemo_rl_core.errors import InvariantViolation
from nemo_rl_core.infra.weights.fingerprint import Fingerprint
from nemo_rl_core.machine.deadline import Deadline
from nemo_rl_core.machine.threads import in_thread

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["OutgoingWeights", "compare_fingerprints", "run_until"]


class OutgoingWeights:
    """Passes the trainer's tensors on in the engine's dtype, counts them and takes their digest.

    Args:
        source: Name and tensor, as `export_weights` yields them.
        dtype: Type of the engine's weights; None leaves the tensors as they are.
        digest: Whether to take the digest on the way. If not, the attribute `digest` stays that of no tensors.

    Attributes:
        num_tensors: Tensors seen.
        num_bytes: Their size in the engine's dtype.
        num_cast_bytes: Of those that had another dtype.
        digest: Of the tensors as they were passed on.
        waiting_for: The side that has to do something now.
    """

    def __init__(self, source: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, *, digest: bool = True) -> None:
        """Take over the source, whose tensors may have any shape [...]; nothing is read from it yet."""
        self.source = source
        self.dtype = dtype
        self.num_tensors = 0
        self.num_bytes = 0
        self.num_cast_bytes = 0
        self.digest = Fingerprint()
        self._digests = digest
        self.waiting_for = "the engine (update_weights)"

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each name and its tensor [...] in the engine's dtype."""
        self.waiting_for = "the trainer (export_weights)"
        for name, tensor in self.source:
            out = tensor.detach()
            if self.dtype is not None and out.is_floating_point() and out.dtype != self.dtype:
                out = out.to(self.dtype)
                self.num_cast_bytes += out.numel() * out.element_size()
            self.num_tensors += 1
            self.num_bytes += out.numel() * out.element_size()
            if self._digests:
                self.digest.add(name, out)
            self.waiting_for = "the engine (update_weights)"
            yield name, out
            self.waiting_for = "the trainer (export_weights)"
        self.waiting_for = "the engine (update_weights)"


def run_until(work: Callable[[], None], outgoing: OutgoingWeights, *, version: int, timeout_s: float) -> None:
    """Run `work` in a thread until the deadline, and raise what it raises.

    Raises:
        DeadlineExceeded: Names the side that was waited for.
    """
    deadline = Deadline(
        timeout_s,
        what=f"Refit to weight version {version}",
        hint="Raise generation.refit_timeout_s, or look at that side's log.",
    )
    done = in_thread(work, name=f"refit-{version}")
    if not wait([done], deadline.remaining()).done:
        raise deadline.exceeded(f"{outgoing.waiting_for}, after {outgoing.num_tensors} tensors")
    done.result()


def compare_fingerprints(
    trainer: str, engine: str, *, version: int, num_tensors: int, name: str = "the engine"
) -> None:
    """Check that an engine's weights are the trainer's.

    Raises:
        InvariantViolation: The digests differ.
    """
    if trainer != engine:
        raise InvariantViolation(
            f"After the refit to weight version {version} {name}'s weights differ from the trainer's "
            f"({num_tensors} tensors; trainer {trainer}, engine {engine}). On the way a tensor was lost, mixed up or "
            "changed: what it would sample is not the policy. Set "
            "weight_sync.options.check_fingerprint: false only to look for the cause."
        )
