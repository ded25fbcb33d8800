"""Contract of a logger: sends metrics somewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

__all__ = ["Logger"]


@runtime_checkable
class Logger(Protocol):
    """Receives the metrics of a run. A component of group `nemo_rl.loggers`, created with its config."""

    config_class: ClassVar[type]

    if TYPE_CHECKING:

        def __init__(self, config: Any) -> None: ...

    def start(self, run_name: str, run_dir: str, config: Mapping[str, Any]) -> None:
        """Begin; called once, before the first step."""
        ...

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log finite floats; called once per step. Names are `area/name` (`train/loss`, `timing/generation`)."""
        ...

    def finish(self, status: str) -> None:
        """End; called once. `status` is "completed", "interrupted" or "failed"."""
        ...
