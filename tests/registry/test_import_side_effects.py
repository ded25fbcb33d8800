"""What the import of a plugin changes for everyone is named once, and put back where that is safe."""

from __future__ import annotations

import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings

import numpy
import pytest
import torch

from nemo_rl_core.registry import Registry

STATE = {
    "the working folder": ("import os\nos.chdir('/')", os.getcwd),
    "the umask": ("import os\nos.umask(0)", lambda: os.umask(os.umask(0o022))),
    "the recursion limit": ("import sys\nsys.setrecursionlimit(5000)", sys.getrecursionlimit),
    "signal handlers SIGTERM": (
        "import signal\nsignal.signal(signal.SIGTERM, lambda *_: None)",
        lambda: signal.getsignal(signal.SIGTERM),
    ),
    "the root logger": (
        "import logging\nlogging.root.addHandler(logging.NullHandler())\nlogging.disable(50)",
        lambda: (list(logging.root.handlers), logging.root.manager.disable),
    ),
    "a filter for all warnings": ("import warnings\nwarnings.simplefilter('ignore')", lambda: list(warnings.filters)),
    "the locale": (
        "import locale\nlocale.setlocale(locale.LC_NUMERIC, 'C.UTF-8')",
        lambda: locale.setlocale(locale.LC_ALL),
    ),
    "the random state": ("import random\nrandom.seed(90417)", random.getstate),
    "the random state of numpy": (
        "import numpy\nnumpy.random.seed(90417)",
        lambda: list(numpy.random.get_state()[1]),
    ),
    "the random state of torch": ("import torch\ntorch.manual_seed(90417)", lambda: torch.get_rng_state().tolist()),
    "torch's default dtype": ("import torch\ntorch.set_default_dtype(torch.float64)", torch.get_default_dtype),
    "torch's number of threads": ("import torch\ntorch.set_num_threads(3)", torch.get_num_threads),
    "torch's grad mode": ("import torch\ntorch.set_grad_enabled(False)", torch.is_grad_enabled),
    "torch's deterministic mode": (
        "import torch\ntorch.use_deterministic_algorithms(True)",
        torch.are_deterministic_algorithms_enabled,
    ),
}


@pytest.fixture
def load(site, caplog):
    """`load(source)` imports a plugin of that source and returns the warnings."""
    number = iter(range(100))

    def load(source: str, name: str = "") -> list[str]:
        name = f"{name or 'fx'}_{os.getpid()}_{next(number)}"
        site.install(
            f"{name}-dist",
            entry_points={"rewards": {name: f"{name}:r"}},
            modules={name: f"{source}\ndef r(response):\n    return 1.0\n"},
        )
        Registry(allow=[f"{name}-dist"]).resolve("rewards", name).load()
        return [record.getMessage() for record in caplog.records if "shares" in record.getMessage()]

    return load


@pytest.mark.parametrize("what", STATE)
def test_it_is_put_back_and_named(load, what):
    source, read = STATE[what]
    torch.set_num_threads(1)
    before = read()
    (told,) = load(source)
    assert read() == before
    assert f"{what} (put back)" in told, told


def test_what_libraries_rely_on_is_named_only(load, monkeypatch):
    monkeypatch.delenv("FX_VARIABLE", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (told,) = load("import os, sys\nos.environ['FX_VARIABLE'] = '1'\nsys.path.append('/fx')")
    assert "environment variables FX_VARIABLE (left as it is); sys.path /fx (left as it is)" in told
    assert os.environ.pop("FX_VARIABLE") == "1" and "/fx" in sys.path


def test_a_variable_of_a_library_is_no_news_though_it_was_set_before_the_library_came(load, tmp_path, monkeypatch):
    (tmp_path / "fxlibrary").mkdir()
    (tmp_path / "fxlibrary" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FXLIBRARY_CACHE", "/of/the/parent")
    assert load("import fxlibrary") == []
    monkeypatch.setenv("FXLIBRARY_CACHE", "/of/the/parent")
    assert load("import os\nos.environ['FXLIBRARY_CACHE'] = '/other'") == []


def test_a_thread_is_named(load):
    source = "import threading\nstop = threading.Event()\nthreading.Thread(target=stop.wait, name='fx-thread').start()"
    (told,) = load(source, "fxthread")
    assert "a thread that runs on (fx-thread)" in told
    for name, module in list(sys.modules.items()):
        if name.startswith("fxthread_"):
            module.stop.set()
    assert [t.join(5) for t in threading.enumerate() if t.name == "fx-thread"] in ([], [None])


def test_it_is_put_back_after_a_failure_too(load):
    before = os.getcwd()
    with pytest.raises(ImportError):
        load("import os\nos.chdir('/')\nraise ValueError")
    assert os.getcwd() == before


def test_a_plain_import_is_no_news(load):
    assert load("import logging\nlog = logging.getLogger('x')") == []
