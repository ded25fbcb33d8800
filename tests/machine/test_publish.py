"""What is published is whole, or is not there."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nemo_rl_core.machine.publish import published, replace


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    with published(path) as unfinished:
        unfinished.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_after_an_error_the_old_one_is_there(tmp_path, folder, error):
    path = tmp_path / "a"

    def write(place, text):
        if folder:
            place.mkdir()
            place = place / "inside"
        place.write_text(text)

    with published(path) as unfinished:
        write(unfinished, "old")
    with pytest.raises(type(error)), published(path) as unfinished:
        write(unfinished, "new")
        raise error
    assert (path / "inside" if folder else path).read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_another(tmp_path):
    for text in ("old", "new"):
        with published(tmp_path / "a") as unfinished:
            unfinished.mkdir()
            (unfinished / text).write_text(text)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_process_left_is_no_obstacle(tmp_path):
    code = (
        "import os, pathlib, sys\nfrom nemo_rl_core.machine.publish import published\n"
        "with published(pathlib.Path(sys.argv[1])) as unfinished:\n"
        "    unfinished.mkdir()\n    (unfinished / 'half').write_text('half')\n    os._exit(9)"
    )
    path = tmp_path / "a"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert not path.exists()
    with published(path) as unfinished:
        unfinished.mkdir()
        (unfinished / "whole").write_text("whole")
    assert [p.name for p in path.iterdir()] == ["whole"] and list(tmp_path.iterdir()) == [path]


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), published(tmp_path / "a"):
        pass
    with pytest.raises(FileNotFoundError):
        replace(tmp_path / "b", tmp_path / "c")
