"""The contract of a sandbox.

The programs here do what a policy's programs do: crash, hang, leave children behind, fill memory and disk, look
around. They need Python in the sandbox and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from nemo_rl_core.errors import NemoRLError
from nemo_rl_core.protocols.sandbox import Sandbox, SandboxLimits, SandboxProgram, SandboxResult
from nemo_rl_core.testing.conformance.frame.kit import Contract

__all__ = ["SandboxContract"]

MIB = 2**20
_GONE_TIMEOUT_S = 3.0
"""How long after `run` a killed process may still be seen: the kernel takes a moment."""


class SandboxContract(Contract):
    """What every sandbox must be. Define the fixture `sandbox`.

    Attributes:
        startup_s: Seconds that starting one program may take, which are added to its deadline.
    """

    kind: ClassVar[str] = "sandboxes"
    subject: ClassVar[str] = "sandbox"
    startup_s: ClassVar[float] = 5.0

    # -- clauses: a program and its result -------------------------------------------------------

    def test_runs_a_program(self, sandbox: Sandbox) -> None:
        """It runs a program and returns what that wrote, standard output and standard error apart."""
        found = _run(sandbox, "import sys; print('out'); print('err', file=sys.stderr)")
        assert found.exit_status == 0, f"exit status {found.exit_status}: {found.stderr}"
        assert found.stdout == "out\n", f"standard output is {found.stdout!r}"
        assert found.stderr == "err\n", f"standard error is {found.stderr!r}"
        assert not (found.timed_out or found.killed_for_memory or found.output_truncated), f"a limit was hit: {found}"

    def test_runs_a_command(self, sandbox: Sandbox) -> None:
        """It runs a command with its arguments as they are, without a shell."""
        arguments = ["a b", "$HOME", "*", "'", ""]
        program = "import sys; print(sys.argv[1:])"
        found = asyncio.run(sandbox.run(SandboxProgram(command=["python3", "-c", program, *arguments])))
        assert found.stdout == f"{arguments}\n", f"the command got {found.stdout!r} {found.stderr!r}"

    def test_exit_status(self, sandbox: Sandbox) -> None:
        """A program that fails is a result with its exit status, or minus the signal that ended it."""
        for source, status in (
            ("raise SystemExit(3)", 3),
            ("this is no Python", 1),
            ("1 / 0", 1),
            ("import os; os.kill(os.getpid(), 11)", -11),
        ):
            found = _run(sandbox, source)
            assert found.exit_status == status, f"{source!r} ended with {found.exit_status}, not {status}"
            assert not found.succeeded, f"{source!r} counts as a success"

    def test_stdin(self, sandbox: Sandbox) -> None:
        """The program reads what it was given, and then the end."""
        text = "one\ntwo \N{GRINNING FACE}\n" + "x" * 100_000
        found = _run(sandbox, "import sys; text = sys.stdin.read(); print(len(text), text[:9])", stdin=text)
        assert found.stdout == f"{len(text)} {text[:9]}\n", f"it read {found.stdout!r} {found.stderr[-200:]!r}"
        assert _run(sandbox, "import sys; print(repr(sys.stdin.read()))").stdout == "''\n", (
            "without any it is not empty"
        )

    def test_any_output(self, sandbox: Sandbox) -> None:
        """Bytes that are no text are replaced, not an exception."""
        found = _run(sandbox, "import os; os.write(1, b'a\\xff\\x00b'); os.write(2, b'\\xfe')")
        assert found.stdout[:1] == "a" and found.stdout[-1:] == "b" and found.exit_status == 0, f"it returned {found}"

    def test_files(self, sandbox: Sandbox) -> None:
        """Files are there before the program starts, and those asked for come back; one that is missing is left out."""
        source = """
            from pathlib import Path
            data = Path("in/data.bin").read_bytes()
            Path("out").mkdir()
            Path("out/copy.bin").write_bytes(data * 2)
        """
        data = bytes(range(256))
        wanted = ("out/copy.bin", "missing.txt")
        found = _run(sandbox, source, files={"in/data.bin": data}, outputs=wanted)
        assert found.exit_status == 0, found.stderr
        assert dict(found.files) == {"out/copy.bin": data * 2}, f"the files are {list(found.files)}"

    def test_refuses_an_unknown_language(self, sandbox: Sandbox) -> None:
        """A language that it does not have is refused by a `NemoRLError` that names it."""
        assert "python" in sandbox.languages, f"languages are {sorted(sandbox.languages)}; this kit needs python"
        try:
            found = asyncio.run(sandbox.run(SandboxProgram(source="x", language="klingon")))
        except NemoRLError as error:
            assert "klingon" in str(error), f"its error does not name the language: {error}"
        except Exception as error:
            raise AssertionError(f"it raised {type(error).__name__} ({error}), not a NemoRLError") from error
        else:
            raise AssertionError(f"it ran it: {found}")

    # -- clauses: limits ---------------------------------------------------------------------------

    def test_deadline(self, sandbox: Sandbox) -> None:
        """At the deadline the program is killed, also one that ignores signals, and the result says so."""
        source = """
            import signal, time
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            print("started", flush=True)
            while True:
                time.sleep(1)
        """
        found = self._limited(sandbox, source, SandboxLimits(seconds=0.5))
        assert found.timed_out, f"timed_out is False: {found}"
        assert found.exit_status is None and not found.succeeded, f"exit status is {found.exit_status}, not None"
        assert found.stdout == "started\n", f"what it wrote before the deadline is {found.stdout!r}"

    @pytest.mark.parametrize("ends", ["killed", "ended"])
    def test_children_end_with_it(self, sandbox: Sandbox, ends: str) -> None:
        """What the program started ends with it, be it killed or ended, even in a session of its own."""
        token = f"kit-{uuid.uuid4().hex}"
        wait = "time.sleep(600)" if ends == "killed" else "time.sleep(0.1)"
        source = f"""
            import subprocess, sys, time
            child = [sys.executable, "-c", "import time; time.sleep(600)  # {token}"]
            subprocess.Popen(child, start_new_session=True)
            subprocess.Popen(child)
            {wait}
        """
        found = self._limited(sandbox, source, SandboxLimits(seconds=1.0 if ends == "killed" else 5.0))
        assert found.timed_out == (ends == "killed"), f"timed_out is {found.timed_out}: {found}"
        assert _is_gone(token), f"after a program that was {ends} a child still runs"

    def test_memory_limit(self, sandbox: Sandbox) -> None:
        """A program cannot have more memory than its limit, and one below it is left in peace."""
        if "memory_limit" not in sandbox.capabilities:
            pytest.skip("it does not declare memory_limit")
        source = "x = bytearray({} * 2**20); x[::4096] = b'x' * len(x[::4096]); print('done')"
        limits = SandboxLimits(memory_bytes=256 * MIB)
        below = self._limited(sandbox, source.format(32), limits)
        assert below.stdout == "done\n", f"32 MiB under a limit of 256 MiB failed: {below}"
        above = self._limited(sandbox, source.format(512), limits)
        assert "done" not in above.stdout and not above.succeeded, "it had 512 MiB under a limit of 256 MiB"
        assert not above.timed_out, "it was stopped by the deadline, not by the memory limit"

    def test_process_limit(self, sandbox: Sandbox) -> None:
        """A program cannot start processes without end."""
        if "process_limit" not in sandbox.capabilities:
            pytest.skip("it does not declare process_limit")
        source = """
            import os, time
            started = 1
            for _ in range(200):
                try:
                    if os.fork() == 0:
                        time.sleep(600)
                except OSError:
                    break
                started += 1
                time.sleep(0.005)
            print(started, flush=True)
            os._exit(0)
        """
        found = self._limited(sandbox, source, SandboxLimits(processes=12, seconds=5.0))
        started = int(found.stdout) if found.stdout.strip().isdigit() else 0
        assert started <= 12, f"it had {started} processes under a limit of 12"

    def test_output_limit(self, sandbox: Sandbox) -> None:
        """Of endless output the beginning is kept, the rest thrown away, and the result says so."""
        source = "import sys\nfor _ in range(400):\n    sys.stdout.write('o' * 4096); sys.stderr.write('e' * 4096)"
        found = self._limited(sandbox, source, SandboxLimits(output_bytes=10_000, seconds=3.0))
        assert len(found.stdout) <= 10_000 and len(found.stderr) <= 10_000, (
            f"it kept {len(found.stdout)} and {len(found.stderr)} bytes under a limit of 10000"
        )
        assert found.stdout[:5000] == "o" * 5000, "the beginning of the output was not kept"
        assert found.output_truncated, "output_truncated is False"
        assert not found.timed_out, "the program waited for somebody to read its output"

    # -- clauses: apart from the host and from each other ----------------------------------------------

    def test_no_network(self, sandbox: Sandbox) -> None:
        """A program reaches no network, not even the host."""
        if "no_network" not in sandbox.capabilities:
            pytest.skip("it does not declare no_network")
        with _listener() as (port, reached):
            source = f"""
                import socket
                try:
                    socket.create_connection(("127.0.0.1", {port}), timeout=1).close()
                    print("reached")
                except OSError as error:
                    print("not reached")
            """
            found = _run(sandbox, source)
        assert found.stdout == "not reached\n", (
            f"a program reached a port of the host: {found.stdout!r} {found.stderr!r}"
        )
        assert not reached, "a program reached a port of the host"

    def test_scratch_folder(self, sandbox: Sandbox) -> None:
        """Each run works in an empty folder of its own that it can write to, and that is gone afterwards."""
        source = """
            import os
            print(os.getcwd()); print(os.listdir("."))
            open("left.txt", "w").write("x"); os.mkdir("folder")
        """
        folders = []
        for number in range(2):
            found = _run(sandbox, source)
            assert found.exit_status == 0, f"it cannot write to its folder: {found.stderr}"
            folder, content, *_ = found.stdout.splitlines()
            assert content == "[]", f"in run {number + 1} the folder held {content}"
            folders.append(folder)
        left = [folder for folder in folders if (Path(folder) / "left.txt").exists()]
        assert not left, f"{left[0]} was left behind"

    def test_environment_is_not_leaked(self, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
        """A program sees no environment variable of the host's, such as a key."""
        monkeypatch.setenv("NEMO_RL_KIT_KEY", "secret-of-the-host")
        found = _run(sandbox, "import os; print(dict(os.environ))")
        assert found.exit_status == 0, found.stderr
        assert "secret-of-the-host" not in found.stdout, "it printed a variable of the host"
        home = os.environ.get("HOME")
        assert home in (None, "/") or f"'HOME': '{home}'" not in found.stdout, "its HOME is the host's"

    def test_concurrent_runs(self, sandbox: Sandbox) -> None:
        """Runs at the same time are independent: each gets its own answer, files and deadline."""
        source = """
            import pathlib, sys, time
            pathlib.Path("mine.txt").write_text(sys.stdin.read())
            time.sleep(0.2)
            print(pathlib.Path("mine.txt").read_text())
        """
        programs = [_program(source, stdin=str(i), outputs=("mine.txt",)) for i in range(6)]
        programs.append(_program("import time; time.sleep(600)", limits=SandboxLimits(seconds=0.5)))

        async def every() -> list[SandboxResult]:
            return list(await asyncio.gather(*(sandbox.run(program) for program in programs)))

        *found, hung = asyncio.run(every())
        assert hung.timed_out, "the one that hangs was not killed"
        for i, result in enumerate(found):
            assert result.stdout == f"{i}\n", f"run {i} answered {result.stdout!r} {result.stderr[-200:]!r}"
            assert result.files == {"mine.txt": str(i).encode()}, f"run {i} brought back {result.files}"

    def test_cancelled(self, sandbox: Sandbox) -> None:
        """A call that is cancelled kills its program."""
        token = f"kit-{uuid.uuid4().hex}"
        child = f"subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)  # {token}'])"

        async def cancel() -> None:
            limits = SandboxLimits(seconds=30.0)
            running = asyncio.create_task(sandbox.run(_program(f"import subprocess, sys; {child}", limits=limits)))
            deadline = time.monotonic() + self.startup_s
            while not running.done() and not _processes(token) and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

        asyncio.run(cancel())
        assert _is_gone(token), "the program of a cancelled call still runs"

    def test_close_twice(self, sandbox: Sandbox) -> None:
        """It may be closed again, also when it ran nothing."""
        for number in (1, 2):
            try:
                sandbox.close()
            except Exception as error:
                raise AssertionError(
                    f"closing it for the {number}. time raised {type(error).__name__}: {error}"
                ) from error

    # -- running ---------------------------------------------------------------------------------------

    def _limited(self, sandbox: Sandbox, source: str, limits: SandboxLimits) -> SandboxResult:
        """Run under limits; a sandbox that does not come back fails the clause."""

        async def run() -> SandboxResult:
            async with asyncio.timeout(limits.seconds + self.startup_s):
                return await sandbox.run(_program(source, limits=limits))

        try:
            return asyncio.run(run())
        except TimeoutError as error:
            raise AssertionError(
                f"it did not come back {self.startup_s:g} s after the deadline of {limits.seconds:g} s"
            ) from error


def _program(source: str, **options: object) -> SandboxProgram:
    return SandboxProgram(source=textwrap.dedent(source), **options)  # type: ignore[arg-type]


def _run(sandbox: Sandbox, source: str, **options: object) -> SandboxResult:
    return asyncio.run(sandbox.run(_program(source, **options)))


def _processes(token: str) -> list[int]:
    """Processes of this machine with `token` on their command line; none where that cannot be seen."""
    found = []
    if sys.platform == "linux":
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if token.encode() in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
    return found


def _is_gone(token: str) -> bool:
    """Whether the processes with `token` are gone, or go in a moment; kills those that stay."""
    deadline = time.monotonic() + _GONE_TIMEOUT_S
    while _processes(token):
        if time.monotonic() > deadline:
            for pid in _processes(token):
                with contextlib.suppress(OSError):
                    os.kill(pid, 9)
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def _listener() -> Iterator[tuple[int, list[bool]]]:
    """A port of this host, and whether somebody connected to it."""
    reached: list[bool] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        closing = threading.Event()

        def serve() -> None:
            while not closing.is_set():
                with contextlib.suppress(OSError):
                    server.accept()[0].close()
                    reached.append(True)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1], reached
        finally:
            closing.set()
            thread.join()
