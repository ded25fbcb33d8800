"""Contract of a sandbox: runs a program that nobody has read, such as one that a policy wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from attrs import Attribute, Factory, field, frozen

from nemo_rl_core.errors import ConfigError

__all__ = ["Capability", "Sandbox", "SandboxLimits", "SandboxProgram", "SandboxResult"]

Capability = Literal["memory_limit", "no_network", "process_limit"]
"""What a sandbox enforces here, on this machine. The deadline, the limit of output, and a scratch folder and an
environment of its own are enforced by every sandbox."""


def _positive(instance: Any, attribute: Attribute[Any], value: float) -> None:
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ConfigError(
            f"sandbox limit {attribute.name} is {value!r}; it must be a number above 0. Nothing is unlimited."
        )


def _inside(names: Sequence[str], what: str) -> None:
    for name in names:
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ConfigError(f"{what} {name!r} is outside of the scratch folder; use a relative path without `..`.")


def _files_inside(instance: Any, attribute: Attribute[Any], value: Any) -> None:
    _inside(list(value), f"sandbox {attribute.name}:")


@frozen(kw_only=True)
class SandboxLimits:
    """What a program may use. Every limit has a value."""

    seconds: float = field(default=10.0, validator=_positive)
    """Wall-clock time; then the program and everything it started is killed."""
    memory_bytes: int = field(default=512 * 2**20, validator=_positive)
    """Memory of all its processes, or of each if the sandbox cannot add them up."""
    processes: int = field(default=32, validator=_positive)
    """Processes and threads at a time, the program itself included."""
    output_bytes: int = field(default=2**20, validator=_positive)
    """Of standard output, and again of standard error; what comes after is thrown away."""


@frozen(kw_only=True)
class SandboxProgram:
    """A program and what it gets.

    Raises:
        ConfigError: Neither or both of source and command are given, or a file lies outside of the scratch folder.
    """

    source: str | None = None
    """Source text in `language`, or:"""
    command: Sequence[str] | None = None
    """a command with its arguments, run in the scratch folder."""
    language: str = "python"
    """Of `source`."""
    stdin: str = ""
    """Its standard input, which ends after it."""
    files: Mapping[str, bytes] = field(factory=dict, validator=_files_inside)
    """Files put into the scratch folder before it starts, by relative path."""
    outputs: Sequence[str] = field(default=(), validator=_files_inside)
    """Relative paths of files to bring back."""
    limits: SandboxLimits = Factory(SandboxLimits)

    def __attrs_post_init__(self) -> None:
        """Exactly one thing is to be run."""
        if (self.source is None) == (self.command is None):
            raise ConfigError("A sandbox program is either `source` or `command`; give one of them.")


@frozen(kw_only=True)
class SandboxResult:
    """How a program went. A program that fails is a result, not an exception."""

    exit_status: int | None
    """Of the program; negative: the number of the signal that ended it; None if it was killed at a limit."""
    stdout: str
    """Bytes that are not UTF-8 are replaced."""
    stderr: str
    seconds: float
    """Wall-clock time from its start to its end."""
    timed_out: bool = False
    """It was killed at `limits.seconds`."""
    killed_for_memory: bool = False
    """It was killed at `limits.memory_bytes`. False also where memory was only refused to it, and it ended itself."""
    output_truncated: bool = False
    """It wrote more than `limits.output_bytes`."""
    files: Mapping[str, bytes] = field(factory=dict)
    """Those of `outputs` that it wrote."""

    @property
    def succeeded(self) -> bool:
        """Whether it ended by itself with status 0."""
        return self.exit_status == 0


@runtime_checkable
class Sandbox(Protocol):
    """Runs programs, each apart from the host and from the others. A component of group `nemo_rl.sandboxes`.

    Made with its config; `run` is called concurrently from one event loop, many calls at a time. Each run has a
    scratch folder of its own, which is its working directory, is the only place that it can count on writing to,
    and is gone when `run` returns. It sees no environment variable of the host but what a program needs to start.

    Attributes:
        config_class: attrs class of the sandbox's options.
        capabilities: See `Capability`; what it cannot enforce on this machine is left out.
        languages: Languages of `SandboxProgram.source` that it runs.
    """

    config_class: ClassVar[type]
    capabilities: frozenset[str]
    languages: frozenset[str]

    async def run(self, program: SandboxProgram) -> SandboxResult:
        """Run one program to its end, or to a limit. A call that is cancelled kills its program.

        Raises:
            ConfigError: The language is not one of `languages`.
            ResourceError: The sandbox itself cannot start: says what is missing on this machine.
        """
        ...

    def close(self) -> None:
        """Kill what still runs and release everything; may be called twice."""
        ...
