"""The contract of a sandbox against sandboxes broken on purpose, one at least for each clause.

The sound one is a small real one: a process group with resource limits, in a network namespace if this machine
allows one, found again by a mark in its environment and killed with all that it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from nemo_rl_core.errors import ConfigError
from nemo_rl_core.protocols.sandbox import SandboxLimits, SandboxProgram, SandboxResult
from nemo_rl_core.testing import SandboxContract, run_kit
from nemo_rl_core.testing.conformance.frame.kit import clauses

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the small sandbox reads /proc"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # broken sandboxes leave pipes open
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

MARK = "SMALL_SANDBOX"


@functools.cache
def can_unshare() -> bool:
    """Whether this machine gives an unprivileged process a network namespace."""
    command = ["unshare", "-rn", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def marked(mark: str) -> list[int]:
    """Processes that have the mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


class Sound:
    config_class = dict
    languages = frozenset({"python"})
    capabilities = frozenset({"memory_limit", "process_limit"} | ({"no_network"} if can_unshare() else set()))

    def __init__(self, config=None):
        self.open = True

    async def run(self, program):
        command = self.command(program)
        scratch = self.scratch()
        mark = uuid.uuid4().hex
        try:
            self.put_files(program, scratch)
            return await self.run_in(scratch, command, program, mark)
        finally:
            self.kill(mark)
            self.remove(scratch)

    def command(self, program):
        if program.command is not None:
            return list(program.command)
        if program.language not in self.languages:
            raise ConfigError(f"This sandbox has no {program.language!r}; it has: {', '.join(self.languages)}.")
        return [sys.executable, "-I", "-c", program.source]

    def scratch(self):
        return Path(tempfile.mkdtemp(prefix="small-sandbox-"))

    def remove(self, scratch):
        shutil.rmtree(scratch, ignore_errors=True)

    def put_files(self, program, scratch):
        for name, data in program.files.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(data)

    def environment(self, scratch):
        return {"PATH": os.environ["PATH"], "HOME": str(scratch)}

    def isolation(self):
        return ["unshare", "-rn"] if can_unshare() else []

    def memory(self, limits):
        return limits.memory_bytes

    async def run_in(self, scratch, command, program, mark):
        memory = self.memory(program.limits)
        started = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *self.isolation(),
            *command,
            cwd=scratch,
            env={**self.environment(scratch), MARK: mark},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (memory, memory)),
        )
        limit = self.output_bytes(program.limits)
        stdout = asyncio.create_task(self.read(process.stdout, limit))
        stderr = asyncio.create_task(self.read(process.stderr, limit))
        writing = asyncio.create_task(self.write(process, program.stdin))
        watching = asyncio.create_task(self.watch(mark, program.limits))
        timed_out = False
        try:
            await asyncio.wait_for(self.ended(process), self.seconds(program.limits))
        except TimeoutError:
            timed_out = True
            self.at_deadline(process, mark)
            await process.wait()
        watching.cancel()
        writing.cancel()
        self.kill(mark)
        (out, more_out), (err, more_err) = await stdout, await stderr
        return SandboxResult(
            exit_status=self.status(process.returncode, timed_out),
            stdout=self.text(out),
            stderr=self.text(err),
            seconds=time.monotonic() - started,
            timed_out=timed_out,
            output_truncated=more_out or more_err,
            files=self.bring_back(program, scratch),
        )

    async def ended(self, process):
        """`process.wait()` waits for the children that hold its pipes, too."""
        while process.returncode is None:
            await asyncio.sleep(0.005)

    def seconds(self, limits):
        return limits.seconds

    def output_bytes(self, limits):
        return limits.output_bytes

    def status(self, code, timed_out):
        return None if timed_out else code

    def text(self, data):
        return data.decode(errors="replace")

    def at_deadline(self, process, mark):
        self.kill(mark)

    def bring_back(self, program, scratch):
        paths = {name: scratch / name for name in program.outputs}
        return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}

    async def read(self, stream, limit):
        kept, more = b"", False
        while chunk := await stream.read(1 << 16):
            more = more or len(kept) + len(chunk) > limit
            kept = (kept + chunk)[:limit]
        return kept, more

    async def write(self, process, text):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(text.encode())
            await process.stdin.drain()
            process.stdin.close()

    async def watch(self, mark, limits):
        while True:
            if len(marked(mark)) > self.processes(limits):
                self.kill(mark)
            await asyncio.sleep(0.01)

    def processes(self, limits):
        return limits.processes // 2  # what is started between two looks

    def kill(self, mark):
        while found := marked(mark):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)

    def close(self):
        self.open = False


