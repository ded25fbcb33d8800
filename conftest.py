"""Packages at the top level are in folders of the same names, which pytest would take for the packages."""

from __future__ import annotations

import importlib
from contextlib import suppress
from pathlib import Path

for _file in Path(__file__).parent.glob("nemo_rl_plugins_*/pyproject.toml"):
    with suppress(ModuleNotFoundError):
        importlib.import_module(_file.parent.name)
