"""Contract of a sandbox: runs an untrusted program, such as one that a policy wrote."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from attrs import Attribute, Factory, field, frozen

from nemo_rl_core.errors import ConfigError

__all__ = ["Capability", "Sandbox", "SandboxLimits", "SandboxProgram", "SandboxResult"]

Capability = Literal["memory_limit", "no_network", "process_limit"]
"""Restriction that a sandbox can enforce on this machine. Every sandbox enforces the deadline and the limit of output,
and gives each program its own scratch folder and environment."""


def _positive(instance: object, attribute: Attribute[Any], value: float) -> None:
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ConfigError(
            f"sandbox limit {attribute.name} is {value!r}; it must be a number above 0. Nothing is unlimited."
        )


def _inside(names: Sequence[str], what: str) -> None:
    for name in names:
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ConfigError(f"{what} {name!r} is outside of the scratch folder; use a relative path without `..`.")


def _files_inside(instance: object, attribute: Attribute[Any], value: Iterable[str]) -> None:
    _inside(list(value), f"sandbox {attribute.name}:")


@frozen(kw_only=True)
class SandboxLimits:
    """Limits of a program. Every limit has a value."""

    seconds: float = field(default=10.0, validator=_positive)
    """Wall-clock time after which the program and everything it started is killed."""
    memory_bytes: int = field(default=512 * 2**20, validator=_positive)
    """Memory of all its processes together, or of each if the sandbox cannot add them up."""
    processes: int = field(default=32, validator=_positive)
    """Processes and threads at a time, including the program itself."""
    output_bytes: int = field(default=2**20, validator=_positive)
    """Bytes of standard output, and of standard error, that are kept; the rest is discarded."""


@frozen(kw_only=True)
class SandboxProgram:
    """A program and its inputs.

    Raises:
        ConfigError: Neither or both of `source` and `command` are given, or a file lies outside the scratch folder.
    """

    source: str | None = None
    """Source text in `language`; give this or `command`."""
    command: Sequence[str] | None = None
    """Command with its arguments, run in the scratch folder; give this or `source`."""
    language: str = "python"
    """Programming language of `source`."""
    stdin: str = ""
    """Text of standard input, followed by its end."""
    files: Mapping[str, bytes] = field(factory=dict, validator=_files_inside)
    """Files to put into the scratch folder before the start, by relative path."""
    outputs: Sequence[str] = field(default=(), validator=_files_inside)
    """Relative paths of the files to return."""
    limits: SandboxLimits = Factory(SandboxLimits)

    def __attrs_post_init__(self) -> None:
        """Check that there is exactly one thing to run."""
        if (self.source is None) == (self.command is None):
            raise ConfigError("A sandbox program is either `source` or `command`; give one of them.")


@frozen(kw_only=True)
class SandboxResult:
    """Outcome of a program. A program that fails is a result, not an exception."""

    exit_status: int | None
    """Exit status of the program; minus the number of the signal that ended it; None if it was killed at a limit."""
    stdout: str
    """Standard output; bytes that are not UTF-8 are replaced."""
    stderr: str
    seconds: float
    """Wall-clock time from its start to its end."""
    timed_out: bool = False
    """Whether it was killed at `limits.seconds`."""
    killed_for_memory: bool = False
    """Whether it was killed at `limits.memory_bytes`. False if memory was only refused and the program ended itself."""
    output_truncated: bool = False
    """Whether it wrote more than `limits.output_bytes`."""
    files: Mapping[str, bytes] = field(factory=dict)
    """Contents of those `outputs` that the program wrote."""

    @property
    def succeeded(self) -> bool:
        """Whether it ended by itself with status 0."""
        return self.exit_status == 0


@runtime_checkable
class Sandbox(Protocol):
    """Runs programs isolated from the host and from each other. A component of group `nemo_rl.sandboxes`.

    The core creates it with its config and calls `run` concurrently from one event loop, many calls at a time. Each run
    has its own scratch folder as working directory. This is the only place where a program can rely on writing, and it
    is gone when `run` returns. A program sees only the environment variables that it needs to start.

    Attributes:
        config_class: attrs class of the sandbox's options.
        capabilities: Restrictions that it can enforce on this machine, see `Capability`.
        languages: Languages of `SandboxProgram.source` that it runs.
    """

    config_class: ClassVar[type]
    capabilities: frozenset[str]
    languages: frozenset[str]

    async def run(self, program: SandboxProgram) -> SandboxResult:
        """Run one program to its end, or to a limit. Cancelling the call kills the program.

        Raises:
            ConfigError: The language is not one of `languages`.
            ResourceError: The sandbox itself cannot start; the message says what this machine lacks.
        """
        ...

    def close(self) -> None:
        """Kill running programs and release everything; may be called twice."""
        ...