# -- a program and its result --------------------------------------------------------------------------------


class JoinsTheStreams(Sound):
    async def run(self, program):
        found = await super().run(program)
        return SandboxResult(exit_status=found.exit_status, stdout=found.stdout + found.stderr, stderr="", seconds=0.0)


class ThroughAShell(Sound):
    def command(self, program):
        return ["sh", "-c", " ".join(program.command)] if program.command else super().command(program)


class RaisesOnFailure(Sound):
    def status(self, code, timed_out):
        if code:
            raise RuntimeError(f"exit status {code}")
        return code


class ShellStatus(Sound):
    """128 + signal."""

    def status(self, code, timed_out):
        return 128 - code if code and code < 0 else code


class NoStdin(Sound):
    async def write(self, process, text):
        process.stdin.close()


class StdinWithoutEnd(Sound):
    async def write(self, process, text):
        process.stdin.write(text.encode())
        await process.stdin.drain()

    def seconds(self, limits):
        return 0.5


class StrictText(Sound):
    def text(self, data):
        return data.decode()


class ForgetsFolders(Sound):
    def put_files(self, program, scratch):
        for name, data in program.files.items():
            (scratch / Path(name).name).write_bytes(data)


class InventsMissingFiles(Sound):
    def bring_back(self, program, scratch):
        return {**dict.fromkeys(program.outputs, b""), **super().bring_back(program, scratch)}


class AnyLanguage(Sound):
    def command(self, program):
        return list(program.command) if program.command else [sys.executable, "-c", program.source]


# -- limits ----------------------------------------------------------------------------------------------------


class NoDeadline(Sound):
    def seconds(self, limits):
        return None


class AsksToEnd(Sound):
    """SIGTERM, which a program may ignore; then it waits."""

    def at_deadline(self, process, mark):
        process.terminate()


class DeadlineIsAFailure(Sound):
    def status(self, code, timed_out):
        return code


class KillsTheGroupOnly(Sound):
    """A child in a session of its own lives on."""

    def kill(self, mark):
        for pid in marked(mark)[:1]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(pid) != os.getpgid(0):
                    os.killpg(os.getpgid(pid), signal.SIGKILL)

    async def read(self, stream, limit):
        try:
            return await asyncio.wait_for(super().read(stream, limit), 1.5)
        except TimeoutError:
            return b"", False


class KillsAtTheDeadlineOnly(KillsTheGroupOnly):
    def kill(self, mark):
        pass

    def at_deadline(self, process, mark):
        Sound.kill(self, mark)


class NoMemoryLimit(Sound):
    def memory(self, limits):
        return resource.RLIM_INFINITY


class TightMemory(Sound):
    def memory(self, limits):
        return 24 * 2**20


class NoProcessLimit(Sound):
    def processes(self, limits):
        return 10_000


class NoOutputLimit(Sound):
    def output_bytes(self, limits):
        return 1 << 40


class KeepsTheEnd(Sound):
    async def read(self, stream, limit):
        data = await stream.read()
        return (data[-limit:].replace(b"o", b"x"), True) if len(data) > limit else (data, False)


class StopsReading(Sound):
    """The pipe fills, and the program waits until its deadline."""

    async def read(self, stream, limit):
        kept, more = await stream.read(limit), True
        await asyncio.sleep(0)
        return kept, more

    def seconds(self, limits):
        return min(limits.seconds, 1.0)


