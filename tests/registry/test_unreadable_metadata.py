"""A metadata file that is no UTF-8 text: one broken row, and nothing else of the system notices."""

from __future__ import annotations

import sys
import zipfile

import pytest

from nemo_rl_core.errors import PluginBroken, PluginNotFound
from nemo_rl_core.registry import Registry
from nemo_rl_core.registry.discovery._distributions import distributions
from nemo_rl_core.registry.explaining._diagnosis import diagnose

REWARD = "def r(response):\n    return 1.0\n"


@pytest.fixture(params=["folders only", "with an archive on the path"])
def broken(request, site, monkeypatch, tmp_path):
    """Installs `bad-dist`, one of whose files has been written in another encoding."""
    if request.param != "folders only":
        with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
            archive.writestr("nothing.txt", "")
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "some.zip")])
    site.install("good-dist", entry_points={"rewards": {"good": "good_pkg:r"}}, modules={"good_pkg": REWARD})

    def install(filename, encoding="latin-1"):
        site.install(
            "bad-dist",
            entry_points={"rewards": {"bad": "bad_pkg:r", "worse": "bad_pkg:r"}},
            modules={"bad_pkg": REWARD},
        )
        path = site.path / "bad_dist-1.0.dist-info" / filename
        before = path.read_text()
        text = f"# café\n{before}" if filename == "entry_points.txt" else f"{before}Author: René\n"
        path.write_bytes(text.encode(encoding))

    return install


@pytest.mark.parametrize(
    ("filename", "encoding"), [("entry_points.txt", "latin-1"), ("METADATA", "latin-1"), ("entry_points.txt", "utf-16")]
)
def test_one_broken_row_and_the_others_work(broken, filename, encoding):
    broken(filename, encoding)
    registry = Registry(allow=["good-dist", "bad-dist"])
    assert registry.resolve("rewards", "good").load()("x") == 1.0
    ((distribution, problem),) = registry.problems()
    assert distribution == "bad-dist" and f"its {filename} in " in str(problem)
    assert "is not UTF-8 text (byte 0x" in str(problem)
    with pytest.raises(PluginBroken, match="is not UTF-8 text"):
        registry.resolve("rewards", "bad")
    (finding,) = diagnose(registry, load=False)
    assert (finding.problem, finding.subject) == ("broken", "bad-dist 1.0")
    assert "pip install --force-reinstall bad-dist" in finding.fix


def test_disabled_it_is_not_read(broken):
    broken("entry_points.txt")
    registry = Registry(deny=["bad-dist"])
    assert not registry.index.unreadable and "bad" not in registry.names("rewards")
    with pytest.raises(PluginNotFound, match="disabled"):
        registry.resolve("rewards", "bad")


def test_names_and_versions_are_told_all_the_same(broken):
    broken("METADATA")
    found = {dist.name: dist.version for dist in distributions()}
    assert found["bad-dist"] == found["good-dist"] == "1.0"
    assert found["nemo-rl-core"]
