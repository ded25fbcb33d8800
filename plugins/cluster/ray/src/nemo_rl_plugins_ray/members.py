"""Actors of one group, and how one of them ended."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from attrs import define, field
from ray.exceptions import RayError, RuntimeEnvSetupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nemo_rl_core.errors import ResourceError, WorkerDied
from nemo_rl_core.infra.workers.remote import log_tail, status_text
from nemo_rl_core.registry import NodeDifference, check_nodes
from nemo_rl_plugins_ray.host import exit_record

__all__ = ["Member", "check_started", "kill"]

_LOOK_S = 5.0


@define(kw_only=True)
class Member:
    """One worker: its actor and where that runs."""

    rank: int
    actor: Any
    node_id: str
    host: str = "?"
    pid: int = 0
    log: Path = field(factory=Path)
    ping: Any = None
    """Reference to the answer of a ping that is under way."""

    def located(self, *, host: str, pid: int, log: str) -> None:
        """Take in what the actor said of itself."""
        self.host, self.pid, self.log = host, pid, Path(log)

    @property
    def place(self) -> str:
        """As messages call it."""
        return f"rank {self.rank} on {self.host}"

    def tail(self) -> str:
        """The end of its log, read on its machine."""
        return self._look()[0]

    def ending(self, error: BaseException | None) -> str:
        """How its process ended: by Ray's word, by the status that it left, or by what C libraries wrote last."""
        told = re.search(r"exit code (-?\d+)", str(error))
        if told:
            return status_text(int(told[1]))
        if "OutOfMemory" in type(error).__name__:
            return "was ended by Ray's memory monitor (out of memory)"
        tail, status = self._look()
        if status is not None:
            return status_text(status)
        if any(word in str(error).lower() for word in ("node died", "node was terminated", "node has died")):
            return "is gone with its node"
        for text, signal in (("Segmentation fault", 11), ("Fatal Python error: Aborted", 6)):
            if text in tail:
                return status_text(-signal)
        return status_text(-9)  # nothing was left: no exit, no crash report

    def _look(self) -> tuple[str, int | None]:
        if self.node_id == ray.get_runtime_context().get_node_id():
            return _read(str(self.log))
        where = NodeAffinitySchedulingStrategy(self.node_id, soft=False)
        try:
            return ray.get(_read_there.options(scheduling_strategy=where).remote(str(self.log)), timeout=_LOOK_S)
        except Exception:  # the machine is gone, or too busy to tell
            return "(its machine does not answer)", None


def check_started(role: str, members: list[Member], answers: list[Any]) -> None:
    """Of actors that did not begin, Ray's error stands in place of the answer.

    Raises:
        PluginIncompatible: The core or this package is not installed where an actor was to run; with a table.
        ResourceError: The runtime environment of the role cannot be made.
        WorkerDied: Anything else, in Ray's words.
    """
    failed = [(m, answer) for m, answer in zip(members, answers, strict=True) if isinstance(answer, RayError)]
    missing = []
    for member, error in failed:
        lacks = re.search(r"No module named '(\w+)", str(error))
        if lacks is None:
            words = " ".join(str(error).split())
            if isinstance(error, RuntimeEnvSetupError):
                raise ResourceError(
                    f"The runtime environment of the {role} workers cannot be made on {member.host}: {words} Look at "
                    f"cluster.options.runtime_env and role_runtime_env.{role}."
                )
            raise WorkerDied(f"The {role} worker of {member.place} did not start: {words}")
        name = lacks[1].replace("nemo_rl_plugins_", "nemo_rl_").replace("_", "-")
        try:
            expected = version(name)
        except PackageNotFoundError:
            expected = "any"
        missing.append(NodeDifference(f"{member.host} rank {member.rank}", name, "not installed", expected))
    check_nodes(missing)


def _read(log: str) -> tuple[str, int | None]:
    """The tail of a log, and the status that its process left, if it did."""
    try:
        status = int(exit_record(Path(log)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return log_tail(Path(log)), None
    return log_tail(Path(log)), status


_read_there = ray.remote(num_cpus=0, max_retries=0)(_read)


def kill(members: list[Member]) -> None:
    """End actors at once; those that are gone already are no matter."""
    for member in members:
        try:
            ray.kill(member.actor, no_restart=True)
        except Exception:  # Ray itself may be gone
            return
