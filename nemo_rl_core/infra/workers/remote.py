"""Parts that launchers of worker processes share: error reports, environment, logs.

Importing this module must not import torch: a worker verifies its plugins and adopts its environment first.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.protocols.launcher import WorkerContext, WorkerSpec
from nemo_rl_core.registry import ComponentRef, is_escape, manifest, origin_of, text_of, worker_rows

__all__ = [
    "ErrorReport",
    "adopt_environment",
    "expected_plugins",
    "log_folder",
    "log_tail",
    "raised_by",
    "redirect_output",
    "report_error",
    "status_text",
    "trace_calls",
    "worker_environment",
]

_TAIL_LINES = 20

ErrorReport = tuple[BaseException, str, str]
"""The exception (or one that stands for it), its one-line summary, and its traceback."""


# -- errors ----------------------------------------------------------------------------------------------


def report_error(error: BaseException) -> ErrorReport:
    """In a worker: what to send of an exception, also of one that cannot be pickled."""
    import cloudpickle

    summary = f"{type(error).__name__}: {text_of(error)}"
    trace = "".join(traceback.format_exception(error))
    try:
        bare = error.with_traceback(None)
        bare.__cause__ = bare.__context__ = None
        cloudpickle.loads(cloudpickle.dumps(bare))
    except Exception:  # any object may refuse to be pickled
        return _stand_in(error), summary, trace
    return bare, summary, trace


def _stand_in(error: BaseException) -> RuntimeError:
    """For an exception that cannot be sent: its type and text, and who raised it."""
    from nemo_rl_core.registry._trace import blamed, mark

    origin, distribution = blamed(error) or (None, None)
    found = RuntimeError(f"{type(error).__name__}: {text_of(error).removeprefix(f'{origin}: ')}")
    if origin is not None:
        mark(found, origin, distribution)
    return found


def raised_by(role: str, rank: int, report: ErrorReport) -> BaseException:
    """In the driver: what a worker raised, of the same type, its rank in the message and its traceback as a note."""
    error, summary, trace = report
    place = f"[{role} rank {rank}] "
    origin = origin_of(error)
    if error.args and isinstance(error.args[0], str):
        text = error.args[0]
        if origin is not None and text.startswith(f"{origin}: "):  # who raised it comes first
            place, text = f"{origin}: {place}", text.removeprefix(f"{origin}: ")
        error.args = (place + text, *error.args[1:])
    elif isinstance(error, NemoRLError) or not error.args:
        error.args = (place + summary, *error.args)
    if not isinstance(error, Exception) or is_escape(error):  # SystemExit, StopIteration of a worker are not ours
        error = RuntimeError(place + summary)
    error.add_note(f"Traceback in {role} rank {rank}:\n{trace}")
    return error


def status_text(code: int | None) -> str:
    """How a process ended, from its exit status (negative for a signal)."""
    hint = " (out of memory?)" if code == -9 else ""
    return f"was ended by signal {-code}{hint}" if code is not None and code < 0 else f"exited with status {code}"


# -- starting ----------------------------------------------------------------------------------------------


def worker_environment(spec: WorkerSpec, context: WorkerContext) -> dict[str, str]:
    """Environment variables of one worker: its place, its threads, and those of the spec."""
    found = {
        "RANK": str(context.rank),
        "LOCAL_RANK": str(context.local_rank),
        "WORLD_SIZE": str(context.world_size),
        "MASTER_ADDR": context.master_addr,
        "MASTER_PORT": str(context.master_port),
    }
    if context.num_threads is not None:
        found["OMP_NUM_THREADS"] = found["MKL_NUM_THREADS"] = str(context.num_threads)
    return {**found, **spec.env}


def expected_plugins(spec: WorkerSpec) -> str:
    """What every worker must have installed, as JSON: plain text, so that reading it imports nothing."""
    factory = [spec.factory] if isinstance(spec.factory, ComponentRef) else []
    return json.dumps(worker_rows(spec.manifest or manifest(factory)))


def adopt_environment(environment: dict[str, str]) -> None:
    """In a worker: set its environment; `PYTHONPATH` goes before the driver's own path, which it has."""
    os.environ.update(environment)
    added = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:0] = [entry for entry in added if entry not in sys.path]


def trace_calls(context: WorkerContext) -> None:
    """In a worker: under NEMO_RL_DEBUG write this process's calls into the run's trace as well."""
    from nemo_rl_core.registry import Trace
    from nemo_rl_core.registry.discovery._index import DEBUG_VARIABLE

    if os.environ.get(DEBUG_VARIABLE) and context.run_dir is not None:
        Trace(Path(context.run_dir) / "debug.jsonl", f"{context.role} rank {context.rank}").__enter__()


# -- logs --------------------------------------------------------------------------------------------------


def log_folder(spec: WorkerSpec) -> Path:
    """Folder of the workers' logs: `logs` in the run's, or a temporary one."""
    if spec.run_dir is None:
        return Path(tempfile.mkdtemp(prefix="nemo-rl-logs-"))
    folder = Path(spec.run_dir) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def redirect_output(log_path: str) -> None:
    """In a worker: send file descriptors 1 and 2 to the log, so that also what C libraries write is kept."""
    file = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def log_tail(path: Path) -> str:
    """The last lines of a log."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "(no log)"
    return "\n".join(lines[-_TAIL_LINES:]) or "(empty)"
