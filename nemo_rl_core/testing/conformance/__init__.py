"""Conformance kits: for each kind of component, a class of tests with one test for each clause of its contract."""

from __future__ import annotations

import importlib.util

from nemo_rl_core.errors import MissingExtra

__all__: list[str] = []

if importlib.util.find_spec("pytest") is None:
    raise MissingExtra(
        "Conformance kits are pytest tests, and pytest is not installed: pip install 'nemo-rl-core[testing]'"
    )
