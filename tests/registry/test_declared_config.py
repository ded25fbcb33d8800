"""The options class of a component is found in its source, and validating a configuration imports no torch."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nemo_rl_core.registry import KINDS, get_registry
from nemo_rl_core.registry.discovery._declared import declared_config_class

CONFIG = "import attrs\n@attrs.frozen(kw_only=True)\nclass Options:\n    size: int = 1\n"
_NUMBER = itertools.count()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`package(**modules)` writes a package and returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def package(**modules: str) -> str:
        name = f"fxdeclared{next(_NUMBER)}"
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        for module, source in modules.items():
            (tmp_path / name / f"{module}.py").write_text(textwrap.dedent(source).replace("PKG", name))
        return name

    return package


@pytest.mark.parametrize(
    "source",
    {
        "in the class": "from PKG.config import Options\nclass C:\n    config_class = Options",
        "with an annotation": "from PKG.config import Options\nclass C:\n    config_class: type = Options",
        "by another name": "from PKG.config import Options as O\nclass C:\n    config_class = O",
        "relative": "from .config import Options\nclass C:\n    config_class = Options",
        "in a base": "from .config import Options\nclass B:\n    config_class = Options\nclass C(B): ...",
        "in a base of another module": "from PKG.base import B\nclass C(B): ...",
        "in a generic base": "from PKG.base import B\nclass C(B[int]): ...",
        "exported by another module": "from PKG.base import B as C",
    }.items(),
    ids=lambda item: item[0],
)
def test_it_is_found_though_the_module_cannot_be_imported(package, source):
    base = "import no_such_library\nfrom PKG.config import Options\nclass B:\n    config_class = Options"
    name = package(config=CONFIG, base=base, plugin="import no_such_library\n" + source[1])
    assert declared_config_class(f"{name}.plugin:C") == f"{name}.config:Options"
    ref = get_registry().resolve("losses", f"{name}.plugin:C")
    assert ref.config_class().__name__ == "Options"
    assert ref.state != "loaded" and f"{name}.plugin" not in sys.modules


@pytest.mark.parametrize(
    "source",
    {
        "a class of the same module": CONFIG + "class C:\n    config_class = Options",
        "an expression": "import PKG.config as c\nclass C:\n    config_class = c.Options",
        "a base that is computed": (
            "from PKG.config import Options\nB = [type('B', (), {'config_class': Options})]\nclass C(B[0]): ..."
        ),
        "a metaclass": (
            "from PKG.config import Options\nclass M(type):\n    config_class = Options\nclass C(metaclass=M): ..."
        ),
        "an instance": "from PKG.config import Options\nclass B:\n    config_class = Options\nC = B",
    }.items(),
    ids=lambda item: item[0],
)
def test_what_the_source_does_not_tell_is_asked_of_the_class(package, source):
    body = source[1] + "\n"
    name = package(config=CONFIG, plugin=body)
    assert declared_config_class(f"{name}.plugin:C") is None


@pytest.mark.parametrize(
    ("home", "source", "where"),
    [
        ("__init__", "from .config import Options", "config"),
        ("inner/__init__", "from .config import Options", "inner.config"),
        ("inner/plugin", "from ..config import Options", "config"),
        ("inner/plugin", "from .config import Options", "inner.config"),
    ],
)
def test_a_relative_import_is_followed_from_where_it_stands(package, home, source, where):
    name = package()
    (folder := site_of(name) / "inner").mkdir()
    for place in (folder.parent, folder):
        (place / "config.py").write_text(CONFIG)
    (folder / "__init__.py").write_text("")
    (folder.parent / f"{home}.py").write_text(
        f"import no_such_library\n{source}\nclass C:\n    config_class = Options\n"
    )
    module = f"{name}/{home}".removesuffix("/__init__").replace("/", ".")
    assert declared_config_class(f"{module}:C") == f"{name}.{where}:Options"


def site_of(package: str) -> Path:
    return Path(next(p for p in sys.path if (Path(p) / package).is_dir())) / package


def test_bases_in_a_circle_end(package):
    name = package(a="from PKG.b import B\nclass A(B): ...", b="from PKG.a import A\nclass B(A): ...")
    assert declared_config_class(f"{name}.a:A") is None


def test_a_declaration_that_leads_nowhere_is_told_by_the_class_itself(package):
    name = package(config="", plugin="from PKG.config import Options\nclass C:\n    config_class = Options")
    with pytest.raises(ImportError, match="cannot import name 'Options'"):
        get_registry().resolve("losses", f"{name}.plugin:C").config_class()


def test_both_ways_agree_for_everything_that_is_installed():
    told = 0
    for kind in KINDS:
        for ref in get_registry().entries(kind):
            declared = declared_config_class(ref.value) if ref.value and ref.state != "broken" else None
            if declared is None:
                continue
            told += 1
            loaded = ref.load().config_class
            assert declared.rpartition(":")[2] == loaded.__name__, ref.qualified_name
            assert ref.config_class() is loaded
    assert told >= 30


def test_validating_a_configuration_imports_no_torch(tmp_path):
    wanted = {
        "grpo": {"environment": "math", "data": {"train": {"source": "rows.jsonl"}}},
        "sft": {"policy": {"backend": "megatron", "num_workers": 2, "options": {"pipeline_parallel_size": 2}}},
        "dpo": {"cluster": {"launcher": "ray"}},
    }
    files = []
    for algorithm, rest in wanted.items():
        files.append(tmp_path / f"{algorithm}.json")
        files[-1].write_text(json.dumps({"algorithm": algorithm, "model": "scratch:qwen2-1m", "max_steps": 2, **rest}))
    script = (
        "import sys\nfrom nemo_rl_core.cli import main\n"
        "for file in sys.argv[1:]:\n"
        "    sys.argv = ['nemo-rl', 'config', 'validate', file]\n"
        "    try:\n        main()\n"
        "    except SystemExit as end:\n        assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'ray', 'vllm', 'datasets', 'megatron'} & set(sys.modules)\n"
        "assert not heavy, heavy\nprint('light')"
    )
    done = subprocess.run([sys.executable, "-c", script, *map(str, files)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is valid") == len(files) and done.stdout.endswith("light\n")
