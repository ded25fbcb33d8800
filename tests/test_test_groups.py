"""The tests are run as they are meant to be: those that share something costly share a process, and some must pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("groups")

ROOT = Path(__file__).resolve().parents[1]


def test_a_group_stays_together(request: pytest.FixtureRequest) -> None:
    """A pytest that hides the group from xdist would have both processes build and install the same wheels."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("run with -n 2 --dist loadgroup")
    assert request.node.nodeid.endswith("@groups")


@pytest.mark.parametrize(("tested", "status"), [("pytest.skip('no engine here')", 5), ("pass", 0), ("assert 0", 1)])
def test_a_run_in_which_all_is_skipped_fails_where_that_is_asked(tmp_path: Path, tested: str, status: int) -> None:
    """In CI a run whose tests all lack what they need would be taken for one that found nothing wrong."""
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "test_it.py").write_text(f"import pytest\n\ndef test_it():\n    {tested}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "test_it.py"]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = [
        subprocess.run([*command, *more], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        for more in (["--fail-unless-passed"], [])
    ]
    assert [run.returncode for run in done] == [status, 0 if status == 5 else status], done
