"""From a name to a component: the four ways to name one, conflicts, and what is said when it fails."""

from __future__ import annotations

import pickle
import sys

import pytest

from nemo_rl_core.errors import PluginBroken, PluginConflict, PluginError, PluginIncompatible, PluginNotFound
from nemo_rl_core.registry import KINDS, ComponentRef, Registry, register_loss
from nemo_rl_core.testing.site import PluginSite

LOSS = """
class Loss:
    denominator = "tokens"
    needs = frozenset({"logprobs"})

    def __call__(self, outputs, batch):
        return None
"""


def test_nothing_is_imported_before_load(site, registry):
    site.install(
        "slow", entry_points={"losses": {"slow": "slow_pkg:Loss"}}, modules={"slow_pkg": "raise SystemExit(9)"}
    )
    ref = registry.resolve("losses", "slow")
    assert (ref.distribution, ref.version, ref.value, ref.state) == ("slow", "1.0", "slow_pkg:Loss", "compatible")
    assert "slow" in registry.names("losses")
    assert "slow_pkg" not in sys.modules


def test_four_ways_lead_to_one_class(site, registry):
    site.install("my-dist", entry_points={"losses": {"mine": "my_pkg:Loss"}}, modules={"my_pkg": LOSS})
    cls = registry.resolve("losses", "mine").load()
    assert registry.resolve("losses", "My_Dist:mine").load() is cls
    assert registry.resolve("losses", "my_pkg:Loss").load() is cls
    by_object = registry.resolve("losses", cls)
    assert by_object.load() is cls
    assert by_object.qualified_name == "my-dist:mine"  # told from the installed entry of the same path
    assert registry.resolve("losses", by_object) is by_object


def test_two_distributions_one_name(site, registry):
    site.install("zeta", "2.1", entry_points={"losses": {"x": "zeta_pkg:Loss"}}, modules={"zeta_pkg": LOSS})
    site.install("alpha", "1.5", entry_points={"losses": {"x": "alpha_pkg:Loss"}}, modules={"alpha_pkg": LOSS})
    with pytest.raises(PluginConflict) as error:
        registry.resolve("losses", "x")
    message = str(error.value)
    assert message.index("alpha:x") < message.index("zeta:x")  # deterministic order
    for word in ("alpha 1.5", "zeta 2.1", "plugins: {x: 'alpha:x'}"):
        assert word in message
    assert registry.resolve("losses", "zeta:x").distribution == "zeta"
    assert registry.resolve("losses", "x", plugins={"x": "zeta:x"}).distribution == "zeta"
    registry.prefer({"losses.x": "alpha:x"})
    assert registry.resolve("losses", "x").distribution == "alpha"


def test_one_preference_line_serves_the_kinds_that_have_it(site, registry):
    points = {"losses": {"x": "a_pkg:Loss"}, "rewards": {"x": "a_pkg:reward"}}
    site.install("a", entry_points=points, modules={"a_pkg": LOSS + "\ndef reward(response):\n    return 0.0\n"})
    site.install("b", entry_points={"losses": {"x": "a_pkg:Loss"}})
    assert registry.resolve("rewards", "x", plugins={"x": "b:x"}).distribution == "a"
    assert registry.resolve("losses", "x", plugins={"x": "b:x"}).distribution == "b"
    with pytest.raises(PluginNotFound, match="leads nowhere"):
        registry.resolve("losses", "x", plugins={"x": "c:x"})
    with pytest.raises(PluginError, match="not a full name"):
        registry.prefer({"x": "b"})


def test_the_first_of_two_installations_of_one_distribution_counts(site, registry, tmp_path, monkeypatch):
    site.install("twice", "1.0", entry_points={"losses": {"x": "old:Loss"}})
    nearer = tmp_path / "nearer"
    nearer.mkdir()
    monkeypatch.syspath_prepend(str(nearer))
    PluginSite(nearer).install("Twice", "2.0", entry_points={"losses": {"x": "new:Loss"}})
    assert registry.resolve("losses", "x").version == "2.0"


