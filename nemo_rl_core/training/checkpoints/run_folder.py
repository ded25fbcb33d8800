"""Check that the trainers see the run's folder, where each rank writes its part of a checkpoint."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.machine.deadline import Deadline
from nemo_rl_core.protocols.launcher import on_workers
from nemo_rl_core.protocols.training_backend import TrainingBackend

if TYPE_CHECKING:
    from nemo_rl_core.protocols.launcher import WorkerGroup

__all__ = ["check_run_folder"]

_PATIENCE_S = 5.0
"""A network disk may show a new file late."""
_TIMEOUT_S = 120.0


def check_run_folder(groups: Iterable[WorkerGroup], run_dir: Path) -> None:
    """Let every worker in another process look for a file that is written here, before there is anything to lose.

    Args:
        groups: Of the models that are saved.
        run_dir: Exists.

    Raises:
        ConfigError: Names the machines that do not see it.
    """
    token = run_dir.absolute() / f".seen-{uuid.uuid4().hex}"
    token.touch()
    try:
        blind = [
            host
            for group in groups
            if group.local is None
            for host in on_workers(group, TrainingBackend.apply, timeout_s=_TIMEOUT_S)(_look, str(token), _PATIENCE_S)
            if host is not None
        ]
    finally:
        token.unlink(missing_ok=True)
    if blind:
        raise ConfigError(
            f"The run folder {run_dir.absolute()} is not on a disk that all machines share: the trainers on "
            f"{', '.join(sorted(set(blind)))} do not see what is written there, and each of them writes its part of a "
            "checkpoint. Set run_dir to a folder on a shared disk, or checkpointing.enabled: false."
        )


def _look(backend: TrainingBackend, token: str, patience_s: float) -> str | None:
    """In a worker: None if it sees the file, else the name of its machine."""
    deadline = Deadline(patience_s)
    while not os.path.exists(token):
        if deadline.expired:
            return socket.gethostname()
        time.sleep(0.2)
    return None
