"""Checkpoints are there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nemo_rl_core.errors import CheckpointError
from nemo_rl_core.training.checkpoints.store import CheckpointStore


def writer(text: str):
    def write(folder: Path) -> None:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights.bin").write_text(text)

    return write


def test_what_was_saved_is_loaded(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(3, writer("three"), {"metrics": {"loss": 1.5}})
    checkpoint = store.load("auto")
    assert checkpoint.step == 3
    assert checkpoint.state() == {"metrics": {"loss": 1.5}}
    assert (checkpoint.path / "policy" / "weights.bin").read_text() == "three"


def test_only_the_newest_and_the_best_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=1, metric="accuracy")
    for step, accuracy in ((1, 0.2), (2, 0.9), (3, 0.5), (4, 0.1)):
        store.save(step, writer(str(step)), {"metrics": {"accuracy": accuracy}})
    assert [c.step for c in store.list()] == [2, 4]


def test_lower_is_better_when_said(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=1, metric="loss", higher_is_better=False)
    for step, loss in ((1, 0.2), (2, 0.9), (3, 0.5)):
        store.save(step, writer(str(step)), {"metrics": {"loss": loss}})
    assert [c.step for c in store.list()] == [1, 3]


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, writer("one"), {})

    def fill(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "half"))

    with pytest.raises(CheckpointError, match=r"No space left on device.*step_1.*untouched.*Free space"):
        store.save(2, fill, {})
    assert [c.step for c in store.list()] == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]
    assert store.load("must").step == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_reported(tmp_path):
    def fill(folder: Path) -> None:
        (folder / "data").symlink_to("/dev/full")
        with (folder / "data").open("w") as file:
            file.write("x" * 10_000)

    with pytest.raises(CheckpointError, match="No space left"):
        CheckpointStore(tmp_path).save(1, fill, {})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.write_text("thre"), "has 4 bytes, not 5"),
        (lambda f: f.write_text("thref"), "checksum of policy/weights.bin is wrong"),
        (lambda f: f.unlink(), "policy/weights.bin is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, caplog, spoil, message):
    store = CheckpointStore(tmp_path)
    store.save(2, writer("two"), {})
    store.save(3, writer("three"), {})
    spoil(tmp_path / "step_3" / "policy" / "weights.bin")
    assert store.load("auto").step == 2
    assert message in caplog.text
    assert (tmp_path / "step_3").exists()


def test_when_all_are_damaged_it_is_an_error_not_a_new_start(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, writer("one"), {})
    (tmp_path / "step_1" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"damaged state.json.*resume=never"):
        store.load("auto")


def test_another_format_is_refused(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, writer("one"), {})
    path = tmp_path / "step_1" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        store.load("auto")


def test_must_and_never(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.load("auto") is None
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        store.load("must")
    store.save(1, writer("one"), {})
    assert store.load("never") is None


def test_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, writer("old"), {})
    store.save(1, writer("new"), {})
    assert (store.load("must").path / "policy" / "weights.bin").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_killed_while_writing_leaves_the_former_one_and_is_swept(tmp_path):
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from nemo_rl_core.training.checkpoints.store import CheckpointStore
        store = CheckpointStore(Path(sys.argv[1]))
        store.save(1, lambda f: (f / "a").write_text("one"), {})
        def die(folder):
            (folder / "a").write_text("two")
            os.kill(os.getpid(), signal.SIGKILL)
        store.save(2, die, {})
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".writing-*"))) == 1
    assert CheckpointStore(tmp_path).load("must").step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_killed_between_the_two_renames_of_a_replacement(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, writer("old"), {})
    (tmp_path / "step_1").rename(tmp_path / ".old-step_1")  # what a kill at that moment leaves
    assert (store.load("must").path / "policy" / "weights.bin").read_text() == "old"