def test_unknown_names_say_what_to_do(site, registry):
    site.install("a", entry_points={"losses": {"clipped_thing": "a_pkg:Loss"}})
    site.install("b", entry_points={"environments": {"solo": "b:E", **{f"many/{i}": "b:E" for i in range(5)}}})
    with pytest.raises(PluginNotFound, match=r"Did you mean 'clipped_thing'\?"):
        registry.resolve("losses", "cliped_thing")
    with pytest.raises(PluginNotFound, match=r"Installed: .*clipped_thing.*usually named nemo-rl-<name>"):
        registry.resolve("losses", "qqq")
    with pytest.raises(PluginNotFound, match=r"many/\.\.\. \(5, such as many/0\),.* solo\. Install"):
        registry.resolve("environments", "qqq")
    with pytest.raises(PluginError, match="Did you mean 'losses'"):
        registry.resolve("loses", "x")
    with pytest.raises(PluginNotFound, match="neither an installed plugin distribution nor a module"):
        registry.resolve("losses", "no_such:x")
    with pytest.raises(PluginNotFound, match=r"a 1\.0 provides no loss named 'other'. It provides: clipped_thing"):
        registry.resolve("losses", "a:other")


def test_a_known_but_missing_package_is_named(site):
    lonely = Registry(allow=[])
    lonely.index.disabled.clear()  # as if nothing were installed
    with pytest.raises(PluginNotFound, match="`grpo` is provided by nemo-rl-grpo, which is not installed: pip install"):
        lonely.resolve("algorithms", "grpo")


def test_a_newer_core_is_asked_for(site, registry):
    needs = ("nemo-rl-core>=99", 'nemo_rl_core>=98; extra == "x"')
    site.install("new", entry_points={"losses": {"new": "m:L"}}, requires=needs, modules={"m": "raise SystemExit"})
    ref = next(r for r in registry.entries("losses") if r.name == "new")
    with pytest.raises(PluginIncompatible, match=r"requires nemo-rl-core>=99, and nemo-rl-core \S+ is installed"):
        registry.resolve("losses", "new")
    assert ref.state == "broken"
    assert "m" not in sys.modules


def test_requirements_that_do_not_apply_do_not_count(site, registry):
    needs = ('nemo-rl-core>=99; python_version < "3"', "nemo-rl-core>=0.0.1", "nemo-rl-core-tools>=99")
    site.install("ok", entry_points={"losses": {"ok": "m:L"}}, requires=needs)
    assert registry.resolve("losses", "ok").state == "compatible"


@pytest.mark.parametrize("core", ["0.1.0", "0.2", "1.0.0", "0.2.0rc1"])
@pytest.mark.parametrize(
    "specifier", [">=0.1", ">=0.1,<0.2", "<0.2.0", ">= 1, <1.0.1", "(>=0.2)", "~=0.1.0", "!=0.2", ""]
)
def test_the_core_requirement_is_judged_as_packaging_judges_it(site, monkeypatch, specifier, core):
    from packaging.specifiers import SpecifierSet

    from nemo_rl_core.registry.discovery import _compatibility

    monkeypatch.setattr(_compatibility, "CORE_VERSION", core)
    site.install("d", core, entry_points={"losses": {"x": "m:L"}}, requires=[f"nemo-rl-core{specifier}"])
    expected = SpecifierSet(specifier.strip("()")).contains(core, prereleases=True)
    ref = next(r for r in Registry().entries("losses") if r.name == "x")
    try:
        ref.check()
        fits = True
    except PluginIncompatible:
        fits = False
    assert fits == expected


@pytest.mark.parametrize(
    ("declared", "message"),
    [("v2", "API version 2 .* upgrade the core"), ("0", "upgrade the plugin"), ("two", "declares API version 'two'")],
)
def test_another_api_version(site, registry, declared, message):
    site.install("other", entry_points={"losses": {"x": "m:L"}, "api": {"losses": declared}})
    with pytest.raises(PluginIncompatible, match=message):
        registry.resolve("losses", "x")


def test_api_version_is_by_kind(site, registry):
    points = {"losses": {"x": "m:L"}, "rewards": {"x": "m:r"}, "api": {"losses": "v1", "rewards": "v7"}}
    site.install("other", entry_points=points)
    assert registry.resolve("losses", "x").api_version == KINDS["losses"].api_version == 1
    with pytest.raises(PluginIncompatible):
        registry.resolve("rewards", "x")


