"""The command line as a user meets it: fresh processes, their output and exit status."""

from __future__ import annotations

import json
import re

import pytest

from nemo_rl_core import __version__, errors
from nemo_rl_core import cli as cli_package
from nemo_rl_core.cli import main

HELLO = """
import typer
app = typer.Typer()

@app.command()
def hello(name: str, times: int = 1):
    '''Greet someone.'''
    typer.echo("hello " + name * times)

def plain(count: int = 2):
    '''A function is a command.'''
    print(count + 1)
"""

FAILS = """
from nemo_rl_core.errors import CheckpointError

def known():
    raise CheckpointError("the disk is full; free 3 GB")

def unknown():
    return {}["key"]

def interrupt():
    raise KeyboardInterrupt

def number():
    return 9

def pipe():
    raise BrokenPipeError

def chained():
    try:
        {}["inner"]
    except KeyError as error:
        raise CheckpointError("cannot read it") from error
"""


@pytest.fixture
def fails(cli):
    names = ("known", "unknown", "interrupt", "number", "pipe", "chained")
    cli.site.install("fail-dist", "0.7", entry_points={"commands": {n: f"fails:{n}" for n in names}},
                     modules={"fails": FAILS})  # fmt: skip
    return cli


def test_version(cli):
    done = cli("--version")
    assert (done.returncode, done.stdout) == (0, f"nemo-rl-core {__version__}\n")


