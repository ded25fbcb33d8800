"""The pytest plugin as a plugin author meets it: in a pytest of its own, in a folder of their own."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.xdist_group("author")  # one worker makes what they share

HEADER = """
import pytest
from nemo_rl_core.testing import CallbackContract

class Listener:
    def __init__(self, **own):
        vars(self).update(own)

    def on_step_end(self, run, metrics):
        pass
"""


FIXTURE = """
    @pytest.fixture
    def callback(self):
        return Listener()
"""
SITE = """
import importlib.metadata
import sys
from nemo_rl_core.registry import get_registry, register_loss

def test_installs(plugin_site):
    plugin_site.install(
        "acme",
        entry_points={"losses": {"sharp": "acme_loss:sharp"}},
        modules={"acme_loss": "def sharp(): return 3"},
    )
    assert get_registry().resolve("losses", "sharp").load()() == 3
    assert "acme_loss" in sys.modules
    register_loss("mine")(lambda outputs, batch: None)

def test_is_gone():
    assert "acme_loss" not in sys.modules
    assert not {"sharp", "mine"} & set(get_registry().names("losses"))
"""
CRITICAL = """
    @pytest.fixture
    def callback(self):
        listener = Listener()
        listener.critical = "yes"
        return listener
"""
MODULE_FIXTURE = """
@pytest.fixture
def callback():
    return Listener()

class TestListener(CallbackContract):
    pass
"""
MISTAKES = {
    "no_fixture": ("    pass", "Write in the class: @pytest.fixture def callback(self): return ..."),
    "no_return": ("    @pytest.fixture\n    def callback(self):\n        Listener()", "is a `return` missing?"),
    "a_class": (
        "    @pytest.fixture\n    def callback(self):\n        return Listener",
        "it returns the class Listener: return an object, such as Listener()",
    ),
    "a_method": ("    def callback(self):\n        return Listener()", "`callback` is a method, not a fixture"),
    "a_number": ("    callback = 3", "`callback` is a int, not a fixture"),
    "an_init": ("    def __init__(self):\n        self.x = 1", "it has an __init__, so pytest would leave it out"),
    "takes_away": (f"    test_whole_run = None\n{FIXTURE}", "it takes away test_whole_run"),
    "misspelt": (
        FIXTURE.replace("Listener()", "Listener(conformance={'metric': {}})"),
        "`conformance` of Listener says metric; its contract knows metrics, timeout_s",
    ),
    "no_mapping": (
        FIXTURE.replace("Listener()", "Listener(conformance=3)"),
        "`conformance` of Listener is 3, not a map",
    ),
    "no_function": (
        "    def scale(self): return 1\n" + FIXTURE.replace("Listener()", "Listener(conformance={'scale': 2})"),
        "`conformance` of Listener says scale = 2, not a function",
    ),
}
"""Subclasses of a contract by what is wrong with them, and what is told."""

FILES = {
    "sound": f"{HEADER}\nclass TestListener(CallbackContract):{FIXTURE}",
    "module_fixture": HEADER + MODULE_FIXTURE,
    "critical": f"{HEADER}\nclass TestListener(CallbackContract):{CRITICAL}",
    "no_kind": "from nemo_rl_core.testing import Contract\nclass TestX(Contract):\n    def test_a(self): pass\n",
    "site": SITE,
    **{name: f"{HEADER}\nclass TestListener(CallbackContract):\n{body}\n" for name, (body, _) in MISTAKES.items()},
}


class Outcome(NamedTuple):
    """What became of the tests of one file."""

    passed: int
    failures: str


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Outcome]:
    """Every file, run in one fresh process with this plugin alone."""
    folder = tmp_path_factory.mktemp("author")
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    for name, source in FILES.items():
        (folder / f"test_{name}.py").write_text(source)
    options = ["-q", "-p", "no:cacheprovider", "-p", "nemo_rl", "--continue-on-collection-errors"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--junit-xml=report.xml"],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=folder,
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = {}
    cases = list(ElementTree.parse(folder / "report.xml").getroot().iter("testcase"))
    for name in FILES:
        mine = [case for case in cases if f"test_{name}" in (f"{case.get('classname')}.{case.get('name')}").split(".")]
        bad = [child for case in mine for child in case if child.tag in ("failure", "error")]
        text = " ".join(f"{child.get('message')}\n{child.text}" for child in bad)
        found[name] = Outcome(sum(not list(case) for case in mine), " ".join(text.split()))
    return found


def test_it_is_installed_by_its_entry_point():
    (found,) = entry_points(group="pytest11", name="nemo_rl")
    assert found.value == "nemo_rl_core.testing.pytest_plugin"


def test_it_imports_nothing_heavy():
    program = "import sys, nemo_rl_core.testing.pytest_plugin; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.split())
    assert not {"torch", "numpy", "attrs", "cattrs", "transformers", "nemo_rl_core.config"} & loaded
    ours = {name for name in loaded if name.startswith("nemo_rl_core")}
    assert ours == {
        "nemo_rl_core",
        "nemo_rl_core._version",
        "nemo_rl_core.exports",
        "nemo_rl_core.testing",
        "nemo_rl_core.testing.pytest_plugin",
    }


@pytest.mark.parametrize("name", ["sound", "module_fixture"])
def test_a_contract_is_tested(outcomes, name):
    assert outcomes[name] == (12, "")


def test_failed_clauses_show_what_they_compared(outcomes):
    """Assertions of the kits are rewritten."""
    assert "critical is 'yes'" in outcomes["critical"].failures
    assert "isinstance('yes', bool)" in outcomes["critical"].failures


@pytest.mark.parametrize("name", MISTAKES)
def test_classic_mistakes_are_told(outcomes, name):
    assert MISTAKES[name][1] in outcomes[name].failures


def test_a_contract_without_a_kind_is_told(outcomes):
    assert "Subclass the contract of a kind" in outcomes["no_kind"].failures


def test_a_site_of_plugins(outcomes):
    assert outcomes["site"] == (2, "")


def test_a_tokenizer_and_a_pool(scratch_tokenizer, process_pool):
    import asyncio

    assert scratch_tokenizer.decode(scratch_tokenizer.encode("2+2", add_special_tokens=False)) == "2+2"
    assert asyncio.run(process_pool.run(pow, 2, 5)) == 32


WITHOUT_PYTEST = """
import sys
sys.modules["pytest"] = None
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "pytest" else find_spec(name, *a)
import nemo_rl_core.testing
from nemo_rl_core.testing import PluginSite
try:
    from nemo_rl_core.testing import LossContract
except ImportError as error:
    print(type(error).__name__, error)
"""


def test_without_pytest_only_kits_are_missing():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PYTEST], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("MissingExtra") and "pip install 'nemo-rl-core[testing]'" in done.stdout
