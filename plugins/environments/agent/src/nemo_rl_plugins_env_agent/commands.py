"""An agent that is a program: the policy in its environment variables, the task on its standard input."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from nemo_rl_core.errors import DataError
from nemo_rl_plugins_env_agent.calls import AgentCall, AgentFailed

__all__ = ["read_output", "run_command"]

_LONGEST_OUTPUT = 1 << 20
_SHOWN_ERRORS = 2000
_DRAIN_S = 2.0


async def run_command(
    command: Sequence[str],
    call: AgentCall,
    *,
    timeout_s: float | None,
    variables: Mapping[str, str],
    folder: str | None = None,
) -> str:
    """Run a program to its end; it and all it started are killed then, or at the deadline.

    Args:
        command: Program and arguments; no shell reads them.
        call: The run; its task goes to standard input as JSON.
        timeout_s: Deadline; None sets no deadline.
        variables: Added to the environment variables.
        folder: Where it runs; None is here.

    Returns:
        Its standard output; of a long one the end.

    Raises:
        AgentFailed: It cannot be started, ended with another status than 0, or passed its deadline.
        DataError: The task cannot be written as JSON.
    """
    name = " ".join(command)
    try:
        task = json.dumps(dict(call.task)).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"The row cannot be written as JSON for the agent {name}: {error}.") from error
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=folder,
            env={**os.environ, **_policy_variables(call), **variables},
            start_new_session=True,
        )
    except OSError as error:
        raise AgentFailed(f"The agent {name} cannot be started: {error}.") from error
    assert process.stdout is not None and process.stderr is not None
    out, errors = bytearray(), bytearray()
    pipes = [
        asyncio.create_task(_feed(process, task)),
        asyncio.create_task(_read(process.stdout, out, _LONGEST_OUTPUT)),
        asyncio.create_task(_read(process.stderr, errors, _SHOWN_ERRORS)),
    ]
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            status = await process.wait()
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise AgentFailed(f"The agent {name} did not end within {timeout_s:g} s (timeout_s) and was killed.") from error
    finally:
        await _end(process, pipes)
    if status != 0:
        said = errors.decode(errors="replace").strip() or "it wrote nothing to standard error"
        raise AgentFailed(f"The agent {name} ended with status {status}: {said}")
    return out.decode(errors="replace")


def _policy_variables(call: AgentCall) -> dict[str, str]:
    """Where clients of the chat API look, and what keeps a proxy of the machine out of the way."""
    host = urlsplit(call.base_url).hostname or ""
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), host]))
    return {
        "OPENAI_BASE_URL": call.base_url,
        "OPENAI_API_BASE": call.base_url,
        "OPENAI_API_KEY": call.api_key,
        "OPENAI_MODEL": call.model,
        "NEMO_RL_SEED": str(call.seed),
        "NO_PROXY": direct,
        "no_proxy": direct,
    }


async def _feed(process: asyncio.subprocess.Process, task: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):  # an agent need not read it
        process.stdin.write(task)
        await process.stdin.drain()
    process.stdin.close()


async def _read(stream: asyncio.StreamReader, output: bytearray, longest: int) -> None:
    """The end of what comes, at most `longest` bytes."""
    while piece := await stream.read(1 << 16):
        output += piece
        del output[:-longest]


async def _end(process: asyncio.subprocess.Process, pipes: Sequence[asyncio.Task[Any]]) -> None:
    """Kill the program's process group, and read what is left in the pipes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        await process.wait()
        await asyncio.wait(pipes, timeout=_DRAIN_S)  # longer only if something outside the group holds them
    finally:
        for pipe in pipes:
            pipe.cancel()
        process._transport.close()  # type: ignore[attr-defined]  # closes the pipes; there is no public way


def read_output(text: str) -> object:
    """What a program says of its run: the JSON object or number in its last line, else all of it, an answer."""
    lines = text.strip().splitlines()
    if lines:
        with contextlib.suppress(ValueError):
            outcome = json.loads(lines[-1])
            if isinstance(outcome, dict | int | float):
                return outcome
    return text.strip()