def test_import_error_keeps_its_traceback(site, registry):
    site.install(
        "bad", "0.3", entry_points={"losses": {"bad": "bad_pkg:L"}}, modules={"bad_pkg": "import no_such_dep\n"}
    )
    ref = registry.resolve("losses", "bad")
    with pytest.raises(PluginBroken, match=r"of bad 0\.3 \(bad_pkg:L\).*No module named 'no_such_dep'") as error:
        ref.load()
    assert "NEMO_RL_DISABLE_PLUGINS=bad" in str(error.value)
    assert isinstance(error.value.__cause__, ModuleNotFoundError)
    assert ref.state == "broken"
    assert "bad_pkg.py" in ref.traceback
    with pytest.raises(PluginBroken):
        ref.load()


def test_a_plugin_that_exits_on_import_is_broken(site, registry):
    site.install("bye", entry_points={"losses": {"bye": "bye_pkg:L"}}, modules={"bye_pkg": "raise SystemExit(0)"})
    with pytest.raises(PluginBroken, match="SystemExit"):
        registry.resolve("losses", "bye").load()


def test_missing_attribute_lists_what_is_there(site, registry):
    site.install("bad", entry_points={"losses": {"bad": "bad_pkg:Lss"}}, modules={"bad_pkg": LOSS})
    with pytest.raises(PluginBroken, match="has no attribute 'Lss'; it has Loss"):
        registry.resolve("losses", "bad").load()


def test_refresh_lets_a_repaired_plugin_load(site, registry):
    site.install("bad", entry_points={"losses": {"bad": "bad_pkg:Loss"}}, modules={"bad_pkg": "import no_such_dep"})
    with pytest.raises(PluginBroken):
        registry.resolve("losses", "bad").load()
    site.module("bad_pkg", LOSS)
    registry.refresh()
    assert registry.resolve("losses", "bad").load().__name__ == "Loss"


def test_print_on_import_does_not_reach_stdout(site, registry, capsys):
    site.install(
        "chat", entry_points={"losses": {"chat": "chat_pkg:Loss"}}, modules={"chat_pkg": "print('hello')" + LOSS}
    )
    registry.resolve("losses", "chat").load()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hello" in captured.err


MALFORMED = """
[console_scripts]
thing = somewhere:main
[nemo_rl.losses]
no equals sign
module_only = pkg
not python = pkg:L
dashes = pkg-name:L
good = good_pkg:Loss
good = other_pkg:Loss
[nemo_rl.losess]
typo = pkg:L
[nemo_rl.hooks]
bad hook = pkg
"""


def test_malformed_entry_points(site, registry, caplog):
    site.install("mal", entry_points=MALFORMED, modules={"good_pkg": LOSS, "other_pkg": LOSS})
    problems = "\n".join(str(p) for _, p in registry.problems())
    for word in ("'no equals sign'", "'module_only = pkg'", "'not python = pkg:L'", "'dashes = pkg-name:L'",
                 "stands twice", "did you mean [nemo_rl.losses]?"):  # fmt: skip
        assert word in problems
    with pytest.raises(PluginBroken, match="must be `module:attr`"):
        registry.resolve("losses", "mal:module_only")
    assert registry.resolve("losses", "nll").distribution == "nemo-rl-sft"  # the others are not hurt
    registry.check()
    assert "mal 1.0" in caplog.text
    assert "NEMO_RL_DISABLE_PLUGINS=mal hides it" in caplog.text


def test_strict_refuses_what_is_not_even_used(site, monkeypatch):
    site.install("mal", entry_points={"losses": {"x": "not a path"}})
    with pytest.raises(PluginBroken, match=r"strict mode.*\n- .*mal 1\.0"):
        Registry(strict=True).resolve("losses", "nll")
    monkeypatch.setenv("NEMO_RL_STRICT_PLUGINS", "1")
    with pytest.raises(PluginBroken):
        Registry().resolve("losses", "nll")


def test_allow_and_deny_lists(site, monkeypatch):
    site.install("one", entry_points={"losses": {"one": "m:L"}})
    site.install("two", entry_points={"losses": {"two": "m:L"}})
    assert Registry(allow=["One"]).names("losses") == ["one"]
    assert "one" not in Registry(deny=["one"]).names("losses")
    monkeypatch.setenv("NEMO_RL_PLUGINS", "two")
    assert Registry().names("losses") == ["two"]
    monkeypatch.setenv("NEMO_RL_PLUGINS", "")
    assert Registry().names("losses") == []
    assert Registry().names("launchers") == ["local"]  # the core's own always stay
    monkeypatch.delenv("NEMO_RL_PLUGINS")
    monkeypatch.setenv("NEMO_RL_DISABLE_PLUGINS", "two, other")
    assert {"one"} <= set(Registry().names("losses")) and "two" not in Registry().names("losses")
    with pytest.raises(PluginNotFound, match=r"provided by two 1\.0, which is disabled.*NEMO_RL_DISABLE_PLUGINS"):
        Registry().resolve("losses", "two")