LIGHT = """
import sys
from nemo_rl_core.cli import main
status = main(sys.argv[1:])
heavy = {"torch", "transformers", "datasets", "boom"} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["plugins", "list"], ["plugins", "list", "--json"], ["plugins", "--help"]]
)
def test_no_plugin_and_no_torch_is_imported(cli, arguments):
    cli.site.install("boom-dist", entry_points={"commands": {"boom": "boom:main"}, "losses": {"boom": "boom:L"},
                                                "hooks": {"boom": "boom"}},
                     modules={"boom": "raise SystemExit(99)"})  # fmt: skip
    done = cli.site.run("-c", LIGHT, *arguments)
    assert done.returncode == 0, done.stderr
    assert arguments[-1] == "--version" or done.stdout


LIGHT_MODULES = (
    "nemo_rl_core",
    "nemo_rl_core.registry",
    "nemo_rl_core.registry._hooks",
    "nemo_rl_core.cli",
    "nemo_rl_core.cli._app",
    "nemo_rl_core.training.callbacks",
)


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_imports_stay_light(cli, module):
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert cli.site.run("-c", code).returncode == 0


def test_help_lists_plugin_commands(cli):
    cli.site.install("hello-dist", "3.1", entry_points={"commands": {"hello": "hello_pkg:app"}})
    done = cli("--help")
    assert re.search(r"hello +\(from hello-dist 3\.1\)", done.stdout)
    for name in ("train", "eval", "config", "plugins"):
        assert re.search(rf"^  {name} +\S", done.stdout, re.M)
    assert "hello" not in cli("--no-plugins", "--help").stdout
    assert "hello" not in cli("--help", NEMO_RL_DISABLE_PLUGINS="hello-dist").stdout
    assert cli().returncode == 2  # no command: the help, and a status that says so


def test_a_typer_app_and_a_plain_function_are_commands(cli):
    cli.site.install("hello-dist", entry_points={"commands": {"hello": "hello_pkg:app", "plain": "hello_pkg:plain"}},
                     modules={"hello_pkg": HELLO})  # fmt: skip
    done = cli("hello", "you", "--times", "2")
    assert (done.returncode, done.stdout) == (0, "hello youyou\n"), done.stderr
    assert cli("plain", "--count", "4").stdout == "5\n"
    assert "Greet someone." in cli("hello", "--help").stdout
    wrong = cli("hello", "you", "--times", "x")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr and "--times" in wrong.stderr


def test_one_command_of_two_distributions(cli):
    cli.site.install("a-dist", entry_points={"commands": {"plain": "hello_pkg:plain"}}, modules={"hello_pkg": HELLO})
    cli.site.install("b-dist", entry_points={"commands": {"plain": "other_pkg:plain"}})
    done = cli("plain")
    assert done.returncode == 3
    assert "a-dist:plain" in done.stderr and "b-dist:plain" in done.stderr
    assert cli("a-dist:plain").stdout == "3\n"


def test_a_broken_command_is_one_precise_error(cli):
    cli.site.install("bad-dist", "0.2", entry_points={"commands": {"bad": "bad_pkg:app"}},
                     modules={"bad_pkg": "import no_such_dep"})  # fmt: skip
    done = cli("bad")
    assert done.returncode == 3
    assert "'bad' of bad-dist 0.2" in done.stderr and "no_such_dep" in done.stderr
    assert "Traceback" not in done.stderr
    assert "bad" in cli("--help").stdout  # and hurts nothing else
    assert "Traceback" in cli("--debug", "bad").stderr


def test_unknown_commands(cli):
    assert cli("nonsense").returncode == 2
    lonely = cli("quickstart", NEMO_RL_PLUGINS="")
    assert lonely.returncode == 3
    assert "nemo-rl" in lonely.stderr and "disabled" in lonely.stderr


def test_known_errors_are_a_message_and_a_status(fails):
    done = fails("known")
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == "error: the disk is full; free 3 GB\n"
    assert "Traceback" in fails("--debug", "known").stderr
    assert "Traceback" in fails("known", NEMO_RL_DEBUG="1").stderr
    assert fails("--debug", "known").returncode == 5
    chained = fails("chained")
    assert "--debug" in chained.stderr and "inner" not in chained.stderr


def test_unexpected_errors_leave_a_file(fails):
    done = fails("unknown", TMPDIR=str(fails.site.path))
    assert done.returncode == 70
    first = done.stderr.splitlines()[0]
    assert first == "error: plugin unknown 0.7 (dist fail-dist), command call: KeyError: 'key'"
    assert "NEMO_RL_DISABLE_PLUGINS=fail-dist" in done.stderr
    assert "Traceback" not in done.stderr
    (written,) = fails.site.path.glob("nemo-rl-error-*.txt")
    assert str(written) in done.stderr
    assert "Traceback" in written.read_text() and '{}["key"]' in written.read_text()


def test_unexpected_errors_where_no_file_can_be_written(fails):
    """The disk may be what failed: then the traceback is printed."""
    code = "import tempfile, sys\ndef full(*a, **k): raise OSError(28, 'No space left')\ntempfile.mkstemp = full\n"
    code += "from nemo_rl_core.cli import main; sys.exit(main(['unknown']))"
    done = fails.site.run("-c", code)
    assert done.returncode == 70 and "Traceback" in done.stderr


def test_interrupts_numbers_and_closed_pipes(fails):
    done = fails("interrupt")
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert fails("number").returncode == 9  # what a command returns is its status
    done = fails("pipe")
    assert done.returncode == 1 and done.stderr == ""


def test_main_returns_the_status(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nemo-rl-core {__version__}\n"
    assert main(["--no-such-option"]) == 2


def test_every_exit_status_is_documented():
    documented = {int(n) for n in re.findall(r"^(\d+) ", cli_package.__doc__, re.M)}
    classes = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.NemoRLError)]
    assert {e.exit_code for e in classes} | {0, 70} == documented


def test_strict_and_no_plugins_reach_child_processes(cli):
    code = "def show():\n    import os\n    print(os.environ.get('NEMO_RL_STRICT_PLUGINS'))"
    cli.site.install("env-dist", entry_points={"commands": {"env": "env_pkg:show"}}, modules={"env_pkg": code})
    assert cli("--strict-plugins", "env").stdout == "1\n"
    assert cli("env").stdout == "None\n"


def test_the_working_folder_is_importable(cli):
    """`module:attr` of the folder in which the command is run."""
    cli.site.module("my_losses", "class Loss:\n    '''Mine.'''\n    def __call__(self, outputs, batch): ...")
    code = "import os, sys; sys.path.remove(os.getcwd()); from nemo_rl_core.cli import main; main(['--version'])\n"
    code += "from nemo_rl_core.registry import get_registry as g; print(g().resolve('losses', 'my_losses:Loss').load())"
    done = cli.site.run("-c", code, env={"PYTHONSAFEPATH": "1"})
    assert "my_losses.Loss" in done.stdout, done.stderr


def rows(done):
    return {(r["kind"], r["name"]): r for r in json.loads(done.stdout)}


def test_plugins_list(cli):
    cli.site.install("good-dist", "1.5", entry_points={"losses": {"good": "good_pkg:L"}, "hooks": {"g": "good_hooks"}})
    cli.site.install("new-dist", entry_points={"losses": {"new": "m:L"}}, requires=["nemo-rl-core>=99"])
    cli.site.install("mal-dist", entry_points="[nemo_rl.losses]\nmal = nonsense\n[nemo_rl.loses]\ntypo = m:L\n")
    found = rows(cli("plugins", "list", "--json"))
    good = found["losses", "good"]
    assert (good["state"], good["distribution"], good["version"], good["api_version"], good["value"]) == (
        "compatible", "good-dist", "1.5", 1, "good_pkg:L")  # fmt: skip
    assert found["hooks", "g"]["state"] == "found"
    for key, word in ((("losses", "new"), ">=99"), (("losses", "mal"), "module:attr"), (("?", "typo"), "did you mean")):
        assert found[key]["state"] == "broken" and word in found[key]["error"]
    text = cli("plugins", "list", "--kind", "losses")
    assert text.returncode == 0
    assert re.search(r"^losses +good +good-dist +1\.5 +1 +compatible$", text.stdout, re.M)
    assert "environments" not in text.stdout
    strict = cli("--strict-plugins", "plugins", "list")
    assert strict.returncode == 3 and "mal-dist" in strict.stderr
    disabled = rows(cli("plugins", "list", "--json", NEMO_RL_DISABLE_PLUGINS="good-dist"))
    assert disabled["losses", "good"]["state"] == "disabled"
    none = json.loads(cli("--no-plugins", "plugins", "list", "--kind", "launchers", "--json").stdout)
    assert [row["name"] for row in none if row["state"] != "disabled"] == ["local"]


def test_plugins_list_all_asks_the_plugins(cli):
    cli.site.install("prov-dist", entry_points={"hooks": {"p": "prov"}},
                     modules={"prov": "def nemo_rl_rewards():\n    return {'late': 'prov:late'}"})  # fmt: skip
    assert ("rewards", "late") not in rows(cli("plugins", "list", "--json"))
    assert rows(cli("plugins", "list", "--all", "--json"))["rewards", "late"]["distribution"] == "prov-dist"


SINK = """
from attrs import field, frozen

