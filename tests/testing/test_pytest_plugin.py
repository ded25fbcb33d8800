"""The pytest plugin as a plugin author meets it: in a pytest of its own, in a folder of their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib.metadata import entry_points

import pytest

HEADER = """
import pytest
from nemo_rl_core.testing import CallbackContract

class Listener:
    def on_step_end(self, run, metrics):
        pass
"""


@pytest.fixture
def run_pytest(tmp_path):
    """Write a test file and run it in a fresh process with this plugin alone."""

    def run(source, *arguments):
        (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
        (tmp_path / "test_it.py").write_text(textwrap.dedent(source))
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or ("-p", "nemo_rl"))],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
            check=False,
        )

    return run


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


def test_a_contract_is_tested(run_pytest):
    done = run_pytest(
        HEADER
        + """
class TestListener(CallbackContract):
    @pytest.fixture
    def callback(self):
        return Listener()
"""
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 passed" in done.stdout


def test_a_fixture_of_the_module_serves(run_pytest):
    done = run_pytest(
        HEADER
        + """
@pytest.fixture
def callback():
    return Listener()

class TestListener(CallbackContract):
    pass
"""
    )
    assert "12 passed" in done.stdout, done.stdout


def test_failed_clauses_show_what_they_compared(run_pytest):
    """Assertions of the kits are rewritten."""
    done = run_pytest(
        HEADER
        + """
class TestListener(CallbackContract):
    @pytest.fixture
    def callback(self):
        listener = Listener()
        listener.critical = "yes"
        return listener
"""
    )
    assert "critical is 'yes'" in done.stdout
    assert "isinstance('yes', bool)" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("    pass", "Write in the class: @pytest.fixture def callback(self): return ..."),
        ("    @pytest.fixture\n    def callback(self):\n        Listener()", "returns None: is a `return` missing?"),
        (
            "    @pytest.fixture\n    def callback(self):\n        return Listener",
            "it returns the class Listener: return an object, such as Listener()",
        ),
        ("    def callback(self):\n        return Listener()", "`callback` is a method, not a fixture"),
        ("    callback = 3", "`callback` is a int, not a fixture"),
        ("    def __init__(self):\n        self.x = 1", "it has an __init__, so pytest would leave it out"),
        (
            "    test_whole_run = None\n    @pytest.fixture\n    def callback(self):\n        return Listener()",
            "it takes away test_whole_run",
        ),
    ],
)
def test_classic_mistakes_are_told(run_pytest, body, complaint):
    done = run_pytest(f"{HEADER}\nclass TestListener(CallbackContract):\n{body}\n")
    assert done.returncode != 0
    assert complaint in " ".join(done.stdout.split()), done.stdout


def test_a_contract_without_a_kind_is_told(run_pytest):
    done = run_pytest("from nemo_rl_core.testing import Contract\nclass TestX(Contract):\n    def test_a(self): pass\n")
    assert "Sub-class the contract of a kind" in done.stdout


def test_a_site_of_plugins(run_pytest):
    done = run_pytest(
        """
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
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


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
