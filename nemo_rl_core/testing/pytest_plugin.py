"""Pytest plugin: fixtures for a plugin's tests, and clear messages for kits used wrongly.

Loaded at every start of pytest in an environment that has the core, so it imports nothing but pytest; torch and
everything else wait for the fixture that needs them. `-p no:nemo_rl` leaves it out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nemo_rl_core.models.tokenizer import Tokenizer
    from nemo_rl_core.registry import Registry
    from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool
    from nemo_rl_core.testing.site import PluginSite

__all__ = [
    "is_fixture",
    "plugin_registry",
    "plugin_site",
    "process_pool",
    "pytest_pycollect_makeitem",
    "scratch_tokenizer",
]

_KITS = "nemo_rl_core.testing.conformance"
_SETTINGS = ("NEMO_RL_PLUGINS", "NEMO_RL_DISABLE_PLUGINS", "NEMO_RL_STRICT_PLUGINS")

if _KITS not in sys.modules:  # pytest cannot rewrite what is imported already, and would warn
    pytest.register_assert_rewrite(_KITS)


@pytest.fixture
def plugin_registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of the test's own, which `get_registry()` returns during the test.

    What decorators register in the test is forgotten after it; the user's settings of plugins have no influence.
    """
    from nemo_rl_core.registry import Registry, _registry

    for name in _SETTINGS:
        monkeypatch.delenv(name, raising=False)
    own = Registry()
    monkeypatch.setattr(_registry, "_registry", own)
    return own


@pytest.fixture
def plugin_site(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, plugin_registry: Registry
) -> Iterator[PluginSite]:
    """An empty `PluginSite`, first on `sys.path`, with a registry of its own that sees what is installed there.

    Modules imported from it are forgotten after the test.
    """
    from nemo_rl_core.testing.site import PluginSite

    folder = tmp_path_factory.mktemp("site")
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield PluginSite(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture(scope="session")
def scratch_tokenizer() -> Tokenizer:
    """The tokenizer of the smallest built-in model, one token per character; needs neither network nor files."""
    from nemo_rl_core.models import load_tokenizer

    return load_tokenizer("scratch:qwen2-tiny")


@pytest.fixture(scope="session")
def process_pool() -> Iterator[ProcessPool]:
    """A process pool of two workers, as rewards and environments have it in a run."""
    from nemo_rl_core.rollouts.scoring.process_pool import ProcessPool

    pool = ProcessPool(2, default_timeout_s=20.0)
    yield pool
    pool.shutdown()


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    """Refuse a subclass of a contract that pytest would pass over, or whose clauses could not run."""
    kit = sys.modules.get(f"{_KITS}.frame.kit")  # nobody can have subclassed a contract that is not imported
    if kit is None or not (isinstance(obj, type) and issubclass(obj, kit.Contract) and collector.classnamefilter(name)):
        return
    mistake = _mistake(obj, kit.Contract)
    if mistake is not None:
        raise collector.CollectError(f"{collector.name}: class {name}: {mistake}")


def _mistake(tested: type, contract: type) -> str | None:
    """Say in words what keeps the clauses of `tested` from running; None if nothing does."""
    subject: str | None = getattr(tested, "subject", None)
    if subject is None:
        return "it is a subclass of Contract itself. Subclass the contract of a kind, such as LossContract."
    if any("__init__" in vars(base) for base in tested.__mro__[:-1]):
        return (
            f"it has an __init__, so pytest would leave it out without a test. Make the component in the fixture "
            f"`{subject}` and set options as class attributes."
        )
    found = getattr(tested, subject, None)
    if found is not None and not is_fixture(found):
        what = "a method" if callable(found) else f"a {type(found).__name__}"
        return f"`{subject}` is {what}, not a fixture. Write @pytest.fixture above def {subject}(self): return ..."
    own = {name for base in tested.__mro__ if base.__module__.startswith(_KITS) for name in vars(base)}
    hidden = [name for name in own if name.startswith("test_") and getattr(tested, name) is None]
    if hidden:
        return (
            f"it takes away {', '.join(sorted(hidden))}. A contract has all its clauses: declare what differs by its "
            "attributes, or mark the clause with pytest.mark.xfail and a reason."
        )
    return None


def is_fixture(value: object) -> bool:
    """Return whether `@pytest.fixture` made `value`: a marked function before pytest 8.4, an object since then."""
    return hasattr(value, "_pytestfixturefunction") or type(value).__name__ == "FixtureFunctionDefinition"