@frozen(kw_only=True)
class Inner:
    depth: int = 3

@frozen(kw_only=True)
class Options:
    path: str
    '''Where the lines
    are written.'''
    every: int = field(default=10)
    names: list[str] = field(factory=list)
    inner: Inner = field(factory=Inner)

class Sink:
    '''Writes metrics to a file.

    Slowly.
    '''
    config_class = Options
    def start(self, run_name, run_dir, config): ...
    def log(self, metrics, *, step): ...
    def finish(self, status): ...
"""


def test_plugins_show(cli):
    cli.site.install(
        "sink-dist", "2.0", entry_points={"loggers": {"sink": "sink_pkg:Sink"}}, modules={"sink_pkg": SINK}
    )
    (shown,) = json.loads(cli("plugins", "show", "sink", "--json").stdout)
    assert shown["state"] == "loaded" and shown["qualified_name"] == "sink-dist:sink"
    assert shown["summary"] == "Writes metrics to a file." and shown["config_class"] == "sink_pkg:Options"
    assert [list(row.values()) for row in shown["options"]] == [
        ["path", "text", "text", "required", None, "Where the lines are written."],
        ["every", "integer", "integer", "10", None, ""],
        ["names", "list of text", "list of text", "[]", None, ""],
        ["inner.depth", "integer", "integer", "3", None, ""],
    ]
    text = cli("plugins", "show", "sink-dist").stdout
    for word in ("logger sink", "sink-dist 2.0", "API version 1", "protocols.logger:Logger", "inner.depth"):
        assert word in text
    missing = cli("plugins", "show", "snik")
    assert missing.returncode == 3 and "Did you mean 'sink'?" in missing.stderr


def test_plugins_show_of_a_broken_one_has_the_traceback(cli):
    cli.site.install(
        "bad-dist", entry_points={"losses": {"bad": "bad_pkg:L"}}, modules={"bad_pkg": "import no_such_dep"}
    )
    done = cli("plugins", "show", "bad")
    assert done.returncode == 3
    assert "broken" in done.stdout and "Traceback" in done.stdout and "bad_pkg.py" in done.stdout
