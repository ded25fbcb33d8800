"""Memory that processes share: reserved before it is written to, and not left behind by killed processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from nemo_rl_core.errors import ResourceError
from nemo_rl_core.machine import shared_files
from nemo_rl_core.machine.shared_files import SharedFile, map_shared, sweep

MAKE = """
import os, pathlib, signal, sys
from nemo_rl_core.machine import shared_files
shared_files._SHARED = pathlib.Path(sys.argv[1])
file = shared_files.SharedFile(1000, fix="")
print(file.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_files, "_SHARED", tmp_path)
    monkeypatch.setattr(shared_files, "_swept", set())
    return tmp_path


def test_both_sides_see_the_same_bytes_and_closing_leaves_no_file(folder):
    file = SharedFile(1000, fix="")
    file.map()[7] = 42
    other = map_shared(file.path, 1000)
    assert other[7] == 42
    assert os.stat(file.path).st_blocks * 512 >= 1000  # not a hole that may find no memory later
    file.close()
    file.close()
    assert list(folder.iterdir()) == []
    assert other[7] == 42


def test_too_little_memory_is_an_error_that_says_what_to_do(folder):
    found = os.statvfs(folder)
    with pytest.raises(ResourceError, match=r"No room for \d+ MiB.*MiB, of which.*Lower it\..*--shm-size"):
        SharedFile(2 * found.f_blocks * found.f_frsize, fix="Lower it.")
    assert list(folder.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(folder):
    done = subprocess.run(
        [sys.executable, "-c", MAKE, str(folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    left = done.stdout.strip()
    used, other = SharedFile(10, fix=""), folder / "another-file"
    other.write_text("")
    shared_files._swept.clear()
    assert sweep(str(folder)) == []  # it is young: its maker may be about to lock it
    for path in (left, used.path, other):
        os.utime(path, (0, 0))
    shared_files._swept.clear()
    assert sweep(str(folder)) == [os.path.basename(left)]
    assert {path.name for path in folder.iterdir()} == {os.path.basename(used.path), "another-file"}
    used.close()