NOT_A_LOSS = "class L:\n    def forward(self): ...\n"
INHERITS_STUBS = """
from nemo_rl_core.protocols.logger import Logger

class L(Logger):
    config_class = dict

    def start(self, run_name, run_dir, config):
        pass
"""


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("losses", NOT_A_LOSS, "L is not a loss: it lacks __call__"),
        ("losses", "L = 3", "3 of type int, not a class or a function"),
        ("losses", "import json as L", "it is the module json"),
        ("loggers", INHERITS_STUBS, "it lacks log, finish"),
        ("loggers", "class L:\n  def start(s): 0\n  def log(s): 0\n  def finish(s): 0", "it lacks config_class"),
        ("rewards", "L = 'text'", "not a class or a function"),
        ("rewards", "class L:\n  def score(self, response): 0", "L is not a reward: it lacks __call__"),
    ],
)
def test_not_what_the_kind_requires(site, registry, kind, source, message):
    site.install("wrong", entry_points={kind: {"wrong": "wrong_pkg:L"}}, modules={"wrong_pkg": source})
    with pytest.raises(PluginBroken, match=message):
        registry.resolve(kind, "wrong").load()


def test_defaults_of_a_protocol_are_inherited(registry):
    from nemo_rl_core.protocols.environment import Environment, SingleTurnEnvironment

    class Mine(Environment):
        config_class = dict

        def reset(self, task, seed):
            return []

        def step(self, message):
            return None

    assert registry.resolve("environments", Mine).load() is Mine  # close() has a body: a default
    assert registry.resolve("environments", SingleTurnEnvironment).load() is SingleTurnEnvironment


def test_an_object_that_has_the_members_serves(registry):
    class Loss:
        def __call__(self, outputs, batch):
            return None

    made = Loss()
    assert registry.resolve("losses", made).load() is made
    with pytest.raises(PluginBroken, match="of type object"):
        registry.resolve("losses", object()).load()


def test_no_default_one_default_many(site, registry):
    assert registry.default("sandboxes") is None
    with pytest.raises(PluginNotFound, match="No sandbox is installed"):
        registry.resolve("sandboxes")
    site.install("s", entry_points={"sandboxes": {"box": "m:S"}})
    registry.refresh()
    assert registry.default("sandboxes") == "box"
    assert registry.resolve("sandboxes", None).name == "box"
    site.install("t", entry_points={"sandboxes": {"crate": "m:S"}})
    registry.refresh()
    with pytest.raises(PluginConflict, match="several are installed: box, crate"):
        registry.default("sandboxes")
    site.install("d", entry_points={"hooks": {"d": "d_pkg"}}, modules={
        "d_pkg": "def nemo_rl_defaults():\n"
        "    return {'sandboxes': 'crate', 'exporters': 'absent', 'sandboxes.far': 'box'}"})  # fmt: skip
    registry.refresh()
    assert registry.default("sandboxes") == "crate"
    assert registry.default("sandboxes", "near", "far") == registry.default("sandboxes", "far") == "box"
    assert registry.default("exporters") is None  # declared, but not installed
    site.install("e", entry_points={"hooks": {"e": "e_pkg"}}, modules={
        "e_pkg": "def nemo_rl_defaults():\n    return {'sandboxes': 'box'}"})  # fmt: skip
    registry.refresh()
    with pytest.raises(PluginConflict, match=r"declared twice.*plugin d 1\.0"):
        registry.default("sandboxes")


