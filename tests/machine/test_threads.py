"""Work in threads, answers to event loops, and a process that notices that its parent is gone."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading

import pytest

from nemo_rl_core.machine.threads import in_thread, settle_soon

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, pass_fds=[{fd}])
child.stdout.readline()
"""
CHILD = """
import os, threading
from nemo_rl_core.machine import threads
{before}
gone = threading.Event()
threads.watch_parent(gone.set, name="watch")
print("ready", flush=True)
gone.wait()
os.write({fd}, b"parent gone")
"""


def test_a_thread_hands_back_its_result_or_what_it_raised():
    assert in_thread(lambda: threading.current_thread().name, name="of-a-test").result(10.0) == "of-a-test"
    with pytest.raises(SystemExit, match="7"):
        in_thread(lambda: sys.exit("7"), name="of-a-test").result(10.0)


async def test_a_future_is_settled_on_its_loop_and_only_once():
    future = asyncio.get_running_loop().create_future()
    for value, error in ((1, None), (2, None), (None, ValueError())):
        assert await asyncio.to_thread(settle_soon, future, value, error)
    assert await future == 1
    failed = asyncio.get_running_loop().create_future()
    await asyncio.to_thread(settle_soon, failed, None, ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        await failed


def test_the_future_of_a_loop_that_is_closed_is_nobodys():
    loop = asyncio.new_event_loop()
    future = loop.create_future()
    loop.close()
    assert not settle_soon(future, 1)


@pytest.mark.parametrize("before", ["", "threads._LOOK_S = 0.01\ndel os.pidfd_open"], ids=["told", "looking"])
def test_a_child_notices_that_its_parent_has_ended(before):
    ours, theirs = os.pipe()
    child = CHILD.format(before=before, fd=theirs)
    subprocess.run([sys.executable, "-c", PARENT.format(child=child, fd=theirs)], pass_fds=[theirs], check=True)
    os.close(theirs)
    with os.fdopen(ours, "rb") as told:
        assert told.read() == b"parent gone"