# -- apart from the host and from each other -----------------------------------------------------------------


class OnTheNetwork(Sound):
    capabilities = frozenset({"no_network"})

    def isolation(self):
        return []


class OneFolderForAll(Sound):
    folder = None

    def scratch(self):
        type(self).folder = self.folder or Path(tempfile.mkdtemp(prefix="small-sandbox-"))
        return self.folder

    def remove(self, scratch):
        pass


class LeavesItsFolder(Sound):
    def remove(self, scratch):
        left.append(scratch)


left: list[Path] = []


class HostEnvironment(Sound):
    def environment(self, scratch):
        return dict(os.environ)


class HostHome(Sound):
    def environment(self, scratch):
        return {**super().environment(scratch), "HOME": os.environ.get("HOME", "/root")}


class OneNameForAll(OneFolderForAll):
    """Concurrent runs write over each other's files."""


class AbandonsWhenCancelled(Sound):
    async def run(self, program):
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        process = subprocess.Popen(self.command(program), start_new_session=True, **quiet)
        while process.poll() is None:
            await asyncio.sleep(0.02)


class ClosesOnce(Sound):
    def close(self):
        assert self.open
        self.open = False


BROKEN = {
    "runs_a_program": [JoinsTheStreams],
    "runs_a_command": [ThroughAShell],
    "exit_status": [RaisesOnFailure, ShellStatus],
    "stdin": [NoStdin, StdinWithoutEnd],
    "any_output": [StrictText],
    "files": [ForgetsFolders, InventsMissingFiles],
    "refuses_an_unknown_language": [AnyLanguage],
    "deadline": [NoDeadline, AsksToEnd, DeadlineIsAFailure],
    "children_end_with_it": [KillsTheGroupOnly, KillsAtTheDeadlineOnly],
    "memory_limit": [NoMemoryLimit, TightMemory],
    "process_limit": [NoProcessLimit],
    "output_limit": [NoOutputLimit, KeepsTheEnd, StopsReading],
    "no_network": [OnTheNetwork],
    "scratch_folder": [OneFolderForAll, LeavesItsFolder],
    "environment_is_not_leaked": [HostEnvironment, HostHome],
    "concurrent_runs": [OneNameForAll],
    "cancelled": [AbandonsWhenCancelled],
    "close_twice": [ClosesOnce],
}


class Kit(SandboxContract):
    startup_s = 2.0


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    for folder in (*left, OneFolderForAll.folder, OneNameForAll.folder):
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    OneFolderForAll.folder = OneNameForAll.folder = None
    left.clear()


def test_a_sound_sandbox_passes_every_clause():
    report = run_kit(Kit, Sound)
    skipped = [] if can_unshare() else ["no_network"]
    assert report.failed == (), report
    assert [result.clause for result in report.results if result.outcome == "skipped"] == skipped


def test_every_clause_has_a_broken_sandbox():
    assert set(BROKEN) == set(clauses(SandboxContract))


@pytest.mark.parametrize(("clause", "broken"), [(c, b) for c, many in BROKEN.items() for b in many])
def test_a_broken_sandbox_fails_its_clause(clause, broken):
    report = run_kit(Kit, broken, only=[clause])
    assert report.failed == (clause,), report


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": "1", "files": {"../up": b""}},
        {"source": "1", "files": {"/etc/passwd": b""}},
        {"source": "1", "outputs": ["a/../../b"]},
        {"source": "1", "command": ["true"]},
        {},
    ],
)
def test_a_program_that_reaches_out_of_its_folder_cannot_be_written_down(wrong):
    with pytest.raises(ConfigError):
        SandboxProgram(**wrong)


@pytest.mark.parametrize("limit", ["seconds", "memory_bytes", "processes", "output_bytes"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), None])
def test_no_limit_can_be_lifted(limit, value):
    with pytest.raises(ConfigError, match=limit):
        SandboxLimits(**{limit: value})
