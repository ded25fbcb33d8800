"""Errors a user may meet. Each says what failed, what was found, and what to do.

Every class is a `NemoRLError` (so that the command line can print it without a traceback) and the
builtin a caller would expect to catch.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeadlineExceeded",
    "EnvironmentFailure",
    "GenerationError",
    "InvariantViolation",
    "MissingExtra",
    "NemoRLError",
    "PluginBroken",
    "PluginConflict",
    "PluginError",
    "PluginFailed",
    "PluginIncompatible",
    "PluginNotFound",
    "ResourceError",
    "RewardError",
    "RunInterrupted",
    "ShapeMismatch",
    "WorkerDied",
    "extend_message",
]


class NemoRLError(Exception):
    """Base of every error this framework raises on purpose."""

    exit_code: int = 1
    """Exit status of the command line when this error ends a run."""


class ConfigError(NemoRLError, ValueError):
    """The configuration cannot be used; the message lists every mistake found."""

    exit_code = 2


class PluginError(NemoRLError):
    """Base of everything that can go wrong between a name and a component."""

    exit_code = 3


class PluginNotFound(PluginError, LookupError):
    """No installed plugin provides the requested name."""


class PluginConflict(PluginError, LookupError):
    """Two distributions provide the same bare name."""


class PluginBroken(PluginError, ImportError):
    """The plugin that provides the name fails to import or is not what its kind requires."""


class PluginIncompatible(PluginError, ImportError):
    """The plugin was written for another version of the core or of its kind's contract."""


class PluginFailed(PluginError, RuntimeError):
    """A plugin raised what would have read as success, ended somebody else's work, or could not be told."""

    exit_code = 70


class MissingExtra(NemoRLError, ImportError):
    """What was asked for needs an optional package that is not installed."""

    exit_code = 3


class DataError(NemoRLError, ValueError):
    """A dataset, a row or a rollout record cannot be read or lacks what is needed."""

    exit_code = 4


class ShapeMismatch(NemoRLError, ValueError):
    """Tensors that must agree in shape do not."""


class CheckpointError(NemoRLError, OSError):
    """A checkpoint cannot be written or read. What was saved before is untouched."""

    exit_code = 5


class ResourceError(NemoRLError, RuntimeError):
    """The machine or cluster does not have what the run asks for."""

    exit_code = 6


class DeadlineExceeded(NemoRLError, TimeoutError):
    """A wait passed its deadline; the message names who was waited for."""

    exit_code = 7


class WorkerDied(NemoRLError, RuntimeError):
    """A worker process ended without being asked to."""

    exit_code = 7


class InvariantViolation(NemoRLError, ArithmeticError):
    """A run-time invariant of training was broken (non-finite loss, stale weights, mismatch)."""

    exit_code = 8


class GenerationError(NemoRLError, RuntimeError):
    """The generation backend could not serve a request."""


class EnvironmentFailure(NemoRLError, RuntimeError):
    """An environment raised; the rollout is recorded as failed."""


class RewardError(NemoRLError, RuntimeError):
    """A reward raised, returned something that is not a finite number, or passed its deadline."""


class RunInterrupted(NemoRLError, RuntimeError):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has saved its state."""

    exit_code = 130


def extend_message(error: Exception, text: str) -> None:
    """Add a line to what `error` says; a note where the message is not a text of its own."""
    if text and len(error.args) == 1 and str(error) == error.args[0]:
        error.args = (f"{error.args[0]}\n{text}",)
    elif text:
        error.add_note(text)
