"""References in other processes, manifests and their differences."""

from __future__ import annotations

import json
import pickle
import socket

import pytest

from nemo_rl_core.errors import PluginError, PluginIncompatible
from nemo_rl_core.registry import (
    ComponentRef,
    Registry,
    compare_manifests,
    difference_table,
    manifest,
    register_loss,
    register_reward,
)

LOSS = """
class Loss:
    def __call__(self, outputs, batch):
        return None
"""

SPAWN = """
import multiprocessing as mp
from nemo_rl_core.registry import get_registry, register_reward

FACTOR = 3

@register_reward("triple")
def triple(response):
    return FACTOR * len(response)

class Scorer:
    def __call__(self, response):
        return triple(response) + 1

def work(ref):
    return ref.load()("abcd"), ref.name

def outer():
    @register_reward("local")
    def local(response):
        return 7.0
    return local

if __name__ == "__main__":
    outer()
    registry = get_registry()
    refs = [registry.resolve("rewards", x) for x in ("triple", "local", triple, Scorer(), lambda response: 9.0)]
    with mp.get_context("spawn").Pool(1) as pool:
        print(pool.map(work, refs))
"""

RECEIVE = """
import pickle, sys
ref = pickle.load(open(sys.argv[1], "rb"))
assert ref.state == "found"
try:
    print(ref.load()("abcd"))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_decorated_in_main_reaches_a_spawned_process(site):
    script = site.module("script", SPAWN)
    done = site.run(str(script))
    assert done.stdout.strip() == str(
        [(12, "triple"), (7.0, "local"), (12, "triple"), (13, "Scorer"), (9.0, "<lambda>")]
    )


def test_decorated_in_main_by_value_in_a_process_without_the_script(site, tmp_path):
    """As on a machine that has never seen the notebook."""
    sent = tmp_path / "ref.pickle"
    code = SPAWN.partition("def work")[0] + "\nimport pickle\nref = get_registry().resolve('rewards', 'triple')"
    code += f"\npickle.dump(ref, open({str(sent)!r}, 'wb'))"
    done = site.run("-c", code)
    assert done.returncode == 0, done.stderr
    assert site.run("-c", RECEIVE, str(sent)).stdout == "12\n"


def test_installed_components_travel_by_name(site, registry):
    site.install("d", "1.0", entry_points={"losses": {"x": "d_pkg:Loss"}}, modules={"d_pkg": LOSS})
    ref = registry.resolve("losses", "x")
    cls = ref.load()
    data = pickle.dumps(ref)
    assert len(data) < 700 and b"cloudpickle" not in data
    again = pickle.loads(data)
    assert again == ref and again.state == "found"
    assert again.load() is cls


def test_a_worker_with_another_version_refuses_with_a_table(site, tmp_path):
    reward = {"r_pkg": "def reward(response):\n    return len(response)\n"}
    site.install("r", "1.0", entry_points={"rewards": {"r": "r_pkg:reward"}}, modules=reward)
    sent = tmp_path / "ref.pickle"
    dump = "import pickle,sys; from nemo_rl_core.registry import get_registry as g;"
    dump += "pickle.dump(g().resolve('rewards', 'r'), open(sys.argv[1], 'wb'))"
    site.run("-c", dump, str(sent))
    assert site.run("-c", RECEIVE, str(sent)).stdout == "4\n"

    (site.path / "r-1.0.dist-info").rename(site.path / "r-1.1.dist-info")
    lines = site.run("-c", RECEIVE, str(sent)).stdout.splitlines()
    assert lines[0].startswith("PluginIncompatible")
    assert lines[1].split() == ["node", "plugin", "found", "expected"]
    assert lines[2].split() == [socket.gethostname(), "r", "(rewards", "r)", "1.1", "1.0"]

    (site.path / "r-1.1.dist-info").rename(tmp_path / "gone")
    assert "r (rewards r)  not installed  1.0" in site.run("-c", RECEIVE, str(sent)).stdout


def test_a_worker_with_another_working_tree_refuses(site, tmp_path):
    files = {
        "r_pkg.__init__": "",
        "r_pkg.main": "from r_pkg.part import f as reward",
        "r_pkg.part": "def f(response): return 1",
    }
    site.install("r", entry_points={"rewards": {"r": "r_pkg.main:reward"}}, modules=files, editable=True)
    sent = tmp_path / "ref.pickle"
    dump = "import pickle,sys; from nemo_rl_core.registry import get_registry as g;"
    dump += "pickle.dump(g().resolve('rewards', 'r'), open(sys.argv[1], 'wb'))"
    site.run("-c", dump, str(sent))
    assert site.run("-c", RECEIVE, str(sent)).stdout == "1\n"
    site.module("r_pkg.part", "def f(response): return 2")  # not the file that the entry point names
    assert "1.0, source " in site.run("-c", RECEIVE, str(sent)).stdout


def test_user_code_in_a_module_travels_by_name_and_is_compared(site, registry, tmp_path):
    site.module(
        "mine", "from nemo_rl_core.registry import register_reward\n@register_reward('m')\ndef m(response): return 5"
    )
    import mine  # noqa: F401  # from the site

    ref = registry.resolve("rewards", "m")
    sent = tmp_path / "ref.pickle"
    sent.write_bytes(pickle.dumps(ref))
    assert site.run("-c", RECEIVE, str(sent)).stdout == "5\n"
    site.module("mine", "def m(response): return 6")
    assert "PluginIncompatible" in site.run("-c", RECEIVE, str(sent)).stdout


def test_what_cannot_be_sent_says_so(registry):
    import threading

    lock = threading.Lock()

    def held(response):
        return lock.locked()

    ref = registry.resolve("rewards", held)
    with pytest.raises(PluginError, match=r"'held'.*cannot be sent.*lock.*Move it into a module"):
        pickle.dumps(ref)


def test_manifest_rows_are_plain_and_sorted(site, registry):
    site.install("b", "2.0", entry_points={"rewards": {"r": "b_pkg:r"}}, modules={"b_pkg": "def r(response): 0"})
    site.install("a", "1.0", entry_points={"losses": {"x": "a_pkg:Loss"}}, modules={"a_pkg": LOSS}, editable=True)

    @register_reward("own")
    def own(response):
        return 0.0

    refs = [
        registry.resolve(k, n) for k, n in (("rewards", "r"), ("rewards", "own"), ("losses", "x"), ("rewards", "r"))
    ]
    rows = registry.manifest(refs)
    assert json.loads(json.dumps(rows)) == rows
    assert [(r["kind"], r["name"]) for r in rows] == [("losses", "x"), ("rewards", "own"), ("rewards", "r")]
    installed = rows[2]
    assert installed == {"kind": "rewards", "name": "r", "distribution": "b", "version": "2.0",
                         "value": "b_pkg:r", "api_version": 1, "source_hash": None, "origin": "entry point",
                         "defined_in": None}  # fmt: skip
    assert rows[0]["source_hash"] is not None  # a working tree
    assert rows[1]["source_hash"] is not None and rows[1]["distribution"] is None
    assert rows[1]["origin"] == "decorator" and rows[1]["defined_in"] == __file__
    assert rows == manifest(refs)
    registry.check_manifest(rows)


def test_compare_manifests():
    row = {"kind": "losses", "name": "x", "distribution": "d", "version": "1", "value": "m:L", "api_version": 1,
           "source_hash": None}  # fmt: skip
    assert compare_manifests([row], [dict(row)]) == []
    other = {**row, "version": "2", "api_version": 2}
    differences = compare_manifests([row, {**row, "name": "gone"}], [other, {**row, "name": "new"}])
    assert [(d.name, d.field, d.before, d.after) for d in differences] == [
        ("gone", "component", "present", "absent"),
        ("new", "component", "absent", "present"),
        ("x", "version", "1", "2"),
        ("x", "api_version", 1, 2),
    ]
    assert "losses 'x': version was 1, is 2" in map(str, differences)
    lines = difference_table(differences, before="saved", after="now").splitlines()
    assert lines[0].split() == ["kind", "name", "what", "saved", "now"]
    assert (
        len({line.index(cell) for line, cell in zip(lines, ("saved", "present", "absent", "1", "1"), strict=True)}) == 1
    )
    old = {k: v for k, v in row.items() if k != "source_hash"}  # an older manifest lacks a column
    assert compare_manifests([old], [{**row, "source_hash": "abc"}]) == []


def test_check_manifest_lists_every_difference(site, registry):
    site.install("d", "1.0", entry_points={"losses": {"x": "d_pkg:Loss"}})
    base = registry.manifest([registry.resolve("losses", "x")])[0]
    rows = [{**base, "version": "0.9"}, {**base, "name": "y", "distribution": "absent-dist"}]
    with pytest.raises(PluginIncompatible) as error:
        registry.check_manifest(rows)
    assert "0.9" in str(error.value) and "absent-dist" in str(error.value)


def test_registered_again_in_the_receiving_process_is_no_conflict(registry):
    @register_loss("twice")
    def twice(outputs, batch):
        return None

    ref = pickle.loads(pickle.dumps(registry.resolve("losses", "twice")))
    assert ref.load() is not twice  # local: came by value
    assert ref.load().__name__ == "twice"
    assert isinstance(ref, ComponentRef) and Registry is not None


def test_a_module_without_a_file_travels_by_value(site, tmp_path):
    """As one that a notebook's magic or a tool made: no other process can import it."""
    sent = tmp_path / "ref.pickle"
    code = """
import pickle, sys, types
from nemo_rl_core.registry import get_registry, register_reward
module = types.ModuleType("made_by_a_tool")
source = "FACTOR = 3\\ndef helper(x): return FACTOR * x\\ndef score(response): return helper(len(response))"
exec(source, module.__dict__)
sys.modules["made_by_a_tool"] = module
register_reward("made")(module.score)
pickle.dump(get_registry().resolve("rewards", "made"), open(sys.argv[1], "wb"))
"""
    assert site.run("-c", code, str(sent)).returncode == 0
    assert site.run("-c", RECEIVE, str(sent)).stdout.strip() == "12"
