"""`plugins doctor` outlives every plugin, says of each what happened, and gives advice that helps."""

from __future__ import annotations

import json
import re

import pytest

from nemo_rl_core.registry import Registry
from nemo_rl_core.registry.explaining._diagnosis import examine

REWARD = "def r(response):\n    return 1.0\n"
UNTOLD = "class Untold(Exception):\n    def __str__(self):\n        raise ValueError\nraise Untold"
ENDS = {
    "exits": ("import os\nos._exit(0)", "importing it ended the process with status 0 (os._exit)"),
    "crashes": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "importing it ended the process: SIGSEGV"),
    "aborts": ("import os\nos.abort()", "importing it ended the process: SIGABRT"),
    "untold": (UNTOLD, "importing it raised Untold: (its text cannot be shown: __str__ raised ValueError)"),
    "shallow": (
        "import sys\nsys.setrecursionlimit(60)",
        "importing it raised ImportError: shallow_pkg has no attribute 'r'",
    ),
    "leaves": ("import sys\nsys.exit(0)", "importing it raised SystemExit: 0"),
    "odd": ("class Odd(BaseException): ...\nraise Odd('x')", "importing it raised Odd: x"),
    "interrupts": ("raise KeyboardInterrupt", "importing it raised KeyboardInterrupt"),
}


def diagnosed(*names: str, deny: tuple[str, ...] = (), **options):
    found = examine(Registry(allow=names, deny=deny), **options)
    return {finding.subject: finding for finding in found.findings}


def test_each_end_is_one_row_and_the_others_are_looked_at(site):
    for name, (source, _) in ENDS.items():
        module = f"{name}_pkg"
        site.install(f"{name}-dist", entry_points={"rewards": {name: f"{module}:r"}}, modules={module: source})
    site.install("zz-hooks", entry_points={"hooks": {"h": "zz_pkg"}}, modules={"zz_pkg": ENDS["exits"][0]})
    site.install("zz-sound", entry_points={"rewards": {"sound": "zz_sound:r"}}, modules={"zz_sound": REWARD})
    dists = [f"{name}-dist" for name in ENDS]
    found = diagnosed(*dists, "zz-hooks", "zz-sound")
    assert found.keys() == {*(f"{name}-dist:{name}" for name in ENDS), "zz-hooks:h"}
    for name, (_, told) in ENDS.items():
        finding = found[f"{name}-dist:{name}"]
        assert finding.problem == "broken" and told in finding.message, finding
    assert found["zz-hooks:h"].problem == "hook plugin" and "status 0" in found["zz-hooks:h"].message
    assert diagnosed(*dists, "zz-hooks", "zz-sound", deny=(*dists, "zz-hooks")) == {}


def test_one_that_does_not_end(site):
    site.install(
        "slow-dist",
        entry_points={"rewards": {"s": "slow_pkg:r"}},
        modules={"slow_pkg": "import threading\nthreading.Event().wait()"},
    )
    site.install("zz-dist", entry_points={"rewards": {"z": "zz_bad:r"}}, modules={"zz_bad": "import nowhere_x"})
    found = diagnosed("slow-dist", "zz-dist", timeout_s=5.0)
    assert "did not end within 5 s" in found["slow-dist:s"].message
    assert "nowhere_x" in found["zz-dist:z"].message


def test_nobody_is_blamed_for_what_another_one_did(site):
    taken = "import sys\nsys.modules['only_mine'] = None\n"
    site.install("aa-dist", entry_points={"rewards": {"a": "aa_pkg:r"}}, modules={"aa_pkg": taken + REWARD})
    site.install(
        "bb-dist",
        entry_points={"rewards": {"b": "bb_pkg:r"}},
        modules={"bb_pkg": "import only_mine\n" + REWARD, "only_mine": ""},
    )
    assert diagnosed("aa-dist", "bb-dist") == {}


def test_the_command_says_what_an_exit_did(cli):
    cli.site.install(
        "gone-dist",
        entry_points={"rewards": {"g": "gone_pkg:r"}},
        modules={"gone_pkg": "import os\nprint('noise')\nos._exit(0)"},
    )
    done = cli("plugins", "doctor", "--json", NEMO_RL_PLUGINS="gone-dist")
    (finding,) = json.loads(done.stdout)["findings"]
    assert done.returncode == 3 and "status 0" in finding["message"]


# -- advice ---------------------------------------------------------------------------------------------------


def disabled_by(fix: str) -> list[str]:
    (names,) = re.findall(r"NEMO_RL_DISABLE_PLUGINS=(\S+)", fix)
    return names.split(",")


@pytest.mark.parametrize("count", [2, 3])
def test_the_advice_on_a_conflict_settles_it(site, count):
    names = [f"{letter}-dist" for letter in "abc"[:count]]
    for name in names:
        module = name.replace("-", "_")
        site.install(name, entry_points={"rewards": {"same": f"{module}:r"}}, modules={module: REWARD})
    fix = diagnosed(*names)["reward same"].fix
    assert diagnosed(*names, deny=tuple(disabled_by(fix))) == {}
    (full,) = re.findall(r"plugins: \{same: '([^']+)'\}", fix)
    registry = Registry(allow=names)
    assert registry.resolve("rewards", "same", plugins={"same": full}).qualified_name == full


def test_the_advice_never_is_to_disable_the_core(site):
    source = "from nemo_rl_core.infra.workers.local import LocalLauncher\nclass Own(LocalLauncher): ..."
    site.install("own-dist", entry_points={"launchers": {"local": "own_pkg:Own"}}, modules={"own_pkg": source})
    fix = diagnosed("own-dist")["launcher local"].fix
    assert disabled_by(fix) == ["own-dist"] and "plugins: {local: 'own-dist:local'}" in fix
    assert diagnosed("own-dist", deny=("own-dist",)) == {}


def test_the_advice_keeps_what_is_disabled_already(site):
    for name in ("one-dist", "two-dist"):
        module = name.replace("-", "_")
        site.install(name, entry_points={"rewards": {name: f"{module}:r"}}, modules={module: "import nowhere_x"})
    fix = diagnosed("one-dist", "two-dist", deny=("one-dist",))["two-dist:two-dist"].fix
    assert diagnosed("one-dist", "two-dist", deny=tuple(disabled_by(fix))) == {}


def test_a_name_that_stands_twice_is_not_offered_as_the_way_out(site):
    text = "[nemo_rl.rewards]\nsame = tw_pkg:r\nsame = tw_pkg:q\n"
    site.install("tw-dist", entry_points=text, modules={"tw_pkg": REWARD + "q = r"})
    assert "plugins:" not in diagnosed("tw-dist")["reward same"].fix