def test_provision_hooks_are_asked_only_for_names_that_metadata_lacks(site, registry):
    hooks = """
    from json import JSONDecoder

    def nemo_rl_rewards():
        return {"late": "late_pkg:reward", "direct": direct}

    def direct(response):
        return 1.0
    """
    site.install("prov", "3.0", entry_points={"hooks": {"p": "prov_pkg"}, "rewards": {"early": "late_pkg:reward"}},
                 modules={"prov_pkg": hooks, "late_pkg": "def reward(response):\n    return 0.5"})  # fmt: skip
    registry.resolve("rewards", "early")
    assert "prov_pkg" not in sys.modules
    assert "late" not in registry.names("rewards")
    ref = registry.resolve("rewards", "late")
    assert "prov_pkg" in sys.modules and "late_pkg" not in sys.modules
    assert (ref.distribution, ref.version, ref.origin) == ("prov", "3.0", "hook")
    assert ref.load()("x") == 0.5
    assert registry.resolve("rewards", "prov:direct").load()("x") == 1.0
    assert {"direct", "early", "late"} <= set(registry.names("rewards", full=True))
    assert pickle.loads(pickle.dumps(ref)).load()("x") == 0.5


def test_a_decorator_may_not_shadow_silently(site, registry):
    site.install("inst", entry_points={"losses": {"x": "inst_pkg:Loss"}}, modules={"inst_pkg": LOSS})

    @register_loss("x")
    def mine(outputs, batch):
        return None

    with pytest.raises(PluginConflict, match=r"inst:x(.|\n)*override=True"):
        registry.resolve("losses", "x")
    assert registry.resolve("losses", "x", plugins={"x": f"{__name__}:x"}).load() is mine
    assert registry.resolve("losses", "x", plugins={"x": "inst:x"}).distribution == "inst"

    register_loss("x", override=True)(mine)
    assert registry.resolve("losses", "x").load() is mine


def test_decorators_with_and_without_a_name(registry):
    @register_loss
    def plain(outputs, batch):
        return None

    @register_loss()
    def called(outputs, batch):
        return None

    assert registry.resolve("losses", "plain").load() is plain
    assert registry.resolve("losses", "called").load() is called
    assert registry.resolve("losses", plain).origin == "decorator"
    with pytest.raises(PluginError, match="without a colon"):
        register_loss("a:b")(plain)

    def other():
        return None

    with pytest.raises(PluginConflict, match="already registered"):
        register_loss("plain")(other)
    register_loss("plain")(plain)  # the same again, as when a notebook cell is run twice
    registry.unregister("losses", "plain")
    register_loss("plain")(other)
    assert registry.resolve("losses", "plain").load() is other


def test_references_compare_by_what_they_name():
    a, b = (ComponentRef(kind="losses", name="x", value="m:L", distribution="d", version="1") for _ in range(2))
    assert a == b and len({a, b}) == 1
    assert a != ComponentRef(kind="losses", name="x", value="m:L", distribution="d", version="2")


def test_the_index_agrees_with_importlib(site, registry):
    """Our reading of the metadata finds what the standard library finds."""
    from importlib.metadata import entry_points

    site.install("std", entry_points={"losses": {"x": "m:L", "y": "m.sub:A.b"}, "rewards": {"r": "m:r"}})
    for kind in KINDS:
        ours = {(r.name, r.value, r.version) for r in registry.entries(kind)}
        theirs = {(e.name, e.value, e.dist.version) for e in entry_points(group=f"nemo_rl.{kind}")}
        assert ours == theirs


def test_an_egg_info_folder_and_an_archive_are_found(site, registry, tmp_path, monkeypatch):
    import zipfile

    info = site.path / "old_style.egg-info"
    info.mkdir()
    (info / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: Old.Style\nVersion: 4.2\n")
    (info / "entry_points.txt").write_text("[nemo_rl.losses]\nold = m:L\n")
    (info / "requires.txt").write_text("nemo-rl-core>=99\n[extra]\nfoo\n")
    with pytest.raises(PluginIncompatible, match=r"old-style 4\.2"):
        registry.resolve("losses", "old")
    archive = tmp_path / "zipped.zip"
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("zipped-1.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: zipped\nVersion: 1.1\n")
        z.writestr("zipped-1.1.dist-info/entry_points.txt", "[nemo_rl.losses]\nz = zipped_pkg:Loss\n")
        z.writestr("zipped_pkg.py", LOSS)
    monkeypatch.syspath_prepend(str(archive))
    registry.refresh()
    assert registry.resolve("losses", "z").load().__name__ == "Loss"
    assert "old" in {r.name for r in registry.entries("losses")}
