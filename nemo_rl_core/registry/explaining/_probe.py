"""Whether plugins can be imported, found out in a child process, so that one that ends it leaves the others to see.

The parent hands a list of probes to a child, which tells when each begins and what came of it. A child that dies, or
takes too long, has met its end in the probe that was begun; another child goes on with the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from attrs import field, frozen

if TYPE_CHECKING:
    from nemo_rl_core.registry._reference import ComponentRef
    from nemo_rl_core.registry._registry import Registry
    from nemo_rl_core.registry.discovery._index import Entry

__all__ = ["Answer", "Probe", "probe", "serve"]

_START = (
    "import json, sys; spec = json.load(sys.stdin); sys.path[:] = spec['path']; "
    "from nemo_rl_core.registry.explaining._probe import serve; serve(spec)"
)


class Probe(NamedTuple):
    """One thing to import."""

    kind: str
    """Of the component; `hooks` for a hook plugin."""
    distribution: str
    name: str
    value: str


@frozen
class Answer:
    """What came of a probe."""

    error: str | None = None
    """What is wrong, ready to be read; None if nothing is."""
    incompatible: bool = False
    """It fits another core, or another version of its contract."""
    nodes: Mapping[str, Sequence[Mapping[str, Any]]] = field(factory=dict)
    """What a hook plugin answers to `nemo_rl_node_manifests`."""


# -- the parent ----------------------------------------------------------------------------------------------


def probe(registry: Registry, probes: Sequence[Probe], *, timeout_s: float) -> list[Answer]:
    """The answer to each probe.

    A probe that found something wrong after others had run in the same child is repeated in a child of its own, so
    that no plugin is blamed for what another one has changed.

    Args:
        registry: Its selection of plugins holds in the child too.
        probes: In the order in which they are made.
        timeout_s: Longest time that one probe may take.
    """
    answers: dict[int, Answer] = {}
    again: list[int] = []
    left = list(range(len(probes)))
    while left:
        done = dict(_in_child(registry, probes, left, timeout_s))
        again += [number for number in list(done)[1:] if done[number].error is not None]
        answers.update(done)
        left = [number for number in left if number not in done]
    for number in again:
        answers.update(_in_child(registry, probes, [number], timeout_s))
    return [answers[number] for number in range(len(probes))]


def _in_child(
    registry: Registry, probes: Sequence[Probe], numbers: Sequence[int], timeout_s: float
) -> Iterator[tuple[int, Answer]]:
    """Answers of one child, as many as it lives to give; at least the first."""
    reader, writer = os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, "-c", _START],
            stdin=subprocess.PIPE,
            stdout=2,
            pass_fds=[writer],
            start_new_session=True,
        )
    finally:
        os.close(writer)
    try:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(json.dumps(_spec(registry, probes, numbers, writer)).encode())
        begun = numbers[0]
        for row in _rows(reader, timeout_s):
            if "answer" in row:
                yield row["number"], Answer(**row["answer"])
            elif "number" in row:
                begun = row["number"]
            else:
                return
        yield begun, Answer(error=_end_of(child, timeout_s))
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _spec(registry: Registry, probes: Sequence[Probe], numbers: Sequence[int], writer: int) -> dict[str, Any]:
    selection = registry._selection
    return {
        "path": sys.path,
        "allow": None if selection.allow is None else sorted(selection.allow),
        "deny": sorted(selection.deny),
        "answers": writer,
        "probes": [[number, *probes[number]] for number in numbers],
    }


def _rows(reader: int, timeout_s: float) -> Iterator[dict[str, Any]]:
    """What the child says, until it ends or says nothing for too long."""
    rest = b""
    limit = time.monotonic() + timeout_s
    while select.select([reader], [], [], max(0.0, limit - time.monotonic()))[0]:
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)
        limit = time.monotonic() + timeout_s


def _end_of(child: subprocess.Popen[bytes], timeout_s: float) -> str:
    """How a child ended that had not finished."""
    try:
        status = child.wait(1.0)
    except subprocess.TimeoutExpired:
        return f"importing it did not end within {timeout_s:g} s"
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"importing it ended the process: {name}"
    return f"importing it ended the process with status {status} (os._exit)"


# -- the child -----------------------------------------------------------------------------------------------


def serve(spec: Mapping[str, Any]) -> None:
    """In the child: make the probes and say what came of each."""
    import logging

    from nemo_rl_core.registry._registry import Registry

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    registry = Registry(allow=spec["allow"], deny=spec["deny"], strict=False)
    for number, *which in spec["probes"]:
        _say(spec["answers"], {"number": number})
        _say(spec["answers"], {"number": number, "answer": _answer(registry, Probe(*which))})
    _say(spec["answers"], {"finished": True})
    os._exit(0)  # threads and exit handlers of plugins are not waited for


def _say(answers: int, row: Mapping[str, Any]) -> None:
    left = memoryview((json.dumps(row, default=str) + "\n").encode())
    while left:
        left = left[os.write(answers, left) :]


def _answer(registry: Registry, wanted: Probe) -> dict[str, Any]:
    from nemo_rl_core.errors import PluginError, PluginIncompatible

    try:
        if wanted.kind == "hooks":
            return _ask_hooks(registry, next(e for e in registry.index.hooks() if _is(e, wanted)))
        next(ref for ref in registry.entries(wanted.kind) if _is(ref, wanted)).load()
    except PluginError as error:
        return {"error": str(error), "incompatible": isinstance(error, PluginIncompatible)}
    return {}


def _is(found: Entry | ComponentRef, wanted: Probe) -> bool:
    dist = found.distribution
    return (dist if dist is None or isinstance(dist, str) else dist.name, found.name, found.value) == wanted[1:]


def _ask_hooks(registry: Registry, entry: Entry) -> dict[str, Any]:
    """Import a hook plugin and ask it for all that it provides."""
    from nemo_rl_core.registry._escapes import text_of
    from nemo_rl_core.registry._hooks import HookPlugins
    from nemo_rl_core.registry.discovery._kinds import KINDS

    plugins = HookPlugins.of(registry, entry)
    for kind in KINDS:
        list(plugins.call_each(f"nemo_rl_{kind}"))
    nodes = {name: rows for _, found in plugins.call_each("nemo_rl_node_manifests") for name, rows in found.items()}
    told = [f"{f.hook} raised {type(f.error).__name__}: {text_of(f.error)}" for f in plugins.failures]
    return {"error": "; ".join(told) or None, "nodes": nodes}
